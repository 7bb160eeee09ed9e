"""Adapter for open_clip's own `VisionTransformer`: its modules, walked over a flat token axis.

Nothing of the tower's arithmetic is written here but the projections around attention, which open_clip hides
inside `nn.MultiheadAttention`. Shapes: T packed tokens, D width, N heads, H head size.
"""

from __future__ import annotations

import torch
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
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


class OpenClipVisionTower:
    """Reads a `VisionTransformer` in place; holds no parameter of its own."""

    has_cls = True
    patch_bias: Tensor | None = None

    def __init__(self, visual: VisionTransformer) -> None:
        """
        Raises:
            ModelError: a shape or a head that has no single vector a video, or no square patches.
        """
        _check_supported(visual)
        self.visual = visual
        self.width: int = visual.class_embedding.shape[0]
        self.patch_size: int = visual.patch_size[0]
        self.grid_size: tuple[int, int] = visual.grid_size
        self.pools_cls = visual.attn_pool is None and visual.pool_type != "avg"

    @property
    def blocks(self) -> nn.ModuleList:
        """The residual blocks, in order."""
        return self.visual.transformer.resblocks

    @property
    def patch_weight(self) -> Tensor:
        """Weights of the patch embedding, [D, 3, P, P]."""
        return self.visual.conv1.weight

    def cls_token(self) -> Tensor:
        """[D], with its position."""
        return self.visual.class_embedding + self.visual.positional_embedding[0]

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """[H'W', D], row-major, resampled where `grid` is not the tower's own."""
        return resampled(self.visual.positional_embedding[1:], self.grid_size, grid)

    def rotary_table(self, grid: tuple[int, int]) -> None:
        """This family rotates nothing."""

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        """The norm before the blocks (identity where the tower has none)."""
        return self.visual.ln_pre(x_TD)

    def residuals(
        self, block: nn.Module, attend: Attend, rotary_TE: Tensor | None
    ) -> tuple[Residual, Residual]:
        """The two residual branches of a block: attention and MLP, each from [T, D] to [T, D]."""
        if isinstance(block, ResidualAttentionBlock):
            return (
                lambda x_TD: block.ls_1(_multihead(block.attn, block.ln_1(x_TD), attend)),
                lambda x_TD: block.ls_2(block.mlp(block.ln_2(x_TD))),
            )
        assert isinstance(block, CustomResidualAttentionBlock)
        return (
            lambda x_TD: block.ls_1(block.ln_attn(_custom_attention(block.attn, block.ln_1(x_TD), attend))),
            lambda x_TD: block.ls_2(block.mlp(block.ln_2(x_TD))),
        )

    def pool(
        self, x_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights_T: Tensor, cross_attend: CrossAttend
    ) -> Tensor:
        """[B, D'], before the projection; see `Tower.pool`."""
        visual = self.visual
        if visual.attn_pool is not None:
            pooled_BQD = self._attention_pool(x_TD, cu_seqlens, max_seqlen, weights_T, cross_attend)
            return pooled_BQD[:, 0] if visual.pool_type != "avg" else pooled_BQD[:, 1:].mean(1)
        if visual.final_ln_after_pool:
            return visual.ln_post(self._global_pool(x_TD, cu_seqlens, weights_T))
        return self._global_pool(visual.ln_post(x_TD), cu_seqlens, weights_T)

    def project(self, pooled_BD: Tensor) -> Tensor:
        """[B, D'] to the shared embedding space."""
        return pooled_BD if self.visual.proj is None else pooled_BD @ self.visual.proj

    def _global_pool(self, x_TD: Tensor, cu_seqlens: Tensor, weights_T: Tensor) -> Tensor:
        cls_rows_B = cu_seqlens[:-1].long()
        if self.visual.pool_type != "avg":
            return x_TD[cls_rows_B]
        return weighted_mean(x_TD, cu_seqlens, weights_T.index_fill(0, cls_rows_B, 0.0))

    def _attention_pool(
        self, x_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights_T: Tensor, cross_attend: CrossAttend
    ) -> Tensor:
        visual = self.visual
        if visual.attn_pool_contrastive is None:
            return visual.ln_post(
                _pooler(visual.attn_pool, x_TD, cu_seqlens, max_seqlen, weights_T, cross_attend)
            )
        x_TD = visual.ln_post(x_TD)
        if visual.attn_pool_type == "parallel":
            return _pooler(
                visual.attn_pool_contrastive, x_TD, cu_seqlens, max_seqlen, weights_T, cross_attend
            )
        tokens_BQD = _pooler(visual.attn_pool, x_TD, cu_seqlens, max_seqlen, weights_T, cross_attend)
        return visual.attn_pool_contrastive(tokens_BQD)


