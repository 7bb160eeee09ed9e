"""RLT with motion compensation against loops straight from its rules; pans, still pictures and the bound it promises.

Shapes: T frames, H x W pixels, P patch side.
"""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt_retrieval.encoders.reducers.motion import MotionTokenizer
from rlt_retrieval.encoders.tokenizer import KEEP_ALL, RunLengthTokenizer

P = 4
STD_THOUSANDTHS = (229, 224, 225)
Displacement = tuple[int, int]


def difference(a_CPP: np.ndarray, b_CPP: np.ndarray) -> Fraction:
    """Mean over pixels and channels of |a - b| / (255 std_c), exactly."""
    sums = np.abs(a_CPP.astype(int) - b_CPP.astype(int)).sum((1, 2))
    count = a_CPP.shape[1] * a_CPP.shape[2]
    scaled = [
        Fraction(int(total) * 1000, 255 * std * count)
        for total, std in zip(sums, STD_THOUSANDTHS, strict=True)
    ]
    return sum(scaled, Fraction(0)) / 3


def length(displacement: Displacement) -> tuple[int, Displacement]:
    return displacement[0] ** 2 + displacement[1] ** 2, displacement


def obvious_pan(frame: np.ndarray, canvas: np.ndarray) -> Displacement:
    """By loops over the coarse pixels of the interior."""
    height, width = frame.shape[1] // 4, frame.shape[2] // 4
    far = min(8, height // 4, width // 4)

    def coarse(picture: np.ndarray, y: int, x: int) -> int:
        return int(picture[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].astype(int).sum())

    sums = {
        (dy, dx): sum(
            abs(coarse(frame, y, x) - coarse(canvas, y + dy, x + dx))
            for y in range(far, height - far)
            for x in range(far, width - far)
        )
        for dy in range(-far, far + 1)
        for dx in range(-far, far + 1)
    }
    dy, dx = min(sums, key=lambda d: (sums[d], length(d)))
    return 4 * dy, 4 * dx


class ObviousMotion:
    """One clip, pixel by pixel and candidate by candidate."""

    def __init__(self, frames: np.ndarray, threshold: float, search: int) -> None:
        self.frames, self.threshold, self.search = frames, threshold, search
        _, _, self.height, self.width = frames.shape
        self.cells = [(y, x) for y in range(self.height // P) for x in range(self.width // P)]
        self.positions: list[tuple[int, int, int]] = []
        self.covering: list[list[int]] = []
        self.displacements: list[list[Displacement]] = []
        self.bounds: list[Fraction] = []  # how far each dropped patch is from the block that stands for it
        self.canvas = np.zeros_like(frames[0])
        self.owner = np.zeros((self.height, self.width), int)
        for t in range(len(frames)):
            self._step(t)

    def _block(self, y: int, x: int, moved: Displacement = (0, 0)) -> tuple[slice, slice] | None:
        top, left = y * P + moved[0], x * P + moved[1]
        inside = 0 <= top <= self.height - P and 0 <= left <= self.width - P
        return np.s_[top : top + P, left : left + P] if inside else None

    def _candidates(self, t: int) -> list[Displacement]:
        reach = range(-self.search, self.search + 1)
        centres = [(0, 0)] + ([obvious_pan(self.frames[t], self.canvas)] if self.search else [])
        found = {(y + dy, x + dx) for y, x in centres for dy in reach for dx in reach}
        return sorted(found, key=length)

    def _step(self, t: int) -> None:
        frame, canvas, owner = self.frames[t], self.canvas.copy(), self.owner.copy()
        candidates = self._candidates(t) if t else []
        moves = []
        for y, x in self.cells:
            here = self._block(y, x)
            assert here is not None
            found = [(d, block) for d in candidates if (block := self._block(y, x, d)) is not None]
            distances = [difference(frame[:, *here], self.canvas[:, *block]) for _, block in found]
            if found and min(distances) <= self.threshold:
                moved, block = found[distances.index(min(distances))]
                canvas[:, *here], owner[here] = self.canvas[:, *block], self.owner[block]
                self.bounds.append(difference(frame[:, *here], canvas[:, *here]))
            else:
                moved = (0, 0)
                canvas[:, *here], owner[here] = frame[:, *here], len(self.positions)
                self.positions.append((t, y, x))
            moves.append(moved)
        self.canvas, self.owner = canvas, owner
        self.displacements.append(moves)
        self.covering.append([self._main_owner(y, x) for y, x in self.cells])

    def _main_owner(self, y: int, x: int) -> int:
        counts = Counter(self.owner[self._block(y, x)].ravel().tolist())
        return min(counts, key=lambda token: (-counts[token], token))


@st.composite
def videos(draw: st.DrawFn) -> np.ndarray:
    """A texture that drifts, with patches that change; sometimes it repeats itself, so that blocks tie."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_frames, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    period, farthest = draw(st.sampled_from([1, 2, 4, 48])), draw(st.sampled_from([0, 1, 3, 6]))
    tile = rng.integers(0, 256, (3, period, period), dtype=np.uint8)
    world = np.tile(tile, (1, (height * P + 48) // period + 1, (width * P + 48) // period + 1))
    frames, y, x = [], 24, 24
    for _ in range(num_frames):
        frame = world[:, y : y + height * P, x : x + width * P].astype(int)
        noisy = rng.integers(0, 4, (height, width)).repeat(P, 0).repeat(P, 1) == 0
        frames.append(np.clip(frame + noisy * rng.integers(-9, 10, frame.shape), 0, 255))
        y, x = y + rng.integers(-farthest, farthest + 1), x + rng.integers(-farthest, farthest + 1)
    return np.stack(frames).astype(np.uint8)


@given(
    frames=videos(), threshold=st.sampled_from([KEEP_ALL, 0.0, 0.01, 0.1]), search=st.sampled_from([0, 1, 2])
)
@settings(max_examples=60)
def test_tokens_equal_the_rules_and_stay_within_the_threshold(
    frames: np.ndarray, threshold: float, search: int
) -> None:
    expected = ObviousMotion(frames, threshold, search)
    assert all(bound <= threshold for bound in expected.bounds)
    tokenizer = MotionTokenizer(P, threshold, search)
    tokens = tokenizer(torch.from_numpy(frames))
    assert list(map(tuple, tokens.positions.tolist())) == expected.positions
    assert tokens.covering is not None
    assert tokens.covering.flatten(1).tolist() == expected.covering
    counts = Counter(token for frame in expected.covering for token in frame)
    assert tokens.run_lengths.tolist() == [counts[token] for token in range(len(expected.positions))]
    displacements = tokenizer.displacements(torch.from_numpy(frames))
    assert displacements.dtype == torch.int16
    assert [list(map(tuple, frame)) for frame in displacements.flatten(1, 2).tolist()] == (
        expected.displacements
    )
    for patch, (t, y, x) in zip(tokens.patches, expected.positions, strict=True):
        assert np.array_equal(patch[0], frames[t, :, y * P : (y + 1) * P, x * P : (x + 1) * P])


def panned(num_frames: int, size: int, step: Displacement) -> torch.Tensor:
    """A window of size x size pixels that moves over a texture by `step` a frame, from its middle."""
    rng = np.random.default_rng(0)
    side = size + 2 * num_frames * max(map(abs, step))
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, side // 4 + 1, side // 4 + 1)))
    world = (
        torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")[0].round().to(torch.uint8)
    )
    y, x = (num_frames * abs(d) for d in step)
    return torch.stack(
        [world[:, y + t * step[0] :, x + t * step[1] :][:, :size, :size] for t in range(num_frames)]
    )


@pytest.mark.parametrize("step", [(0, 3), (-2, 0), (4, -4), (0, 12), (10, 5), (-17, 21)])
def test_a_pan_keeps_only_what_comes_in_at_the_border(step: Displacement) -> None:
    """Steps farther than the search of 4 pixels are found as the pan of the whole picture."""
    frames, grid = panned(4, 96, step), 96 // 8
    tokenizer = MotionTokenizer(8, 0.0)
    mask = torch.zeros(4, grid, grid, dtype=torch.bool)
    tokens = tokenizer(frames)
    mask[tuple(tokens.positions.long().T)] = True
    cells = torch.arange(grid) * 8
    stays = [(cells + d >= 0) & (cells + d + 8 <= 96) for d in step]
    came_in = ~(stays[0][:, None] & stays[1][None])
    assert mask[0].all()
    assert (mask[1:] == came_in).all()
    assert (tokenizer.displacements(frames)[1:][:, ~came_in] == torch.tensor(step)).all()


def test_tokens_move_with_the_picture() -> None:
    """Three pixels a frame to the left, patches of eight: after two frames most of patch 0 shows what was patch 1."""
    tokens = MotionTokenizer(8, 0.0)(panned(4, 64, (0, 3)))
    assert tokens.covering is not None
    assert tokens.covering[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert tokens.covering[:, 0, 5].tolist() == [5, 5, 6, 6]
    assert tokens.run_lengths.sum() == 4 * 8 * 8
    assert (tokens.run_lengths >= 1).all()


def test_a_pan_beyond_all_reach_keeps_everything() -> None:
    tokens = MotionTokenizer(8, 0.1)(panned(3, 128, (0, 64)))
    assert len(tokens) == 3 * 16 * 16


def test_a_still_clip_equals_rlt() -> None:
    frames = panned(1, 64, (0, 0)).expand(5, -1, -1, -1)
    tokens, rlt = MotionTokenizer(8, 0.1)(frames), RunLengthTokenizer(8, 1, 0.1, "anchor")(frames)
    for name in ("patches", "positions", "run_lengths"):
        assert torch.equal(getattr(tokens, name), getattr(rlt, name))
    assert tokens.covering is not None
    assert torch.equal(
        tokens.covering, torch.arange(64, dtype=torch.int32).reshape(1, 8, 8).expand(5, -1, -1)
    )


@given(frames=videos(), threshold=st.sampled_from([KEEP_ALL, 0.0, 0.01, 0.1]))
@settings(max_examples=40)
def test_without_a_search_the_tokens_are_rlts(frames: np.ndarray, threshold: float) -> None:
    tensor = torch.from_numpy(frames)
    tokens = MotionTokenizer(P, threshold, 0)(tensor)
    rlt = RunLengthTokenizer(P, 1, threshold, "anchor")(tensor)
    for name in ("patches", "positions", "run_lengths"):
        assert torch.equal(getattr(tokens, name), getattr(rlt, name))


def test_impossible_settings_and_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size is 0"):
        MotionTokenizer(0)
    with pytest.raises(ValueError, match="threshold is inf"):
        MotionTokenizer(16, float("inf"))
    with pytest.raises(ValueError, match="search_pixels is -1; it must be at least 0"):
        MotionTokenizer(16, 0.1, -1)
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        MotionTokenizer(16)(torch.zeros(2, 3, 16, 24, dtype=torch.uint8))
