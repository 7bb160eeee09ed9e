"""The only inference loop: streams of tokenized clips and lists of texts → embeddings.

Shapes: N clips, Q texts, D embedding.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from rlt_retrieval.annotations import Classes, Ek100Dataset, read_dataset
from rlt_retrieval.config import default_num_workers
from rlt_retrieval.data.batching import batches_by_budget
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.loading import Sampling, decode_frames, iter_eval_clips, prefetch
from rlt_retrieval.data.shards import BadSample, ShardSample, expand_shards, load_sample, scan_shard
from rlt_retrieval.data.video import FrameTransform
from rlt_retrieval.data.workers import Item, WorkerPool
from rlt_retrieval.encoders.packing import VideoTokens, pack
from rlt_retrieval.errors import ShardError
from rlt_retrieval.eval import scored as scoring
from rlt_retrieval.eval.ek100 import Ek100Result
from rlt_retrieval.eval.protocols import ProtocolResult
from rlt_retrieval.eval.scored import Protocol, Scored
from rlt_retrieval.model import VideoTextModel

logger = logging.getLogger(__name__)
Label = TypeVar("Label")
Element = TypeVar("Element")
Result = TypeVar("Result")
TEXT_BATCH = 256
PREFETCHED_CLIPS = 16
LANES = 4  # batches that a CPU encodes at once, at most: each holds its own activations
GPU_LANES = 2  # while a GPU computes one batch, the host packs and plans the next
CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET = 1024, 16384  # larger batches are slower on a CPU
# Any aspect whole on one small picture, with bars where it is not 16:9.
THUMBNAIL = FrameTransform(90, 160, resize_mode="longest")


@dataclass(frozen=True)
class LoaderOptions:
    """How clips are decoded and batched for inference.

    token_budget: rows of a batch; None: CPU_TOKEN_BUDGET or GPU_TOKEN_BUDGET. num_threads: that encode on a CPU;
    None: as many as torch has (OMP_NUM_THREADS, else one a core).
    """

    num_workers: int = default_num_workers()
    decode_timeout_seconds: float = 60.0
    max_bad_fraction: float = 0.1
    token_budget: int | None = None
    num_threads: int | None = None


@dataclass(frozen=True)
class ShardEmbeddings:
    """Clips of an evaluation set in reading order.

    shards: where each clip was read; captions: at least one text a clip; classes: None where a sample has none;
    z_ND: float32, unit norm; kept_tokens, all_tokens: int64 [N], tokens that went into the encoder and tokens of whole
    clips.
    """

    keys: list[str]
    shards: list[str]
    captions: list[tuple[str, ...]]
    classes: list[Classes | None]
    z_ND: np.ndarray
    kept_tokens: np.ndarray
    all_tokens: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[ShardEmbeddings]) -> ShardEmbeddings:
        """The shares of all ranks as one set."""
        return cls(
            keys=[key for part in parts for key in part.keys],
            shards=[shard for part in parts for shard in part.shards],
            captions=[texts for part in parts for texts in part.captions],
            classes=[classes for part in parts for classes in part.classes],
            z_ND=np.concatenate([part.z_ND for part in parts]),
            kept_tokens=np.concatenate([part.kept_tokens for part in parts]),
            all_tokens=np.concatenate([part.all_tokens for part in parts]),
        )

    @property
    def keep_ratio(self) -> float:
        return float(self.kept_tokens.sum() / self.all_tokens.sum())


def model_sampling(model: VideoTextModel) -> Sampling:
    """What a loader worker needs to make tokens for this model (centre crop, segment middles)."""
    return Sampling(model.config.video.num_frames, model.transform, model.tokenizer)


def embed_clips(
    model: VideoTextModel, clips: Iterable[tuple[Label, VideoTokens]], options: LoaderOptions
) -> Iterator[list[tuple[Label, np.ndarray]]]:
    """Embed a stream of labelled clips in batches of at most `token_budget` computed tokens; order is kept.

    A CPU encodes up to LANES batches at once, each with its share of the threads. Threads that work on one batch meet
    at every operator, and wait there for the one whose core a decoder has taken; lanes wait for nobody. As many batches
    again are ready for them, so that none stands still while an earlier batch is waited for. For a GPU, GPU_LANES
    threads of the host take turns.

    Yields:
        One batch at a time: (label, float32 [D] of unit norm) for each of its clips.
    """
    on_cpu = model.device.type == "cpu"
    token_budget = options.token_budget or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
    num_threads = options.num_threads or torch.get_num_threads()
    num_lanes = min(num_threads, LANES) if on_cpu else GPU_LANES

    def embed(batch: list[tuple[Label, VideoTokens]]) -> list[tuple[Label, np.ndarray]]:
        with torch.inference_mode():
            z_BD = model.encode_tokens(pack([tokens for _, tokens in batch])).float().cpu().numpy()
        return [(label, z_D) for (label, _), z_D in zip(batch, z_BD, strict=True)]

    batches = batches_by_budget(clips, lambda labelled: model.video.num_rows(labelled[1]), token_budget)
    # Set in the lanes themselves: the number of threads belongs to the thread that asks for it.
    lane_threads = max(1, num_threads // num_lanes)
    with ThreadPoolExecutor(num_lanes, "encode", torch.set_num_threads, (lane_threads,)) as pool:
        yield from _in_order(pool, embed, batches, 2 * num_lanes)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Element], Result], elements: Iterable[Element], ahead: int
) -> Iterator[Result]:
    """`function` of every element, computed up to `ahead` before the one that is waited for."""
    due: deque[Future[Result]] = deque()
    try:
        for element in elements:
            due.append(pool.submit(function, element))
            if len(due) > ahead:
                yield due.popleft().result()
        while due:
            yield due.popleft().result()
    finally:
        for future in due:
            future.cancel()


def embed_texts(model: VideoTextModel, texts: Sequence[str]) -> np.ndarray:
    """float32 [Q, D], unit norm; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(distinct), TEXT_BATCH):
            parts.append(model.encode_text(distinct[start : start + TEXT_BATCH]).cpu().numpy())
    z_UD = np.concatenate(parts) if parts else np.zeros((0, model.dimension), np.float32)
    row = {text: index for index, text in enumerate(distinct)}
    return z_UD[[row[text] for text in texts]]


