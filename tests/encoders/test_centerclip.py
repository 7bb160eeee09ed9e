"""CenterCLIP's clustering against loops over one segment, and the segments that it leaves.

Shapes: S sequences, R rows, D width, G sets of N points, K medoids.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_plans import assert_consistent, plan_of, random_rows, run_tower
from torch import Tensor

from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.reducers.centerclip import CenterClip, k_medoids
from rlt_retrieval.errors import ModelError


def naive_k_medoids(x_ND: Tensor, num_medoids: int) -> list[int]:
    points = range(len(x_ND))

    def distance(i: int, j: int) -> float:
        return -1.0 if i == j else float((x_ND[i] - x_ND[j]).norm())

    medoids = [max(points, key=lambda i: float(x_ND[i].norm()))]
    while len(medoids) < num_medoids:
        medoids.append(max(points, key=lambda i: min(distance(i, m) for m in medoids)))
    for _ in range(100):
        nearest = [min(range(num_medoids), key=lambda c: distance(medoids[c], i)) for i in points]
        clusters = [[i for i in points if nearest[i] == c] for c in range(num_medoids)]
        moved = [min(members, key=lambda i: sum(distance(i, j) for j in members)) for members in clusters]
        if moved == medoids:
            break
        medoids = moved
    return sorted(medoids)


@given(st.integers(1, 14), st.floats(0, 1), st.integers(0, 10_000))
@settings(deadline=None)
def test_medoids_equal_loops(num_points: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_GND = torch.randn(3, num_points, 4, generator=generator, dtype=torch.float64)
    num_medoids = max(1, round(share * num_points))
    expected = [naive_k_medoids(x_ND, num_medoids) for x_ND in x_GND]
    assert k_medoids(x_GND, num_medoids).tolist() == expected


def test_medoids_by_hand() -> None:
    """The far point 9 comes first, then 0; of {0, 1, 2} the middle is the medoid, and 9 stays alone."""
    x_GND = torch.tensor([[[0.0], [1.0], [9.0], [2.0]]])
    assert k_medoids(x_GND, 2).tolist() == [[1, 2]]


def test_copies_are_different_points() -> None:
    x_GND = torch.ones(2, 5, 3)
    assert k_medoids(x_GND, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert k_medoids(x_GND, 2).tolist() == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("keep_ratio", "num_segments"), [(0.75, 6), (2 / 3, 4), (0.625, 3)], ids=["half", "third", "quarter"]
)
def test_published_settings_are_points_of_the_schedule(keep_ratio: float, num_segments: int) -> None:
    """ViT-B/32, 12 frames of 49 patches: after 6 of 12 blocks, 49 medoids in each of 6, 4 or 3 segments."""
    reducer = CenterClip(keep_ratio, num_blocks=12)
    assert reducer.blocks_before == 6
    assert reducer.segments(num_frames=12, num_patches=49, num_cls=1) == (num_segments, 49)


def rows_per_block(reducer: CenterClip, num_frames: int, num_patches: int, num_cls: int) -> list[int]:
    num_segments, num_medoids = reducer.segments(num_frames, num_patches, num_cls)
    before = [num_frames * (num_patches + num_cls)] * reducer.blocks_before
    after = [num_segments * (num_medoids + num_cls)] * (reducer.num_blocks - reducer.blocks_before)
    return before + after


@given(
    st.integers(1, 32),
    st.integers(4, 60),
    st.integers(0, 1),
    st.integers(2, 14),
    st.floats(0.01, 0.999),
    st.floats(0.01, 0.999),
)
@settings(deadline=None)
def test_schedule_meets_its_share_and_is_monotone_but_for_rounding(
    num_frames: int, num_patches: int, num_cls: int, num_blocks: int, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    full = num_blocks * num_frames * (num_patches + num_cls)
    sums = []
    for keep_ratio in (less, more):
        reducer = CenterClip(keep_ratio, num_blocks)
        num_segments, num_medoids = reducer.segments(num_frames, num_patches, num_cls)
        assert 1 <= num_segments <= num_frames
        assert 1 <= num_medoids <= num_frames // num_segments * num_patches
        rows = rows_per_block(reducer, num_frames, num_patches, num_cls)
        least = rows[0] * reducer.blocks_before + (1 + num_cls) * (num_blocks - reducer.blocks_before)
        assert sum(rows) <= max(keep_ratio * full * (1 + 1e-6), least)
        sums.append(sum(rows))
    assert sums[0] <= sums[1] + num_frames * num_blocks


def expected_segments(
    x_RD: Tensor, frame_length: int, num_cls: int, cuts: Sequence[int], num_medoids: int
) -> Tensor:
    """Of one clip's rows: mean CLS and medoids of the frames between each two cuts."""
    parts = []
    for first, last in itertools.pairwise(cuts):
        frames = x_RD[first * frame_length : last * frame_length].unflatten(0, (-1, frame_length))
        patches = frames[:, num_cls:].flatten(0, 1)
        parts.append(frames[:, :num_cls].mean(0))
        parts.append(patches[naive_k_medoids(patches, num_medoids)])
    return torch.cat(parts)


