"""What the reducers inside the network share: matching rows in pairs, merging them, and the plan that remains.

Shapes: S sequences, R rows now and R' rows after a merge, K keys, D width, N heads, H head size, E any feature size.
A padded sequence has L places, dealt alternately to the sides A (even) and B (odd).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders.layouts import LayoutPlan


class NetworkReducer:
    """What `VideoEncoder` calls in every block; a method that is not overridden gives its arguments back."""

    def after_attention(
        self, block_index: int, x_RD: Tensor, plan: LayoutPlan, q_RNH: Tensor, k_RNH: Tensor
    ) -> tuple[Tensor, LayoutPlan]:
        """Between the two branches of a block. x_RD: with attention added; q, k: the block's, one a row."""
        return x_RD, plan

    def after_block(self, block_index: int, x_RD: Tensor, plan: LayoutPlan) -> tuple[Tensor, LayoutPlan]:
        """After the MLP has been added."""
        return x_RD, plan


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(values)]; the host does not wait for the copy."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def halved(length: int) -> int:
    """Fewest rows that one matching can leave of `length`, the CLS row among them: side A less the CLS goes."""
    return length - (length - 1) // 2


def least_reduction(
    length: int, keep_ratio: float, lengths_after: Callable[[int], list[int]], strongest: int
) -> tuple[int, ...]:
    """Rows to merge in each block, at the least strength whose mean length is at most keep_ratio * length.

    Args:
        length: rows before the first block.
        lengths_after: strength → rows that each block's MLP reads; none grows with the strength.
        strongest: the strength to take when none does.
    """
    limit = keep_ratio * length

    def is_enough(strength: int) -> bool:
        lengths = lengths_after(strength)
        return sum(lengths) <= limit * len(lengths)

    strength = bisect.bisect_left(range(strongest), True, key=is_enough)
    return tuple(before - after for before, after in itertools.pairwise([length, *lengths_after(strength)]))


