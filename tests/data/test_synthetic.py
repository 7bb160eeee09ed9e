"""The demo's data set: captions, split, what the clips show and how the shards are dealt."""

from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt_retrieval.data.shards import read_shard
from rlt_retrieval.data.streams import LogicalStream, sample_rng
from rlt_retrieval.data.synthetic import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    DISTRACTORS,
    SHAPES,
    SPEC,
    Composition,
    render,
    split,
    write_synthetic_shards,
)

PATCH = 8
compositions = st.builds(
    Composition,
    *(st.sampled_from(list(values)) for values in (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS, DISTRACTORS)),
)


def decode(media: bytes) -> np.ndarray:
    with av.open(BytesIO(media)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def patch_difference(a_HWC: np.ndarray, b_HWC: np.ndarray) -> np.ndarray:
    """The difference of the run-length rule: mean of |a − b| / (255 · std) over every 8×8 patch."""
    difference = np.abs(a_HWC.astype(float) - b_HWC) / (255 * np.array([0.229, 0.224, 0.225]))
    rows, columns = a_HWC.shape[0] // PATCH, a_HWC.shape[1] // PATCH
    return difference.reshape(rows, PATCH, columns, PATCH, 3).mean(axis=(1, 3, 4))


def test_captions_are_compositional_and_differ():
    c = Composition("red", "circle", "left", "stripes", "orange star")
    assert c.caption() == "a red circle moves left over stripes beside a still orange star"
    train, test = split(seed=0)
    assert len({c.caption() for c in train + test}) == len(train) + len(test)


def test_split_keeps_test_compositions_out_but_shows_every_value_and_pair():
    train, test = split(seed=3, num_test=256)
    assert len(test) == 256
    assert not set(train) & set(test)
    for names in [(a, b) for a in vars(test[0]) for b in vars(test[0])]:
        seen = {tuple(getattr(c, name) for name in names) for c in train}
        assert {tuple(getattr(c, name) for name in names) for c in test} <= seen
    assert split(seed=3) == (train, test)
    assert split(seed=4)[1] != test
    with pytest.raises(ValueError, match="num_test"):
        split(seed=0, num_test=3000)


@settings(max_examples=30, deadline=None)
@given(compositions, st.integers(0, 2**32))
def test_a_reversed_clip_is_the_clip_of_the_opposite_direction(composition, seed):
    forward = render(composition, np.random.default_rng(seed))
    backward = render(composition.reversed(), np.random.default_rng(seed))
    assert forward.dtype == np.uint8
    assert forward.shape == (SPEC.num_frames, SPEC.side, SPEC.side, 3)
    np.testing.assert_array_equal(forward[::-1], backward)
    assert composition.reversed().reversed() == composition


@settings(max_examples=60, deadline=None)
@given(compositions, st.integers(0, 2**32))
def test_only_the_shape_moves_in_its_direction_and_clear_of_the_distractor(composition, seed):
    frames = render(composition, np.random.default_rng(seed)).astype(int)
    other = render(
        Composition("blue" if composition.colour != "blue" else "red", *list(vars(composition).values())[1:]),
        np.random.default_rng(seed),
    )
    shape_THW = (frames != other).any(axis=-1)  # where the colour of the shape shows
    centres = [np.argwhere(mask).mean(axis=0)[::-1] for mask in shape_THW]
    steps = np.diff(centres, axis=0)
    speed = steps @ np.array(DIRECTIONS[composition.direction])
    # a pixel counts when its colour shows at all, so centres are right to about half a pixel
    assert ((speed > SPEC.speed[0] - 0.8) & (speed < SPEC.speed[1] + 0.8)).all()
    assert np.abs(steps @ np.array(DIRECTIONS[composition.direction])[::-1]).max() < 0.8
    # the distractor: what changes when another one is drawn; the shape never covers a pixel of it
    swapped = Composition(
        *list(vars(composition).values())[:4], next(d for d in DISTRACTORS if d != composition.distractor)
    )
    distractor_THW = (frames != render(swapped, np.random.default_rng(seed))).any(axis=-1)
    assert (distractor_THW == distractor_THW[0]).all()
    assert not (shape_THW & distractor_THW).any()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return write_synthetic_shards(folder, num_train=64, num_test=40, seed=5, num_streams=4)


def test_encoded_clips_keep_few_patches_and_still_areas_stay_under_the_threshold(shards):
    """Codec noise above the threshold would make every still patch a token: the demo would show no saving."""
    kept = []
    assert shards.test_compositions == split(5, 40)[1]
    for sample, composition in zip(read_shard(shards.test[0]), shards.test_compositions, strict=True):
        frames = decode(sample.media)
        rendered = render(composition, sample_rng(5, 0, sample.key))
        assert frames.shape == rendered.shape
        assert sample.captions == (composition.caption(),)
        for before, after, drawn_before, drawn_after in zip(
            frames, frames[1:], rendered, rendered[1:], strict=False
        ):
            difference = patch_difference(before, after)
            kept.append((difference > 0.1).mean())
            still = patch_difference(drawn_before, drawn_after) == 0
            assert difference[still].max() < 0.1
    share = (1 + (SPEC.num_frames - 1) * np.mean(kept)) / SPEC.num_frames
    assert 0.15 < share < 0.30


def test_training_shards_alternate_groups_and_singles_and_hold_no_test_composition(shards):
    assert [len(paths) for paths in (shards.train, shards.test, shards.reversed_test)] == [4, 1, 1]
    test_captions = {caption for sample in read_shard(shards.test[0]) for caption in sample.captions}
    assert len(test_captions) == 40
    for number, path in enumerate(shards.train):
        samples = list(read_shard(path))
        assert len(samples) == 16
        assert all((sample.group is None) == (number % 2 == 1) for sample in samples)
        assert not any(set(sample.captions) & test_captions for sample in samples)
        assert all(len(sample.captions) == 1 for sample in samples)


def test_reversed_clips_are_the_test_clips_backwards_with_the_opposite_caption(shards):
    """Catches another appearance (place, speed, background phase) drawn for the reversed clip."""
    for forward, backward, composition in zip(
        read_shard(shards.test[0]),
        read_shard(shards.reversed_test[0]),
        shards.test_compositions,
        strict=True,
    ):
        assert backward.key == forward.key
        assert backward.captions == (composition.reversed().caption(),)
        difference = decode(forward.media)[::-1].astype(int) - decode(backward.media)
        assert np.abs(difference).mean() < 3  # the same pictures, but for the codec


def test_a_group_differs_in_direction_only(shards):
    samples = list(read_shard(shards.train[0]))
    for first in range(0, len(samples), 4):
        group = samples[first : first + 4]
        assert len({sample.group for sample in group}) == 1
        words = {tuple(w for w in sample.captions[0].split() if w not in DIRECTIONS) for sample in group}
        assert len(words) == 1
        assert [next(d for d in DIRECTIONS if f" {d} " in s.captions[0]) for s in group] == list(DIRECTIONS)
        left, right = decode(group[0].media).astype(int), decode(group[1].media).astype(int)
        assert np.abs(left - right[::-1]).mean() < 3  # the same clip backwards, but for the codec


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_every_even_stream_holds_groups_whatever_their_number(shards, num_streams):
    for stream in range(num_streams):
        dealt = iter(
            LogicalStream(shards.train, stream=stream, num_streams=num_streams, seed=0, shuffle_buffer=16)
        )
        items = [next(dealt)[1] for _ in range(8)]
        assert all((item.group is None) == (stream % 2 == 1) for item in items)
        if stream % 2 == 0:
            assert len({item.group for item in items[:4]}) == 1


def test_the_same_seed_writes_the_same_bytes(shards, tmp_path):
    again = write_synthetic_shards(tmp_path, num_train=64, num_test=40, seed=5, num_streams=4)
    for name in ("train", "test", "reversed_test"):
        for path, first in zip(getattr(again, name), getattr(shards, name), strict=True):
            assert path.read_bytes() == first.read_bytes()


def test_sizes_that_cannot_be_dealt_are_refused(tmp_path):
    for num_train, num_streams in [(64, 3), (20, 2), (0, 2)]:
        with pytest.raises(ValueError, match="num_streams must be even"):
            write_synthetic_shards(tmp_path, num_train=num_train, seed=0, num_streams=num_streams)
