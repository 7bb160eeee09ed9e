"""One adapter a tower family: how `VideoEncoder` reads the parts of an image tower that somebody else wrote."""

from __future__ import annotations

from torch import nn

from rlt_retrieval.encoders.towers.open_clip_vit import OpenClipVisionTower
from rlt_retrieval.errors import ModelError


def adapt_tower(visual: nn.Module) -> OpenClipVisionTower:
    """The adapter for an image tower.

    Raises:
        ModelError: a tower of a kind that no adapter knows; the message names it.
    """
    if OpenClipVisionTower.accepts(visual):
        return OpenClipVisionTower(visual)
    kind = f"{type(visual).__module__}.{type(visual).__name__}"
    inner = getattr(visual, "trunk", None)
    if inner is not None:
        kind += f" around {type(inner).__module__}.{type(inner).__name__}"
    raise unsupported_tower(kind)


def unsupported_tower(kind: str) -> ModelError:
    """The error for an image tower that no adapter knows."""
    return ModelError(
        f"the image tower is a {kind}; supported is open_clip.transformer.VisionTransformer: choose a backbone "
        "such as ViT-B-32, ViT-B-16 or ViT-L-14"
    )
