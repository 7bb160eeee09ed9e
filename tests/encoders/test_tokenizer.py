"""The fast tokenizer against float loops straight from the definition, and the promises of both references.

Shapes: T frames, T' tubelets, H x W pixels, P patch side, u frames of a tubelet.
"""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.encoders.tokenizer import KEEP_ALL, RunLengthTokenizer

STD = (0.229, 0.224, 0.225)
REFERENCES = ("previous", "anchor")


def difference(a_CPP: np.ndarray, b_CPP: np.ndarray) -> float:
    """Mean over pixels and channels of |a - b| / (255 std_c), in float."""
    channels = [
        np.abs(a_CPP[c].astype(float) - b_CPP[c].astype(float)).mean() / (255 * STD[c]) for c in range(3)
    ]
    return sum(channels) / 3


def obvious_tokens(
    frames: np.ndarray, tokenizer: RunLengthTokenizer
) -> tuple[dict[tuple[int, int, int], int], list[float]]:
    """Run length of each kept (t, y, x), tubelet by tubelet, and every difference that was looked at."""
    u, p, every = tokenizer.tubelet_size, tokenizer.patch_size, tokenizer.refresh_every
    frames = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % u)])
    tubelets = frames.reshape(-1, u, *frames.shape[1:])
    places = [(y, x) for y in range(frames.shape[2] // p) for x in range(frames.shape[3] // p)]
    latest = dict.fromkeys(places, 0)
    runs = {(0, y, x): 1 for y, x in places}
    differences = []
    for t in range(1, len(tubelets)):
        kept = set()
        for y, x in places:
            patch = tubelets[..., y * p : (y + 1) * p, x * p : (x + 1) * p]
            if tokenizer.reference == "previous":
                changed = difference(patch[t, -1], patch[t - 1, 0])
            else:
                changed = max(difference(patch[t, i], patch[latest[y, x], i]) for i in range(u))
            differences.append(changed)
            if changed > tokenizer.threshold:
                kept.add((y, x))
        if every and t % every == 0 and (kept or any(s > t - every for s, _, _ in runs)):
            kept = set(places)
        for y, x in places:
            if (y, x) in kept:
                latest[y, x] = t
                runs[t, y, x] = 0
            runs[latest[y, x], y, x] += 1
    return runs, differences


def as_dict(tokens: VideoTokens) -> dict[tuple[int, ...], int]:
    positions = [tuple(position) for position in tokens.positions.tolist()]
    assert positions == sorted(positions), "tokens are ordered by (t, y, x)"
    return dict(zip(positions, tokens.run_lengths.tolist(), strict=True))


@st.composite
def videos(draw: st.DrawFn, patch: int = 2) -> np.ndarray:
    """Frames of which some patches move by a little, some by much, some not at all."""
    num_frames, height, width = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = rng.choice([0, 0, 1, 4, 7, 60], (num_frames, 1, height, width)).repeat(patch, 2).repeat(patch, 3)
    signs = rng.integers(-1, 2, (num_frames, 3, height * patch, width * patch))
    first = rng.integers(0, 256, signs.shape[1:])
    return np.clip(first + np.cumsum(steps * signs, 0), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("reference", REFERENCES)
@given(
    frames=videos(),
    threshold=st.sampled_from([-1.0, 0.0, 0.01, 0.1, 0.5]),
    refresh_every=st.sampled_from([0, 0, 1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_fast_tokens_equal_the_definition(
    frames: np.ndarray, threshold: float, refresh_every: int, reference: str, tubelet: int
) -> None:
    """Catches pairing lengths in (y, x, t) order with tokens in (t, y, x) order, as the published code does."""
    tokenizer = RunLengthTokenizer(2, tubelet, threshold, reference, refresh_every)  # type: ignore[arg-type]
    expected, differences = obvious_tokens(frames, tokenizer)
    assume(all(abs(value - threshold) > 1e-12 or value == 0 for value in differences))
    tokens = tokenizer(torch.from_numpy(frames))
    assert as_dict(tokens) == expected
    assert tokenizer.keep_mask(torch.from_numpy(frames)).sum() == len(expected)


@pytest.mark.parametrize("reference", REFERENCES)
@given(frames=videos(), tubelet=st.sampled_from([1, 2]), threshold=st.floats(-0.1, 1))
@settings(max_examples=40, deadline=None)
def test_lengths_sum_to_the_number_of_tubelets_at_every_place(
    frames: np.ndarray, tubelet: int, threshold: float, reference: str
) -> None:
    tokens = RunLengthTokenizer(2, tubelet, threshold, reference)(torch.from_numpy(frames))  # type: ignore[arg-type]
    num_tubelets, height, width = tokens.grid
    assert num_tubelets == -(-len(frames) // tubelet)
    sums = torch.zeros(height, width, dtype=torch.int64)
    sums.index_put_(tuple(tokens.positions[:, 1:].long().T), tokens.run_lengths.long(), accumulate=True)
    assert (sums == num_tubelets).all()
    assert (tokens.run_lengths >= 1).all()
    assert tokens.positions.dtype == tokens.run_lengths.dtype == torch.int32


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("reference", REFERENCES)
@given(num_frames=st.integers(1, 9), seed=st.integers(0, 999), threshold=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_a_repeated_frame_keeps_exactly_its_first_tubelet(
    num_frames: int, seed: int, threshold: float, reference: str, tubelet: int
) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 6), dtype=np.uint8)
    tokenizer = RunLengthTokenizer(2, tubelet, threshold, reference)  # type: ignore[arg-type]
    tokens = tokenizer(torch.from_numpy(frame.repeat(num_frames, 0)))
    assert len(tokens) * tokens.grid[0] == np.prod(tokens.grid)
    assert (tokens.positions[:, 0] == 0).all()
    assert (tokens.run_lengths == tokens.grid[0]).all()


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("reference", REFERENCES)
@given(seed=st.integers(0, 999), num_frames=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_threshold_zero_keeps_all_of_an_always_changing_video(
    seed: int, num_frames: int, reference: str, tubelet: int
) -> None:
    """One grey level in one channel of one pixel is a change."""
    frames = np.random.default_rng(seed).integers(0, 100, (1, 3, 4, 4), dtype=np.uint8).repeat(num_frames, 0)
    frames[:, 1, ::2, ::2] += np.arange(num_frames, dtype=np.uint8)[:, None, None]
    tokens = RunLengthTokenizer(2, tubelet, 0.0, reference)(torch.from_numpy(frames))  # type: ignore[arg-type]
    assert len(tokens) == np.prod(tokens.grid)


@given(frames=videos(), tubelet=st.sampled_from([1, 2]), low=st.floats(-0.1, 1), rise=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_kept_tokens_never_rise_with_the_threshold(
    frames: np.ndarray, tubelet: int, low: float, rise: float
) -> None:
    """Even more than their number: what a higher threshold keeps, a lower one keeps too (`previous` only)."""
    masks = [
        RunLengthTokenizer(2, tubelet, threshold).keep_mask(torch.from_numpy(frames))
        for threshold in (low, low + rise)
    ]
    assert not (masks[1] & ~masks[0]).any()


@pytest.mark.parametrize("tubelet", [1, 2])
@given(frames=videos(), threshold=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
@settings(max_examples=60, deadline=None)
def test_anchor_keeps_every_dropped_patch_within_the_threshold_of_its_token(
    frames: np.ndarray, threshold: float, tubelet: int
) -> None:
    assert_anchor_bound(frames, threshold, tubelet)


def assert_anchor_bound(frames: np.ndarray, threshold: float, tubelet: int) -> None:
    tokens = RunLengthTokenizer(2, tubelet, threshold, "anchor")(torch.from_numpy(frames))
    padded = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % tubelet)])
    tubelets = padded.reshape(-1, tubelet, *frames.shape[1:])
    for index, ((t, y, x), length) in enumerate(as_dict(tokens).items()):
        for later in range(t, t + length):
            patch = tubelets[later, :, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            for i in range(tubelet):
                assert difference(patch[i], tokens.patches[index, i].numpy()) <= threshold + 1e-12


@pytest.mark.parametrize("tubelet", [1, 2])
def test_a_slow_fade_defeats_previous_but_not_anchor(tubelet: int) -> None:
    """One grey level a frame: no step passes 0.1 (5.7 levels), the whole fade is 95 levels."""
    fade = np.full((96, 3, 4, 4), 64, np.uint8) + np.arange(96, dtype=np.uint8)[:, None, None, None]
    kept = {
        reference: RunLengthTokenizer(2, tubelet, 0.1, reference)(torch.from_numpy(fade))  # type: ignore[arg-type]
        for reference in REFERENCES
    }
    assert len(kept["previous"]) == 4  # the first tubelet only
    assert len(kept["anchor"]) > 10 * 4
    assert_anchor_bound(fade, 0.1, tubelet)


def test_the_paper_compares_the_last_frame_with_the_first_of_the_tubelet_before() -> None:
    """A flash inside a tubelet is a change at the next one for `previous`, and against its own twin for `anchor`."""
    a, b = np.zeros((3, 2, 2), np.uint8), np.full((3, 2, 2), 200, np.uint8)
    frames = torch.from_numpy(np.stack([a, b, a, b]))
    assert RunLengthTokenizer(2, 2, 0.1, "previous").keep_mask(frames)[:, 0, 0].tolist() == [True, True]
    assert RunLengthTokenizer(2, 2, 0.1, "anchor").keep_mask(frames)[:, 0, 0].tolist() == [True, False]


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_refresh_keeps_whole_tubelets_and_anchors_them(reference: str) -> None:
    """Four grey levels a step, threshold 0.1 = 5.7: `anchor` also keeps the tubelets two steps after each anchor."""
    steps = np.array([0, 4, 8, 12, 16, 20, 24], np.uint8)[:, None, None, None]
    frames = torch.from_numpy(np.full((7, 3, 2, 2), 64, np.uint8) + steps)
    kept = {
        every: RunLengthTokenizer(2, 1, 0.1, reference, every)
        .keep_mask(frames)
        .flatten()
        .nonzero()[:, 0]
        .tolist()  # type: ignore[arg-type]
        for every in (0, 1, 3)
    }
    assert kept[0] == ([0] if reference == "previous" else [0, 2, 4, 6])
    assert kept[1] == ([0] if reference == "previous" else [0, 2, 4, 6])
    assert kept[3] == ([0] if reference == "previous" else [0, 2, 3, 5, 6])


def test_a_refresh_waits_for_something_new() -> None:
    """A still clip costs its first tubelet whatever is asked for; one change and the next that is due is whole."""
    frames = torch.zeros(9, 3, 4, 4, dtype=torch.uint8)
    assert int(RunLengthTokenizer(2, refresh_every=2).keep_mask(frames).sum()) == 4
    frames[3:, :, :2, :2] = 99
    for reference in REFERENCES:
        mask = RunLengthTokenizer(2, 1, 0.1, reference, 2).keep_mask(frames)  # type: ignore[arg-type]
        assert mask.sum((1, 2)).tolist() == [4, 0, 0, 1, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_an_odd_last_frame_is_repeated(num_frames: int) -> None:
    frames = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (num_frames, 3, 2, 4), dtype=np.uint8)
    )
    tokens = RunLengthTokenizer(2, 2, KEEP_ALL)(frames)
    assert tokens.grid == ((num_frames + 1) // 2, 1, 2)
    assert tokens.patches.shape == (len(tokens), 2, 3, 2, 2)
    last = frames[-1, :, :, 2:]
    assert torch.equal(tokens.patches[-1, 1], last)
    assert torch.equal(tokens.patches[-1, 0], last if num_frames % 2 else frames[-2, :, :, 2:])


def test_patches_are_the_pixels_of_their_positions() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 6, 9), dtype=np.uint8))
    tokens = RunLengthTokenizer(3, 1, KEEP_ALL)(frames)
    for patch, (t, y, x) in zip(tokens.patches, tokens.positions.tolist(), strict=True):
        assert torch.equal(patch[0], frames[t, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3])


def patch_with_sums(sums: tuple[int, int, int]) -> np.ndarray:
    """[3, 16, 16] whose channels sum to these numbers."""
    patch = np.zeros((3, 256), np.uint8)
    for channel, total in enumerate(sums):
        patch[channel] = total // 256
        patch[channel, : total % 256] += 1
    return patch.reshape(3, 16, 16)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_difference_of_exactly_the_threshold_is_a_repetition(reference: str) -> None:
    """Sums of 229 k, 224 k, 225 k with k = 51 differ by exactly 0.78125; float sums would fall to either side."""
    still = np.zeros((3, 16, 16), np.uint8)
    tokenizer = RunLengthTokenizer(16, 1, 0.78125, reference)  # type: ignore[arg-type]
    for extra, kept in ((0, False), (1, True), (-1, False)):
        frames = np.stack([still, patch_with_sums((229 * 51, 224 * 51, 225 * 51 + extra))])
        assert bool(tokenizer.keep_mask(torch.from_numpy(frames))[1, 0, 0]) is kept


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("patch", [16, 32])
def test_black_beside_white_is_the_largest_difference(patch: int, reference: str) -> None:
    """(1/0.229 + 1/0.224 + 1/0.225) / 3 = 4.425…; its weighted sum is beyond 32 bits, a pixel's step beyond 8."""
    frames = torch.zeros(3, 3, patch, patch, dtype=torch.uint8)
    frames[1] = 255
    for threshold, kept in ((4.425, True), (4.426, False)):
        tokenizer = RunLengthTokenizer(patch, 1, threshold, reference)  # type: ignore[arg-type]
        assert tokenizer.keep_mask(frames).flatten().tolist() == [True, kept, kept]


@pytest.mark.parametrize("reference", REFERENCES)
@given(frames=videos(), threshold=st.sampled_from([0.0, 0.1]))
@settings(max_examples=20, deadline=None)
def test_masks_depend_on_nothing_but_the_pixels(frames: np.ndarray, threshold: float, reference: str) -> None:
    """Neither on what lies beside a place, nor on memory layout, default dtype, autocast or a pickled tokenizer."""
    tokenizer = RunLengthTokenizer(2, 1, threshold, reference)  # type: ignore[arg-type]
    tensor = torch.from_numpy(frames)
    mask = tokenizer.keep_mask(tensor)
    columns = [tokenizer.keep_mask(tensor[..., x : x + 2]) for x in range(0, tensor.shape[-1], 2)]
    assert torch.equal(torch.cat(columns, -1), mask)
    channels_last = tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer)).keep_mask(channels_last), mask)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tokenizer.keep_mask(tensor), mask)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"tubelet_size": 3}, "tubelet_size is 3; it must be 1 or 2"),
        ({"reference": "next"}, "reference is 'next'"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"refresh_every": -1}, "refresh_every is -1; it must be 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunLengthTokenizer(**options)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 3, 16, 16), "frames are torch.float32"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), r"\(3, 16, 16\); expected uint8 \[T, 3, H, W\]"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), r"expected uint8 \[T, 3, H, W\]"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), "expected T >= 1"),
        (torch.zeros(2, 3, 16, 24, dtype=torch.uint8), "multiples of the patch size 16"),
        (torch.zeros(2, 3, 0, 16, dtype=torch.uint8), "expected T >= 1 and sides"),
    ],
)
def test_frames_of_another_kind_are_refused(frames: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunLengthTokenizer(16)(frames)