def bipartite_assignment(
    metric_RE: Tensor, is_cls_R: Tensor, lengths: Sequence[int], num_merged: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3) inside each packed sequence.

    The rows of a sequence go alternately to A and B. Each row of A looks for the row of B with the largest cosine,
    and the `num_merged` best of these pairs merge. The sequence that remains is what is left of A, then B, each in
    its order (as in ToMe's code), so a CLS row, first in A and never merged, stays first. Where nothing merges, the
    order stays.

    Args:
        metric_RE: what is compared; no gradient flows through it.
        is_cls_R: bool [R], rows that must not be merged: at most the first of a sequence.
        lengths: rows of each sequence, S of them.
        num_merged: rows that each sequence loses, at most (length - 1) // 2.
    Returns:
        int64 [R], the new row of each row; bool [R], whether it was merged into one of B.
    """
    device, num_rows = metric_RE.device, len(metric_RE)
    lengths_S = on_device(lengths, device)
    starts_S = lengths_S.cumsum(0) - lengths_S
    num_places = max(lengths) + max(lengths) % 2
    places_L = torch.arange(num_places, device=device)
    is_row_SL = places_L < lengths_S[:, None]
    rows_SL = (starts_S[:, None] + places_L).clamp(max=num_rows - 1)
    best_SA, partner_SA = _best_partners(metric_RE, rows_SL, is_row_SL)
    may_go_SA = is_row_SL[:, 0::2] & ~is_cls_R[rows_SL[:, 0::2]]
    order_SA = best_SA.masked_fill(~may_go_SA, -torch.inf).argsort(dim=1, descending=True, stable=True)
    num_merged_S = on_device(num_merged, device)
    goes_SA = order_SA.argsort(dim=1) < num_merged_S[:, None]

    new_SL = _remaining_order(is_row_SL, goes_SA, partner_SA)
    new_starts_S = starts_S - (num_merged_S.cumsum(0) - num_merged_S)
    new_SL = torch.where(num_merged_S[:, None] == 0, new_starts_S[:, None] + places_L, new_SL)
    goes_SL = torch.stack([goes_SA, torch.zeros_like(goes_SA)], -1)
    sequence_R = torch.repeat_interleave(lengths_S, output_size=num_rows)
    place_R = sequence_R * num_places + torch.arange(num_rows, device=device) - starts_S[sequence_R]
    return new_SL.flatten()[place_R], goes_SL.flatten()[place_R]


def _remaining_order(is_row_SL: Tensor, goes_SA: Tensor, partner_SA: Tensor) -> Tensor:
    """int64 [S, L], the new row of each place: in each sequence what is left of A, then B."""
    stays_SL = torch.cat([is_row_SL[:, 0::2] & ~goes_SA, is_row_SL[:, 1::2]], 1)
    new_SA, new_SB = (stays_SL.flatten().cumsum(0) - 1).reshape(stays_SL.shape).chunk(2, 1)
    new_SA = torch.where(goes_SA, new_SB.gather(1, partner_SA), new_SA)
    return torch.stack([new_SA, new_SB], -1).flatten(1)


def _best_partners(metric_RE: Tensor, rows_SL: Tensor, is_row_SL: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each place of A with a row of B, and the place of B that it is with."""
    unit_RE = F.normalize(at_least_float32(metric_RE.detach()), dim=-1)
    cosines_SAB = unit_RE[rows_SL[:, 0::2]] @ unit_RE[rows_SL[:, 1::2]].transpose(1, 2)
    best = cosines_SAB.masked_fill(~is_row_SL[:, None, 1::2], -torch.inf).max(-1)
    return best.values, best.indices


def merge(
    x_RD: Tensor, plan: LayoutPlan, assignment_R: Tensor, num_merged: Sequence[int], masses_R: Tensor
) -> tuple[Tensor, LayoutPlan]:
    """Rows merged to their mean by mass, and the plan in which the masses have added up.

    num_merged: rows that each sequence loses.
    """
    lengths = [length - merged for length, merged in zip(plan.lengths, num_merged, strict=True)]
    x_new = merge_rows(x_RD, masses_R, assignment_R, sum(lengths))
    return x_new, merged_plan(plan, assignment_R, lengths, masses_R)


def merge_rows(x_RD: Tensor, masses_R: Tensor, assignment_R: Tensor, num_rows: int) -> Tensor:
    """Mean by mass of the rows that go to each new row; a row that goes there alone comes through bit by bit.

    Args:
        masses_R: float [R], >= 0, with a positive sum for every new row.
        assignment_R: int64 [R], the new row of each row, -1 for rows that are dropped.
        num_rows: R', the number of new rows.
    Returns:
        [R', D], the dtype of x.
    """
    target_R, masses_R = _targets(assignment_R, num_rows), masses_R.to(at_least_float32(x_RD).dtype)
    sums = masses_R.new_zeros(num_rows + 1).index_add(0, target_R, masses_R)
    shares_R = torch.where(assignment_R < 0, 0, masses_R / sums[target_R])
    x_new = shares_R.new_zeros(num_rows + 1, x_RD.shape[1]).index_add(0, target_R, x_RD * shares_R[:, None])
    return x_new[:num_rows].to(x_RD.dtype)


def merged_plan(
    plan: LayoutPlan, assignment_R: Tensor, lengths: Sequence[int], masses_R: Tensor
) -> LayoutPlan:
    """The plan after a merge inside its sequences.

    A merged row has the place (`rows`) of the first of its rows, and their masses in sum. Attention is proportional to
    size (ToMe, section 3, "Tracking token size"): softmax(q k' / sqrt(H) + log s). Where every row is a key, s is its
    mass. Where keys are chosen rows, s is the number of the sequence's keys that were merged into it: the keys
    repeated, each computed once; how many keys remain is then known only once the device has counted them.

    Args:
        assignment_R: int64 [R], the new row of each row, sequence by sequence, -1 for dropped ones (never a key).
        lengths: new rows of each sequence.
        masses_R: float [R], what each row brings; plan.weights for all that it stands for.
    """
    num_rows, device = sum(lengths), assignment_R.device
    target_R = _targets(assignment_R, num_rows)
    first = target_R.new_full((num_rows + 1,), len(target_R)).scatter_reduce(
        0, target_R, torch.arange(len(target_R), device=device), "amin"
    )
    weights = plan.weights.new_zeros(num_rows + 1).index_add(0, target_R, masses_R.to(plan.weights.dtype))
    cu_q = on_device([0, *itertools.accumulate(lengths)], device).int()
    key_rows, cu_k, max_k, key_bias = plan.key_rows, cu_q, max(lengths), weights[:num_rows].log()
    if key_rows is not None:
        key_rows, cu_k, max_k, key_bias = _merged_keys(plan, assignment_R[key_rows], num_rows)
    return replace(
        plan,
        rows=plan.rows[first[:num_rows]],
        cu_q=cu_q,
        key_rows=key_rows,
        cu_k=cu_k,
        max_k=max_k,
        weights=weights[:num_rows],
        key_bias=key_bias,
        lengths=tuple(lengths),
        owner=_composed(plan.owner, assignment_R),
    )


def _targets(assignment_R: Tensor, num_rows: int) -> Tensor:
    """The new row of each row; one more row takes what is dropped."""
    return torch.where(assignment_R < 0, num_rows, assignment_R)


def _composed(owner: Tensor | None, assignment_R: Tensor) -> Tensor:
    return assignment_R if owner is None else torch.where(owner < 0, -1, assignment_R[owner.clamp(min=0)])


def _merged_keys(plan: LayoutPlan, key_rows_K: Tensor, num_rows: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Each row once a sequence, in order of first appearance: key_rows, cu_k, max_k, key_bias = log(keys in it)."""
    counts_K = torch.ones_like(key_rows_K, dtype=torch.float32)
    if plan.key_bias is not None:
        counts_K = plan.key_bias.exp()
    num_sequences, num_keys = len(plan.cu_k) - 1, len(key_rows_K)
    sequence_K = torch.repeat_interleave(plan.cu_k.diff().long(), output_size=num_keys)
    pairs, pair_of_K = (sequence_K * num_rows + key_rows_K).unique(return_inverse=True)
    first = torch.full_like(pairs, num_keys).scatter_reduce(
        0, pair_of_K, torch.arange(num_keys, device=pairs.device), "amin"
    )
    order = first.argsort()
    key_bias = torch.zeros_like(pairs, dtype=torch.float32).index_add(0, pair_of_K, counts_K).log()
    per_sequence = torch.bincount(pairs // num_rows, minlength=num_sequences)
    cu_k = F.pad(per_sequence.cumsum(0), (1, 0)).int()
    return (pairs % num_rows)[order], cu_k, int(per_sequence.max()), key_bias[order]


def at_least_float32(x: Tensor) -> Tensor:
    """Sums of many rows and cosines are taken in float32 even where the network runs in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
