"""One adapter a tower family: how `VideoEncoder` reads the parts of an image tower that somebody else wrote."""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from rlt_retrieval.encoders.towers.open_clip_vit import OpenClipVisionTower
from rlt_retrieval.encoders.towers.protocol import Tower, refused_tower
from rlt_retrieval.encoders.towers.timm_eva import EvaTower
from rlt_retrieval.encoders.towers.timm_vit import TimmVisionTower
from rlt_retrieval.errors import ModelError

__all__ = ["KNOWN_MODULES", "Tower", "adapt_tower", "unsupported_tower"]

# Modules of open_clip and timm that define towers: those with an adapter, and what is in the way in others.
KNOWN_MODULES = ("open_clip.transformer", "timm.models.vision_transformer", "timm.models.eva")
_IN_THE_WAY = {
    "open_clip.modified_resnet": "convolutions, so that no patch can be left out",
    "timm.models.convnext": "convolutions, so that no patch can be left out",
    "timm.models.fastvit": "convolutions, so that no patch can be left out",
    "timm.models.swin_transformer": "windowed attention, so that no patch can be left out",
    "timm.models.vitamin": "a convolutional stem, so that a patch depends on its neighbours",
    "timm.models.vision_transformer_hybrid": "a convolutional stem, so that a patch depends on its neighbours",
    "timm.models.vision_transformer_relpos": "relative positions inside attention, which its fast kernels cannot add",
    "timm.models.naflexvit": "a grid of its own for every picture (NaFlex); take the fixed-size model of that family",
}


def adapt_tower(visual: nn.Module) -> Tower:
    """The adapter for an image tower.

    Raises:
        ModelError: a tower of a kind that no adapter knows, or with options that none can walk; the message says which.
    """
    if isinstance(visual, VisionTransformer):
        return OpenClipVisionTower(visual)
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if type(trunk) is TimmVisionTransformer:
        return TimmVisionTower(visual)
    if type(trunk) is Eva:
        return EvaTower(visual)
    raise unsupported_tower(type(trunk).__name__, type(trunk).__module__)


def unsupported_tower(kind: str, module: str) -> ModelError:
    """The error for an image tower, called `kind`, of a module of open_clip or timm that no adapter knows."""
    reason = f"has {_IN_THE_WAY[module]}" if module in _IN_THE_WAY else "is of a kind that no adapter knows"
    return refused_tower(f"{kind} ({module}) {reason}")
