"""Logical streams: shards dealt to a fixed number of endless, shuffled, resumable streams.

Ranks and workers share streams out, so what a stream gives depends on the recipe alone. Only headers and
positions are held: a shuffle buffer holds no media, and resuming in the middle of an epoch reads none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rlt_retrieval.data.shards import BadSample, ShardEntry, ShardSample, load_sample, read_group, scan_shard
from rlt_retrieval.errors import ShardError


@dataclass(frozen=True)
class StreamPosition:
    """How many items (bad ones included) of epoch `epoch` a stream has given out."""

    epoch: int
    index: int


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator for all random draws of one sample; the same on every machine, rank and worker."""
    return _stable_rng("sample", seed, epoch, key)


def _stable_rng(*parts: str | int) -> np.random.Generator:
    # a cryptographic hash: Python's hash() of text differs from process to process
    return np.random.default_rng(int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16]))


class LogicalStream:
    """One of the fixed streams that shards are dealt to; ranks and workers share streams out, never samples.

    Stream s reads `sorted(paths)[s::num_streams]`; with fewer shards than streams, the streams that share a
    shard take its units in turn. A unit is a run of neighbouring samples of one `group`, or one sample. Each
    epoch draws the order of the shards, and the units from a buffer that holds `shuffle_buffer` samples (1:
    file order), from (seed, epoch, stream). Iterating never ends: it gives (position after this item, sample
    or bad sample), and a stream made with such a position continues with exactly the next item.

    Raises (while iterating):
        ShardError: a shard is missing, or an epoch gave no usable sample.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        stream: int,
        num_streams: int,
        seed: int,
        shuffle_buffer: int,
        position: StreamPosition = StreamPosition(0, 0),
    ) -> None:
        shards = sorted(Path(path) for path in paths)
        if not shards:
            raise ShardError("no shards given to a stream; name at least one")
        if not 0 <= stream < num_streams:
            raise ValueError(f"stream must be in 0..{num_streams - 1}, got {stream}")
        # the streams first, first + len(shards), … share one shard; there is only one where shards are enough
        first = stream % len(shards) if len(shards) < num_streams else stream
        sharing = range(first, num_streams, len(shards)) if len(shards) < num_streams else [stream]
        self.shards = shards[first::num_streams]
        self.turn, self.num_turns = sharing.index(stream), len(sharing)
        self.stream, self.num_streams = stream, num_streams
        self.seed, self.shuffle_buffer, self.position = seed, shuffle_buffer, position

    def __iter__(self) -> Iterator[tuple[StreamPosition, ShardSample | BadSample]]:
        epoch, skip = self.position.epoch, self.position.index
        while True:
            found = skip > 0  # what an earlier run gave out is not read again to be judged
            for index, entry in enumerate(self._epoch(epoch)):
                if index < skip:
                    continue
                item = load_sample(entry)
                found = found or isinstance(item, ShardSample)
                yield StreamPosition(epoch, index + 1), item
            if not found:
                raise ShardError(
                    f"stream {self.stream} of {self.num_streams}: no usable sample in {self.shards[0]}"
                    f"{' and others' if self.shards[1:] else ''}; use fewer streams or more samples"
                )
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[ShardEntry | BadSample]:
        rng = _stable_rng("stream", self.seed, epoch, self.stream)
        order = rng.permutation(len(self.shards))
        units = (
            unit
            for number in order
            for unit in islice(_units(scan_shard(self.shards[number])), self.turn, None, self.num_turns)
        )
        for unit in _shuffled(units, self.shuffle_buffer, rng):
            yield from unit


def _units(entries: Iterable[ShardEntry | BadSample]) -> Iterator[list[ShardEntry | BadSample]]:
    unit: list[ShardEntry | BadSample] = []
    unit_group: str | None = None
    for entry in entries:
        group = read_group(entry)
        if unit and (group is None or group != unit_group):
            yield unit
            unit = []
        unit.append(entry)
        unit_group = group
    if unit:
        yield unit


def _shuffled(
    units: Iterable[list[ShardEntry | BadSample]], buffer_size: int, rng: np.random.Generator
) -> Iterator[list[ShardEntry | BadSample]]:
    held: list[list[ShardEntry | BadSample]] = []
    num_held = 0

    def draw() -> list[ShardEntry | BadSample]:
        place = int(rng.integers(len(held)))
        held[place], held[-1] = held[-1], held[place]
        return held.pop()

    for unit in units:
        held.append(unit)
        num_held += len(unit)
        while held and num_held >= buffer_size:
            drawn = draw()
            num_held -= len(drawn)
            yield drawn
    while held:
        yield draw()
