"""Token merging (ToMe, arXiv 2210.09461): in every block the most similar rows become one.

Shapes: R rows, D width, N heads, H head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.reducers.merging import (
    NetworkReducer,
    bipartite_assignment,
    halved,
    least_reduction,
    merge,
)


@dataclass(frozen=True)
class TokenMerging(NetworkReducer):
    """ToMe on packed sequences of any lengths, between attention and MLP of every block.

    Rows are matched on the block's keys, averaged over heads (section 3, "Token similarity"; `bipartite_assignment`),
    a pair becomes its mean by size, and attention is proportional to size (section 3, "Tracking token size";
    `merged_plan`). Sizes start as plan.weights: 1, or the run lengths of RLT in layout "joint"; where they are not 1,
    the first plan must have their logarithm as its key_bias, as all later ones have. A sequence is a frame or a clip,
    as the layout has it; rows of different sequences never merge, nor does a CLS row. What was read is the code of
    the authors and not the paper's text, so section titles stand here for equation numbers.

    Differs from the authors' code: r is a constant share of each sequence, so that sequences of different lengths
    lose equally much (`tome_schedule`), and towers without CLS keep the order of rows as towers with one do. Where
    keys carry rotary positions, those take part in the similarity.

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
        num_merged = [
            tome_schedule(length, self.num_blocks, self.keep_ratio)[block_index]
            for length in plan.first_lengths
        ]
        if not any(num_merged):
            return x_RD, plan
        assignment_R, _ = bipartite_assignment(k_RNH.mean(1), plan.rows == 0, plan.lengths, num_merged)
        return merge(x_RD, plan, assignment_R, num_merged, plan.weights)


@functools.lru_cache(maxsize=4096)
def tome_schedule(length: int, num_blocks: int, keep_ratio: float) -> tuple[int, ...]:
    """Rows to merge in each block of a sequence that starts with `length` rows.

    The same number r in every block, as in ToMe's constant schedule, but for rounding (r need not be whole, so that
    any cost can be met) and for ToMe's bound of half the rows a step. r is the least for which the rows after each
    block average to at most keep_ratio * length, so a larger keep_ratio never merges more; a keep_ratio below what
    halving in every block gives is not reached.
    """

    def lengths_after(total: int) -> list[int]:
        lengths, now = [], length
        for block in range(1, num_blocks + 1):
            now = max(length - block * total // num_blocks, halved(now))
            lengths.append(now)
        return lengths

    return least_reduction(length, keep_ratio, lengths_after, strongest=length * num_blocks)