def embed_shards(
    model: VideoTextModel,
    shards: Sequence[Path],
    options: LoaderOptions,
    *,
    failures: FailureLog | None = None,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int], None] = lambda num_clips: None,
) -> ShardEmbeddings:
    """Embed this rank's share of the clips of some shards, each exactly once; `on_progress(clips read)`.

    Raises:
        ShardError: more than `max_bad_fraction` of the samples are bad.
    """
    failures = failures or FailureLog(None, options.max_bad_fraction)
    samples: list[ShardSample] = []
    counts: list[tuple[int, int]] = []

    def labelled(pool: WorkerPool) -> Generator[tuple[str, VideoTokens], None, None]:
        clips = iter_eval_clips(
            shards, model_sampling(model), pool, failures, rank=rank, world_size=world_size
        )
        for sample, clip in prefetch(clips, PREFETCHED_CLIPS):
            samples.append(replace(sample, media=b""))  # what is needed later, not the video
            counts.append((len(clip.run_lengths), model.video.num_cells(clip.grid)))
            on_progress(len(counts))
            yield sample.key, clip.tokens

    with (
        WorkerPool(options.num_workers, options.decode_timeout_seconds) as pool,
        closing(labelled(pool)) as clips,
    ):
        batches = embed_clips(model, clips, options)
        embedded = [pair for batch in batches for pair in batch]
    z_ND = np.array([z for _, z in embedded], np.float32).reshape(len(embedded), model.dimension)
    kept_all = np.array(counts, np.int64).reshape(-1, 2)
    return ShardEmbeddings(
        keys=[sample.key for sample in samples],
        shards=[sample.shard for sample in samples],
        captions=[sample.captions for sample in samples],
        classes=[sample.classes for sample in samples],
        z_ND=z_ND,
        kept_tokens=kept_all[:, 0],
        all_tokens=kept_all[:, 1],
    )


