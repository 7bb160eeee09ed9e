"""Token containers: one clip (`VideoTokens`) and many clips on one flat axis (`PackedTokens`).

Shapes: N tokens of one clip or of a whole batch, B clips, P patch side in pixels; grid T' x H' x W'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VideoTokens:
    """Kept tubelets of one clip, ordered by (t, y, x).

    patches: uint8 [N, tubelet, 3, P, P]; positions: int32 [N, 3] as (t, y, x);
    run_lengths: int32 [N], how many tubelets each token stands for; grid: (T', H', W').
    """

    patches: Tensor
    positions: Tensor
    run_lengths: Tensor
    grid: Grid

    def __len__(self) -> int:
        return self.patches.shape[0]


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of B clips one after the other, without padding. Counts patches only, never CLS tokens.

    patches: uint8 [N, tubelet, 3, P, P]; positions: int32 [N, 3]; run_lengths: int32 [N];
    cu_seqlens: int32 [B + 1], clip b owns rows cu_seqlens[b]:cu_seqlens[b + 1]; max_seqlen: longest clip;
    grids: one (T', H', W') a clip; clip_seeds: one integer a clip from which the random decisions inside
    the model (stochastic depth, patch dropout) are drawn in training, empty when nothing is random.
    """

    patches: Tensor
    positions: Tensor
    run_lengths: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    grids: tuple[Grid, ...]
    clip_seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def num_tokens(self) -> int:
        return self.patches.shape[0]

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("patches", "positions", "run_lengths", "cu_seqlens")
        }
        return replace(self, **moved)


def pack(clips: Sequence[VideoTokens], clip_seeds: Sequence[int] = ()) -> PackedTokens:
    """Concatenate clips on one token axis.

    Args:
        clips: at least one clip; all with the same patch and tubelet size.
        clip_seeds: one integer a clip, or nothing (see `PackedTokens`).
    Raises:
        ValueError: no clip, or clips of different patch shapes.
    """
    if not clips:
        raise ValueError("pack() got no clip; it needs at least one VideoTokens")
    shapes = {tuple(clip.patches.shape[1:]) for clip in clips}
    if len(shapes) > 1:
        raise ValueError(f"pack() got clips of different patch shapes {sorted(shapes)}; use one tokenizer")
    if clip_seeds and len(clip_seeds) != len(clips):
        raise ValueError(f"pack() got {len(clip_seeds)} seeds for {len(clips)} clips")
    lengths = torch.tensor([len(clip) for clip in clips])
    cu_seqlens = torch.zeros(len(clips) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return PackedTokens(
        patches=torch.cat([clip.patches for clip in clips]),
        positions=torch.cat([clip.positions for clip in clips]),
        run_lengths=torch.cat([clip.run_lengths for clip in clips]),
        cu_seqlens=cu_seqlens.to(clips[0].patches.device),
        max_seqlen=int(lengths.max()),
        grids=tuple(clip.grid for clip in clips),
        clip_seeds=tuple(clip_seeds),
    )
