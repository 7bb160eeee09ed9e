"""The baselines `frames`, `resolution`, `random` and `rlt+random` against loops straight from their definitions.

Shapes: T frames, T' tubelets, H x W pixels, P patch side.
"""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.encoders.reducers.choosing import (
    FrameTokenizer,
    RandomTokenizer,
    RltRandomTokenizer,
    SmallPictureTokenizer,
    reduced_grid,
)
from rlt_retrieval.encoders.tokenizer import KEEP_ALL, RunLengthTokenizer

RATIOS = st.sampled_from([0.01, 0.25, 0.3, 0.5, 0.7, 1.0])


def changing(num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise of which about half the patches of 2x2 pixels repeat those of the frame before."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num_frames, 3, height, width), dtype=np.uint8)
    for t in range(1, num_frames):
        repeats = rng.integers(0, 2, (height // 2, width // 2), dtype=bool).repeat(2, 0).repeat(2, 1)
        frames[t][:, repeats] = frames[t - 1][:, repeats]
    return torch.from_numpy(frames)


def assert_runs_fill_the_grid(tokens: VideoTokens) -> None:
    """Every place: the first tubelet is kept and the run lengths sum to T'."""
    num_tubelets, height, width = tokens.grid
    sums = torch.zeros(height, width, dtype=torch.int64)
    sums.index_put_(tuple(tokens.positions[:, 1:].long().T), tokens.run_lengths.long(), accumulate=True)
    assert (sums == num_tubelets).all()
    assert (tokens.positions[: height * width, 0] == 0).all()
    assert tokens.positions.tolist() == sorted(tokens.positions.tolist())
    assert tokens.positions.dtype == tokens.run_lengths.dtype == torch.int32
    assert tokens.patches.dtype == torch.uint8
    assert tokens.covering is None


# ---------------------------------------------------------------------------------------------- frames


@given(num_frames=st.integers(1, 17), keep_ratio=RATIOS)
@settings(max_examples=40)
def test_frames_equal_their_definition(num_frames: int, keep_ratio: float) -> None:
    frames = changing(num_frames, 4, 6, num_frames)
    tokens = FrameTokenizer(2, keep_ratio)(frames)
    assert_runs_fill_the_grid(tokens)
    rows = zip(tokens.patches, tokens.positions.tolist(), tokens.run_lengths.tolist(), strict=True)
    count = max(1, round(keep_ratio * num_frames))
    for i in range(count):
        start, end = i * num_frames // count, (i + 1) * num_frames // count
        middle = frames[start:end][(end - start - 1) // 2]
        for y in range(2):
            for x in range(3):
                patch, position, length = next(rows)
                assert (position, length) == ([start, y, x], end - start)
                assert torch.equal(patch[0], middle[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2])
    assert next(rows, None) is None


def test_half_of_five_frames_by_hand() -> None:
    """round(2.5) = 2 frames: [0, 2) shows frame 0, [2, 5) shows frame 3."""
    frames = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 2)
    tokens = FrameTokenizer(2, 0.5)(frames)
    assert tokens.positions[:, 0].tolist() == [0, 2]
    assert tokens.run_lengths.tolist() == [2, 3]
    assert tokens.patches[:, 0, 0, 0, 0].tolist() == [0, 3]


# ------------------------------------------------------------------------------------------ resolution


@pytest.mark.parametrize(
    ("grid", "keep_ratio", "expected"),
    [
        ((14, 14), 1.0, (14, 14)),
        ((14, 14), 0.5, (10, 10)),  # 9.90
        ((14, 14), 0.25, (7, 7)),
        ((16, 8), 0.5, (11, 6)),  # 11.31, 5.66
        ((14, 14), 0.001, (1, 1)),
    ],
)
def test_the_reduced_grid_by_hand(
    grid: tuple[int, int], keep_ratio: float, expected: tuple[int, int]
) -> None:
    assert reduced_grid(grid, keep_ratio) == expected


def test_resolution_keeps_all_tokens_of_smaller_pictures() -> None:
    """Beside Pillow's bicubic filter of floats, which knows nothing of torch's."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 3, 32, 48), dtype=np.uint8)
    tokens = SmallPictureTokenizer(8, 0.3)(torch.from_numpy(frames))
    height, width = reduced_grid((4, 6), 0.3)
    assert (height, width) == (2, 3)
    assert tokens.grid == (3, 2, 3)
    assert len(tokens) == 3 * 2 * 3
    assert (tokens.run_lengths == 1).all()
    assert_runs_fill_the_grid(tokens)
    for patch, (t, y, x) in zip(tokens.patches, tokens.positions.tolist(), strict=True):
        for channel in range(3):
            picture = Image.fromarray(frames[t, channel].astype(np.float32)).resize(
                (24, 16), Image.Resampling.BICUBIC
            )
            expected = np.asarray(picture)[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].clip(0, 255)
            assert np.abs(patch[0, channel].numpy() - expected).max() < 0.501  # rounded to whole numbers


def test_resolution_at_the_full_size_is_every_patch_as_it_is() -> None:
    frames = changing(3, 8, 8)
    assert torch.equal(SmallPictureTokenizer(4, 1.0)(frames).patches, all_patches(frames, 4))


def all_patches(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    return RunLengthTokenizer(patch_size, threshold=KEEP_ALL)(frames).patches


# --------------------------------------------------------------------------------- random, rlt+random


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@pytest.mark.parametrize("tubelet", [1, 2])
@given(num_frames=st.integers(1, 9), seed=st.integers(0, 99), keep_ratio=RATIOS)
@settings(max_examples=20)
def test_draws_keep_the_first_tubelet_and_the_count_they_promise(
    num_frames: int, seed: int, keep_ratio: float, tubelet: int, reference: str
) -> None:
    rlt = RunLengthTokenizer(2, tubelet, 0.1, reference)  # type: ignore[arg-type]
    frames = changing(num_frames, 6, 8, seed)
    kept_by_rlt, drawn = rlt(frames), RandomTokenizer(rlt)(frames)
    thinned = RltRandomTokenizer(rlt, keep_ratio)(frames)
    assert len(drawn) == len(kept_by_rlt)
    assert len(thinned) == max(3 * 4, round(keep_ratio * len(kept_by_rlt)))
    assert set(map(tuple, thinned.positions.tolist())) <= set(map(tuple, kept_by_rlt.positions.tolist()))
    every_patch = RunLengthTokenizer(2, tubelet, KEEP_ALL)(frames)
    for tokens in (drawn, thinned):
        assert_runs_fill_the_grid(tokens)
        t, y, x = tokens.positions.long().T
        assert torch.equal(tokens.patches, every_patch.patches[(t * 3 + y) * 4 + x])


def test_every_other_cell_is_drawn_equally_often() -> None:
    """400 clips that keep 6 of 12 later cells each: 200 draws a cell, standard deviation 10."""
    drawn = torch.zeros(4, 2, 2)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        frames = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 4), dtype=np.uint8).repeat(4, 0))
        frames[1:3, :, :2] = (
            255 - frames[0, :, :2]
        )  # changes at frame 1, back at frame 3: 2 places, 4 kept cells
        frames[1, :, 2:] = 255 - frames[0, :, 2:]  # changes at frame 1, back at frame 2: 4 more
        tokens = RandomTokenizer(RunLengthTokenizer(2, 1, 0.0))(frames)
        assert len(tokens) == 4 + 8
        drawn[tuple(tokens.positions.long().T)] += 1
    assert (drawn[0] == 400).all()
    expected = 400 * 8 / 12
    assert (drawn[1:] - expected).abs().max() < 5 * (400 * (8 / 12) * (4 / 12)) ** 0.5


def test_another_clip_has_another_draw() -> None:
    draws = [
        RandomTokenizer(RunLengthTokenizer(2, 1, 0.1))(changing(6, 8, 8, seed)).positions for seed in range(4)
    ]
    assert len({tuple(map(tuple, positions.tolist())) for positions in draws}) == 4


# ------------------------------------------------------------------------------------------------ all


TOKENIZERS: list[Callable[[torch.Tensor], VideoTokens]] = [
    FrameTokenizer(2, 0.5),
    SmallPictureTokenizer(2, 0.5),
    RandomTokenizer(RunLengthTokenizer(2, 1, 0.1, "anchor")),
    RltRandomTokenizer(RunLengthTokenizer(2, 2, 0.1, "anchor", refresh_every=2), 0.7),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
def test_the_same_pixels_give_the_same_tokens(tokenizer: Callable[[torch.Tensor], VideoTokens]) -> None:
    """Again, pickled, from another memory layout and whatever was drawn before; and nobody else's draws change."""
    frames = changing(6, 8, 8)
    untouched = frames.clone()
    tokens = tokenizer(frames)
    state = torch.get_rng_state()
    others = [
        pickle.loads(pickle.dumps(tokenizer))(frames),
        tokenizer(frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(frames, untouched)
    for other in others:
        assert other.grid == tokens.grid
        for name in ("patches", "positions", "run_lengths"):
            assert torch.equal(getattr(other, name), getattr(tokens, name))


@pytest.mark.parametrize(
    "make",
    [
        FrameTokenizer,
        SmallPictureTokenizer,
        lambda _, keep_ratio: RltRandomTokenizer(RunLengthTokenizer(), keep_ratio),
    ],
)
@pytest.mark.parametrize("keep_ratio", [0.0, 1.5, float("nan")])
def test_impossible_shares_are_refused(make: Callable[[int, float], object], keep_ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"keep_ratio is {keep_ratio}; it must be above 0 and at most 1"):
        make(16, keep_ratio)


@pytest.mark.parametrize("make", [FrameTokenizer, SmallPictureTokenizer])
def test_impossible_sizes_and_frames_are_refused(make: Callable[..., Callable]) -> None:
    with pytest.raises(ValueError, match="patch_size is 0"):
        make(0, 0.5)
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        make(16, 0.5)(torch.zeros(2, 3, 16, 24, dtype=torch.uint8))