def _check_supported(visual: VisionTransformer) -> None:
    sides = [(image, patch) for image, patch in zip(visual.image_size, visual.patch_size, strict=True)]
    if visual.patch_size[0] != visual.patch_size[1] or any(image % patch for image, patch in sides):
        raise refused_tower(
            f"cuts {visual.image_size} pixels into patches of {visual.patch_size}, not into squares that fill the image"
        )
    pools_to_one = visual.pool_type != "none" or getattr(visual, "attn_pool_type", "") in (
        "parallel",
        "cascade",
    )
    if not pools_to_one:
        raise refused_tower("has pool_type 'none' and gives one vector a token, and not one a picture")


def _multihead(attention: nn.MultiheadAttention, x_TD: Tensor, attend: Attend) -> Tensor:
    qkv = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    return attention.out_proj(attend(q, k, v).flatten(1))


def _custom_attention(attention: Attention, x_TD: Tensor, attend: Attend) -> Tensor:
    qkv = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    if attention.logit_scale is not None:
        # Cosine attention: the learned scale goes into q, and undoes the 1 / sqrt(H) that `attend` applies.
        scale_N1 = attention.logit_scale.clamp(max=attention.logit_scale_max).exp().reshape(-1, 1)
        q = F.normalize(q, dim=-1) * scale_N1 * attention.head_dim**0.5
        k = F.normalize(k, dim=-1)
    else:
        q, k = attention.ln_q(q), attention.ln_k(k)
    out_TNH = attend(q.type_as(v), k.type_as(v), v)  # under autocast, norms give float32
    if attention.head_scale is not None:
        out_TNH = out_TNH * attention.head_scale.reshape(-1, 1)
    return attention.out_proj(attention.ln_inner(out_TNH.flatten(1)))


def _pooler(
    pooler: nn.Module,
    x_TD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights_T: Tensor,
    cross_attend: CrossAttend,
) -> Tensor:
    """open_clip's AttentionalPooler over packed sequences: [B, Q, D]."""
    attention = pooler.attn
    assert isinstance(attention, nn.MultiheadAttention)
    query_QD, x_TD = pooler.ln_q(pooler.query), pooler.ln_k(x_TD)  # type: ignore[operator]
    q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
    if attention._qkv_same_embed_dim:
        q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
    else:
        q_weight, k_weight, v_weight = (
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        )
    num_queries, num_sequences, heads = len(query_QD), len(cu_seqlens) - 1, attention.num_heads
    q = F.linear(query_QD, q_weight, q_bias).unflatten(-1, (heads, -1)).repeat(num_sequences, 1, 1)
    k = F.linear(x_TD, k_weight, k_bias).unflatten(-1, (heads, -1))
    v = F.linear(x_TD, v_weight, v_bias).unflatten(-1, (heads, -1))
    cu_q = torch.arange(num_sequences + 1, dtype=torch.int32, device=x_TD.device) * num_queries
    out = cross_attend(q, k, v, cu_q, cu_seqlens, num_queries, max_seqlen, weights_T)
    return attention.out_proj(out.flatten(1)).unflatten(0, (num_sequences, num_queries))
