"""Token containers: one clip (`VideoTokens`) and many clips on one flat axis (`PackedTokens`).

Shapes: N tokens of one clip or of a whole batch, B clips, P patch side in pixels; grid T' x H' x W'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VideoTokens:
    """Kept tubelets of one clip, ordered by (t, y, x).

    patches: uint8 [N, tubelet, 3, P, P]; positions: int32 [N, 3] as (t, y, x);
    run_lengths: int32 [N], how many cells of the grid each token stands for; grid: (T', H', W');
    covering: int32 [T', H', W'], the token that stands for each cell; None where that is the latest one at its place.
    """

    patches: Tensor
    positions: Tensor
    run_lengths: Tensor
    grid: Grid
    covering: Tensor | None = None

    def __len__(self) -> int:
        return self.patches.shape[0]

    @property
    def keep_mask(self) -> Tensor:
        """bool [T', H', W'], the cells that have a token of their own."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.positions.device)
        mask[tuple(self.positions.long().unbind(1))] = True
        return mask


class Tokenizer(Protocol):
    """A clip's frames, uint8 [T, 3, H, W], to its tokens; picklable, so that loader workers run it."""

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens: ...


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of B clips one after the other, without padding. Counts patches only, never CLS tokens.

    patches: uint8 [N, tubelet, 3, P, P]; positions: int32 [N, 3]; run_lengths: int32 [N];
    cu_seqlens: int32 [B + 1], clip b owns rows cu_seqlens[b]:cu_seqlens[b + 1]; max_seqlen: longest clip;
    grids: one (T', H', W') a clip; coverings: `VideoTokens.covering` of each clip, on the host;
    clip_seeds: one integer a clip from which the random decisions inside the model (stochastic depth, patch dropout)
    are drawn in training, empty when nothing is random.
    """

    patches: Tensor
    positions: Tensor
    run_lengths: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    grids: tuple[Grid, ...]
    coverings: tuple[Tensor | None, ...]
    clip_seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def num_tokens(self) -> int:
        return self.patches.shape[0]

    @property
    def clip_of_token(self) -> Tensor:
        """int64 [N], the clip that each token belongs to."""
        return torch.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on another device."""
        device = torch.device(device)
        return replace(
            self,
            patches=to_device(self.patches, device),
            positions=to_device(self.positions, device),
            run_lengths=to_device(self.run_lengths, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
        )


def covering_tokens(packed: PackedTokens) -> Tensor:
    """Which token of the batch stands for each cell: int64 [B, T', H', W'], with T' of the longest clip.

    What a clip's `covering` says, else the latest token at the cell's place. All clips have one H' x W'.
    """
    positions, (_, height, width) = packed.positions, packed.grids[0]
    starts_B = packed.cu_seqlens[:-1].long()
    shape = len(packed), max(grid[0] for grid in packed.grids), height, width
    covering_Bthw = starts_B[:, None, None, None].repeat(1, *shape[1:])
    covering_Bthw[packed.clip_of_token, *positions.long().unbind(1)] = torch.arange(
        packed.num_tokens, device=positions.device
    )
    # Tokens are ordered by t: the latest one has the largest index.
    covering_Bthw = covering_Bthw.cummax(1).values
    for clip, given in enumerate(packed.coverings):
        if given is not None:
            covering_Bthw[clip, : len(given)] = starts_B[clip] + given.to(positions.device)
    return covering_Bthw


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From the host to a GPU the copy is queued like a kernel, which needs pinned memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
        coverings=tuple(None if clip.covering is None else clip.covering.cpu() for clip in clips),
        clip_seeds=tuple(clip_seeds),
    )
