"""CenterCLIP (arXiv 2205.00823): after some blocks the frames of a segment share one sequence of medoids.

Shapes: T frames of a clip, S sequences (frames before, segments after), R rows, D width, G segments of F frames with
N patches in all, K medoids, P patches a frame.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.reducers.merging import (
    NetworkReducer,
    at_least_float32,
    merge_rows,
    merged_plan,
    on_device,
)
from rlt_retrieval.errors import ModelError

_LEAST_SHARE = 1 / 4  # of the rows that go on: the published settings keep 1/2 (12 frames to 6), 1/3 and 1/4
_MAX_ITERATIONS = 100  # the authors' scripts


@dataclass(frozen=True)
class CenterClip(NetworkReducer):
    """Multi-segment token clustering of whole frames (layout "frame", nothing pruned).

    Up to one block each frame is on its own. Then the clip is cut into segments of equal numbers of frames, the patches
    of a segment's frames are clustered (`k_medoids`), the medoids go on unchanged and in their order, all other patches
    are dropped, the CLS rows of the frames are averaged, and attention is among the rows of a segment. As in the
    authors' code there is no weighting by cluster size. Read: that code; of the paper only the abstract, so no
    equation numbers. It was published as fine-tuned, not as something to do to stock weights.

    Attributes:
        keep_ratio: mean over blocks of the rows that a block computes, of the rows that it would compute unclustered.
        num_blocks: blocks of the tower, at least 2.
    Raises:
        ModelError: a tower of one block.
    """

    keep_ratio: float
    num_blocks: int

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ModelError(
                f"reducer 'centerclip' clusters between two blocks; the tower has {self.num_blocks}: choose another"
            )

    @property
    def blocks_before(self) -> int:
        """Blocks that frames go through on their own.

        6 of 12 as published, as long as that leaves at least 1/4 of the rows for the others. For a smaller keep_ratio
        fewer (our choice: half of the cost is spent by then).
        """
        affordable = int(self.num_blocks * (self.keep_ratio - _LEAST_SHARE) / (1 - _LEAST_SHARE))
        return max(1, min(self.num_blocks // 2, affordable))

    def segments(self, num_frames: int, num_patches: int, num_cls: int) -> tuple[int, int]:
        """Number of segments of a clip, and of medoids in each.

        The share of rows that goes on is what keep_ratio leaves after `blocks_before`. A segment is as many frames as
        have about one frame's rows left by that share, as published (49 of 12 frames of 49 in 4 segments), at least
        two. The number of medoids is the largest that keeps the share: one step of keep_ratio may cost a row a segment.
        """
        num_rows = num_frames * (num_patches + num_cls)
        left = (self.keep_ratio * self.num_blocks - self.blocks_before) / (
            self.num_blocks - self.blocks_before
        )
        share = max(left, 1 / num_rows)
        num_segments = max(1, num_frames // max(2, round(1 / share)))
        num_medoids = int(share * num_rows / num_segments + 1e-6) - num_cls  # 1/3 is no float
        return num_segments, max(1, min(num_medoids, num_frames // num_segments * num_patches))

    def after_block(self, block_index: int, x_RD: Tensor, plan: LayoutPlan) -> tuple[Tensor, LayoutPlan]:
        """See `NetworkReducer`."""
        if self.keep_ratio == 1 or block_index + 1 != self.blocks_before:
            return x_RD, plan
        assert len(plan.rows) == (len(plan.cu_q) - 1) * plan.max_q, "centerclip reads whole frames"
        return self._clustered(x_RD, plan)

    def _clustered(self, x_RD: Tensor, plan: LayoutPlan) -> tuple[Tensor, LayoutPlan]:
        num_cls = int(plan.rows[0] == 0)
        frames: list[int] = []  # of each segment
        medoids: list[int] = []  # of each segment
        for _, group in itertools.groupby(plan.clip_of_sequence.tolist()):
            num_frames = len(list(group))
            num_segments, num_medoids = self.segments(num_frames, plan.max_q - num_cls, num_cls)
            cuts = [i * num_frames // num_segments for i in range(num_segments + 1)]
            frames += [after - before for before, after in itertools.pairwise(cuts)]
            medoids += [num_medoids] * num_segments
        lengths = [num_cls + num_medoids for num_medoids in medoids]
        assignment_R = _assignment(x_RD.detach(), plan.max_q, num_cls, frames, medoids)
        x_new = merge_rows(x_RD, torch.ones_like(plan.weights), assignment_R, sum(lengths))
        return x_new, _segment_plan(plan, assignment_R, frames, lengths)


def _assignment(
    x_RD: Tensor, frame_length: int, num_cls: int, frames: list[int], medoids: list[int]
) -> Tensor:
    """int64 [R]: the CLS rows of a segment to its first row, medoids after it in their order, all else to -1."""
    device = x_RD.device
    first_frames = itertools.accumulate(frames, initial=0)
    new_starts = itertools.accumulate((num_cls + count for count in medoids), initial=0)
    alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for first_frame, new_start, shape in zip(
        first_frames, new_starts, zip(frames, medoids, strict=True), strict=False
    ):
        alike[shape].append((first_frame * frame_length, new_start))
    assignment_R = torch.full((len(x_RD),), -1, device=device)
    for (num_frames, num_medoids), starts in alike.items():
        old_G1, new_G1 = (on_device(column, device)[:, None] for column in zip(*starts, strict=True))
        rows_GFL = (old_G1 + torch.arange(num_frames * frame_length, device=device)).unflatten(
            1, (num_frames, -1)
        )
        patches_GN = rows_GFL[:, :, num_cls:].flatten(1)
        medoids_GK = patches_GN.gather(1, k_medoids(x_RD[patches_GN], num_medoids))
        assignment_R[rows_GFL[:, :, :num_cls].flatten(1)] = new_G1
        assignment_R[medoids_GK] = new_G1 + num_cls + torch.arange(num_medoids, device=device)
    return assignment_R


def _segment_plan(
    plan: LayoutPlan, assignment_R: Tensor, frames: list[int], lengths: list[int]
) -> LayoutPlan:
    """Segments instead of frames: rows that stand for one cell each, and no bias, whatever a medoid's cluster holds."""
    frames_S = on_device(frames, assignment_R.device)
    segment_of_frame = torch.repeat_interleave(frames_S, output_size=len(plan.sequence_weights))
    merged = merged_plan(plan, assignment_R, lengths, torch.ones_like(plan.weights))
    return replace(
        merged,
        weights=torch.ones_like(merged.weights),
        key_bias=None,
        clip_of_sequence=plan.clip_of_sequence[frames_S.cumsum(0) - frames_S],
        sequence_weights=plan.sequence_weights.new_zeros(len(frames)).index_add(
            0, segment_of_frame, plan.sequence_weights
        ),
        first_lengths=merged.lengths,
    )


