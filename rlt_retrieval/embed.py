"""The only inference loop: streams of tokenized clips and lists of texts → embeddings.

Shapes: N clips, Q texts, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlt_retrieval.config import default_num_workers, num_cores
from rlt_retrieval.data.batching import batches_by_budget
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.loading import Sampling, TokenizedClip, iter_eval_clips, prefetch
from rlt_retrieval.data.shards import BadSample, expand_shards
from rlt_retrieval.data.workers import WorkerPool
from rlt_retrieval.encoders.packing import VideoTokens, pack
from rlt_retrieval.errors import ShardError
from rlt_retrieval.eval.protocols import ProtocolResult, captions_protocol
from rlt_retrieval.model import VideoTextModel

Label = TypeVar("Label")
TEXT_BATCH = 256
PREFETCHED_CLIPS = 16


@dataclass(frozen=True)
class LoaderOptions:
    """How clips are decoded and batched for inference."""

    num_workers: int = default_num_workers()
    decode_timeout_seconds: float = 60.0
    max_bad_fraction: float = 0.1
    token_budget: int = 16384


@dataclass(frozen=True)
class ShardEmbeddings:
    """Clips of an evaluation set in reading order.

    z_ND: float32, unit norm; captions: at least one text a clip; kept_tokens, all_tokens: int64 [N], tokens that
    went into the encoder and tokens of the whole grid.
    """

    keys: list[str]
    captions: list[tuple[str, ...]]
    z_ND: np.ndarray
    kept_tokens: np.ndarray
    all_tokens: np.ndarray

    @property
    def keep_ratio(self) -> float:
        return float(self.kept_tokens.sum() / self.all_tokens.sum())


def model_sampling(model: VideoTextModel) -> Sampling:
    """What a loader worker needs to make tokens for this model (centre crop, segment middles)."""
    return Sampling(model.config.video.num_frames, model.transform, model.tokenizer)


def embed_clips(
    model: VideoTextModel, clips: Iterable[tuple[Label, VideoTokens]], token_budget: int
) -> Iterator[list[tuple[Label, np.ndarray]]]:
    """Embed a stream of labelled clips in batches of at most `token_budget` computed tokens; order is kept.

    Yields:
        One batch at a time: (label, float32 [D] of unit norm) for each of its clips.
    """
    for batch in batches_by_budget(clips, lambda labelled: model.video.num_rows(labelled[1]), token_budget):
        with torch.inference_mode():
            z_BD = model.encode_tokens(pack([tokens for _, tokens in batch])).float().cpu().numpy()
        yield [(label, z_D) for (label, _), z_D in zip(batch, z_BD, strict=True)]


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
    captions: list[tuple[str, ...]] = []
    counts: list[tuple[int, int]] = []

    def labelled(pool: WorkerPool) -> Generator[tuple[str, VideoTokens], None, None]:
        clips = iter_eval_clips(
            shards, model_sampling(model), pool, failures, rank=rank, world_size=world_size
        )
        for sample, clip in prefetch(clips, PREFETCHED_CLIPS):
            captions.append(sample.captions)
            counts.append(_token_counts(clip))
            on_progress(len(counts))
            yield sample.key, clip.tokens

    with (
        WorkerPool(options.num_workers, options.decode_timeout_seconds) as pool,
        closing(labelled(pool)) as clips,
    ):
        batches = embed_clips(model, clips, options.token_budget)
        embedded = [pair for batch in batches for pair in batch]
    z_ND = np.array([z for _, z in embedded], np.float32).reshape(len(embedded), model.dimension)
    kept_all = np.array(counts, np.int64).reshape(-1, 2)
    return ShardEmbeddings([key for key, _ in embedded], captions, z_ND, kept_all[:, 0], kept_all[:, 1])


@dataclass(frozen=True)
class ShardScores:
    """Result of `evaluate_shards`: the protocol's numbers, share of tokens kept, samples left out."""

    result: ProtocolResult
    embeddings: ShardEmbeddings
    skipped: list[BadSample]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the protocol's keys, keep_ratio and skipped (how many)."""
        return {
            **self.result.to_dict(),
            "keep_ratio": self.embeddings.keep_ratio,
            "skipped": len(self.skipped),
        }


def evaluate_shards(
    model: VideoTextModel,
    sources: Sequence[str | Path],
    options: LoaderOptions,
    *,
    on_progress: Callable[[int], None] = lambda num_clips: None,
) -> ShardScores:
    """The captions protocol on shards, by exact search: every caption against every clip.

    Raises:
        ShardError: no shard, no good sample, or more than `max_bad_fraction` of the samples are bad.
    """
    failures = FailureLog(None, options.max_bad_fraction)
    share_cores(options.num_workers, model.device)
    embedded = embed_shards(
        model, expand_shards(sources), options, failures=failures, on_progress=on_progress
    )
    if not embedded.keys:
        reasons = "; ".join(f"{bad.key}: {bad.reason}" for bad in failures.failures[:1]) or "it is empty"
        raise ShardError(f"{sources[0]}: no good sample to score ({reasons}); mend the shards or give others")
    return ShardScores(score_captions(model, embedded.z_ND, embedded.captions), embedded, failures.failures)


def score_captions(
    model: VideoTextModel, z_ND: np.ndarray, captions: Sequence[tuple[str, ...]]
) -> ProtocolResult:
    """The captions protocol for embedded clips and their texts."""
    texts = [text for clip in captions for text in clip]
    video_of_text_Q = np.repeat(np.arange(len(captions)), [len(clip) for clip in captions])
    return captions_protocol(z_ND, embed_texts(model, texts), video_of_text_Q, texts)


def _token_counts(clip: TokenizedClip) -> tuple[int, int]:
    return len(clip.run_lengths), int(np.prod(clip.grid))


def share_cores(num_workers: int, device: torch.device) -> None:
    """Leave the cores that loader workers use to them: two thread pools on the same cores slow each other down."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() - num_workers))
