"""ClipStore, an index folder: arrays and rows in, rows out.

Shapes: N clips, D embedding dimensions, Q queries.

    my.index/records.sqlite   the truth (records.py)
             vectors.faiss    derived, rebuilt from the records whenever it does not fit them (vectors.py)
             writer.lock      locked with flock by the one process that writes, so that its death frees it
"""

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from rlt_retrieval.errors import IndexStoreError
from rlt_retrieval.indexing.records import ClipRow, Records, VideoRow, VideoStatus
from rlt_retrieval.indexing.vectors import VectorIndex, require_faiss, saved_tag

__all__ = ["ClipRow", "ClipStore", "StoreCounts", "VideoRow", "VideoStatus"]

logger = logging.getLogger(__name__)

RECORDS = "records.sqlite"
VECTORS = "vectors.faiss"
LOCK = "writer.lock"


@dataclass(frozen=True)
class StoreCounts:
    """What an index holds; `videos` counts every status, `hours` is the summed length of the clips."""

    clips: int
    videos: dict[str, int]
    hours: float
    bytes_on_disk: int


class ClipStore:
    """An open index folder. Readers go on while one process writes; not to be shared between threads."""

    def __init__(self, path: Path, records: Records, *, device: str, float16: bool) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._records = records
        self._device, self._float16 = device, float16
        self._writing = False
        self._vectors: VectorIndex | None = None
        self._vectors_tag = b""  # the state of the records that `_vectors` shows
        self._video_ids_N: np.ndarray | None = None  # of that state; read when first needed

    @classmethod
    def create(
        cls, path: str | Path, manifest: dict[str, Any], *, device: str = "cpu", float16: bool = False
    ) -> "ClipStore":
        """A new, empty index; `manifest` holds JSON values, among them `dimension` (D, an int).

        The folder is made under another name and renamed when it is complete. Raises IndexStoreError when
        something is at `path` already, or nothing can be written there.
        """
        path = Path(path)
        if type(manifest.get("dimension")) is not int or manifest["dimension"] < 1:
            raise ValueError(
                f"manifest['dimension'] must be a positive int, got {manifest.get('dimension')!r}"
            )
        _refuse_existing(path)
        building = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            building.mkdir(parents=True)
            try:
                Records.create(building / RECORDS, manifest)
                _flush_folder(building)
                building.rename(path)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            _flush_folder(path.parent)
        except OSError as error:
            raise IndexStoreError(
                f"{path} cannot be created ({error.strerror}); check free space and write permission"
            ) from error
        return cls.open(path, device=device, float16=float16)

    @classmethod
    def open(cls, path: str | Path, *, device: str = "cpu", float16: bool = False) -> "ClipStore":
        """An existing index, for reading, and for writing inside `writing()`.

        `device`: "cpu", "cuda" or "cuda:N", where search runs if this faiss can; `float16`: the precision of
        the copy on the GPU. Raises IndexStoreError when `path` is missing, not an index, or not readable.
        """
        path = Path(path)
        if not path.exists():
            raise IndexStoreError(
                f"{path}: no such index; build it with: rlt-retrieval index build {path} SOURCE"
            )
        if not (path / RECORDS).is_file():
            raise IndexStoreError(f"{path} is not an index (no {RECORDS} in it); name another folder")
        return cls(path, Records(path / RECORDS), device=device, float16=float16)

    def close(self) -> None:
        self._records.close()

    def __enter__(self) -> "ClipStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manifest(self) -> dict[str, Any]:
        return self._records.manifest

    @property
    def dimension(self) -> int:
        return self._records.dimension

    @property
    def generation(self) -> int:
        """Grows with every transaction, of any process, that changes the set of clips."""
        return self._records.generation

    def video(self, video: str) -> VideoRow | None:
        return self._records.video(video)

    def videos(self, status: VideoStatus | None = None) -> list[VideoRow]:
        """All videos, or those of one status, by name."""
        return self._records.videos(status)

    def clips(self, video: str) -> list[ClipRow]:
        """The committed clips of `video`, in the order they were added."""
        return self._records.clips(video)

    def counts(self) -> StoreCounts:
        with self._records.snapshot():
            clips, seconds = self._records.totals()
            videos = self._records.status_counts()
        return StoreCounts(clips, videos, seconds / 3600, _folder_bytes(self.path))

    @contextmanager
    def writing(self) -> Iterator["ClipStore"]:
        """The right to change the index, held by one process at a time; at its end `vectors.faiss` is saved.

        Raises IndexStoreError at once when another writer holds it, MissingDependencyError without faiss.
        """
        require_faiss()
        with _writer_lock(self.path):
            for leftover in self.path.glob(f"{VECTORS}.*.tmp"):  # of a killed writer
                with suppress(OSError):
                    leftover.unlink()
            self._writing = True
            try:
                yield self
                self.save_vectors()
            finally:
                self._writing = False

    def begin_video(self, video: str, size: int, mtime_ns: int) -> VideoRow:
        """Start or resume `video`; the row says how many of its clips are there already.

        An incomplete video whose file is the same (size, mtime) keeps its clips; in every other case (changed
        file, failed or finished before) its old clips are dropped.
        """
        self._require_writing()
        self._records.begin_video(video, size, mtime_ns)
        row = self._records.video(video)
        assert row is not None
        return row

    def add_clips(
        self,
        video: str,
        spans: Sequence[tuple[float, float]],
        captions: Sequence[str | None],
        embeddings_ND: np.ndarray,
        *,
        reason: str | None = None,
    ) -> None:
        """Commit clips of a begun video: spans in seconds, embeddings float32 [N, D]; all of them or none.

        `reason`: what is known by now to be wrong with the video, so that a resumed one does not forget it.
        """
        self._require_writing()
        if not len(spans) == len(captions) == len(embeddings_ND):
            raise ValueError(
                f"{video}: {len(spans)} spans, {len(captions)} captions, {len(embeddings_ND)} embeddings"
            )
        self._require_vectors(embeddings_ND, "embeddings")
        self._records.add_clips(video, spans, captions, embeddings_ND, reason)

    def finish_video(
        self,
        video: str,
        *,
        status: Literal["ok", "partial", "failed"],
        reason: str | None = None,
        duration_seconds: float | None = None,
    ) -> None:
        """Mark a begun video as done; its clips stay as they are."""
        self._require_writing()
        self._records.finish_video(video, status, reason, duration_seconds)

    def remove_videos(self, videos: Iterable[str]) -> int:
        """Drop videos and their clips in one transaction; the number of clips removed. Unknown names: 0."""
        self._require_writing()
        return self._records.remove_videos(videos)

    def search(
        self, queries_QD: np.ndarray, k: int, *, per_video: bool = False
    ) -> list[list[tuple[float, ClipRow]]]:
        """For each query (float32 [Q, D]) up to `k` (inner product, clip), by score descending, then clip_id.

        Exact over all clips committed when the search begins. `per_video`: only the best clip of each video.
        """
        self._require_vectors(queries_QD, "queries")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        with self._records.snapshot():
            vectors, is_new = self._refresh()
            found = vectors.search(queries_QD, k, self._videos_of_clips() if per_video else None)
            rows = self._records.clips_by_id({clip_id for hits in found for _, clip_id in hits})
        if is_new and not self._writing:
            self._save_for_other_readers()
        return [[(score, rows[clip_id]) for score, clip_id in hits] for hits in found]

    def save_vectors(self) -> None:
        """Write `vectors.faiss`, unless it is that of the present records already."""
        self._require_writing()
        if saved_tag(self.path / VECTORS) == self._records.tag():
            return
        with self._records.snapshot():
            vectors, _ = self._refresh()
        vectors.save(self.path / VECTORS, self._vectors_tag)

    def _refresh(self) -> tuple[VectorIndex, bool]:
        """The vectors of the present snapshot, and whether they are other than at the last call."""
        tag = self._records.tag()
        if self._vectors is not None and self._vectors_tag == tag:
            return self._vectors, False
        # An interrupted refresh must leave nothing half-filled.
        vectors, self._vectors, self._video_ids_N = self._vectors, None, None
        if vectors is not None and self._are_still_there(vectors.ids_N):
            vectors.append(self._records.embeddings(after_clip_id=int(vectors.ids_N.max(initial=0))))
        else:
            vectors = None  # its memory is free before the new one is made
            vectors = self._load_or_rebuild(tag)
        self._vectors, self._vectors_tag = vectors, tag
        return vectors, True

    def _are_still_there(self, ids_N: np.ndarray) -> bool:
        present_ids_N, self._video_ids_N = self._records.clip_ids()
        return np.array_equal(ids_N, present_ids_N[: len(ids_N)])

    def _videos_of_clips(self) -> np.ndarray:
        """int64 [N], by ascending clip id."""
        if self._video_ids_N is None:
            _, self._video_ids_N = self._records.clip_ids()
        return self._video_ids_N

    def _load_or_rebuild(self, tag: bytes) -> VectorIndex:
        placement: dict[str, Any] = {"device": self._device, "float16": self._float16}
        num_clips = self._records.num_clips()
        loaded = VectorIndex.load(self.path / VECTORS, tag, num_clips, **placement)
        if loaded is not None:
            return loaded
        if saved_tag(self.path / VECTORS) == tag:
            with suppress(OSError):  # damaged, but its good trailer would keep it from being saved anew
                (self.path / VECTORS).unlink()
        return VectorIndex.build(self.dimension, self._records.embeddings(), **placement)

    def _save_for_other_readers(self) -> None:
        """Spare them the rebuild; a writer will do it itself, and a reader may lack the permission."""
        if saved_tag(self.path / VECTORS) == self._vectors_tag or _somebody_writes(self.path):
            return
        try:
            assert self._vectors is not None
            self._vectors.save(self.path / VECTORS, self._vectors_tag)
        except IndexStoreError as error:
            logger.info("%s", error)

    def _require_vectors(self, vectors_ND: np.ndarray, what: str) -> None:
        if vectors_ND.dtype != np.float32 or vectors_ND.ndim != 2 or vectors_ND.shape[1] != self.dimension:
            got = f"{vectors_ND.dtype} {list(vectors_ND.shape)}"
            raise ValueError(f"{what} must be float32 [N, {self.dimension}], got {got}")
        if not np.isfinite(vectors_ND).all():
            raise ValueError(f"{what} hold NaN or infinity")

    def _require_writing(self) -> None:
        if not self._writing:
            raise RuntimeError(f"{self.path}: changes are made inside `with store.writing():`")