def k_medoids(x_GND: Tensor, num_medoids: int) -> Tensor:
    """Medoids of each of G sets of points, by Euclidean distance: k-medoids++ as in the authors' code.

    Start (KKZ): the point of the largest norm, then again and again the point farthest from its nearest medoid. Then,
    until nothing changes: each point to its nearest medoid, each cluster to its point with the least sum of distances
    to the others. Ties go to the lower index, and a point is nearer to itself than to its exact copies, so that
    medoids differ and no cluster is empty.

    Args:
        x_GND: the points; no gradient flows through the choice.
        num_medoids: K, at most N.
    Returns:
        int64 [G, K], indices of points, ascending.
    """
    x_GND = at_least_float32(x_GND.detach())
    distances_GNN = torch.cdist(x_GND, x_GND)
    distances_GNN.diagonal(dim1=1, dim2=2).fill_(-1)
    medoids_GK = _farthest_points(x_GND.norm(dim=-1), distances_GNN, num_medoids)
    for _ in range(_MAX_ITERATIONS):
        moved_GK = _central_points(distances_GNN, _nearest(distances_GNN, medoids_GK), num_medoids)
        if torch.equal(moved_GK, medoids_GK):
            break
        medoids_GK = moved_GK
    return medoids_GK.sort(1).values


def _farthest_points(norms_GN: Tensor, distances_GNN: Tensor, num_points: int) -> Tensor:
    points = [norms_GN.argmax(1)]
    sets_G = torch.arange(len(norms_GN), device=norms_GN.device)
    nearest_GN = distances_GNN[sets_G, points[0]]
    for _ in range(num_points - 1):
        points.append(nearest_GN.argmax(1))
        nearest_GN = torch.minimum(nearest_GN, distances_GNN[sets_G, points[-1]])
    return torch.stack(points, 1)


def _nearest(distances_GNN: Tensor, medoids_GK: Tensor) -> Tensor:
    """int64 [G, N], which medoid each point is nearest to."""
    num_points = distances_GNN.shape[1]
    return distances_GNN.gather(1, medoids_GK[:, :, None].expand(-1, -1, num_points)).argmin(1)


def _central_points(distances_GNN: Tensor, cluster_GN: Tensor, num_clusters: int) -> Tensor:
    """int64 [G, K], the first point of each cluster whose distances to its points add up to the least."""
    same_GNN = cluster_GN[:, :, None] == cluster_GN[:, None]
    costs_GN = (distances_GNN * same_GNN).sum(2)
    least_GK = costs_GN.new_full((len(costs_GN), num_clusters), torch.inf).scatter_reduce(
        1, cluster_GN, costs_GN, "amin"
    )
    num_points = costs_GN.shape[1]
    points_N = torch.arange(num_points, device=costs_GN.device)
    candidates_GN = torch.where(costs_GN == least_GK.gather(1, cluster_GN), points_N, num_points)
    empty_GK = cluster_GN.new_full(least_GK.shape, num_points)
    return empty_GK.scatter_reduce(1, cluster_GN, candidates_GN, "amin")
