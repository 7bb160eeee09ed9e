"""AVION's dual encoders (Zhao and Krähenbühl, arXiv 2309.16669) as open_clip models: names, shapes and arithmetic.

A checkpoint of theirs is a CLIP model of other names. The image tower reads all frames of a clip at once and may have
a temporal table; it may be written for flash attention (fused `Wqkv`, `fc1`, `fc2`) and with the patch embedding as a
matrix. Names are given without the prefix `module.` of distributed training. Facts are from the public code,
github.com/zhaoyue-zephyrus/AVION, avion/models and scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TEMPORAL_TABLE = "visual.temporal_embedding"

# Of 255, as they were trained; the red mean is not CLIP's (122.77).
AVION_PREPROCESS = {
    "mean": [value / 255 for value in (108.3272985, 116.7460125, 104.0937362)],
    "std": [value / 255 for value in (68.5005327, 66.6321579, 70.3231631)],
}

# What no tensor of the file shows, whatever the backbone's own configuration says.
_ARITHMETIC: dict[str, Any] = {"quick_gelu": False}
_VISION_ARITHMETIC = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": None, "pool_type": "tok"}
_TEXT_ARITHMETIC = {"norm_kwargs": {"eps": 1e-5}, "act_kwargs": None, "pool_type": "argmax"}

_PROJECTIONS = {
    "visual.proj": ("visual.image_projection", "image_projection"),
    "text_projection": ("textual.text_projection", "text_projection"),
}
_FLASH_NAMES = {
    ".attn.in_proj_": ".attn.Wqkv.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def is_avion(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a dual encoder in AVION's naming."""
    return any(name.startswith("textual.") for name in state)


def avion_config(model_cfg: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The backbone's configuration with AVION's arithmetic, and embedding size and context length of the file.

    Raises:
        ValueError: tensors that should tell these sizes are missing or are no matrices; the message names one.
    """
    text_cfg = {**model_cfg["text_cfg"], **_TEXT_ARITHMETIC}
    text_cfg["context_length"] = _matrix(state, "positional_embedding").shape[0]
    return {
        **model_cfg,
        **_ARITHMETIC,
        "embed_dim": _matrix(state, "visual.proj").shape[1],
        "vision_cfg": {**model_cfg["vision_cfg"], **_VISION_ARITHMETIC},
        "text_cfg": text_cfg,
    }


def to_open_clip(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under open_clip's names, without the temporal table.

    Args:
        state: the checkpoint's tensors.
        expected: state dict of the open_clip model they are for.
    Raises:
        ValueError: the first tensor that is missing, has another shape, or has no place in the model.
    """
    spelled: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for name, parameter in expected.items():
        spelled[name] = _spelling(state, name)
        tensor = state[spelled[name]]
        if name == "visual.conv1.weight" and tensor.shape == parameter.flatten(1).shape:
            tensor = tensor.reshape(parameter.shape)
        if tensor.shape != parameter.shape:
            raise _misfit(f"{spelled[name]} has shape {list(tensor.shape)}, expected {list(parameter.shape)}")
        weights[name] = tensor
    strange = [name for name in state if name not in {*spelled.values(), TEMPORAL_TABLE}]
    if strange:
        raise _misfit(f"{strange[0]} has no place in this model")
    return weights


def temporal_table(state: Mapping[str, Tensor], width: int) -> Tensor | None:
    """The temporal table [T, D], float32: row t is added to the patches of frame t. None where the file has none.

    Raises:
        ValueError: a table of another width.
    """
    table_TD = state.get(TEMPORAL_TABLE)
    if table_TD is None:
        return None
    if table_TD.ndim != 2 or table_TD.shape[1] != width:
        raise _misfit(f"{TEMPORAL_TABLE} has shape {list(table_TD.shape)}, expected [frames, {width}]")
    return table_TD.float()


def _matrix(state: Mapping[str, Tensor], name: str) -> Tensor:
    spelled = _spelling(state, name)
    if state[spelled].ndim != 2:
        raise _misfit(f"{spelled} has shape {list(state[spelled].shape)}, expected a matrix")
    return state[spelled]


def _spelling(state: Mapping[str, Tensor], name: str) -> str:
    """The checkpoint's name of a tensor, given open_clip's."""
    for spelled in _spellings(name):
        if spelled in state:
            return spelled
    raise _misfit(f"it has no {' or '.join(_spellings(name))}")


def _spellings(name: str) -> tuple[str, ...]:
    if name in _PROJECTIONS:
        return _PROJECTIONS[name]
    plain = name if name.startswith(("visual.", "logit_")) else f"textual.{name}"
    for own, flash in _FLASH_NAMES.items():
        if own in plain:
            return plain.replace(own, flash), plain
    return (plain,)


def _misfit(what: str) -> ValueError:
    return ValueError(f"{what}; choose the backbone it was trained with: ViT-B-16, ViT-L-14 or ViT-L-14-336")
