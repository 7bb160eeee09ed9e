"""vid-TLDR against loops over one sequence, and its saliency by hand.

Shapes: S sequences, R rows, D width, N heads, H head size, L rows of one sequence.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_plans import HEADS, assert_consistent, one_sequence, plan_of, random_rows, run_tower
from torch import Tensor

from rlt_retrieval.encoders.reducers import vid_tldr
from rlt_retrieval.encoders.reducers.merging import bipartite_assignment, halved
from rlt_retrieval.encoders.reducers.vid_tldr import (
    VidTldr,
    packed_saliency,
    saliency,
    vid_tldr_schedule,
)


def naive_saliency(q_LNH: Tensor, k_LNH: Tensor, has_cls: bool) -> list[float]:
    length, num_heads, head_size = q_LNH.shape
    sharpness = []
    for query in range(length):
        mean_L = sum(
            (k_LNH[:, head] @ q_LNH[query, head] / math.sqrt(head_size)).softmax(0)
            for head in range(num_heads)
        )
        sharpness.append(sum(float(a / num_heads) * math.log(a / num_heads) for a in mean_L))
    patches = range(int(has_cls), length)
    least = min(sharpness[row] for row in patches)
    largest = max(sharpness[row] - least for row in patches)
    scaled = {row: (sharpness[row] - least) / largest for row in patches}
    mean = sum(scaled.values()) / len(scaled)
    top = max(scaled[row] - mean for row in patches)
    return [
        (scaled[row] - mean) / top if row in scaled and scaled[row] >= mean else 0.0 for row in range(length)
    ]


def test_saliency_by_hand() -> None:
    """Negative entropies -log 2, 0 and -log 4: scaled 1/2, 1 and 0, mean 1/2, so only the sharpest is salient."""
    attention_LL = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1.0, 0], [0.25, 0.25, 0.25, 0.25]])
    seen = saliency(attention_LL, torch.zeros(3, dtype=torch.bool))
    assert seen.tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_saliency_between_background_and_the_sharpest() -> None:
    """Keys shared by 8, 2, 4 and 1 at equal parts: -log2 entropies -3, -1, -2, 0, scaled 0, 2/3, 1/3, 1."""
    attention_LL = torch.zeros(4, 8)
    for query, count in enumerate((8, 2, 4, 1)):
        attention_LL[query, :count] = 1 / count
    seen = saliency(attention_LL, torch.zeros(4, dtype=torch.bool))
    assert seen.tolist() == pytest.approx([0, 1 / 3, 0, 1], abs=1e-6)  # less the mean 1/2, over 1/2


def test_a_cls_takes_no_part_in_the_scale() -> None:
    """The same rows after a CLS that is duller, or sharper, than all of them."""
    attention_LL = torch.zeros(5, 16)
    for cls_count in (16, 1):
        for query, count in enumerate((cls_count, 8, 4, 4, 2)):
            attention_LL[query] = torch.where(torch.arange(16) < count, 1 / count, 0)
        seen = saliency(attention_LL, torch.tensor([True, False, False, False, False]))
        assert seen.tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)


@pytest.mark.parametrize("length", [3, 5, 7, 11, 13])
def test_equally_sharp_rows_are_all_background(length: int) -> None:
    """Whatever rounding makes of the mean of equal numbers."""
    attention_GLL = torch.full((2, length, length), 1 / length)
    seen = saliency(attention_GLL, torch.zeros(2, length, dtype=torch.bool))
    assert torch.equal(seen, torch.zeros(2, length))


@pytest.mark.parametrize("has_cls", [True, False])
def test_packed_saliency_equals_loops(has_cls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of one length are taken together, a few at a time."""
    monkeypatch.setattr(vid_tldr, "_ROWS_AT_ONCE", 14)
    lengths = [7, 5, 7, 2, 7, 5]
    plan = plan_of(lengths, has_cls=has_cls)
    q_RNH, k_RNH = (random_rows(plan, seed).unflatten(1, (HEADS, -1)) for seed in (1, 2))
    seen = packed_saliency(q_RNH, k_RNH, plan.rows == 0, lengths)
    for q_LNH, k_LNH, part in zip(
        q_RNH.split(lengths), k_RNH.split(lengths), seen.split(lengths), strict=True
    ):
        if len(part) > 2:  # a CLS and one patch: the patch is least and largest
            assert part.tolist() == pytest.approx(naive_saliency(q_LNH, k_LNH, has_cls), abs=1e-9)


def test_a_cls_alone_has_no_saliency() -> None:
    plan = plan_of([1, 3])
    q_RNH = random_rows(plan).unflatten(1, (HEADS, -1))
    assert packed_saliency(q_RNH, q_RNH, plan.rows == 0, [1, 3])[0] == 0


