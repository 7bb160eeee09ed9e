"""Training batches: what they hold depends on the recipe only; bad samples are replaced and listed once.

The slow reference `expected_batches` decodes every stream on its own, one clip after the other.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval.annotations import Classes, Ek100Dataset, Ek100Sentence
from rlt_retrieval.data import loading
from rlt_retrieval.data.batching import batches_by_budget
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.loading import (
    NO_CAPTION,
    NO_CLASSES,
    NO_POSITIVE,
    Sampling,
    TokenizedClip,
    TrainBatch,
    TrainLoader,
    iter_eval_clips,
    prefetch,
    tokenize_clip,
)
from rlt_retrieval.data.shards import BadSample, ShardSample, write_shards
from rlt_retrieval.data.streams import LogicalStream, StreamPosition, sample_rng
from rlt_retrieval.data.video import FrameTransform, decode_clip, encode_mp4
from rlt_retrieval.data.workers import WorkerPool
from rlt_retrieval.encoders.reducers.gated import GatedTokenizer
from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer
from rlt_retrieval.errors import RetrievalError, ShardError

NUM_STREAMS = 4
SAMPLING = Sampling(3, FrameTransform(16, 16, crop_scale=(0.5, 1.0)), RunLengthTokenizer(8, 1, 0.1, "anchor"))
LONG_SECONDS = 60.0


def make_media(number: int) -> bytes:
    """A clip of its own whose left part is still: the numbers of tokens differ."""
    rng = np.random.default_rng(number)
    frames_THWC = np.repeat(rng.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8), 6, axis=0)
    width = rng.integers(24)
    frames_THWC[:, :, width:] = rng.integers(0, 256, (6, 24, 24 - width, 3), dtype=np.uint8)
    return encode_mp4(frames_THWC, fps=6)


@pytest.fixture(scope="session")
def media() -> list[bytes]:
    return [make_media(number) for number in range(28)]


def make_samples(media: Sequence[bytes]) -> list[ShardSample]:
    return [
        ShardSample(f"clip-{n:02}", content, (f"caption {n}", f"other words {n}"), f"{n}.mp4", 0.0, None)
        for n, content in enumerate(media)
    ]


def test_what_stands_for_what_crosses_with_the_tokens(media: list[bytes]) -> None:
    """Reducers whose tokens stand for other cells than their own would else be read as if they did not."""
    sampling = replace(SAMPLING, tokenizer=GatedTokenizer(8, 0.2))
    for content in media[:3]:
        (clip,) = tokenize_clip(content, sampling, 1, None)
        frames = decode_clip(content, num_frames=3, transform=SAMPLING.transform).frames_TCHW
        expected = sampling.tokenizer(frames).covering
        assert clip.tokens.covering is not None
        assert expected is not None
        assert torch.equal(clip.tokens.covering, expected)


@pytest.fixture
def shards(media: list[bytes], tmp_path: Path) -> list[Path]:
    """Four shards of seven clips: one shard a stream."""
    return write_shards(make_samples(media), tmp_path / "shards", samples_per_shard=7)


def make_loader(
    shards: Sequence[Path],
    pool: WorkerPool,
    *,
    streams: Sequence[int] = range(NUM_STREAMS),
    clips_per_stream: int = 2,
    num_streams: int = NUM_STREAMS,
    positions: Mapping[int, StreamPosition] | None = None,
    failures: FailureLog | None = None,
    sampling: Sampling = SAMPLING,
    dataset: Ek100Dataset | None = None,
) -> TrainLoader:
    return TrainLoader(
        shards,
        sampling,
        pool,
        failures or FailureLog(None, 1.0),
        clips_per_stream=clips_per_stream,
        num_streams=num_streams,
        streams=streams,
        seed=5,
        shuffle_buffer=4,
        positions=positions or {},
        dataset=dataset,
    )


def load(
    shards: Sequence[Path], num_batches: int, num_workers: int = 0, **options: object
) -> list[TrainBatch]:
    with WorkerPool(num_workers, LONG_SECONDS) as pool:
        return list(islice(make_loader(shards, pool, **options), num_batches))  # type: ignore[arg-type]


def keys(batches: Iterable[TrainBatch]) -> list[list[str]]:
    return [[clip.key for clip in batch.clips] for batch in batches]


def join(parts: Sequence[TrainBatch]) -> TrainBatch:
    """The global batch of several ranks' parts."""
    clips = [clip for part in parts for clip in part.clips]
    return TrainBatch(clips, {stream: p for part in parts for stream, p in part.positions.items()})


