"""Logical streams: who reads what, in which order, and going on exactly where a run stopped."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import write_numbered, write_tar

from rlt_retrieval.data import streams
from rlt_retrieval.data.shards import BadSample, ShardSample
from rlt_retrieval.data.streams import LogicalStream, StreamPosition, sample_rng
from rlt_retrieval.errors import ShardError

START = StreamPosition(0, 0)


def take_epoch(stream: LogicalStream) -> list[str]:
    keys = []
    for position, item in stream:
        if position.epoch != stream.position.epoch:
            return keys
        keys.append(item.key)
    raise AssertionError("a stream never ends")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 3), st.data())
def test_streams_part_the_samples_and_resume_exactly(tmp_path_factory, sizes, num_streams, group_size, data):
    paths = write_numbered(tmp_path_factory.mktemp("streams") / "s", sizes, group_size)
    buffer = data.draw(st.integers(0, 12))
    seed = data.draw(st.integers(0, 3))

    def make(stream: int, position: StreamPosition = START) -> LogicalStream:
        return LogicalStream(
            data.draw(st.permutations(paths)),  # the order they are given in does not matter
            stream=stream,
            num_streams=num_streams,
            seed=seed,
            shuffle_buffer=buffer,
            position=position,
        )

    seen: list[str] = []
    for stream in range(num_streams):
        try:
            keys = take_epoch(make(stream))
        except ShardError:  # fewer units than streams
            continue
        seen += keys
        items = list(islice(make(stream), 3 * len(keys)))
        assert [item.key for _, item in items[: len(keys)]] == keys
        assert Counter(item.key for _, item in items[len(keys) : 2 * len(keys)]) == Counter(keys)
        cut = data.draw(st.integers(0, len(items) - 1))
        resumed = make(stream, items[cut - 1][0] if cut else START)
        assert list(islice(resumed, len(items) - cut)) == items[cut:]
    assert sorted(seen) == [f"{i:04d}" for i in range(sum(sizes))]


def test_groups_stay_together_and_in_order(tmp_path):
    paths = write_numbered(tmp_path / "s", [24, 24], group_size=4)
    stream = LogicalStream(paths, stream=0, num_streams=1, seed=1, shuffle_buffer=16)
    items = [item for _, item in islice(stream, 48)]
    assert [item.key for item in items] != sorted(item.key for item in items)
    for first in range(0, 48, 4):
        unit = items[first : first + 4]
        assert len({item.group for item in unit}) == 1
        assert [item.key for item in unit] == sorted(item.key for item in unit)


def test_epochs_seeds_and_streams_draw_other_orders(tmp_path):
    paths = write_numbered(tmp_path / "s", [20] * 2)

    def keys(seed: int, position: StreamPosition) -> list[str]:
        stream = LogicalStream(
            paths, stream=0, num_streams=1, seed=seed, shuffle_buffer=10, position=position
        )
        return [item.key for _, item in islice(stream, 40)]

    orders = [keys(0, StreamPosition(0, 0)), keys(0, StreamPosition(1, 0)), keys(1, StreamPosition(0, 0))]
    assert len({tuple(order) for order in orders}) == 3
    in_order = LogicalStream(paths[:1], stream=0, num_streams=1, seed=0, shuffle_buffer=1)
    assert take_epoch(in_order) == [f"{i:04d}" for i in range(20)]


def test_bad_samples_travel_in_streams_and_have_positions(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.mp4", b"v"), ("b.txt", b"no media"), ("c.mp4", b"v")])
    stream = LogicalStream([path], stream=0, num_streams=1, seed=0, shuffle_buffer=1)
    items = list(islice(stream, 4))
    assert [(p.epoch, p.index, type(i)) for p, i in items] == [
        (0, 1, ShardSample),
        (0, 2, BadSample),
        (0, 3, ShardSample),
        (1, 1, ShardSample),
    ]


def test_an_epoch_without_a_usable_sample_stops(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("b.txt", b"x")])
    stream = iter(LogicalStream([path], stream=0, num_streams=1, seed=0, shuffle_buffer=1))
    assert [type(item) for _, item in islice(stream, 2)] == [BadSample] * 2
    with pytest.raises(ShardError, match=r"stream 0 of 1: no usable sample in .*x\.tar; use fewer streams"):
        next(stream)
    with pytest.raises(ShardError, match="stream 2 of 3: no usable sample"):
        next(iter(LogicalStream([path], stream=2, num_streams=3, seed=0, shuffle_buffer=1)))
    with pytest.raises(ShardError, match="no shards given"):
        LogicalStream([], stream=0, num_streams=1, seed=0, shuffle_buffer=1)


def test_shuffling_and_resuming_read_no_media_they_do_not_give_out(tmp_path, monkeypatch):
    """A buffer that held media would need gigabytes, and a late restart would read an epoch all again."""
    (path,) = write_numbered(tmp_path / "s", [50])
    loaded = []
    load = streams.load_sample
    monkeypatch.setattr(streams, "load_sample", lambda entry: loaded.append(entry.key) or load(entry))
    stream = LogicalStream(
        [path], stream=0, num_streams=1, seed=0, shuffle_buffer=30, position=StreamPosition(0, 45)
    )
    given_out = [item.key for _, item in islice(stream, 5)]
    assert loaded == given_out


def test_sample_rng_is_the_same_in_another_process():
    """Python's own hash() of text differs from process to process."""
    code = "from rlt_retrieval.data.streams import sample_rng; print(sample_rng(1, 2, 'é').integers(2**60))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert int(printed) == sample_rng(1, 2, "é").integers(2**60)
    draws = {
        int(sample_rng(*parts).integers(2**60))
        for parts in [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (12, 0, "a")]
    }
    assert len(draws) == 4
