"""Token merging against loops over one sequence, and what merging does to a plan.

Shapes: S sequences, R rows, K keys, D width, E feature size, N heads, H head size.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_plans import (
    HEADS,
    WIDTH,
    assert_consistent,
    one_sequence,
    plan_of,
    random_rows,
    run_tower,
    with_keys,
)
from torch import Tensor

from rlt_retrieval.encoders.attention import attend_rows
from rlt_retrieval.encoders.reducers.merging import (
    bipartite_assignment,
    halved,
    merge,
    merge_rows,
    merged_plan,
)
from rlt_retrieval.encoders.reducers.tome import TokenMerging, tome_schedule


def naive_assignment(metric_RE: Tensor, has_cls: bool, num_merged: int) -> list[int]:
    """New row of each row of one sequence: ToMe, step by step."""
    side_a, side_b = range(0, len(metric_RE), 2), range(1, len(metric_RE), 2)

    def cosine(a: int, b: int) -> float:
        return float(metric_RE[a] @ metric_RE[b] / (metric_RE[a].norm() * metric_RE[b].norm()))

    edges = []
    for a in side_a:
        if has_cls and a == 0:
            continue
        if len(side_b):
            partner = max(side_b, key=lambda b: cosine(a, b))
            edges.append((cosine(a, partner), a, partner))
    if num_merged == 0:
        return list(range(len(metric_RE)))
    edges.sort(key=lambda edge: -edge[0])
    partners = {a: b for _, a, b in edges[:num_merged]}
    stay = [a for a in side_a if a not in partners] + list(side_b)
    return [stay.index(partners.get(row, row)) for row in range(len(metric_RE))]


def naive_means(x_RD: Tensor, sizes: Sequence[float], assignment: Sequence[int]) -> Tensor:
    means = []
    for new in range(max(assignment) + 1):
        members = [row for row, target in enumerate(assignment) if target == new]
        total = sum(sizes[row] for row in members)
        means.append(sum(sizes[row] * x_RD[row] for row in members) / total)
    return torch.stack(means)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_packed_matching_equals_loops(sequences: list[tuple[int, float]], has_cls: bool, seed: int) -> None:
    lengths = [length for length, _ in sequences]
    num_merged = [round(share * ((length - 1) // 2)) for length, share in sequences]
    plan = plan_of(lengths, has_cls=has_cls)
    metric_RE = random_rows(plan, seed)
    assignment_R, goes_R = bipartite_assignment(metric_RE, plan.rows == 0, lengths, num_merged)
    expected, start = [], 0
    for part, merged in zip(metric_RE.split(lengths), num_merged, strict=True):
        expected += [start + new for new in naive_assignment(part, has_cls, merged)]
        start += len(part) - merged
    assert assignment_R.tolist() == expected
    assert int(goes_R.sum()) == sum(num_merged)
    assert not goes_R[plan.rows == 0].any()


def test_matching_by_hand() -> None:
    """CLS a0, then b0 a1 b1 a2: a1 is closest to b1 and a2 to b0, the latter pair is the better one."""
    metric_RE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.3, 1.0], [2.0, 0.1]])
    is_cls_R = torch.tensor([True, False, False, False, False])
    assignment_R, goes_R = bipartite_assignment(metric_RE, is_cls_R, [5], [1])
    assert assignment_R.tolist() == [0, 2, 1, 3, 2]  # what is left of A: a0 a1; then B: b0 b1
    assert goes_R.tolist() == [False, False, False, False, True]


def test_rows_merge_to_their_mean_by_size() -> None:
    x_RD = torch.tensor([[1.0], [5.0], [2.0], [7.0]])
    merged = merge_rows(x_RD, torch.tensor([1.0, 3.0, 1.0, 1.0]), torch.tensor([0, 0, 1, -1]), 2)
    assert merged.tolist() == [[4.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_alone_comes_through_bit_by_bit(dtype: torch.dtype) -> None:
    x_RD = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes_R = torch.tensor([1.0, 3.0, 7.0, 1.0, 1.0, 0.3])
    merged = merge_rows(x_RD, sizes_R, torch.tensor([0, 1, 2, 3, 3, 4]), 5)
    assert merged.dtype == dtype
    assert torch.equal(merged[[0, 1, 2, 4]], x_RD[[0, 1, 2, 5]])


def test_gradients_are_the_shares() -> None:
    x_RD = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    sizes_R, assignment_R = torch.tensor([1.0, 2.0, 3.0, 1.0, 4.0]), torch.tensor([1, 0, 1, -1, 0])
    merged = merge_rows(x_RD, sizes_R, assignment_R, 2)
    grad_out = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(merged, x_RD, grad_out)
    shares = torch.tensor([1 / 4, 2 / 6, 3 / 4, 0, 4 / 6], dtype=torch.float64)
    expected = shares[:, None] * grad_out[assignment_R.clamp(min=0)]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("has_cls", [True, False])
def test_one_step_equals_loops(has_cls: bool) -> None:
    """Keys averaged over heads are compared; the rows themselves merge, by size."""
    sizes = [1.0, 2.0, 1.0, 5.0, 1.0, 3.0, 1.0, 1.0, 2.0]
    plan = plan_of([9], weights=torch.tensor(sizes), has_cls=has_cls)
    x_RD = random_rows(plan)
    k_RNH = random_rows(plan, seed=1).unflatten(1, (HEADS, -1))
    reducer = TokenMerging(keep_ratio=0.6, num_blocks=2)
    merges = tome_schedule(9, 2, 0.6)
    x_new, plan_new = reducer.after_attention(0, x_RD, plan, k_RNH, k_RNH)
    expected = naive_assignment(sum(k_RNH[:, head] for head in range(HEADS)) / HEADS, has_cls, merges[0])
    assert merges[0] > 0
    torch.testing.assert_close(x_new, naive_means(x_RD, sizes, expected), rtol=1e-12, atol=1e-12)
    assert plan_new.owner is not None
    assert plan_new.owner.tolist() == expected
    new_sizes = [
        sum(s for s, t in zip(sizes, expected, strict=True) if t == new) for new in range(len(x_new))
    ]
    assert plan_new.weights.tolist() == new_sizes
    assert plan_new.key_bias is not None
    assert plan_new.key_bias.tolist() == pytest.approx([math.log(size) for size in new_sizes], abs=1e-6)


@pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 0.9])
def test_packed_equals_one_at_a_time(keep_ratio: float) -> None:
    plan = plan_of([9, 4, 1, 14, 9], weights=torch.arange(1.0, 38.0))
    x_RD = random_rows(plan)
    reducer = TokenMerging(keep_ratio, num_blocks=4)
    x_all, plans = run_tower(reducer, x_RD, plan, num_blocks=4)
    alone = []
    for sequence in range(5):
        rows, plan_alone = one_sequence(plan, sequence)
        alone.append(run_tower(reducer, x_RD[rows], plan_alone, num_blocks=4)[0])
    assert plans[-1].cu_q.diff().tolist() == [len(x) for x in alone]
    torch.testing.assert_close(x_all, torch.cat(alone), rtol=1e-9, atol=1e-9)
    again, _ = run_tower(reducer, x_RD, plan, num_blocks=4)
    assert torch.equal(x_all, again)


def test_keeping_all_changes_nothing() -> None:
    plan = plan_of([9, 4])
    x_RD = random_rows(plan)
    x_new, plan_new = TokenMerging(1.0, 3).after_attention(1, x_RD, plan, x_RD[:, None], x_RD[:, None])
    assert x_new is x_RD
    assert plan_new is plan


def test_plans_stay_consistent_and_sizes_add_up() -> None:
    plan = plan_of([12, 7, 10], weights=torch.arange(1.0, 30.0))
    _, plans = run_tower(TokenMerging(0.5, 4), random_rows(plan), plan, num_blocks=4)
    for after in plans:
        assert_consistent(after, plan)
        totals = [part.sum().item() for part in after.weights.split(after.cu_q.diff().tolist())]
        assert totals == [part.sum().item() for part in plan.weights.split([12, 7, 10])]
        by_owner = torch.zeros(len(after.rows)).index_add(0, after.owner, plan.weights)
        assert torch.equal(by_owner, after.weights)
    assert [len(after.rows) for after in plans] == [
        29 - sum(sum(tome_schedule(length, 4, 0.5)[: block + 1]) for length in (12, 7, 10))
        for block in range(4)
    ]


def test_merged_copies_give_what_the_copies_gave() -> None:
    """A CLS, 13 copies of one patch and 3 others among them: with attention by size, merging copies is exact."""
    generator = torch.Generator().manual_seed(0)
    different = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    x_RD = different[[0, 1, 1, 2, 1, 1, 1, 3, 1, 1, 1, 1, 4, 1, 1, 1, 1]]
    plan = plan_of([17])
    dense, _ = run_tower(None, x_RD, plan, num_blocks=3)
    merged, plans = run_tower(TokenMerging(0.7, 3), x_RD, plan, num_blocks=3)
    assert len(merged) == 8
    torch.testing.assert_close(merged[plans[-1].owner], dense, rtol=1e-6, atol=1e-6)


def test_gradients_reach_every_row() -> None:
    plan = plan_of([9, 6])
    x_RD = random_rows(plan).requires_grad_()
    merged, _ = run_tower(TokenMerging(0.5, 3), x_RD, plan, num_blocks=3)
    (gradient,) = torch.autograd.grad(merged.square().sum(), x_RD)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).all()


def test_chosen_keys_count_as_often_as_they_repeat() -> None:
    """Layout "frame" after RLT: softmax over the repeated keys, each computed once, through two merges."""
    plan = with_keys(plan_of([5, 4, 2]), [[0, 1, 2, 3, 4], [5, 1, 6, 7, 8], [9, 1, 6, 7, 10]])
    first_R = torch.tensor([0, 1, 1, 1, 2, 3, 4, 5, 4, 6, 7])
    second_R = torch.tensor([0, 1, 1, 2, 3, 3, 4, 5])
    ones = torch.ones(11)
    once = merged_plan(plan, first_R, [3, 3, 2], ones)
    twice = merged_plan(once, second_R, [2, 2, 2], once.weights)
    assert once.key_rows is not None
    assert once.key_rows.tolist() == [0, 1, 2, 3, 1, 4, 5, 6, 1, 4, 5, 7]
    assert once.key_bias is not None
    assert once.key_bias.exp().round().tolist() == [1, 3, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert once.cu_k.tolist() == [0, 3, 7, 12]
    assert once.max_k == 5
    repeated = with_keys(twice, [second_R[first_R[keys]].tolist() for keys in plan.key_rows.split(5)])
    x_RD = random_rows(twice).unflatten(1, (HEADS, -1))
    seen = attend_rows(x_RD, x_RD, x_RD, twice, backend="sdpa")
    expected = []
    for sequence, keys in enumerate(repeated.key_rows.split(5)):
        for query in range(*twice.cu_q[sequence : sequence + 2].tolist()):
            for head in range(HEADS):
                logits = x_RD[keys, head] @ x_RD[query, head] / (WIDTH / HEADS) ** 0.5
                expected.append(logits.softmax(0) @ x_RD[keys, head])
    torch.testing.assert_close(seen.flatten(0, 1), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_frames_with_chosen_keys_run_through_a_tower() -> None:
    plan = with_keys(plan_of([9, 5], clips=[0, 0]), [[*range(9)], [9, 1, 2, 3, 4, 10, 11, 12, 13]])
    _, plans = run_tower(TokenMerging(0.6, 3), random_rows(plan), plan, num_blocks=3)
    for after in plans:
        assert_consistent(after, plan)
        counts = after.key_bias.exp().split(after.cu_k.diff().tolist())
        assert [round(float(part.sum()), 3) for part in counts] == [9, 9]
        assert [rows[0].item() for rows in after.key_rows.split(after.cu_k.diff().tolist())] == (
            after.first_rows.tolist()
        )


def test_dropped_rows_have_no_owner_ever_after() -> None:
    plan = plan_of([4])
    once = merged_plan(plan, torch.tensor([0, -1, 1, 2]), [3], torch.ones(4))
    _, twice = merge(random_rows(once), once, torch.tensor([0, 1, 1]), [1], once.weights)
    assert twice.owner is not None
    assert twice.owner.tolist() == [0, -1, 1, 1]
    assert twice.rows.tolist() == [0, 2]
    assert twice.weights.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("keep_ratio", "merges"),
    [(1.0, (0, 0, 0, 0)), (0.75, (10, 10, 10, 10)), (0.6, (16, 16, 16, 16)), (0.1, (49, 25, 12, 6))],
)
def test_schedule_by_hand(keep_ratio: float, merges: tuple[int, ...]) -> None:
    """100 rows, 4 blocks: 100 - (10 + 20 + 30 + 40) / 4 = 75; from 0.2475 down, halving is all there is."""
    assert tome_schedule(100, 4, keep_ratio) == merges


def lengths_after(length: int, merges: Sequence[int]) -> list[int]:
    return [length - sum(merges[: block + 1]) for block in range(len(merges))]


@given(st.integers(1, 300), st.integers(1, 14), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(deadline=None)
def test_schedule_is_bounded_meets_its_share_and_is_monotone(
    length: int, num_blocks: int, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    strong, weak = (lengths_after(length, tome_schedule(length, num_blocks, keep)) for keep in (less, more))
    halving, now = [], length
    for _ in range(num_blocks):
        now = halved(now)
        halving.append(now)
    for lengths, keep in ((strong, less), (weak, more)):
        for before, after in zip([length, *lengths], lengths, strict=False):
            assert halved(before) <= after <= before
        limit = keep * length * num_blocks
        assert sum(lengths) <= limit + 1e-6 or lengths == halving
        assert sum(lengths) > limit - num_blocks - 1e-6 or sum(lengths) == length * num_blocks
    assert all(a <= b for a, b in zip(strong, weak, strict=True))
