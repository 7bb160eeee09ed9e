"""Small timm towers inside open_clip models: the true architectures by their names, with fewer and narrower layers.

Shapes: B pictures, C = 3 channels, H x W pixels, G patches of a picture, T rows, D width, Z embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from small_models import SMALL_TEXT, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.attention import attend_varlen
from rlt_retrieval.encoders.towers import Tower
from rlt_retrieval.encoders.towers.loading import build_clip
from rlt_retrieval.model import ModelConfig, VideoTextModel

SMALL_TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

# One a family and option: timm's name, open_clip's pooling and projection, and what is changed of the architecture.
TIMM_TOWERS: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "SigLIP": ("vit_base_patch16_siglip_224", "map", "none", {}),
    "SigLIP SO400M": ("vit_so400m_patch14_siglip_224", "map", "none", {}),
    "wide image": ("vit_base_patch16_siglip_224", "map", "none", {"img_size": (24, 40)}),
    "attention pooling with CLS": ("vit_base_patch16_siglip_224", "map", "none", {"class_token": True}),
    "attention pooling of CLS too": (
        "vit_base_patch16_siglip_224",
        "map",
        "none",
        {"class_token": True, "pool_include_prefix": True},
    ),
    "CLS": ("vit_large_patch14_clip_224", "token", None, {}),
    "CLS, linear head": ("vit_large_patch14_clip_224", "token", "linear", {}),
    "CLS, MLP head": ("vit_large_patch14_clip_224", "token", "mlp", {}),
    "CLS without position": ("vit_large_patch14_clip_224", "token", None, {"no_embed_class": True}),
    "average": ("vit_large_patch14_clip_224", "avg", None, {}),
    "average of a tower without CLS": ("vit_medium_patch16_gap_256", "", "linear", {}),
    "no positions": ("vit_base_patch16_siglip_224", "map", "none", {"pos_embed": "none"}),
    "layer scale": ("vit_base_patch16_siglip_224", "map", "none", {"init_values": 0.1}),
    "norms inside attention": (
        "vit_base_patch16_siglip_224",
        "map",
        "none",
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "PE-Core": ("vit_pe_core_base_patch16_224", "map", None, {}),
    "PE-Core bigG": ("vit_pe_core_gigantic_patch14_448", "map", None, {}),
    "PE-Core, wide image": ("vit_pe_core_base_patch16_224", "map", None, {"img_size": (24, 40)}),
    "EVA01": ("eva_giant_patch14_224", "token", None, {}),
    "EVA02-B": ("eva02_base_patch16_clip_224", "token", None, {}),
    "EVA02-L": ("eva02_large_patch14_clip_224", "token", None, {}),
    "EVA02-E": ("eva02_enormous_patch14_clip_224", "token", None, {}),
    "EVA average": ("eva02_base_patch16_clip_224", "avg", None, {}),
    "EVA layer scale": ("eva02_base_patch16_clip_224", "token", None, {"init_values": 0.1}),
}


def timm_config(tower: str, **more: Any) -> dict[str, Any]:
    """open_clip's configuration of one of `TIMM_TOWERS`; build it inside `shrunken(tower)`."""
    name, pool, proj, changes = TIMM_TOWERS[tower]
    size = changes.get("img_size", SMALL_TRUNK["img_size"])
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": dict(SMALL_TEXT),
        **more,
    }


@contextmanager
def shrunken(tower: str) -> Iterator[None]:
    """timm builds its models small, with the changes of one of `TIMM_TOWERS`."""
    create_model = timm.create_model
    changes = {**SMALL_TRUNK, **TIMM_TOWERS[tower][3]}

    def create_small(*names: Any, **options: Any) -> Any:
        return create_model(*names, **{**options, **changes})

    with mock.patch.object(timm, "create_model", create_small):
        yield


def small_timm_model(tower: str, config: dict[str, Any] | None = None, **settings: Any) -> VideoTextModel:
    """A small model in eval mode, the same each time; `settings` are fields of VideoSettings (default: 6 frames).

    Matrices are large enough (timm starts them with a deviation of 0.02) that attention is far from uniform.
    """
    config = config or timm_config(tower)
    with shrunken(tower), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        clip = build_clip(config)
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    values = {"layout": "joint", "threshold": 0.0, "reference": "previous", "num_frames": 6, **settings}
    preprocess = dict(clip.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    preprocess["size"] = list(clip.visual.image_size)  # type: ignore[union-attr, arg-type]
    model = VideoTextModel(clip, ModelConfig("custom", config, preprocess, VideoSettings(**values))).eval()
    randomise(model, 1)
    return model


def walk(tower: Tower, pictures_BCHW: Tensor) -> Tensor:
    """[B, Z]: all pictures at once over one flat axis of rows, with dense attention inside each."""
    patches_BDhw = F.conv2d(pictures_BCHW, tower.patch_weight, tower.patch_bias, stride=tower.patch_size)
    grid = (patches_BDhw.shape[2], patches_BDhw.shape[3])
    rows_BGD = patches_BDhw.flatten(2).mT
    positions, rotary = tower.position_table(grid), tower.rotary_table(grid)
    if positions is not None:
        rows_BGD = rows_BGD + positions
    if tower.has_cls:
        rows_BGD = torch.cat([tower.cls_token().expand(len(rows_BGD), 1, -1), rows_BGD], 1)
    elif rotary is not None:
        rotary = rotary[1:]
    length = rows_BGD.shape[1]
    cu = torch.arange(len(rows_BGD) + 1, dtype=torch.int32) * length
    rotary_TE = None if rotary is None else rotary.repeat(len(rows_BGD), 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_varlen(q, k, v, cu, cu, length, length, backend="sdpa")

    def cross_attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: object) -> Tensor:
        return attend_varlen(q, k, v, cu_q, cu_k, length, length, backend="sdpa")

    x_TD = tower.before_blocks(rows_BGD.flatten(0, 1))
    for block in tower.blocks:
        for residual in tower.residuals(block, attend, rotary_TE):
            x_TD = x_TD + residual(x_TD)
    return tower.project(tower.pool(x_TD, cu, length, torch.ones(len(x_TD)), cross_attend))