def clustered(reducer: CenterClip, x_RD: Tensor, plan: LayoutPlan) -> tuple[Tensor, LayoutPlan]:
    return reducer.after_block(reducer.blocks_before - 1, x_RD, plan)


@pytest.mark.parametrize("has_cls", [True, False])
def test_one_clustering_equals_loops(has_cls: bool) -> None:
    """Two clips, of 5 and of 4 frames, two segments each; a segment has more frames when they do not go evenly."""
    num_cls = int(has_cls)
    plan = plan_of([6] * 9, clips=[0] * 5 + [1] * 4, has_cls=has_cls)
    x_RD = random_rows(plan)
    reducer = CenterClip(0.75, num_blocks=4)
    counts = [reducer.segments(frames, 6 - num_cls, num_cls) for frames in (5, 4)]
    assert [num_segments for num_segments, _ in counts] == [2, 2]
    x_new, plan_new = clustered(reducer, x_RD, plan)
    expected = torch.cat(
        [
            expected_segments(x_RD[:30], 6, num_cls, [0, 2, 5], counts[0][1]),
            expected_segments(x_RD[30:], 6, num_cls, [0, 2, 4], counts[1][1]),
        ]
    )
    torch.testing.assert_close(x_new, expected, rtol=1e-12, atol=1e-12)
    assert plan_new.clip_of_sequence.tolist() == [0, 0, 1, 1]
    assert plan_new.sequence_weights.tolist() == [2, 3, 2, 2]
    assert plan_new.cu_q.diff().tolist() == [num_cls + medoids for _, medoids in counts for _ in range(2)]
    assert plan_new.key_bias is None
    assert torch.equal(plan_new.weights, torch.ones(len(x_new)))
    assert_consistent(plan_new, plan)


def test_medoids_go_on_bit_by_bit_and_the_rest_is_dropped() -> None:
    plan = plan_of([6] * 4, clips=[0] * 4)
    x_RD = random_rows(plan)
    x_new, plan_new = clustered(CenterClip(0.75, num_blocks=4), x_RD, plan)
    assert plan_new.owner is not None
    kept = [
        (row, owner) for row, owner in enumerate(plan_new.owner.tolist()) if owner >= 0 and plan.rows[row]
    ]
    assert len(kept) == len(x_new) - 2
    assert [owner for _, owner in kept] == sorted(owner for _, owner in kept)
    for row, owner in kept:
        assert torch.equal(x_new[owner], x_RD[row])
        assert plan_new.rows[owner] == plan.rows[row]
    assert plan_new.owner.tolist().count(-1) == 24 - 4 - len(kept)


@pytest.mark.parametrize("keep_ratio", [0.2, 0.5, 0.7, 0.95])
def test_packed_equals_one_clip_at_a_time(keep_ratio: float) -> None:
    plan = plan_of([6] * 9, clips=[0] * 5 + [1] * 3 + [2])
    x_RD = random_rows(plan)
    reducer = CenterClip(keep_ratio, num_blocks=4)
    x_all, plans = run_tower(reducer, x_RD, plan, num_blocks=4)
    alone = []
    for part in x_RD.split([30, 18, 6]):
        plan_alone = plan_of([6] * (len(part) // 6), clips=[0] * (len(part) // 6))
        alone.append(run_tower(reducer, part, plan_alone, num_blocks=4)[0])
    torch.testing.assert_close(x_all, torch.cat(alone), rtol=1e-9, atol=1e-9)
    again, _ = run_tower(reducer, x_RD, plan, num_blocks=4)
    assert torch.equal(x_all, again)
    assert [len(after.rows) < 54 for after in plans] == [
        block + 1 >= reducer.blocks_before for block in range(4)
    ]


def test_keeping_all_changes_nothing() -> None:
    plan = plan_of([6] * 4, clips=[0] * 4)
    x_RD = random_rows(plan)
    x_new, plan_new = clustered(CenterClip(1.0, num_blocks=4), x_RD, plan)
    assert x_new is x_RD
    assert plan_new is plan


def test_gradients_reach_cls_rows_and_medoids_and_are_finite() -> None:
    plan = plan_of([6] * 4, clips=[0] * 4)
    x_RD = random_rows(plan).requires_grad_()
    x_new, plan_new = clustered(CenterClip(0.75, num_blocks=4), x_RD, plan)
    (gradient,) = torch.autograd.grad(x_new.sum(), x_RD)
    shares = [
        0.0 if owner < 0 else 0.5 if plan.rows[row] == 0 else 1.0
        for row, owner in enumerate(plan_new.owner.tolist())
    ]
    assert gradient[:, 0].tolist() == shares


def test_a_tower_of_one_block_is_refused() -> None:
    with pytest.raises(ModelError, match="between two blocks; the tower has 1"):
        CenterClip(0.5, num_blocks=1)
