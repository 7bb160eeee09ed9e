"""From media to tokens: the jobs of the loader workers, and the streams of clips that come out of them.

Decoding and tokenizing happen in worker processes that can be killed; only kept patches (uint8) come back.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlt_retrieval.annotations import POSITIVE_RELEVANCY, Classes, Ek100Dataset
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.shards import BadSample, ShardSample, iter_samples
from rlt_retrieval.data.streams import LogicalStream, StreamPosition, sample_rng
from rlt_retrieval.data.video import Clip, FrameTransform, VideoSummary, decode_clip, iter_windows
from rlt_retrieval.data.workers import Failure, Item, WorkerPool
from rlt_retrieval.encoders.packing import Tokenizer, VideoTokens
from rlt_retrieval.errors import ShardError

Element = TypeVar("Element")

JOIN_SECONDS = 1.0
NO_CAPTION = "no caption; add one to the sample's json or txt"
NO_CLASSES = "no verb_class and noun_classes in its json; make the shards again with --format ek100"
NO_POSITIVE = (
    f"no sentence of dataset.json has a relevancy above {POSITIVE_RELEVANCY} to it; mend its classes"
)


@dataclass(frozen=True)
class Sampling:
    """What a worker needs to turn media into tokens."""

    num_frames: int
    transform: FrameTransform
    tokenizer: Tokenizer


@dataclass(frozen=True)
class TokenizedClip:
    """Tokens of one clip and the span they were read from. Holds numpy arrays: it crosses process borders."""

    patches: np.ndarray
    positions: np.ndarray
    run_lengths: np.ndarray
    grid: tuple[int, int, int]
    start_seconds: float
    end_seconds: float
    caption_index: int = 0
    lost: str | None = None  # see `data.video.Clip`
    covering: np.ndarray | None = None

    @property
    def tokens(self) -> VideoTokens:
        """The tokens as tensors that share this clip's memory."""
        return VideoTokens(
            torch.from_numpy(self.patches),
            torch.from_numpy(self.positions),
            torch.from_numpy(self.run_lengths),
            self.grid,
            None if self.covering is None else torch.from_numpy(self.covering),
        )


def tokenize_windows(
    source: str | bytes, sampling: Sampling, window_seconds: float, first_window: int
) -> Generator[TokenizedClip, None, VideoSummary]:
    """Worker job: every window of a video, from `first_window` on. See `data.video.iter_windows`."""
    windows = iter_windows(
        source,
        num_frames=sampling.num_frames,
        transform=sampling.transform,
        window_seconds=window_seconds,
        first_window=first_window,
    )
    while True:
        try:
            clip = next(windows)
        except StopIteration as stop:
            return stop.value
        yield _tokenized(clip, sampling)


def tokenize_clip(
    media: bytes, sampling: Sampling, num_captions: int, draw: tuple[int, int, str] | None
) -> Iterator[TokenizedClip]:
    """Worker job: one whole clip.

    Args:
        num_captions: texts to draw from; `caption_index` of the result is the one drawn.
        draw: (seed, epoch, key) of the random draws in training (caption, frames, crop); None in evaluation.
    """
    rng = None if draw is None else sample_rng(*draw)
    caption_index = 0 if rng is None else int(rng.integers(num_captions))
    clip = decode_clip(media, num_frames=sampling.num_frames, transform=sampling.transform, rng=rng)
    yield _tokenized(clip, sampling, caption_index)