def assert_same(found: Sequence[TrainBatch], expected: Sequence[TrainBatch]) -> None:
    """Key for key, caption for caption, class for class, pixel for pixel."""
    assert keys(found) == keys(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.positions == right.positions
        for a, b in zip(left.clips, right.clips, strict=True):
            assert (a.caption, a.classes, a.sentence_classes) == (b.caption, b.classes, b.sentence_classes)
            assert a.tokens.grid == b.tokens.grid
            for name in ("patches", "positions", "run_lengths"):
                assert torch.equal(getattr(a.tokens, name), getattr(b.tokens, name)), (a.key, name)


def expected_batches(shards: Sequence[Path], num_batches: int, clips_per_stream: int) -> list[TrainBatch]:
    """Stream by stream, epoch by epoch: whole slices of the usable clips, the rest of an epoch left out."""
    slices = {s: list(islice(_slices(shards, s, clips_per_stream), num_batches)) for s in range(NUM_STREAMS)}
    return [join([slices[stream][n] for stream in slices]) for n in range(num_batches)]


def _slices(shards: Sequence[Path], stream: int, clips_per_stream: int) -> Iterator[TrainBatch]:
    source = LogicalStream(shards, stream=stream, num_streams=NUM_STREAMS, seed=5, shuffle_buffer=4)
    epoch, clips = 0, []
    for position, sample in source:
        if isinstance(sample, BadSample) or not sample.captions:
            continue
        clips = clips if position.epoch == epoch else []
        epoch = position.epoch
        draw = (5, position.epoch, sample.key)
        try:
            (clip,) = tokenize_clip(sample.media, SAMPLING, len(sample.captions), draw)
        except RetrievalError:
            continue
        clips.append(loading.TrainClip(sample.key, sample.captions[clip.caption_index], clip.tokens))
        if len(clips) == clips_per_stream:
            yield TrainBatch(clips, {stream: position})
            clips = []


# --- what a batch holds -------------------------------------------------------------------------------------


def test_equals_one_stream_after_the_other(shards: list[Path]) -> None:
    """Eight batches are more than two epochs; seven clips a stream leave one over in every epoch."""
    assert_same(load(shards, 8), expected_batches(shards, 8, clips_per_stream=2))


def test_equal_slice_of_every_stream_and_no_clip_twice(shards: list[Path]) -> None:
    """Without whole epochs for every slice, the batch across an epoch's end would hold a clip as its own negative."""
    for batch in keys(load(shards, 10, clips_per_stream=5)):
        assert len(set(batch)) == len(batch)
        assert [int(key[-2:]) // 7 for key in batch] == [stream for stream in range(4) for _ in range(5)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_does_not_depend_on_the_number_of_ranks(shards: list[Path], num_ranks: int) -> None:
    share = NUM_STREAMS // num_ranks
    ranks = [load(shards, 5, streams=range(r * share, (r + 1) * share)) for r in range(num_ranks)]
    assert_same([join(parts) for parts in zip(*ranks, strict=True)], load(shards, 5))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_does_not_depend_on_the_number_of_workers(shards: list[Path], num_workers: int) -> None:
    """Catches results in the order in which workers finish, and draws from a worker's own generator."""
    assert_same(load(shards, 5, num_workers=num_workers), load(shards, 5))


@pytest.mark.parametrize("clips_per_stream", [2, 3, 7])
def test_continues_exactly_after_any_batch(shards: list[Path], clips_per_stream: int) -> None:
    whole = load(shards, 8, clips_per_stream=clips_per_stream)
    for done in range(1, 8):
        rest = load(shards, 8 - done, clips_per_stream=clips_per_stream, positions=whole[done - 1].positions)
        assert_same(rest, whole[done:])


def test_epochs_draw_new_crops_frames_and_captions(shards: list[Path]) -> None:
    batches = load(shards, 28, clips_per_stream=1)
    first, *later = [clip for batch in batches for clip in batch.clips if clip.key == "clip-00"]
    assert len(later) == 3
    assert any(not torch.equal(first.tokens.patches, clip.tokens.patches) for clip in later)
    assert {clip.caption for clip in (first, *later)} == {"caption 0", "other words 0"}


def test_groups_arrive_together(media: list[bytes], tmp_path: Path) -> None:
    """The four clips that differ in direction only must meet in one batch, or motion is not learnt."""
    samples = [
        ShardSample(f"g{n // 4}-{n % 4}", content, ("x",), "v", 0.0, None, group=f"g{n // 4}")
        for n, content in enumerate(media)
    ]
    paths = write_shards(samples, tmp_path / "groups", samples_per_shard=len(samples))
    for batch in keys(load(paths, 10, num_streams=1, streams=[0], clips_per_stream=8)):
        for four in (batch[:4], batch[4:]):
            assert four == [f"{four[0][:2]}-{n}" for n in range(4)]


# --- sentences of a data set ----------------------------------------------------------------------------------

OWN = Classes(1, (0, 1, 2))  # clips 0 … 13
OTHER = Classes(2, (7,))  # clips 14 … 27
# Text → classes, in an order that neither classes nor clips have. Relevancy to OWN: 0, 1, 0.1 and not above, 1/6, 1/2,
# 1/2, 0; to OTHER: 1/2, and 0 for all the rest.
SENTENCES = {
    "turn the tap": Classes(2, (5,)),
    "wash all three": OWN,
    "cut one of five": Classes(9, (0, 4, 5)),  # IoU 1/5
    "cut one of three": Classes(9, (0,)),  # IoU 1/3
    "wash the lid": Classes(1, (8,)),
    "cut all three": Classes(9, (0, 1, 2)),
    "open the door": Classes(3, (9,)),
}
POSITIVES = {
    OWN: {"wash all three", "cut one of three", "wash the lid", "cut all three"},
    OTHER: {"turn the tap"},
}
DATASET = Ek100Dataset(
    "train", 28, tuple(Ek100Sentence(f"P01_{n}", *row) for n, row in enumerate(SENTENCES.items()))
)


@pytest.fixture
def classed_shards(media: list[bytes], tmp_path: Path) -> list[Path]:
    """The clips of `shards` with classes; their captions are in no row of the data set."""
    samples = [
        replace(sample, classes=OWN if n < 14 else OTHER) for n, sample in enumerate(make_samples(media))
    ]
    return write_shards(samples, tmp_path / "classed", samples_per_shard=7)


def test_sentences_are_all_the_relevant_ones_and_keep_their_own_classes(classed_shards: list[Path]) -> None:
    """A text with the classes, or the relevancy, of another row would show: every row differs in both."""
    drawn: dict[Classes, list[str]] = {OWN: [], OTHER: []}
    for batch in load(classed_shards, 40, dataset=DATASET):
        for clip in batch.clips:
            assert clip.classes == (OWN if clip.key < "clip-14" else OTHER)
            assert clip.sentence_classes == SENTENCES[clip.caption]
            assert clip.classes is not None
            drawn[clip.classes].append(clip.caption)
    assert {classes: set(texts) for classes, texts in drawn.items()} == POSITIVES
    counts = [drawn[OWN].count(text) for text in POSITIVES[OWN]]
    assert min(counts) > sum(counts) / 8, "uniform: a quarter each"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_sentences_do_not_depend_on_workers_or_where_a_run_stopped(
    classed_shards: list[Path], num_workers: int
) -> None:
    whole = load(classed_shards, 6, dataset=DATASET)
    assert_same(load(classed_shards, 6, num_workers, dataset=DATASET), whole)
    rest = load(classed_shards, 2, num_workers, dataset=DATASET, positions=whole[3].positions)
    assert_same(rest, whole[4:])


def test_epochs_draw_new_sentences(classed_shards: list[Path]) -> None:
    batches = load(classed_shards, 42, clips_per_stream=1, dataset=DATASET)
    assert len({clip.caption for batch in batches for clip in batch.clips if clip.key == "clip-00"}) > 1


def test_clips_without_classes_or_relevant_sentence_are_bad_samples(
    media: list[bytes], tmp_path: Path
) -> None:
    """A caption is then no excuse, and no caption no fault."""
    samples = [replace(sample, classes=OWN) for sample in make_samples(media)]
    samples[3] = replace(samples[3], classes=None)
    samples[9] = replace(samples[9], classes=Classes(30, (40,)))
    samples[10] = replace(samples[10], captions=())
    paths = write_shards(samples, tmp_path / "some", samples_per_shard=7)
    failures = FailureLog(None, 1.0)
    batches = load(paths, 6, dataset=DATASET, failures=failures)
    assert {bad.key: bad.reason for bad in failures.failures} == {
        "clip-03": NO_CLASSES,
        "clip-09": NO_POSITIVE,
    }
    assert "clip-10" in {key for batch in keys(batches) for key in batch}


# --- bad samples --------------------------------------------------------------------------------------------


def with_bad_samples(media: list[bytes], tmp_path: Path) -> list[Path]:
    """Number 3 is no video and number 9 has no caption."""
    samples = make_samples(media)
    samples[3] = ShardSample("no-video", b"these are not the bytes", ("x",), "v", 0.0, None)
    samples[9] = ShardSample("no-caption", media[9], (), "v", 0.0, None)
    return write_shards(samples, tmp_path / "bad", samples_per_shard=7)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_sample_is_replaced_and_listed_once(media: list[bytes], tmp_path: Path, num_workers: int) -> None:
    """Over several epochs; the batches keep their size and their order."""
    paths = with_bad_samples(media, tmp_path)
    log = tmp_path / "failures.jsonl"
    failures = FailureLog(log, 0.2)
    batches = load(paths, 9, num_workers, clips_per_stream=3, failures=failures)
    assert_same(batches, expected_batches(paths, 9, clips_per_stream=3))
    listed = {line["key"]: line["reason"] for line in map(json.loads, log.read_text().splitlines())}
    assert len(log.read_text().splitlines()) == len(listed) == 2
    assert listed["no-caption"] == NO_CAPTION
    assert "\n" not in listed["no-video"]
    assert failures.num_bad > 2, "every epoch's bad samples count in the fraction"


def test_resumes_exactly_between_bad_samples(media: list[bytes], tmp_path: Path) -> None:
    paths = with_bad_samples(media, tmp_path)
    whole = load(paths, 8)
    for done in range(1, 8):
        assert_same(load(paths, 8 - done, positions=whole[done - 1].positions), whole[done:])


def test_too_many_bad_samples_stop_the_job(media: list[bytes], tmp_path: Path) -> None:
    samples = make_samples(media)
    for n in range(0, 28, 4):
        samples[n] = ShardSample(f"bad-{n:02}", b"x", ("x",), "v", 0.0, None)
    paths = write_shards(samples, tmp_path / "bad", samples_per_shard=7)
    with pytest.raises(ShardError, match=r"samples bad, more than max_bad_fraction = 0\.1") as error:
        load(paths, 100, failures=FailureLog(None, 0.1))
    assert "\n" not in str(error.value)


def hang_on_clip_05(
    content: bytes, sampling: Sampling, num_captions: int, draw: tuple[int, int, str]
) -> Iterator[TokenizedClip]:
    """Stands for a decoder that never returns; runs in a worker."""
    while draw[2] == "clip-05":
        time.sleep(1)
    yield from tokenize_clip(content, sampling, num_captions, draw)


def test_clip_that_hangs_is_skipped(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "tokenize_clip", hang_on_clip_05)
    failures = FailureLog(tmp_path / "failures.jsonl", 0.5)
    with WorkerPool(1, timeout_seconds=3) as pool:
        batches = list(islice(make_loader(shards, pool, clips_per_stream=3, failures=failures), 2))
    assert all(len(batch) == 12 and "clip-05" not in batch for batch in keys(batches))
    assert [(bad.key, bad.reason) for bad in failures.failures] == [("clip-05", "no reply for 3 s: killed")]


@pytest.mark.parametrize("clips_per_stream", [8, 20])
def test_too_few_clips_for_a_slice(shards: list[Path], clips_per_stream: int) -> None:
    """8 of 7 clips went through once, with a clip twice in every batch."""
    with pytest.raises(
        ShardError, match=r"stream \d has fewer usable clips than its slice .* lower"
    ) as error:
        load(shards, 3, clips_per_stream=clips_per_stream)
    assert "\n" not in str(error.value)


def test_stream_without_a_usable_clip_does_not_turn_for_ever(media: list[bytes], tmp_path: Path) -> None:
    """With max_bad_fraction 1 nothing else would stop it."""
    samples = make_samples(media)
    samples[:7] = [ShardSample(f"silent-{n}", media[n], (), "v", 0.0, None) for n in range(7)]
    paths = write_shards(samples, tmp_path / "silent", samples_per_shard=7)
    with pytest.raises(ShardError, match="stream 0 has fewer usable clips"):
        load(paths, 3)


def test_stream_with_many_bad_samples_holds_the_others_back(media: list[bytes], tmp_path: Path) -> None:
    """Streams once took turns, so clips of the good ones piled up in memory for the whole run."""
    samples = make_samples(media)
    for n in range(5):
        samples[n] = ShardSample(f"bad-{n}", b"x", ("x",), "v", 0.0, None)
    paths = write_shards(samples, tmp_path / "bad", samples_per_shard=7)
    with WorkerPool(0, LONG_SECONDS) as pool:
        failures = FailureLog(None, 1.0)
        list(islice(make_loader(paths, pool, failures=failures), 40))
    assert failures.num_good <= 40 * 2 * NUM_STREAMS + NUM_STREAMS * 14  # used, and one left over in an epoch


# --- evaluation ---------------------------------------------------------------------------------------------


def test_evaluation_reads_every_clip_once_over_uneven_ranks(media: list[bytes], tmp_path: Path) -> None:
    paths = with_bad_samples(media, tmp_path)
    found: list[str] = []
    listed: list[str] = []
    for rank in range(3):
        failures = FailureLog(None, 0.5)
        with WorkerPool(0, LONG_SECONDS) as pool:
            clips = list(iter_eval_clips(paths, SAMPLING, pool, failures, rank=rank, world_size=3))
        assert [sample.key for sample, _ in clips] == sorted(sample.key for sample, _ in clips)
        found += [sample.key for sample, _ in clips]
        listed += [bad.key for bad in failures.failures]
    assert sorted(found) == [f"clip-{n:02}" for n in range(28) if n not in (3, 9)]
    assert sorted(listed) == ["no-caption", "no-video"]


# --- tokens by budget ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50)), st.integers(1, 120))
def test_token_budget_drops_nothing(counts: list[int], budget: int) -> None:
    """Every clip once and in order; no list passes the budget but a single clip that does so alone."""
    numbered = list(enumerate(counts))
    batches = list(batches_by_budget(numbered, lambda pair: pair[1], budget))
    assert [pair for batch in batches for pair in batch] == numbered
    sums = [sum(count for _, count in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(sums, batches, strict=True))
    assert all(total + after[0][1] > budget for total, after in zip(sums, batches[1:], strict=False))


def test_sample_rng_differs_by_seed_epoch_and_key() -> None:
    draws = {sample_rng(*parts).random() for parts in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(draws) == 4


# --- prefetching --------------------------------------------------------------------------------------------


def no_thread_left() -> bool:
    return not any(thread.name == "prefetch" for thread in threading.enumerate())


@given(st.integers(0, 20), st.integers(1, 5))
def test_prefetch_keeps_the_order(number: int, depth: int) -> None:
    assert list(prefetch(range(number), depth)) == list(range(number))
    assert no_thread_left()


def test_prefetch_computes_at_most_depth_ahead() -> None:
    """`depth` wait in the queue and one more is in the thread's hand."""
    made: list[int] = []

    def elements() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(elements(), 2)
    assert next(ahead) == 0
    time.sleep(0.3)  # an unbounded one would have made all by now
    assert len(made) <= 4
    ahead.close()


def test_prefetch_raises_the_error_after_what_came_before() -> None:
    def elements() -> Iterator[int]:
        yield 1
        raise ShardError("the third shard is torn")

    ahead = prefetch(elements(), 4)
    assert next(ahead) == 1
    with pytest.raises(ShardError, match="third shard"):
        next(ahead)
    assert no_thread_left()


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetch_closed_early_ends_its_thread_and_its_source(depth: int) -> None:
    """Also while the thread waits for room in a full queue; workers are then killed, not left behind."""
    closed = threading.Event()

    def elements() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    ahead = prefetch(elements(), depth)
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert no_thread_left()


def test_prefetch_not_begun_has_no_thread() -> None:
    prefetch(iter([1]), 1).close()
    assert no_thread_left()
