"""Attention layouts: which token goes where. Index arithmetic alone, on the host where the tokens are there.

Shapes: B clips, S attention sequences (clips or frames), N kept patches, R rows = patches and CLS tokens laid out in
sequences, K keys, L blocks; grid T' x H' x W' with C = H' * W' cells a frame.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.packing import PackedTokens, covering_tokens, to_device


@dataclass(frozen=True)
class LayoutPlan:
    """Rows of S sequences, one after the other, and the keys that each sequence's queries see.

    rows: int64 [R], 0 for the CLS token, 1 + n for patch n; cu_q: int32 [S + 1];
    key_rows: int64 [K], rows that are keys, sequence by sequence, or None: each sequence's own rows;
    cu_k: int32 [S + 1]; max_k; weights: float32 [R], the cells a row stands for (CLS: 1, or T' with cls_bias "log_T");
    key_bias: float32 [K], added to the logits of each key, or None; clip_of_sequence: int64 [S];
    sequence_weights: float32 [S], frames a sequence stands for; owner: int64 [R0], row that each row of the first
    plan was merged into (-1: dropped), or None before the first merge. Known on the host, so that nothing waits for the
    device: lengths, rows of each sequence; first_lengths, the same before any merge.
    """

    rows: Tensor
    cu_q: Tensor
    key_rows: Tensor | None
    cu_k: Tensor
    max_k: int
    weights: Tensor
    key_bias: Tensor | None
    clip_of_sequence: Tensor
    sequence_weights: Tensor
    lengths: tuple[int, ...]
    first_lengths: tuple[int, ...]
    owner: Tensor | None = None

    def to(self, device: torch.device) -> LayoutPlan:
        """The same plan on another device; the copy to a GPU waits for nothing that the GPU still does."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def first_rows_only(self) -> LayoutPlan:
        """The plan of a block after which only the first row of each sequence is read: all keys, one query."""
        count = len(self.lengths)
        return replace(
            self,
            rows=self.rows[self.first_rows],
            cu_q=torch.arange(count + 1, dtype=torch.int32, device=self.rows.device),
            weights=self.weights[self.first_rows],
            lengths=(1,) * count,
        )

    @property
    def max_q(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths)

    @property
    def first_rows(self) -> Tensor:
        """int64 [S], where each sequence begins: its CLS row in towers that have one."""
        return self.cu_q[:-1].long()

    @functools.cached_property
    def sequence_of_row(self) -> Tensor:
        """int64 [R]."""
        return torch.repeat_interleave(self.cu_q.diff().long(), output_size=len(self.rows))

    @property
    def key_rows_by_sequence(self) -> Tensor:
        """int64 [S, max_k], where keys are chosen rows and not merged: then every sequence has as many."""
        assert self.key_rows is not None
        return self.key_rows.reshape(-1, self.max_k)

    @functools.cached_property
    def key_updates(self) -> list[tuple[Tensor, Tensor]]:
        """What changes from one sequence's keys to the next: (places among the keys, rows to put there) a sequence.

        As `key_rows_by_sequence`. The first of a clip changes all, for no row belongs to two clips.
        """
        keys_SK = self.key_rows_by_sequence
        before_SK = torch.cat([torch.full_like(keys_SK[:1], -1), keys_SK[:-1]])
        places = [
            (keys_K != before_K).nonzero()[:, 0] for keys_K, before_K in zip(keys_SK, before_SK, strict=True)
        ]
        return [(places_U, keys_K[places_U]) for places_U, keys_K in zip(places, keys_SK, strict=True)]


def joint_plan(
    packed: PackedTokens, settings: VideoSettings, *, has_cls: bool = True, drop: bool = False
) -> LayoutPlan:
    """One sequence a clip: its CLS, then all its kept patches (less those that patch dropout takes away)."""
    offsets = packed.cu_seqlens.tolist()
    device = packed.positions.device
    parts = []
    for clip, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows = torch.arange(start + 1, end + 1, device=device)
        if drop:
            rows = _dropped(rows, settings.patch_dropout, packed.clip_seeds[clip])
        parts.append(torch.cat([rows.new_zeros(int(has_cls)), rows]))
    rows = torch.cat(parts)
    lengths = tuple(len(part) for part in parts)
    cu_q = _offsets(lengths, device)
    weights = packed.run_lengths.float()[(rows - 1).clamp(min=0)]
    if has_cls:
        cls_counts = [grid[0] if settings.cls_bias == "log_T" else 1 for grid in packed.grids]
        weights[cu_q[:-1].long()] = torch.tensor(cls_counts, dtype=torch.float32, device=device)
    # Merged rows attend by their sizes, so rows that will merge start with theirs.
    by_size = settings.length_bias or settings.reducer == "rlt+tome"
    key_bias = weights.log() if by_size else None
    clips = torch.arange(len(packed), device=device)
    return LayoutPlan(
        rows=rows,
        cu_q=cu_q,
        key_rows=None,
        cu_k=cu_q,
        max_k=max(lengths),
        weights=weights,
        key_bias=key_bias,
        clip_of_sequence=clips,
        sequence_weights=torch.ones_like(clips).float(),
        lengths=lengths,
        first_lengths=lengths,
    )


def frame_plan(packed: PackedTokens, *, has_cls: bool = True) -> LayoutPlan:
    """One sequence a frame that keeps any token: its CLS and its kept tokens.

    Its keys are its CLS and, for every cell of its grid, the token that stands for it, whichever frame that came with.
    A frame that keeps none is not computed: its embedding is the previous one's, and adds to its weight.
    """
    device, extra = packed.positions.device, int(has_cls)
    frames_B = torch.tensor([grid[0] for grid in packed.grids], device=device)
    longest = max(grid[0] for grid in packed.grids)  # frame t of clip b has the number b * longest + t
    frame_N = packed.clip_of_token * longest + packed.positions[:, 0]
    counts_F = torch.bincount(frame_N, minlength=len(packed) * longest)
    frame_S = counts_F.nonzero()[:, 0]
    clip_S, counts_S = frame_S // longest, counts_F[frame_S]
    ends_S = clip_S * longest + frames_B[clip_S]
    next_S = torch.cat([frame_S[1:], ends_S[-1:]])
    lengths = tuple((counts_S + extra).tolist())
    cu_q = _offsets(lengths, device)
    sequence_N = torch.repeat_interleave(counts_S, output_size=packed.num_tokens)
    row_N = torch.arange(packed.num_tokens, device=device) + extra * (1 + sequence_N)
    rows = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
    rows[row_N] = torch.arange(1, packed.num_tokens + 1, device=device)
    num_cells = math.prod(packed.grids[0][1:])  # a frame, for all clips have one grid size
    key_rows = None
    if packed.num_tokens != num_cells * len(lengths):  # something was dropped
        covering_SC = covering_tokens(packed).reshape(-1, num_cells)[frame_S]
        key_rows = torch.cat([cu_q[:-1].long()[:, None][:, :extra], row_N[covering_SC]], 1).flatten()
    return LayoutPlan(
        rows=rows,
        cu_q=cu_q,
        key_rows=key_rows,
        cu_k=_offsets([num_cells + extra] * len(lengths), device),
        max_k=num_cells + extra,
        weights=torch.ones(len(rows), device=device),
        key_bias=None,
        clip_of_sequence=clip_S,
        sequence_weights=(torch.minimum(next_S, ends_S) - frame_S).float(),
        lengths=lengths,
        first_lengths=lengths,
    )


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


def _dropped(rows: Tensor, rate: float, seed: int) -> Tensor:
    """A uniform draw of the rows, in order; at least one stays."""
    generator = torch.Generator().manual_seed(seed)
    num_kept = max(1, round(len(rows) * (1 - rate)))
    kept = torch.randperm(len(rows), generator=generator)[:num_kept].sort().values
    return rows[kept.to(rows.device)]