def decode_frames(
    media: str | bytes,
    num_frames: int,
    transform: FrameTransform,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> Iterator[np.ndarray]:
    """Worker job: evenly spaced frames of a clip, or of [start_seconds, end_seconds) of it: uint8 [T, 3, H, W]."""
    clip = decode_clip(
        media,
        num_frames=num_frames,
        transform=transform,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
    )
    yield clip.frames_TCHW.numpy()


def _tokenized(clip: Clip, sampling: Sampling, caption_index: int = 0) -> TokenizedClip:
    tokens = sampling.tokenizer(clip.frames_TCHW)
    return TokenizedClip(
        tokens.patches.numpy(),
        tokens.positions.numpy(),
        tokens.run_lengths.numpy(),
        tokens.grid,
        clip.start_seconds,
        clip.end_seconds,
        caption_index,
        clip.lost,
        None if tokens.covering is None else tokens.covering.numpy(),
    )


def iter_eval_clips(
    shards: Sequence[Path],
    sampling: Sampling,
    pool: WorkerPool,
    failures: FailureLog,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[ShardSample, TokenizedClip]]:
    """This rank's share of the samples, each once and in order; bad ones go to `failures`."""
    waiting: dict[int, ShardSample] = {}

    def tasks() -> Iterator[tuple[Any, ...]]:
        for sample in iter_samples(shards, rank=rank, world_size=world_size):
            if isinstance(sample, BadSample):
                failures.bad(sample.key, sample.shard, sample.reason)
            elif not sample.captions:
                failures.bad(sample.key, sample.shard, NO_CAPTION)
            else:
                waiting[len(seen)] = sample
                seen.append(None)
                yield sample.media, sampling, len(sample.captions), None

    seen: list[None] = []
    for event in pool.run(tokenize_clip, tasks(), ordered=True):
        if isinstance(event, Item):
            failures.good()
            yield waiting[event.task], event.value
        elif isinstance(event, Failure):
            failures.bad(waiting[event.task].key, waiting[event.task].shard, event.message)
            del waiting[event.task]
        else:
            del waiting[event.task]
    failures.finish()


@dataclass(frozen=True)
class TrainClip:
    """One sample of a training batch.

    With a data set, `classes` are the clip's own and `sentence_classes` those of the sentence drawn as `caption`.
    """

    key: str
    caption: str
    tokens: VideoTokens
    classes: Classes | None = None
    sentence_classes: Classes | None = None


@dataclass(frozen=True)
class TrainBatch:
    """This rank's part of a global batch, stream by stream, and where each of its streams stands after it."""

    clips: list[TrainClip]
    positions: dict[int, StreamPosition]


Slice = list[tuple[StreamPosition, TrainClip]]
Text = tuple[str, Classes | None]


def relevant_texts(dataset: Ek100Dataset) -> Callable[[Classes], Sequence[Text]]:
    """A function from a clip's classes to all sentences with a relevancy above `POSITIVE_RELEVANCY` to it.

    Text and classes come from one row of the data set. Answers are kept: a few thousand different classes share some
    ten thousand clips.
    """
    texts: list[Text] = [(sentence.text, sentence.classes) for sentence in dataset.sentences]
    return cache(lambda classes: [texts[row] for row in dataset.table.positives_of(classes)])


class TrainLoader:
    """Endless training batches: an equal slice of every logical stream of this rank.

    The clips of a batch depend on the recipe only, never on ranks or workers; a bad sample is replaced by the next
    one of its stream. A slice lies in one epoch of its stream, so that no batch holds a clip twice; what is left at
    an epoch's end is too few for a slice and not used (each epoch draws another order).

    The text of a clip is one of its captions, or, with `dataset`, any sentence of it that is relevant to the clip: a
    uniform draw of the sample's own generator either way.

    Raises (while iterating):
        ShardError: a stream with fewer clips than its slice, or more than `max_bad_fraction` of all samples bad.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sampling: Sampling,
        pool: WorkerPool,
        failures: FailureLog,
        *,
        clips_per_stream: int,
        num_streams: int,
        streams: Sequence[int],
        seed: int,
        shuffle_buffer: int,
        positions: Mapping[int, StreamPosition],
        dataset: Ek100Dataset | None = None,
    ) -> None:
        self._sampling, self._pool, self._failures = sampling, pool, failures
        self._clips_per_stream = clips_per_stream
        self._seed = seed
        self._relevant_to = relevant_texts(dataset) if dataset else None
        self._streams = {
            stream: LogicalStream(
                shards,
                stream=stream,
                num_streams=num_streams,
                seed=seed,
                shuffle_buffer=shuffle_buffer,
                position=positions.get(stream, StreamPosition(0, 0)),
            )
            for stream in streams
        }
        # by stream: clips asked for that are neither bad nor left over nor in a batch; the last slice's epoch
        self._clips_ahead = dict.fromkeys(streams, 0)
        self._slice_epochs = {stream: source.position.epoch for stream, source in self._streams.items()}

    def __iter__(self) -> Iterator[TrainBatch]:
        slices: dict[int, deque[Slice]] = {stream: deque() for stream in self._streams}
        gathering: dict[int, Slice] = {stream: [] for stream in self._streams}
        for stream, position, clip in self._clips():
            started = gathering[stream]
            if started and started[0][0].epoch < position.epoch:
                self._clips_ahead[stream] -= len(started)
                started.clear()
            self._check_epoch(stream, position)
            started.append((position, clip))
            if len(started) == self._clips_per_stream:
                self._slice_epochs[stream] = position.epoch
                slices[stream].append(started)
                gathering[stream] = []
            while all(slices.values()):
                yield self._join({stream: waiting.popleft() for stream, waiting in slices.items()})

    def _check_epoch(self, stream: int, position: StreamPosition) -> None:
        """A whole epoch of a stream must not go by without a slice."""
        if position.epoch > self._slice_epochs[stream] + 1:
            raise ShardError(
                f"stream {stream} has fewer usable clips than its slice of a batch ({self._clips_per_stream}); "
                "lower optim.batch_size or data.num_streams, or give more clips"
            )

    def _join(self, slices: Mapping[int, Slice]) -> TrainBatch:
        for stream in slices:
            self._clips_ahead[stream] -= self._clips_per_stream
        clips = [clip for taken in slices.values() for _, clip in taken]
        return TrainBatch(clips, {stream: taken[-1][0] for stream, taken in slices.items()})

    def _clips(self) -> Iterator[tuple[int, StreamPosition, TrainClip]]:
        """Good samples of all streams, with the stream's position after each."""
        waiting: dict[int, tuple[int, StreamPosition, ShardSample, Sequence[Text]]] = {}

        def tasks() -> Iterator[tuple[Any, ...]]:
            number = 0
            for stream, position, sample in self._raw():
                if isinstance(sample, BadSample) or not (texts := self._texts_of(sample)):
                    self._failures.bad(sample.key, sample.shard, self._why_unusable(sample))
                    continue
                self._clips_ahead[stream] += 1
                waiting[number] = (stream, position, sample, texts)
                number += 1
                draw = (self._seed, position.epoch, sample.key)
                yield sample.media, self._sampling, len(texts), draw

        for event in self._pool.run(tokenize_clip, tasks(), ordered=True):
            stream, position, sample, texts = waiting[event.task]
            if isinstance(event, Item):
                self._failures.good()
                text, classes = texts[event.value.caption_index]
                clip = TrainClip(sample.key, text, event.value.tokens, sample.classes, classes)
                yield stream, position, clip
            else:
                if isinstance(event, Failure):
                    self._clips_ahead[stream] -= 1
                    self._failures.bad(sample.key, sample.shard, event.message)
                del waiting[event.task]

    def _texts_of(self, sample: ShardSample) -> Sequence[Text]:
        if self._relevant_to is None:
            return [(caption, None) for caption in sample.captions]
        return [] if sample.classes is None else self._relevant_to(sample.classes)

    def _why_unusable(self, sample: ShardSample | BadSample) -> str:
        if isinstance(sample, BadSample):
            return sample.reason
        if self._relevant_to is None:
            return NO_CAPTION
        return NO_CLASSES if sample.classes is None else NO_POSITIVE

    def _raw(self) -> Iterator[tuple[int, StreamPosition, ShardSample | BadSample]]:
        """The next sample of whichever stream is least ahead: one with many bad samples delays, never piles up."""
        iterators = {stream: iter(source) for stream, source in self._streams.items()}
        while True:
            stream = min(self._clips_ahead, key=self._clips_ahead.__getitem__)
            position, sample = next(iterators[stream])
            if not self._clips_ahead[stream]:  # all that it gave so far was bad, left over or used
                self._check_epoch(stream, position)
            yield stream, position, sample


def clip_seed(seed: int, step: int, key: str) -> int:
    """Seed of the random decisions inside the model for one clip at one step: 63 bits, stable."""
    digest = hashlib.sha256(f"{seed}/{step}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prefetch(elements: Iterable[Element], depth: int) -> Generator[Element, None, None]:
    """The same elements, computed up to `depth` ahead in a thread; its errors are raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(message: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(elements)
        try:
            for element in iterator:
                if not put((True, element)):
                    break
            else:
                put((False, None))
        except BaseException as error:
            put((False, error))
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if not more and value is None:
                return
            if not more:
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(JOIN_SECONDS)  # not for ever: Ctrl-C must not wait for a hung worker
