"""Adapter for timm's plain `VisionTransformer` inside open_clip's `TimmModel`: SigLIP, SigLIP 2 and others like them.

The tower's own modules are walked over a flat token axis; only what lies between the projections and attention is
written here. Shapes: T packed rows, B sequences, D width, N heads, H head size, E numbers of a rotary position.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, PatchEmbed
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.encoders.towers.protocol import (
    Attend,
    CrossAttend,
    Residual,
    refused_tower,
    resampled,
    weighted_mean,
)

_POOLS = ("token", "avg", "map")
_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


class TimmVisionTower:
    """Reads a `TimmModel` around a `VisionTransformer` in place; holds no parameter of its own."""

    block_types: tuple[type[nn.Module], ...] = (Block,)

    def __init__(self, visual: TimmModel) -> None:
        """
        Raises:
            ModelError: an option of the tower that cannot be walked; the message names it.
        """
        trunk = visual.trunk
        refusal = _refusal(visual, self.block_types)
        if refusal:
            raise refused_tower(refusal)
        self.visual, self.trunk = visual, trunk
        self.width: int = trunk.embed_dim
        self.patch_size: int = trunk.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = trunk.patch_embed.grid_size
        self.has_cls: bool = trunk.cls_token is not None
        self.pools_cls: bool = trunk.global_pool == "token"

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The residual blocks, in order."""
        return self.trunk.blocks

    @property
    def patch_weight(self) -> Tensor:
        """Weights of the patch embedding, [D, 3, P, P]."""
        return self.trunk.patch_embed.proj.weight

    @property
    def patch_bias(self) -> Tensor | None:
        """Its bias, [D]; None for towers with a norm before the blocks."""
        return self.trunk.patch_embed.proj.bias

    def cls_token(self) -> Tensor:
        """[D], with its position where it has one."""
        cls_D = self.trunk.cls_token[0, 0]
        return cls_D + self.trunk.pos_embed[0, 0] if self._cls_has_position else cls_D

    def position_table(self, grid: tuple[int, int]) -> Tensor | None:
        """[H'W', D], row-major, resampled where `grid` is not the tower's own; None without learned positions."""
        if self.trunk.pos_embed is None:
            return None
        return resampled(self.trunk.pos_embed[0, int(self._cls_has_position) :], self.grid_size, grid)

    def rotary_table(self, grid: tuple[int, int]) -> Tensor | None:
        """This family rotates nothing."""

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        """The norm before the blocks (identity where the tower has none)."""
        return self.trunk.norm_pre(x_TD)

    def residuals(
        self, block: nn.Module, attend: Attend, rotary_TE: Tensor | None
    ) -> tuple[Residual, Residual]:
        """The two residual branches of a block: attention and MLP, each from [T, D] to [T, D]."""
        assert isinstance(block, Block)
        return (
            lambda x_TD: block.ls1(self_attention(block.attn, block.norm1(x_TD), attend, rotary_TE)),
            lambda x_TD: block.ls2(block.mlp(block.norm2(x_TD))),
        )

    def pool(
        self, x_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights_T: Tensor, cross_attend: CrossAttend
    ) -> Tensor:
        """[B, D], before the projection; see `Tower.pool`."""
        trunk = self.trunk
        x_TD = trunk.norm(x_TD)
        cls_rows_B = cu_seqlens[:-1].long()
        if self.pools_cls:
            return trunk.fc_norm(x_TD[cls_rows_B])
        if self.has_cls and not self._pools_prefix:
            rows_N = _rows_behind_cls(cu_seqlens, len(x_TD))
            x_TD, weights_T = x_TD.index_select(0, rows_N), weights_T.index_select(0, rows_N)
            cu_seqlens = cu_seqlens - torch.arange(len(cu_seqlens), dtype=torch.int32, device=x_TD.device)
            max_seqlen = max_seqlen - 1
        if trunk.global_pool == "avg":
            return trunk.fc_norm(weighted_mean(x_TD, cu_seqlens, weights_T))
        return trunk.fc_norm(
            _latent_pool(trunk.attn_pool, x_TD, cu_seqlens, max_seqlen, weights_T, cross_attend)
        )

    def project(self, pooled_BD: Tensor) -> Tensor:
        """[B, D] to the shared embedding space."""
        return self.visual.head(self.trunk.head(self.trunk.head_drop(pooled_BD)))

    @property
    def _cls_has_position(self) -> bool:
        return self.has_cls and self.trunk.pos_embed is not None and not self.trunk.no_embed_class

    @property
    def _pools_prefix(self) -> bool:
        """Whether the CLS row takes part in pooling."""
        return self.trunk.pool_include_prefix


