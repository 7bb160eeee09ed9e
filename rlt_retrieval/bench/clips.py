"""The clips of a bench: decoded once, at the model's size, from whatever holds videos.

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlt_retrieval.data.loading import decode_frames
from rlt_retrieval.data.shards import BadSample, expand_shards, iter_samples
from rlt_retrieval.data.sources import SourceClip, read_source
from rlt_retrieval.data.sources.folder import captions_beside
from rlt_retrieval.data.video import FrameTransform
from rlt_retrieval.data.workers import Failure, Item, WorkerPool
from rlt_retrieval.embed import LoaderOptions
from rlt_retrieval.errors import SourceError
from rlt_retrieval.video_index import DEFAULT_WINDOW_SECONDS

TABLES = (".csv", ".jsonl")


@dataclass(frozen=True)
class BenchClip:
    """frames_TCHW: uint8 [T, 3, H, W], what the model's tokenizer takes. captions: maybe none."""

    name: str
    frames_TCHW: Tensor
    captions: tuple[str, ...] = ()


class _Job(NamedTuple):
    """A clip before it is decoded; end None: of the file."""

    name: str
    place: str  # where it is, for the reader
    media: str | bytes
    captions: tuple[str, ...]
    start_seconds: float = 0.0
    end_seconds: float | None = None


def read_clips(
    sources: Sequence[str | Path],
    transform: FrameTransform,
    num_frames: int,
    options: LoaderOptions,
) -> tuple[list[BenchClip], list[str]]:
    """Decode every clip that the sources name.

    Args:
        sources: video files, folders of videos (with captions in side files) or of .tar shards, caption files (CSV,
            JSON lines), .tar shards. A span or sample is taken whole, of a video the first DEFAULT_WINDOW_SECONDS.
    Returns:
        The clips in order, and one line for each that is broken: its name and why.
    Raises:
        SourceError, ShardError: a source that is missing or holds nothing, or no clip that can be decoded.
    """
    clips: list[BenchClip] = []
    problems: list[str] = []
    jobs: list[_Job] = []

    def tasks() -> Iterator[tuple[Any, ...]]:
        for source in sources:
            for job in _jobs(Path(source)):
                if isinstance(job, BadSample):
                    problems.append(f"{job.key} in {job.shard}: {job.reason}")
                else:
                    jobs.append(job._replace(media=b""))
                    yield job.media, num_frames, transform, job.start_seconds, job.end_seconds

    with WorkerPool(options.num_workers, options.decode_timeout_seconds) as pool:
        for event in pool.run(decode_frames, tasks(), ordered=True):
            job = jobs[event.task]
            if isinstance(event, Item):
                clips.append(BenchClip(job.name, torch.from_numpy(event.value), job.captions))
            elif isinstance(event, Failure):
                reason = event.message.removeprefix(f"{job.place}: ").removeprefix("<bytes>: ")
                problems.append(f"{job.place}: {reason}")
    if not clips:
        why = problems[0] if problems else "nothing in it"
        raise SourceError(f"{sources[0]}: no clip can be decoded ({why}); give other videos")
    return clips, problems


def _jobs(source: Path) -> Iterator[_Job | BadSample]:
    if source.suffix == ".tar" or any(source.glob("*.tar")):
        for sample in iter_samples(expand_shards([source])):
            if isinstance(sample, BadSample):
                yield sample
            else:
                yield _Job(sample.key, f"{sample.key} in {sample.shard}", sample.media, sample.captions)
        return
    for clip in _source_clips(source):
        end = clip.start_seconds + DEFAULT_WINDOW_SECONDS if clip.end_seconds is None else clip.end_seconds
        video = str(clip.video)
        yield _Job(clip.name, video, video, clip.captions, clip.start_seconds, end)


def _source_clips(source: Path) -> list[SourceClip]:
    if source.is_file() and source.suffix.lower() not in TABLES:
        return [SourceClip(source, captions_beside(source), source.name)]
    return read_source(source).clips
