"""Adapter for timm's `Eva` inside open_clip's `TimmModel`: EVA-CLIP (arXiv 2303.15389), PE-Core (arXiv 2504.13181).

Shapes: T packed rows, D width, E = sines and cosines of a rotary position; grid of H' x W' patches.
"""

from __future__ import annotations

import copy

import torch
from open_clip.timm_model import TimmModel
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from rlt_retrieval.encoders.towers.protocol import Attend, Residual, refused_tower
from rlt_retrieval.encoders.towers.timm_vit import TimmVisionTower, self_attention


class EvaTower(TimmVisionTower):
    """Reads a `TimmModel` around an `Eva` in place; holds no parameter of its own."""

    block_types = (EvaBlock, EvaBlockPostNorm)

    def __init__(self, visual: TimmModel) -> None:
        """
        Raises:
            ModelError: an option of the tower that cannot be walked; the message names it.
        """
        super().__init__(visual)
        rope = self.trunk.rope
        if rope is not None and not isinstance(rope, RotaryEmbeddingCat):
            raise refused_tower(f"rotates by {type(rope).__name__}, not by one table for all blocks")

    def rotary_table(self, grid: tuple[int, int]) -> Tensor | None:
        """[1 + H'W', E]: sines, then cosines; the first row turns nothing. None for towers without rotation.

        For another grid than the tower's own, the positions are those that timm gives a tower of that size.
        """
        rope = self.trunk.rope
        if rope is None:
            return None
        if grid != self.grid_size:
            rope = copy.deepcopy(rope)
            rope.update_feat_shape(list(grid))
        table_GE = rope.get_embed()
        sines_1H, cosines_1H = (torch.full_like(half[:1], n) for n, half in enumerate(table_GE.chunk(2, -1)))
        return torch.cat([torch.cat([sines_1H, cosines_1H], -1), table_GE])

    def residuals(
        self, block: nn.Module, attend: Attend, rotary_TE: Tensor | None
    ) -> tuple[Residual, Residual]:
        """The two residual branches of a block: attention and MLP, each from [T, D] to [T, D]."""
        if isinstance(block, EvaBlockPostNorm):
            return (
                lambda x_TD: block.norm1(self_attention(block.attn, x_TD, attend, rotary_TE)),
                lambda x_TD: block.norm2(block.mlp(x_TD)),
            )
        assert isinstance(block, EvaBlock)
        return (
            lambda x_TD: _scaled(
                self_attention(block.attn, block.norm1(x_TD), attend, rotary_TE), block.gamma_1
            ),
            lambda x_TD: _scaled(block.mlp(block.norm2(x_TD)), block.gamma_2),
        )

    @property
    def _pools_prefix(self) -> bool:
        return self.trunk.global_pool == "map"


def _scaled(change_TD: Tensor, gamma_D: Tensor | None) -> Tensor:
    return change_TD if gamma_D is None else gamma_D * change_TD
