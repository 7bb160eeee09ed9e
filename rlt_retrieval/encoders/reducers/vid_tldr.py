"""vid-TLDR (arXiv 2403.13347): merging in the first blocks in which background leaves no trace.

Shapes: R rows, D width, N heads, H head size, G sequences of L rows.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.reducers.merging import (
    NetworkReducer,
    at_least_float32,
    bipartite_assignment,
    halved,
    least_reduction,
    merge,
    on_device,
)

# Rows merged in the first blocks of 12 x 196: the authors' command for MSR-VTT retrieval with ViT-B/16. For other sets
# and sizes they merge in one to four blocks, always the most in the first or as much as in the next.
_REFERENCE_MERGES = (600, 200, 100)
_ROWS_AT_ONCE = 4096  # of attention matrices that are held at the same time


@dataclass(frozen=True)
class VidTldr(NetworkReducer):
    """vid-TLDR on packed sequences, between attention and MLP of the first three blocks.

    Rows are matched on their features (x, with attention added) as ToMe matches keys. A row that is merged away
    brings its mass times its saliency (`saliency`), so background brings nothing; rows that stay keep their mass
    (equations 10 and 11). Attention is proportional to mass, the attention that saliency is read from is not.
    What was read is the authors' code; the numbers of equations are those in the caption of the paper's figure 3.

    Their backbone (UMT) attends jointly over all frames and has no CLS. Here a CLS row is a key like any other, is
    never merged, and takes no part in the scale of saliency. In layout "frame" everything happens inside one frame:
    entropies are over one frame's keys, every frame has its own background however dull it is, and what repeats from
    frame to frame does not merge.

    Attributes:
        keep_ratio: mean over blocks of the rows that the MLP reads, of the rows that it would read unmerged.
        num_blocks: blocks of the tower.
    """

    keep_ratio: float
    num_blocks: int

    def after_attention(
        self, block_index: int, x_RD: Tensor, plan: LayoutPlan, q_RNH: Tensor, k_RNH: Tensor
    ) -> tuple[Tensor, LayoutPlan]:
        """See `NetworkReducer`."""
        assert plan.key_rows is None, "saliency is read from attention among a sequence's own rows"
        if block_index >= len(_REFERENCE_MERGES):
            return x_RD, plan
        num_merged = [
            vid_tldr_schedule(length, self.num_blocks, self.keep_ratio)[block_index]
            for length in plan.first_lengths
        ]
        if not any(num_merged):
            return x_RD, plan
        is_cls_R = plan.rows == 0
        saliency_R = packed_saliency(q_RNH.detach(), k_RNH.detach(), is_cls_R, plan.lengths)
        assignment_R, goes_R = bipartite_assignment(x_RD, is_cls_R, plan.lengths, num_merged)
        masses_R = torch.where(goes_R, plan.weights * saliency_R, plan.weights)
        return merge(x_RD, plan, assignment_R, num_merged, masses_R)


@functools.lru_cache(maxsize=4096)
def vid_tldr_schedule(length: int, num_blocks: int, keep_ratio: float) -> tuple[int, ...]:
    """Rows to merge in each block of a sequence that starts with `length` rows.

    The first three blocks in the proportion 600 : 200 : 100, each at most half the rows, the others none. One scale
    for the three, the least for which the rows after each block average to at most keep_ratio * length, so a larger
    keep_ratio never merges more; a keep_ratio below what halving three times gives is not reached.
    """

    def lengths_after(first_merge: int) -> list[int]:
        lengths, now = [], length
        for block in range(num_blocks):
            reference = _REFERENCE_MERGES[block] if block < len(_REFERENCE_MERGES) else 0
            merges = first_merge * reference // _REFERENCE_MERGES[0]
            now = max(now - merges, halved(now))
            lengths.append(now)
        return lengths

    return least_reduction(length, keep_ratio, lengths_after, strongest=length)


def saliency(attention_GLL: Tensor, is_cls_GL: Tensor) -> Tensor:
    """How much each row is foreground, from the sharpness of its attention.

    s = sum over keys of a log a (equation 5: the negative entropy of the head-mean attention). What is below the
    sequence's mean is background and gets 0 (the mask of equation 8); the others get (s - mean) / max(s - mean)
    (equation 9). The authors' code first scales s to [0, 1]; what follows takes any scale out again. Where all rows are
    equally sharp, all get 0.

    Args:
        attention_GLL: float [..., L queries, L keys], mean over heads, each query's weights adding up to 1.
        is_cls_GL: bool [..., L], rows that get 0 and have no part in mean and maximum.
    Returns:
        float [..., L], in [0, 1].
    """
    sharpness = -torch.special.entr(attention_GLL).sum(-1)
    least = sharpness.masked_fill(is_cls_GL, torch.inf).amin(-1, keepdim=True)
    shifted = (sharpness - least).masked_fill(is_cls_GL, 0)  # equal rows are then exactly 0, their mean too
    mean = shifted.sum(-1, keepdim=True) / (~is_cls_GL).sum(-1, keepdim=True)
    above = (shifted - mean).masked_fill(is_cls_GL, 0).clamp(min=0)
    largest = above.amax(-1, keepdim=True)
    return above / torch.where(largest > 0, largest, 1)


def packed_saliency(q_RNH: Tensor, k_RNH: Tensor, is_cls_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """`saliency` inside each packed sequence, from queries and keys: float32 [R]. A sequence of a CLS alone gets 0."""
    starts_of_length: dict[int, list[int]] = defaultdict(list)
    start = 0
    for length in lengths:
        starts_of_length[length].append(start)
        start += length
    q_RNH, k_RNH = at_least_float32(q_RNH), at_least_float32(k_RNH)
    saliency_R = q_RNH.new_zeros(len(q_RNH))
    for length, starts in starts_of_length.items():
        places_L = torch.arange(length, device=q_RNH.device)
        for starts_G in on_device(starts, q_RNH.device).split(max(1, _ROWS_AT_ONCE // length)):
            rows_GL = starts_G[:, None] + places_L
            attention_GLL = _mean_attention(q_RNH[rows_GL], k_RNH[rows_GL])
            saliency_R[rows_GL] = saliency(attention_GLL, is_cls_R[rows_GL])
    return saliency_R


def _mean_attention(q_GLNH: Tensor, k_GLNH: Tensor) -> Tensor:
    """[G, L, L]: softmax of q k' / sqrt(H), mean over heads."""
    q_GNLH, k_GNLH = q_GLNH.transpose(1, 2), k_GLNH.transpose(1, 2)
    logits = q_GNLH @ k_GNLH.transpose(2, 3) / q_GLNH.shape[-1] ** 0.5
    return logits.softmax(-1).mean(1)
