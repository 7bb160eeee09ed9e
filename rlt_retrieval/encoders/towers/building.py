"""Building open_clip models from their configuration, whole or as shapes alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import open_clip
import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from torch.overrides import TorchFunctionMode

from rlt_retrieval.encoders.towers import KNOWN_MODULES, adapt_tower, unsupported_tower
from rlt_retrieval.encoders.towers.weight_files import short_reason
from rlt_retrieval.errors import MissingDependencyError, ModelError

# The text tower of a model that is built for its image tower alone.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}

_INITIALISERS = {
    "kaiming_uniform_",
    "xavier_uniform_",
    "normal_",
    "uniform_",
    "trunc_normal_",
    "erfinv_",
    "clamp_",
}
_INITIALISERS |= {"mul_", "add_", "div_", "fill_", "zero_", "zeros_", "ones_"}


def build_clip(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None) -> nn.Module:
    """A randomly initialised open_clip model of a configuration; its class is the one open_clip would choose.

    Args:
        model_cfg: embed_dim, vision_cfg, text_cfg, …
        preprocess_cfg: what differs from open_clip's own defaults: mean, std, interpolation, resize_mode, fill_color.
    Raises:
        ModelError: a configuration that open_clip cannot build.
        MissingDependencyError: its text tower comes from transformers, which is not installed.
    """
    check_tables(model_cfg)
    text_cfg = model_cfg["text_cfg"]
    _check_text_tower(text_cfg)
    options = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    # Weights follow: no tower may download its own first.
    options["text_cfg"] = {**text_cfg, "hf_model_pretrained": False}
    options["vision_cfg"] = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    if "multimodal_cfg" in model_cfg:
        model_class = CoCa
    elif model_cfg.get("custom_text") or "hf_model_name" in text_cfg:
        model_class = CustomTextCLIP
    else:
        model_class = CLIP
    module = _built(model_class, options)
    cfg = {**vars(open_clip.transform.PreprocessCfg()), **(preprocess_cfg or {})}
    cfg["size"] = module.visual.image_size
    open_clip.model.set_model_preprocess_cfg(module, cfg)
    return module


def skeleton(model_cfg: Mapping[str, Any]) -> CLIP:
    """The model of a configuration on the meta device: shapes, and no memory for weights.

    A text tower from transformers is left out, and stands for nothing.

    Raises:
        ModelError: a configuration that open_clip cannot build.
    """
    options = {key: value for key, value in model_cfg.items() if key in ("embed_dim", "quick_gelu")}
    options["vision_cfg"] = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    options["text_cfg"] = NO_TEXT if "hf_model_name" in model_cfg["text_cfg"] else model_cfg["text_cfg"]
    with torch.device("meta"), _Uninitialised():
        return _built(CLIP, options)


class _Uninitialised(TorchFunctionMode):
    """Initialisers do nothing: on the meta device they are most of the work and change no shape."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        if getattr(function, "__name__", "") in _INITIALISERS:
            return args[0] if args else values["tensor"]
        return function(*args, **values)


def check_backbone(model_cfg: Mapping[str, Any]) -> None:
    """Refuse before any download what cannot be built or walked.

    Raises:
        ModelError: an image tower that cannot be walked, with the reason, or a configuration that cannot be built.
        MissingDependencyError: as `build_clip`.
    """
    check_tables(model_cfg)
    check_tower_module(model_cfg["vision_cfg"])
    adapt_tower(skeleton({**model_cfg, "text_cfg": NO_TEXT}).visual)
    _check_text_tower(model_cfg["text_cfg"])


def check_tower_module(vision_cfg: Mapping[str, Any]) -> None:
    """What `check_backbone` can tell without building anything.

    Raises:
        ModelError: a tower of a module that no adapter knows.
    """
    name = vision_cfg.get("timm_model_name")
    if not name and not isinstance(vision_cfg.get("layers", 12), int):
        raise unsupported_tower("ModifiedResNet", "open_clip.modified_resnet")
    if name and timm.is_model(name):
        module = timm.model_entrypoint(name).__module__
        if module not in KNOWN_MODULES:
            raise unsupported_tower(name, module)


def check_tables(model_cfg: Mapping[str, Any]) -> None:
    """
    Raises:
        ModelError: a configuration without one of the tables that describe the two towers.
    """
    for table in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(table), Mapping):
            raise ModelError(
                f"the backbone configuration cannot be built: it has no table {table}; see open_clip's "
                "model_configs for examples"
            )


def _check_text_tower(text_cfg: Mapping[str, Any]) -> None:
    if text_cfg.get("hf_model_name") and not has_transformers():
        raise needs_transformers(f"the text tower {text_cfg['hf_model_name']}")


def has_transformers() -> bool:
    """Whether the extra for text towers and tokenizers of Hugging Face is installed."""
    return importlib.util.find_spec("transformers") is not None


def needs_transformers(what: str) -> MissingDependencyError:
    """The error for a text tower or tokenizer without the extra that brings it."""
    return MissingDependencyError(
        f"{what} needs the packages transformers and sentencepiece: pip install 'rlt-retrieval[siglip]'"
    )


def _built(model_class: type[Any], options: Mapping[str, Any]) -> Any:
    try:
        return model_class(**options)
    except (TypeError, AssertionError, ValueError, ArithmeticError, RuntimeError, OSError) as error:
        raise ModelError(
            f"the backbone configuration cannot be built: {short_reason(error)}; see open_clip's model_configs for "
            "examples"
        ) from error
