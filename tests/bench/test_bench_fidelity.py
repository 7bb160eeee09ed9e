"""Fidelity: hand-worked errors and overlaps, a slow reference, and pictures of what the kept tokens tell."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import repeating_frames, small_model

from rlt_retrieval.bench.fidelity import copied_forward, cosines, neighbour_overlap, relative_errors
from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.encoders.reducers.motion import MotionTokenizer
from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer
from rlt_retrieval.errors import MetricsError


def unit(*degrees: float) -> np.ndarray:
    """float32 [N, 2]: points on the circle."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_errors_are_in_units_of_the_median_distance() -> None:
    """Distances of 0°, 60° and 90°: 1 - cos 60° = 1/2, 1 - cos 30°, 1 - cos 90° = 1; the median is 1/2."""
    full = unit(0, 60, 90)
    errors = relative_errors(full, unit(0, 120, 180))
    assert errors == pytest.approx([0, 1, 2], abs=1e-6)
    assert cosines(full, unit(0, 120, 180)) == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_clips_that_do_not_differ_are_refused() -> None:
    with pytest.raises(MetricsError, match="give clips that differ"):
        relative_errors(unit(10, 10, 10), unit(10, 20, 30))


def test_overlap_by_hand() -> None:
    """The nearest of 0°, 10°, 50°, 70° are 10°, 0°, 70°, 50°; in the second set 1 and 2 find each other instead."""
    full, pruned = unit(0, 10, 50, 70), unit(0, 30, 50, 70.5)
    assert neighbour_overlap(full, full, 1) == 1
    assert neighbour_overlap(full, pruned, 1) == 2 / 4  # 0 → 1 and 3 → 2 stay
    assert neighbour_overlap(full, pruned, 3) == 1  # all others, whatever the embeddings


@given(st.integers(0, 1000), st.integers(2, 9), st.data())
def test_overlap_is_that_of_sets(seed: int, num_clips: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, num_clips - 1))
    z, other = np.random.default_rng(seed).standard_normal((2, num_clips, 5))

    def nearest(z_ND: np.ndarray, row: int) -> set[int]:
        others = [clip for clip in range(num_clips) if clip != row]
        unit = z_ND / np.linalg.norm(z_ND, axis=1)[:, None]
        return set(sorted(others, key=lambda clip: -float(unit[row] @ unit[clip]))[:k])

    expected = [len(nearest(z, row) & nearest(other, row)) / k for row in range(num_clips)]
    assert neighbour_overlap(z, other, k) == pytest.approx(np.mean(expected))


# ------------------------------------------------------------------------------------- copied forward


def slow_copy(frames: torch.Tensor, mask_thw: torch.Tensor, patch: int) -> torch.Tensor:
    copied = frames.clone()
    num_frames, height, width = mask_thw.shape
    for t in range(1, num_frames):
        for y in range(height):
            for x in range(width):
                if not mask_thw[t, y, x]:
                    rows, columns = (slice(i * patch, (i + 1) * patch) for i in (y, x))
                    copied[t, :, rows, columns] = copied[t - 1, :, rows, columns]
    return copied


@pytest.mark.parametrize("reference", ["previous", "anchor"])
def test_dropped_patches_show_the_last_kept_one(reference: str) -> None:
    frames = repeating_frames(5, 0.4) // 8 * 8 + torch.randint(0, 8, (5, 3, 32, 32), dtype=torch.uint8)
    tokenizer = RunLengthTokenizer(8, threshold=0.2, reference=reference)  # type: ignore[arg-type]
    mask = tokenizer.keep_mask(frames)
    assert 16 < mask.sum() < mask.numel()
    assert torch.equal(copied_forward(tokenizer(frames)), slow_copy(frames, mask, 8))


def test_all_tokens_give_the_frames_back() -> None:
    frames = repeating_frames(4, 1.0)
    assert torch.equal(copied_forward(RunLengthTokenizer(8, 2, threshold=-1)(frames)), frames)


def test_a_covering_says_which_token_is_copied() -> None:
    """Two places and two frames; in the second frame both places are covered by the token of the first place."""
    patches = torch.tensor([10, 20], dtype=torch.uint8)[:, None, None, None, None].expand(2, 1, 3, 2, 2)
    tokens = VideoTokens(
        patches,
        torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.int32),
        torch.tensor([3, 1], dtype=torch.int32),
        (2, 1, 2),
        torch.tensor([[[0, 1]], [[0, 0]]], dtype=torch.int32),
    )
    frames = copied_forward(tokens)
    assert frames.shape == (2, 3, 2, 4)
    assert frames[:, 0, 0].tolist() == [[10, 10, 20, 20], [10, 10, 10, 10]]


def test_whole_patches_that_move_are_copied_from_where_they_came() -> None:
    frame = repeating_frames(1, 0.0, side=48)[0]
    frames = torch.stack([frame, frame.roll(8, dims=2)])
    tokens = MotionTokenizer(8, threshold=0.0, search_pixels=8)(frames)
    assert len(tokens) < 36 + 36 // 2
    assert torch.equal(copied_forward(tokens), frames)


def test_a_model_reads_copies_of_a_still_video_as_the_video() -> None:
    model = small_model(layout="frame", threshold=0.0)
    frames = repeating_frames(6, 0.3)
    assert torch.equal(copied_forward(model.tokenizer(frames)), frames)
