"""What open_clip knows and what of it can be walked: sizes, costs, tags and licences, without any weights.

Shapes: D width, G = H' x W' patches of a frame, T = G plus a CLS token where there is one.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
from torch import nn

from rlt_retrieval.encoders.towers import Tower, adapt_tower
from rlt_retrieval.encoders.towers.building import NO_TEXT, check_tower_module, skeleton
from rlt_retrieval.errors import ModelError

UNKNOWN = "unknown"

_NO_VISION = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}


@dataclass(frozen=True)
class PretrainedTag:
    """Weights that open_clip can download: `source` is their hub repository, with the model card that has the licence.

    licence: what timm notes for that repository, else "unknown".
    """

    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class ModelRow:
    """A model of open_clip. What follows `reason` is None where that is not empty, or nothing tells it.

    reason: why its image tower cannot be walked; empty for a supported model. image_parameters, text_parameters: in
    millions. gflops: of one frame, see `gflops_a_frame`. patch, image_size (height, width): pixels.
    embedding: dimension of the shared space. needs_siglip_extra: its texts need `pip install 'rlt-retrieval[siglip]'`.
    """

    name: str
    reason: str
    tags: tuple[PretrainedTag, ...]
    embedding: int
    needs_siglip_extra: bool
    image_parameters: float | None = None
    text_parameters: float | None = None
    gflops: float | None = None
    patch: int | None = None
    image_size: tuple[int, int] | None = None

    @property
    def supported(self) -> bool:
        return not self.reason


def list_models(names: Sequence[str] = ()) -> list[ModelRow]:
    """A row for every model that open_clip knows by name, in its order; with `names`, for those that contain one."""
    wanted = [name.lower() for name in names] or [""]
    return [
        describe_model(name)
        for name in open_clip.list_models()
        if any(part in name.lower() for part in wanted)
    ]


def describe_model(name: str) -> ModelRow:
    """The row of one model.

    Args:
        name: one of `open_clip.list_models()`.
    """
    config = open_clip.get_model_config(name)
    vision_cfg, text_cfg = config["vision_cfg"], config["text_cfg"]
    tags = tuple(_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name))
    common = {
        "tags": tags,
        "embedding": config["embed_dim"],
        "needs_siglip_extra": _is_hugging_face(text_cfg),
    }
    try:
        check_tower_module(vision_cfg)
        tower = _measure_tower(json.dumps(vision_cfg), config["embed_dim"])
    except ModelError as error:
        return ModelRow(name, str(error), **common)
    return ModelRow(
        name,
        "",
        **common,
        **tower,
        text_parameters=_text_parameters(json.dumps(text_cfg), config["embed_dim"]),
    )


def gflops_a_frame(tower: Tower) -> float:
    """Cost of one whole frame in the image tower, in 10^9 operations; a multiply-add counts as two.

    Patch embedding: 2 * G for each of its weights. Each block: 2 * T for each weight of its matrices, and 4 * T * T * D
    for its attention (queries with keys, attention with values). Norms, activations and biases are not counted, nor
    are the pooling head and the projection, which add less than 5 %.
    """
    places = math.prod(tower.grid_size)
    rows = places + tower.has_cls
    embedding = 2 * places * tower.patch_weight.numel()
    matrices = 2 * rows * sum(weight.numel() for weight in tower.blocks.parameters() if weight.ndim == 2)
    attention = len(tower.blocks) * 4 * rows * rows * tower.width
    return (embedding + matrices + attention) / 1e9


@functools.cache
def _measure_tower(vision_cfg: str, embedding: int) -> dict[str, Any]:
    """What a row says of an image tower; many models share one, so it is kept by its configuration as JSON."""
    visual = skeleton(
        {"embed_dim": embedding, "vision_cfg": json.loads(vision_cfg), "text_cfg": NO_TEXT}
    ).visual
    tower = adapt_tower(visual)
    return {
        "image_parameters": _millions(visual),
        "gflops": gflops_a_frame(tower),
        "patch": tower.patch_size,
        "image_size": tuple(visual.image_size),
    }


@functools.cache
def _text_parameters(text_cfg: str, embedding: int) -> float | None:
    """Millions, or None for a tower that only transformers can build."""
    table = json.loads(text_cfg)
    if "hf_model_name" in table:
        return None
    clip = skeleton({"embed_dim": embedding, "vision_cfg": _NO_VISION, "text_cfg": table})
    return _millions(clip) - _millions(clip.visual)


def _millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _is_hugging_face(text_cfg: Mapping[str, Any]) -> bool:
    return "hf_tokenizer_name" in text_cfg


def _tag(name: str, tag: str) -> PretrainedTag:
    source = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].strip("/")
    return PretrainedTag(tag, source, _licences().get(source, UNKNOWN))


@functools.cache
def _licences() -> dict[str, str]:
    """Licence of each hub repository that timm's own list of weights notes one for."""
    noted: dict[str, set[str | None]] = {}
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None and cfg.hf_hub_id:
            noted.setdefault(cfg.hf_hub_id, set()).add(cfg.license)
    return {source: next(iter(names)) or UNKNOWN for source, names in noted.items() if len(names) == 1}
