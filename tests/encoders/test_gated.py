"""The gate on structural similarity against loops straight from its rules, and what the tokens stand for.

Shapes: T frames, H x W pixels, P patch side.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlt_retrieval.encoders.reducers.gated import GatedTokenizer, structural_similarity
from rlt_retrieval.encoders.tokenizer import KEEP_ALL

P = 2


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of all values of two patches, from numpy's means, variances and covariance."""
    a, b = a.astype(float).ravel(), b.astype(float).ravel()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    likeness = (2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
    return likeness / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var() + b.var() + c2))


def obvious_tokens(
    frames: np.ndarray, threshold: float
) -> tuple[dict[tuple[int, int, int], int], np.ndarray, list[float]]:
    """Run length of each kept (t, y, x); the frame whose token covers each cell; every 1 - SSIM looked at."""
    height, width = frames.shape[2] // P, frames.shape[3] // P
    covered_by = np.zeros((len(frames), height, width), int)
    looked_at, key = [], 0
    for t in range(1, len(frames)):
        changed = np.zeros((height, width), bool)
        for y in range(height):
            for x in range(width):
                place = np.s_[:, y * P : (y + 1) * P, x * P : (x + 1) * P]
                dissimilarity = 1 - ssim(frames[t][place], frames[key][place])
                looked_at.append(dissimilarity)
                changed[y, x] = dissimilarity > threshold
        if changed.sum() > changed.size / 2:
            key, changed = t, np.ones_like(changed)
        covered_by[t] = np.where(changed, t, key)
    runs: dict[tuple[int, int, int], int] = {}
    for (_, y, x), source in np.ndenumerate(covered_by):
        runs[int(source), y, x] = runs.get((int(source), y, x), 0) + 1
    return runs, covered_by, looked_at


@st.composite
def videos(draw: st.DrawFn) -> np.ndarray:
    """Frames of which some patches change against the first by a little or much; sometimes all do."""
    num_frames, height, width = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first = rng.integers(0, 256, (3, height * P, width * P))
    strength = rng.choice([0, 0, 0, 2, 10, 80], (num_frames, 1, height, width)).repeat(P, 2).repeat(P, 3)
    strength[0] = 0
    noise = rng.integers(-1, 2, (num_frames, *first.shape))
    return np.clip(first + strength * noise, 0, 255).astype(np.uint8)


@given(frames=videos(), threshold=st.sampled_from([KEEP_ALL, 0.0, 0.01, 0.1, 0.5]))
@settings(max_examples=100)
def test_tokens_equal_the_rules(frames: np.ndarray, threshold: float) -> None:
    runs, covered_by, looked_at = obvious_tokens(frames, threshold)
    # Below 1e-12 the float means of the reference cannot tell equal patches.
    assume(all(abs(value - threshold) > 1e-9 for value in looked_at if abs(value) > 1e-12 or threshold > 0))
    assume(threshold != 0 or all(value > 1e-9 or abs(value) < 1e-15 for value in looked_at))
    tokens = GatedTokenizer(P, threshold)(torch.from_numpy(frames))
    positions = [tuple(position) for position in tokens.positions.tolist()]
    assert positions == sorted(positions)
    assert dict(zip(positions, tokens.run_lengths.tolist(), strict=True)) == runs
    assert tokens.covering is not None
    assert tokens.covering.dtype == tokens.run_lengths.dtype == torch.int32
    for (t, y, x), token in np.ndenumerate(tokens.covering.numpy()):
        assert positions[token] == (covered_by[t, y, x], y, x)
    for patch, (t, y, x) in zip(tokens.patches, positions, strict=True):
        assert np.array_equal(patch[0], frames[t, :, y * P : (y + 1) * P, x * P : (x + 1) * P])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([7, 9, 200], [7, 9, 200], 1.0),
        ([100, 100], [110, 110], (2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025)),
        # Means 128 and 128, variances 127², covariance -127².
        ([1, 255], [255, 1], (-2 * 127**2 + 58.5225) / (2 * 127**2 + 58.5225)),
    ],
)
def test_structural_similarity_by_hand(a: list[int], b: list[int], expected: float) -> None:
    similarity = structural_similarity(torch.tensor(a, dtype=torch.uint8), torch.tensor(b, dtype=torch.uint8))
    assert similarity.item() == pytest.approx(expected, abs=1e-15)
    assert expected != 1 or similarity.item() == 1


def test_a_patch_that_changes_back_stands_for_the_key_frame_again() -> None:
    """One of three patches is inverted in frame 1 only: RLT would keep it twice more than the first frame."""
    key = np.random.default_rng(0).integers(0, 256, (3, 2, 6), dtype=np.uint8)
    frames = np.stack([key, key, key, key])
    frames[1, :, :, 2:4] = 255 - frames[1, :, :, 2:4]
    tokens = GatedTokenizer(2, 0.1)(torch.from_numpy(frames))
    assert tokens.positions.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 1]]
    assert tokens.run_lengths.tolist() == [4, 3, 4, 1]
    assert tokens.covering is not None
    assert tokens.covering[:, 0, 1].tolist() == [1, 3, 1, 1]


@pytest.mark.parametrize(("num_changed", "is_new_scene"), [(2, False), (3, True)])
def test_more_than_half_of_the_patches_start_a_scene(num_changed: int, is_new_scene: bool) -> None:
    """Of four patches. The frame after shows the same: whether it is compared with frame 0 or frame 1 shows."""
    frames = np.random.default_rng(1).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8).repeat(3, 0)
    for place in range(num_changed):
        y, x = 2 * (place // 2), 2 * (place % 2)
        frames[1:, :, y : y + 2, x : x + 2] = 255 - frames[0, :, y : y + 2, x : x + 2]
    tokens = GatedTokenizer(2, 0.1)(torch.from_numpy(frames))
    kept = torch.bincount(tokens.positions[:, 0], minlength=3).tolist()
    assert kept == ([4, 4, 0] if is_new_scene else [4, 2, 2])


def test_a_larger_threshold_keeps_no_more() -> None:
    """Without a new scene: there the rest of the frame is kept too."""
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8).repeat(5, 0)
    frames[1:, :, :2] = rng.integers(0, 256, (4, 3, 2, 8), dtype=np.uint8)
    counts = [len(GatedTokenizer(2, threshold)(torch.from_numpy(frames))) for threshold in (0, 0.5, 0.9, 2)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (16 + 4 * 4, 16)


def test_impossible_settings_and_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size is 0"):
        GatedTokenizer(0)
    with pytest.raises(ValueError, match="threshold is nan"):
        GatedTokenizer(16, float("nan"))
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        GatedTokenizer(16)(torch.zeros(2, 3, 16, 24, dtype=torch.uint8))