@pytest.mark.parametrize("has_cls", [True, False])
def test_one_step_equals_loops(has_cls: bool) -> None:
    """What merges brings its mass times its saliency; what it merges into keeps its whole mass."""
    masses = [1.0, 2.0, 1.0, 5.0, 1.0, 3.0, 1.0, 1.0, 2.0]
    plan = plan_of([9], weights=torch.tensor(masses), has_cls=has_cls)
    x_RD = random_rows(plan)
    q_RNH, k_RNH = (random_rows(plan, seed).unflatten(1, (HEADS, -1)) for seed in (1, 2))
    x_new, plan_new = VidTldr(keep_ratio=0.5, num_blocks=1).after_attention(0, x_RD, plan, q_RNH, k_RNH)
    assignment_R, goes_R = bipartite_assignment(x_RD, plan.rows == 0, [9], [4])
    salient = naive_saliency(q_RNH, k_RNH, has_cls)
    brought = [m * s if goes else m for m, s, goes in zip(masses, salient, goes_R.tolist(), strict=True)]
    assert int(goes_R.sum()) == 4
    for new in range(5):
        members = [row for row in range(9) if assignment_R[row] == new]
        mass = sum(brought[row] for row in members)
        mean_D = sum(brought[row] * x_RD[row] for row in members) / mass
        torch.testing.assert_close(x_new[new], mean_D, rtol=1e-6, atol=1e-6)
        assert float(plan_new.weights[new]) == pytest.approx(mass, rel=1e-5)
    assert plan_new.key_bias is not None
    torch.testing.assert_close(plan_new.key_bias, plan_new.weights.log())
    assert plan_new.owner is not None
    assert plan_new.owner.tolist() == assignment_R.tolist()


def test_background_leaves_no_trace() -> None:
    """Equal attention everywhere: every row is background, so what stays is as it was."""
    plan = plan_of([8])
    x_RD = random_rows(plan)
    q_RNH = torch.zeros(8, HEADS, 4, dtype=torch.float64)
    x_new, plan_new = VidTldr(0.7, 1).after_attention(0, x_RD, plan, q_RNH, q_RNH)
    assert len(x_new) == 5
    assert set(map(tuple, x_new.tolist())) < set(map(tuple, x_RD.tolist()))
    assert torch.equal(plan_new.weights, torch.ones(5))


@pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 0.9])
def test_packed_equals_one_at_a_time(keep_ratio: float) -> None:
    plan = plan_of([9, 4, 14, 9])
    x_RD = random_rows(plan)
    reducer = VidTldr(keep_ratio, num_blocks=5)
    x_all, plans = run_tower(reducer, x_RD, plan, num_blocks=5)
    alone = []
    for sequence in range(4):
        rows, plan_alone = one_sequence(plan, sequence)
        alone.append(run_tower(reducer, x_RD[rows], plan_alone, num_blocks=5)[0])
    torch.testing.assert_close(x_all, torch.cat(alone), rtol=1e-6, atol=1e-6)
    again, _ = run_tower(reducer, x_RD, plan, num_blocks=5)
    assert torch.equal(x_all, again)
    for after in plans:
        assert_consistent(after, plan)
    assert len(plans[2].rows) == len(plans[4].rows) < len(plan.rows)


def test_keeping_all_changes_nothing() -> None:
    plan = plan_of([9, 4])
    x_RD = random_rows(plan)
    x_new, plan_new = VidTldr(1.0, 12).after_attention(0, x_RD, plan, x_RD[:, None], x_RD[:, None])
    assert x_new is x_RD
    assert plan_new is plan


def test_gradients_are_finite_and_reach_what_stays() -> None:
    plan = plan_of([9, 6])
    x_RD = random_rows(plan).requires_grad_()
    merged, _ = run_tower(VidTldr(0.5, 4), x_RD, plan, num_blocks=4)
    (gradient,) = torch.autograd.grad(merged.square().sum(), x_RD)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).all()  # through attention, even where a row's own mass is gone


def lengths_after(length: int, merges: Sequence[int]) -> list[int]:
    return [length - sum(merges[: block + 1]) for block in range(len(merges))]


def test_the_published_merges_are_one_point_of_the_schedule() -> None:
    """12 frames of 196 rows, 12 blocks: 1752, 1552 and ten times 1452 rows."""
    keep_ratio = (1752 + 1552 + 10 * 1452) / (12 * 2352)
    assert vid_tldr_schedule(2352, 12, keep_ratio) == (600, 200, 100, *[0] * 9)


@given(st.integers(1, 3000), st.integers(1, 14), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(deadline=None)
def test_schedule_is_bounded_meets_its_share_and_is_monotone(
    length: int, num_blocks: int, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    strong, weak = (
        lengths_after(length, vid_tldr_schedule(length, num_blocks, keep)) for keep in (less, more)
    )
    halving, now = [], length
    for block in range(num_blocks):
        now = halved(now) if block < 3 else now
        halving.append(now)
    for lengths, keep in ((strong, less), (weak, more)):
        assert all(
            halved(before) <= after <= before
            for before, after in zip([length, *lengths], lengths, strict=False)
        )
        assert lengths[2:] == lengths[2:3] * (num_blocks - 2)
        assert sum(lengths) <= keep * length * num_blocks + 1e-6 or lengths == halving
    assert all(a <= b for a, b in zip(strong, weak, strict=True))