@dataclass(frozen=True, eq=False)
class ShardScores:
    """Result of `evaluate_shards`: the protocol's numbers, share of tokens kept, samples left out."""

    scored: Scored
    embeddings: ShardEmbeddings
    skipped: list[BadSample]

    @property
    def result(self) -> ProtocolResult | Ek100Result:
        return self.scored.result

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the keys of `Scored`, keep_ratio and skipped (how many)."""
        return {
            **self.scored.to_dict(),
            "keep_ratio": self.embeddings.keep_ratio,
            "skipped": len(self.skipped),
        }


def evaluate_shards(
    model: VideoTextModel,
    sources: Sequence[str | Path],
    options: LoaderOptions,
    *,
    protocol: Protocol | None = None,
    on_progress: Callable[[int], None] = lambda num_clips: None,
) -> ShardScores:
    """A protocol on shards, by exact search: every text against every clip.

    protocol: None takes "ek100" for shards that `dataset.json` says are of EPIC-KITCHENS-100, else "captions".

    Raises:
        ShardError: no shard, no good sample, more than `max_bad_fraction` of the samples bad; "ek100" for shards
            without sentences or clips without classes.
        AnnotationError: a damaged dataset.json, shards of different data sets.
    """
    shards = expand_shards(sources)
    dataset = _dataset(shards, protocol)
    failures = FailureLog(None, options.max_bad_fraction)
    embedded = embed_shards(model, shards, options, failures=failures, on_progress=on_progress)
    if not embedded.keys:
        reasons = "; ".join(f"{bad.key}: {bad.reason}" for bad in failures.failures[:1]) or "it is empty"
        raise ShardError(f"{sources[0]}: no good sample to score ({reasons}); mend the shards or give others")
    if dataset:
        scored = _score_ek100(model, embedded, dataset)
    else:
        if protocol is None and any(embedded.classes):
            logger.warning(
                "%s: clips with EK-100 classes but no dataset.json beside them: scored by their captions, not by "
                "the EK-100 protocol; copy the file of these shards there",
                shards[0].parent,
            )
        scored = _score_captions(model, embedded, "msrvtt" if protocol == "msrvtt" else "captions")
    return ShardScores(scored, embedded, failures.failures)


def score(
    model: VideoTextModel, embedded: ShardEmbeddings, dataset: Ek100Dataset | None
) -> ProtocolResult | Ek100Result:
    """Embedded clips by the EPIC-KITCHENS-100 protocol where there is a data set, else by their captions.

    Raises:
        ShardError: a data set, and a clip without classes.
    """
    if dataset:
        return _score_ek100(model, embedded, dataset).result
    return _score_captions(model, embedded, "captions").result


def middle_frames(
    embedded: ShardEmbeddings, rows: Sequence[int], options: LoaderOptions
) -> list[np.ndarray | None]:
    """The middle frame of some embedded clips, small: uint8 [1, 3, 90, 160] for each row, None where it is lost."""
    wanted = {(embedded.shards[row], embedded.keys[row]) for row in rows}
    media = {
        (shard, entry.key): sample.media
        for shard in dict.fromkeys(shard for shard, _ in wanted)
        for entry in scan_shard(Path(shard))
        if (shard, entry.key) in wanted and isinstance(sample := load_sample(entry), ShardSample)
    }
    places = list(media)
    frames: dict[tuple[str, str], np.ndarray] = {}
    with WorkerPool(options.num_workers, options.decode_timeout_seconds) as pool:
        for event in pool.run(decode_frames, [(content, 1, THUMBNAIL) for content in media.values()]):
            if isinstance(event, Item):
                frames[places[event.task]] = event.value
    return [frames.get((embedded.shards[row], embedded.keys[row])) for row in rows]


def _dataset(shards: Sequence[Path], protocol: Protocol | None) -> Ek100Dataset | None:
    """What the protocol needs beside the shards."""
    if protocol in ("msrvtt", "captions"):
        return None
    dataset = read_dataset(shards)
    if protocol == "ek100" and dataset is None:
        raise ShardError(
            f"{shards[0].parent}: no sentences beside these shards (dataset.json); make them with "
            "`rlt-retrieval shards make … --format ek100`, or use --protocol captions"
        )
    return dataset


def _score_ek100(model: VideoTextModel, embedded: ShardEmbeddings, dataset: Ek100Dataset) -> Scored:
    classes = [c for c in embedded.classes if c is not None]
    if len(classes) < len(embedded.classes):
        row = embedded.classes.index(None)
        raise ShardError(
            f"{embedded.keys[row]} in {embedded.shards[row]}: no verb and noun classes; make the shards again with "
            "`rlt-retrieval shards make … --format ek100`"
        )
    z_text_SD = embed_texts(model, [sentence.text for sentence in dataset.sentences])
    narrations = [captions[0] for captions in embedded.captions]
    return scoring.score_ek100(embedded.z_ND, embedded.keys, classes, narrations, z_text_SD, dataset)


def _score_captions(
    model: VideoTextModel, embedded: ShardEmbeddings, protocol: Literal["msrvtt", "captions"]
) -> Scored:
    z_text_QD = embed_texts(model, [text for clip in embedded.captions for text in clip])
    return scoring.score_captions(protocol, embedded.z_ND, embedded.keys, embedded.captions, z_text_QD)