def _refuse_existing(path: Path) -> None:
    if os.path.isfile(path / RECORDS):
        raise IndexStoreError(f"{path} is an index already; open it, or name another folder")
    if os.path.lexists(path):
        raise IndexStoreError(f"{path} exists and is not an index; name a folder that does not exist yet")


@contextmanager
def _writer_lock(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path / LOCK, "a+", encoding="ascii", errors="replace"))
            _lock_or_raise(file, path)
        except OSError as error:
            way_out = "check write permission, and that its disk knows file locks"
            raise IndexStoreError(f"{path} cannot be written ({error.strerror}); {way_out}") from error
        yield


def _lock_or_raise(file: IO[str], path: Path) -> None:
    if not _try_lock(file, fcntl.LOCK_EX):
        time.sleep(0.05)  # a reader that looks whether somebody writes holds it for microseconds
        if not _try_lock(file, fcntl.LOCK_EX):
            file.seek(0)
            raise IndexStoreError(
                f"{path} is being written by another process (pid {file.read() or 'unknown'});"
                " wait for it, or stop it: what it committed is kept"
            )
    with suppress(OSError):  # a full disk: the pid only serves the message above
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()


def _somebody_writes(path: Path) -> bool:
    try:
        with open(path / LOCK, "rb") as file:
            return not _try_lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # not for this process to tell


def _try_lock(file: IO[Any], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder_bytes(path: Path) -> int:
    num_bytes = 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # SQLite's log and temporary files come and go
            num_bytes += file.stat().st_size
    return num_bytes


def _flush_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
