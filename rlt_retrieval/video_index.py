"""VideoIndex, what users hold: a model, the inference loop and a store, behind add / remove / search.

Shapes: Q queries, D embedding.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.data.loading import TokenizedClip, prefetch, tokenize_windows
from rlt_retrieval.data.sources.entries import VideoEntry, VideoSources, video_name
from rlt_retrieval.data.video import VideoSummary
from rlt_retrieval.data.workers import End, Item, WorkerPool
from rlt_retrieval.embed import (
    PREFETCHED_CLIPS,
    LoaderOptions,
    embed_clips,
    embed_texts,
    model_sampling,
)
from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.errors import ConfigError, IndexMismatchError, ShardError
from rlt_retrieval.indexing.store import ClipStore, StoreCounts
from rlt_retrieval.indexing.vectors import require_faiss
from rlt_retrieval.model import VideoTextModel, resolve_device

DEFAULT_WINDOW_SECONDS = 10.0
STOCK = ("ViT-B-16", "openai")  # backbone and weights where none are asked for

logger = logging.getLogger(__name__)

FinalStatus = Literal["ok", "partial", "failed"]


@dataclass(frozen=True)
class Hit:
    """One found clip: the best is rank 1; seconds count from the first frame of the video."""

    rank: int
    score: float
    video: str
    start_seconds: float
    end_seconds: float
    clip_id: int


@dataclass(frozen=True)
class Outcome:
    """What `add` did with one input: "ok", "partial", "failed", or "vanished" (in the index, no longer on disk)."""

    video: str
    status: str
    reason: str | None = None


@dataclass(frozen=True)
class AddReport:
    """What `add` found. `problems` lists every partial, failed or vanished input of these sources, known ones too."""

    added: int = 0
    unchanged: int = 0
    clips: int = 0
    problems: list[Outcome] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Watcher:
    """What `add` calls as it goes: with every outcome (known problems first), and with (videos done, to do)."""

    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    on_progress: Callable[[int, int], None] = lambda num_done, num_videos: None


@dataclass(frozen=True)
class _Todo:
    """An entry that needs work; windows before `first_window` are committed already."""

    entry: VideoEntry
    first_window: int


class VideoIndex:
    """A folder on disk that answers text queries with clips. Use `create` or `open`."""

    def __init__(self, store: ClipStore, model: VideoTextModel | None, device: str) -> None:
        self._store = store
        self._model = model
        self._device = device

    @classmethod
    def create(
        cls, path: str | Path, model: VideoTextModel, *, window_seconds: float = DEFAULT_WINDOW_SECONDS
    ) -> VideoIndex:
        """A new, empty index for the embeddings of `model`.

        Args:
            window_seconds: long videos are cut into windows of this length, each a clip of its own.
        Raises:
            IndexStoreError: something is at `path` already, or it cannot be written.
            ConfigError: window_seconds is no positive number.
        """
        if not 0 < window_seconds < math.inf:
            raise ConfigError(f"window_seconds is {window_seconds}; give a positive number of seconds")
        manifest = {
            "model": model.origin,
            "sha256": model.sha256(),
            "dimension": model.dimension,
            "window_seconds": float(window_seconds),
            "video": model.config.video.model_dump(),
        }
        store = ClipStore.create(path, manifest, device=_search_device(str(model.device)))
        return cls(store, model, str(model.device))

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: VideoTextModel | None = None,
        device: str = "auto",
        *,
        float16: bool = False,
    ) -> VideoIndex:
        """An existing index.

        Args:
            model: the one it was built with; None: built again from the manifest when first needed.
            device: of the model, and of FAISS if it has GPU support.
            float16: keep the vectors in half precision on the GPU.
        Raises:
            IndexStoreError: no index there. IndexMismatchError: another model.
        """
        store = ClipStore.open(path, device=_search_device(device), float16=float16)
        if model is not None:
            _check_model(store, model)
        return cls(store, model, device)

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def manifest(self) -> dict[str, Any]:
        """How the index was made: model, weight hash, dimension, window and tokenizer settings."""
        return self._store.manifest

    @property
    def model(self) -> VideoTextModel:
        """The model of this index, built from the manifest at first use.

        Raises:
            ModelError: it cannot be built any more. IndexMismatchError: its weights have changed.
        """
        if self._model is None:
            origin = self.manifest["model"]
            if origin is None:
                raise IndexMismatchError(
                    f"{self._store.path} does not say how its model was made; open it with the model"
                )
            model = VideoTextModel.from_origin(origin, device=self._device)
            _check_model(self._store, model)
            self._model = model
        return self._model

    def add(
        self,
        sources: Sequence[str | Path],
        *,
        options: LoaderOptions | None = None,
        retry_failed: bool = False,
        watcher: Watcher | None = None,
    ) -> AddReport:
        """Index videos, folders of videos and shards; what is there already is neither decoded nor encoded again.

        A killed `add` loses nothing it committed; the same call finishes the rest. A changed file replaces its
        rows; files that failed, wholly or in part, are left at that until `retry_failed` or until they change.

        Args:
            sources: video files, folders (searched recursively), .tar shards.
        Raises:
            SourceError: a source that does not exist or holds no video. IndexStoreError: another writer.
        """
        return self._add(
            VideoSources(sources), options or LoaderOptions(), retry_failed, watcher or Watcher()
        )

    def _add(
        self, sources: VideoSources, options: LoaderOptions, retry_failed: bool, watcher: Watcher
    ) -> AddReport:
        with self._store.writing():
            todo, known = self._plan(sources, retry_failed)
            for problem in known.problems:
                watcher.on_outcome(problem)
            if not todo:
                return known
            added = _Adder(self, todo, options, watcher).run()
        return AddReport(added.added, known.unchanged, added.clips, known.problems + added.problems)

    def remove(self, videos: Sequence[str | Path]) -> int:
        """Drop videos from the index; the number of clips removed."""
        with self._store.writing():
            return self._store.remove_videos(video_name(video) for video in videos)

    @overload  # a str is a Sequence[str] too, but never meant as one here
    def search(self, query: str, k: int = 10, *, per_video: bool = False) -> list[Hit]: ...  # type: ignore[overload-overlap]
    @overload
    def search(self, query: Sequence[str], k: int = 10, *, per_video: bool = False) -> list[list[Hit]]: ...
    def search(
        self, query: str | Sequence[str], k: int = 10, *, per_video: bool = False
    ) -> list[Hit] | list[list[Hit]]:
        """The k clips that fit a text best (a list of texts gives a list of lists).

        Args:
            per_video: at most one clip, the best, of each video.
        """
        require_faiss()  # before the model is made
        texts = [query] if isinstance(query, str) else list(query)
        found = self.search_vectors(embed_texts(self.model, texts), k, per_video=per_video)
        return found[0] if isinstance(query, str) else found

    def search_vectors(self, z_QD: np.ndarray, k: int = 10, *, per_video: bool = False) -> list[list[Hit]]:
        """The same for float32 [Q, D] query embeddings, without the text tower."""
        return [
            [
                Hit(rank, score, clip.video, clip.start_seconds, clip.end_seconds, clip.clip_id)
                for rank, (score, clip) in enumerate(hits, start=1)
            ]
            for hits in self._store.search(np.ascontiguousarray(z_QD, np.float32), k, per_video=per_video)
        ]

    def counts(self) -> StoreCounts:
        """Clips, videos by status, hours and bytes on disk."""
        return self._store.counts()

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> VideoIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan(self, sources: VideoSources, retry_failed: bool) -> tuple[list[_Todo], AddReport]:
        """Entries that need work, and what is known of the others."""
        todo: list[_Todo] = []
        problems = [
            Outcome(row.video, "vanished", "no longer on disk; its clips stay until they are removed")
            for row in self._store.videos()
            if row.video in sources and row.video not in sources.entries
        ]
        for entry in sources.entries.values():
            row = self._store.video(entry.video)
            if row is None or (row.size, row.mtime_ns) != (entry.size, entry.mtime_ns):
                todo.append(_Todo(entry, 0))
            elif row.status == "incomplete":
                todo.append(_Todo(entry, row.num_clips))
            elif row.status != "ok" and retry_failed:
                todo.append(_Todo(entry, 0))
            elif row.status != "ok":
                problems.append(Outcome(row.video, row.status, row.reason))
        return todo, AddReport(unchanged=len(sources.entries) - len(todo), problems=problems)


class _Adder:
    """One run of `add`: decodes, embeds and commits window by window."""

    def __init__(
        self,
        index: VideoIndex,
        todo: Sequence[_Todo],
        options: LoaderOptions,
        watcher: Watcher,
    ) -> None:
        self._store, self._model = index._store, index.model
        self._window_seconds = index.manifest["window_seconds"]
        self._todo, self._options, self._watcher = todo, options, watcher
        self._begun: set[int] = set()
        self._captions: dict[int, str | None] = {}
        self._ended: dict[int, VideoSummary | str] = {}  # summary, or why decoding broke off
        self._waiting: Counter[int] = Counter()  # clips decoded but not yet committed
        self._outcomes: list[Outcome] = []
        self._clips = 0

    def run(self) -> AddReport:
        self._watcher.on_progress(0, len(self._todo))
        with (
            WorkerPool(self._options.num_workers, self._options.decode_timeout_seconds) as pool,
            closing(self._decoded(pool)) as clips,
        ):
            for batch in embed_clips(self._model, clips, self._options):
                self._commit(batch)
                self._finish_ended()
        self._finish_ended()
        added = sum(outcome.status != "failed" for outcome in self._outcomes)
        problems = [outcome for outcome in self._outcomes if outcome.status != "ok"]
        return AddReport(added=added, clips=self._clips, problems=problems)

    def _decoded(
        self, pool: WorkerPool
    ) -> Generator[tuple[tuple[int, TokenizedClip], VideoTokens], None, None]:
        """Clips of all videos as they come, labelled with the number of their video in `todo`."""
        numbers: list[int] = []  # of the pool's tasks
        sampling = model_sampling(self._model)

        def tasks() -> Iterator[tuple[Any, ...]]:
            for number, todo in enumerate(self._todo):
                try:
                    if todo.entry.problem:
                        raise ShardError(todo.entry.problem)
                    media, self._captions[number] = todo.entry.load()
                except ShardError as error:
                    self._ended[number] = str(error)
                    continue
                numbers.append(number)
                yield media, sampling, self._window_seconds, todo.first_window

        for event in prefetch(pool.run(tokenize_windows, tasks()), PREFETCHED_CLIPS):
            number = numbers[event.task]
            if isinstance(event, Item):
                self._waiting[number] += 1
                yield (number, event.value), event.value.tokens
            else:
                self._ended[number] = event.value if isinstance(event, End) else event.message
                self._finish_ended()

    def _commit(self, batch: Sequence[tuple[tuple[int, TokenizedClip], np.ndarray]]) -> None:
        by_video: dict[int, list[tuple[TokenizedClip, np.ndarray]]] = defaultdict(list)
        for (number, clip), z_D in batch:
            by_video[number].append((clip, z_D))
        for number, pairs in by_video.items():
            self._begin(number)
            self._store.add_clips(
                self._todo[number].entry.video,
                [(clip.start_seconds, clip.end_seconds) for clip, _ in pairs],
                [self._captions[number]] * len(pairs),
                np.stack([z_D for _, z_D in pairs]),
                reason=pairs[-1][0].lost,
            )
            self._waiting[number] -= len(pairs)
            self._clips += len(pairs)

    def _begin(self, number: int) -> None:
        if number not in self._begun:
            entry = self._todo[number].entry
            self._store.begin_video(entry.video, entry.size, entry.mtime_ns)
            self._begun.add(number)

    def _finish_ended(self) -> None:
        for number in [number for number in list(self._ended) if not self._waiting[number]]:
            self._begin(number)
            end, video = self._ended.pop(number), self._todo[number].entry.video
            row = self._store.video(video)
            assert row is not None
            if isinstance(end, VideoSummary):
                # A resumed pass may see no packet lost before it; the row remembers.
                before, problem = row.reason if self._todo[number].first_window else None, end.problem or ""
                if before and not problem.startswith(before):
                    problem = "; ".join(filter(None, (before, problem)))
                reason = problem or None
                status: FinalStatus = "partial" if reason else "ok"
                duration = end.duration_seconds
            else:
                status, duration = ("partial" if row.num_clips else "failed"), None
                reason = end.removeprefix(f"{video}: ").removeprefix(
                    "<bytes>: "
                )  # the outcome names the video
            self._store.finish_video(video, status=status, reason=reason, duration_seconds=duration)
            self._outcomes.append(Outcome(video, status, reason))
            self._watcher.on_outcome(self._outcomes[-1])
            self._watcher.on_progress(len(self._outcomes), len(self._todo))


def build_index(
    path: str | Path,
    sources: Sequence[str | Path],
    *,
    make_model: Callable[[], VideoTextModel] | None = None,
    device: str = "auto",
    window_seconds: float | None = None,
    options: LoaderOptions | None = None,
    retry_failed: bool = False,
    watcher: Watcher | None = None,
) -> AddReport:
    """Create the index at `path` if there is none, and add sources to it.

    Args:
        make_model: makes the model that was asked for; None: the index's own, for a new index the stock default.
        window_seconds: None: the index's own, for a new index DEFAULT_WINDOW_SECONDS.
        options, retry_failed, watcher: see `VideoIndex.add`.
    Raises:
        IndexMismatchError: the index was built with another model or window. SourceError, IndexStoreError,
        ModelError: as for `VideoIndex.add` and `create`.
    """
    require_faiss()
    found = VideoSources(sources)  # before anything is made: a misspelt source should leave no index behind
    if os.path.lexists(path):
        ClipStore.open(path).close()  # what is no index is said before a model is made
        index = VideoIndex.open(path, make_model() if make_model else None, device)
    else:
        model = make_model() if make_model else _stock_model(device)
        model.check_text_tokenizer()  # its absence would show at the first search, after hours of work
        index = VideoIndex.create(path, model, window_seconds=window_seconds or DEFAULT_WINDOW_SECONDS)
    with index:
        _check_window(index, window_seconds)
        return index._add(found, options or LoaderOptions(), retry_failed, watcher or Watcher())


def plan_build(
    path: str | Path, sources: Sequence[str | Path], *, retry_failed: bool = False
) -> dict[str, Any]:
    """What `build_index` would do, for JSON: how many videos are to do and unchanged, known problems.

    Raises:
        SourceError, IndexStoreError: as for `build_index`.
    """
    found = VideoSources(sources)
    if not os.path.lexists(path):
        return {"to_do": len(found.entries), "unchanged": 0, "problems": []}
    with VideoIndex.open(path) as index:
        todo, known = index._plan(found, retry_failed)
    return {
        "to_do": len(todo),
        "unchanged": known.unchanged,
        "problems": [asdict(problem) for problem in known.problems],
    }


def _stock_model(device: str) -> VideoTextModel:
    logger.info("model: %s + %s, layout frame (stock default; --model or --backbone changes it)", *STOCK)
    return VideoTextModel.create(*STOCK, device=device)


def _check_window(index: VideoIndex, window_seconds: float | None) -> None:
    built = index.manifest["window_seconds"]
    if window_seconds is not None and window_seconds != built:
        raise IndexMismatchError(
            f"{index.path} was built with windows of {built:g} s, not {window_seconds:g} s; leave the option out "
            "or build another index"
        )


def _check_model(store: ClipStore, model: VideoTextModel) -> None:
    built = VideoSettings(**store.manifest["video"])
    if model.config.video != built:
        changed = [
            name for name in built.model_dump() if getattr(model.config.video, name) != getattr(built, name)
        ]
        raise IndexMismatchError(
            f"{store.path} was built with other video settings ({', '.join(changed)}); open it without a model to "
            "use its own"
        )
    if model.sha256() != store.manifest["sha256"]:
        raise IndexMismatchError(
            f"{store.path} was built with another model ({_describe(store.manifest['model'])}); use that one, or "
            "build another index"
        )


def _describe(origin: dict[str, Any] | None) -> str:
    if origin is None:
        return "unknown"
    if "path" in origin:
        return str(origin["path"])
    backbone = origin["backbone"] if isinstance(origin["backbone"], str) else "a configured backbone"
    return f"{backbone} + {origin['pretrained'] or 'random weights'}"


def _search_device(device: str) -> str:
    resolved = resolve_device(device)
    return str(resolved) if resolved.type == "cuda" else "cpu"