def self_attention(attention: Any, x_TD: Tensor, attend: Attend, rotary_TE: Tensor | None) -> Tensor:
    """One of timm's attention modules with `attend` in the place of its own softmax: [T, D] to [T, D]."""
    q_TNH, k_TNH, v_TNH = _heads(attention, x_TD)
    q_TNH, k_TNH = attention.q_norm(q_TNH), attention.k_norm(k_TNH)
    if rotary_TE is not None:
        rotate = partial(apply_rot_embed_cat, emb=rotary_TE[:, None], half=attention.rotate_half)
        q_TNH, k_TNH = rotate(q_TNH), rotate(k_TNH)
    out_TNH = attend(q_TNH.type_as(v_TNH), k_TNH.type_as(v_TNH), v_TNH)
    return attention.proj(attention.norm(out_TNH.flatten(1)))


def _heads(attention: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [T, N, H]."""
    heads = attention.num_heads
    if attention.qkv is None:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (projection(x_TD).unflatten(-1, (heads, -1)) for projection in projections)
        return q, k, v
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:  # EVA keeps the biases beside, that of k zero
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x_TD, attention.qkv.weight, bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.unbind(1)
    return q, k, v


def _rows_behind_cls(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """int64 [N], all rows but the first of each sequence."""
    num_sequences = len(cu_seqlens) - 1
    num_patches = num_rows - num_sequences  # known on the host, so that nothing waits for the device
    sequence_N = torch.repeat_interleave(cu_seqlens.diff().long() - 1, output_size=num_patches)
    return torch.arange(1, num_patches + 1, device=cu_seqlens.device) + sequence_N


def _latent_pool(
    pooler: AttentionPoolLatent,
    x_TD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights_T: Tensor,
    cross_attend: CrossAttend,
) -> Tensor:
    """timm's AttentionPoolLatent with its one query over packed sequences: [B, D]."""
    heads, num_sequences = pooler.num_heads, len(cu_seqlens) - 1
    q_1NH = pooler.q_norm(pooler.q(pooler.latent[0]).unflatten(-1, (heads, -1)))
    k_TNH, v_TNH = pooler.kv(x_TD).unflatten(-1, (2, heads, -1)).unbind(1)
    k_TNH = pooler.k_norm(k_TNH)
    q_BNH = q_1NH.expand(num_sequences, -1, -1).type_as(v_TNH)
    cu_q = torch.arange(num_sequences + 1, dtype=torch.int32, device=x_TD.device)
    out_BNH = cross_attend(q_BNH, k_TNH.type_as(v_TNH), v_TNH, cu_q, cu_seqlens, 1, max_seqlen, weights_T)
    pooled_BD = pooler.proj(out_BNH.flatten(1))
    return pooled_BD + pooler.mlp(pooler.norm(pooled_BD))


def _refusal(visual: TimmModel, block_types: tuple[type[nn.Module], ...]) -> str:
    """Why the tower cannot be walked, or nothing."""
    trunk = visual.trunk
    patch_embed = trunk.patch_embed
    if type(patch_embed) is not PatchEmbed or not isinstance(patch_embed.norm, nn.Identity):
        return f"makes its tokens with {type(patch_embed).__name__}, not with one linear map a patch"
    size, (height, width) = tuple(visual.image_size), patch_embed.patch_size
    if height != width or any(side % height for side in size):
        return f"cuts {size} pixels into patches of {(height, width)}, not into squares that fill the image"
    if size != tuple(patch_embed.img_size):
        return f"is configured for images of {size} pixels and built for {tuple(patch_embed.img_size)}"
    if trunk.num_prefix_tokens > 1:
        return f"has {trunk.num_prefix_tokens} tokens before its patches, and at most a CLS token is known"
    if trunk.global_pool not in _POOLS:
        return f"pools by {trunk.global_pool!r}, not by one of {', '.join(_POOLS)}"
    if trunk.attn_pool is not None and not _is_plain_pool(trunk.attn_pool):
        return "has an attention pool with positions of its own or with several queries"
    for block in trunk.blocks:
        if type(block) not in block_types:
            return f"has blocks of the kind {type(block).__name__}, not of {block_types[0].__name__}"
        if not _is_plain_attention(block.attn):
            return f"has {type(block.attn).__name__} that is gated, shares keys between heads or is of another kind"
    return ""


def _is_plain_pool(pooler: nn.Module) -> bool:
    return isinstance(pooler, AttentionPoolLatent) and pooler.pos_embed is None and pooler.latent_len == 1


def _is_plain_attention(attention: nn.Module) -> bool:
    gated = getattr(attention, "gate", None) is not None
    return type(attention) in _ATTENTIONS and not gated and getattr(attention, "num_kv_groups", 1) == 1
