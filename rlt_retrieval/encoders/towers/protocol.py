"""What `VideoEncoder` reads of an image tower, whatever family it is of, and the parts that families share.

Shapes: T packed rows, B sequences, D width, N heads, H head size, E numbers of a rotary position, H' x W' patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.errors import ModelError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_TNH, k_TNH, v_TNH -> out_TNH
# q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, key weights_T -> out_TNH
CrossAttend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, Tensor], Tensor]
Residual = Callable[[Tensor], Tensor]  # x_TD -> change_TD


class Tower(Protocol):
    """An adapter reads the modules of a tower in place; it holds no parameter of its own.

    width: D of the patch embedding. patch_size: side of a patch in pixels. grid_size: (H', W') of its image size.
    has_cls: whether each sequence starts with a CLS row. pools_cls: whether `pool` reads that row alone.
    """

    width: int
    patch_size: int
    grid_size: tuple[int, int]
    has_cls: bool
    pools_cls: bool

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The residual blocks, in order."""

    @property
    def patch_weight(self) -> Tensor:
        """Weights of the patch embedding, [D, 3, P, P]."""

    @property
    def patch_bias(self) -> Tensor | None:
        """Bias of the patch embedding, [D], where the tower has one."""

    def cls_token(self) -> Tensor:
        """[D], with its position; for towers that have one."""

    def position_table(self, grid: tuple[int, int]) -> Tensor | None:
        """[H'W', D], row-major: what is added to the patch at each place; None where the tower adds nothing.

        For another grid than the tower's own it is resampled (bicubic, antialiased) as open_clip and timm do on load.
        """

    def rotary_table(self, grid: tuple[int, int]) -> Tensor | None:
        """[1 + H'W', E]: a neutral row for CLS, then one a place, row-major; None where the tower rotates nothing."""

    def before_blocks(self, x_TD: Tensor) -> Tensor:
        """What comes between the embedding and the first block (identity for most towers)."""

    def residuals(
        self, block: nn.Module, attend: Attend, rotary_TE: Tensor | None
    ) -> tuple[Residual, Residual]:
        """The two residual branches of a block, attention and MLP.

        Args:
            block: one of `blocks`.
            attend: attention of all rows, already split into heads.
            rotary_TE: the row of `rotary_table` that belongs to each row of x; None where that is None.
        """

    def pool(
        self, x_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights_T: Tensor, cross_attend: CrossAttend
    ) -> Tensor:
        """One unprojected vector a sequence, as the tower pools an image.

        Args:
            x_TD: output of the last block; each sequence is its CLS, where the tower has one, and its patches.
            cu_seqlens, max_seqlen: the sequences.
            weights_T: float [T], how many tubelets each row stands for; heads that pool patches weight them by it.
            cross_attend: attention of one query set a sequence over its rows.
        Returns:
            [B, D'], before the projection.
        """

    def project(self, pooled_BD: Tensor) -> Tensor:
        """[B, D'] to the shared embedding space."""


def refused_tower(reason: str) -> ModelError:
    """The error for an image tower that cannot be walked; `reason` is what it has or does."""
    return ModelError(
        f"the image tower {reason}: choose a plain ViT such as ViT-B-16, ViT-B-16-SigLIP2, PE-Core-B-16 or EVA02-B-16 "
        "(`rlt-retrieval models` lists them)"
    )


def weighted_mean(x_TD: Tensor, cu_seqlens: Tensor, weights_T: Tensor) -> Tensor:
    """Mean of each sequence's rows, each counted `weights_T` times: [B, D]."""
    sequence_T = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=len(x_TD))
    weights_T = weights_T.to(x_TD.dtype)
    zeros_BD = x_TD.new_zeros(len(cu_seqlens) - 1, x_TD.shape[1])
    sums_BD = zeros_BD.index_add(0, sequence_T, x_TD * weights_T[:, None])
    totals_B = zeros_BD[:, 0].index_add(0, sequence_T, weights_T)
    return sums_BD / totals_B[:, None]


def resampled(table_GD: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of positions on an `old` grid of (rows, columns), on a `new` one: bicubic and antialiased."""
    if old == new:
        return table_GD
    table_1DHW = table_GD.unflatten(0, old).permute(2, 0, 1)[None]
    wanted = F.interpolate(table_1DHW, size=new, mode="bicubic", antialias=True, align_corners=False)
    return wanted[0].flatten(1).mT
