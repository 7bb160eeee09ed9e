"""The index's records: one SQLite file, the truth from which everything else is rebuilt.

Shapes: N clips, D embedding dimensions.

Every method that changes something is one transaction, and what changes the set of clips also moves the
generation in that transaction. The journal is a write-ahead log: readers go on while a writer commits. It
needs memory shared by all processes that have the file open: write an index on a local disk, not on NFS.

`synchronous=FULL`: a `kill -9` loses no commit at either setting (the operating system has the bytes), but
with `NORMAL` a power cut may take back the last commits, and the records would then be older than the vectors
made from them. One flush a commit costs milliseconds, next to seconds of decoding and encoding.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlt_retrieval.errors import IndexStoreError

VideoStatus = Literal["incomplete", "ok", "partial", "failed"]

APPLICATION_ID = int.from_bytes(b"RLTI", "big")  # marks the SQLite file as ours
SCHEMA_VERSION = 1
ROWS_PER_READ = 16_384

_SCHEMA = """
CREATE TABLE manifest (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE state (generation INTEGER NOT NULL, nonce BLOB NOT NULL);
INSERT INTO state VALUES (0, randomblob(8));
CREATE TABLE videos (
    video_id INTEGER PRIMARY KEY,
    video TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('incomplete', 'ok', 'partial', 'failed')),
    reason TEXT,
    duration_seconds REAL
);
CREATE TABLE clips (
    clip_id INTEGER PRIMARY KEY AUTOINCREMENT,
    video_id INTEGER NOT NULL REFERENCES videos (video_id),
    start_seconds REAL NOT NULL,
    end_seconds REAL NOT NULL,
    caption TEXT,
    embedding BLOB NOT NULL CHECK (length(embedding) = 4 * {dimension})
);
CREATE INDEX clips_of_video ON clips (video_id);
"""
_VIDEO_COLUMNS = (
    "video, size, mtime_ns, status, reason, duration_seconds,"
    " (SELECT count(*) FROM clips WHERE clips.video_id = videos.video_id)"
)
_CLIPS = (
    "SELECT clip_id, video, start_seconds, end_seconds, caption FROM clips JOIN videos USING (video_id)"
    " WHERE {where} ORDER BY clip_id"
)
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_NO_ROOM_OR_RIGHT = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}


@dataclass(frozen=True)
class VideoRow:
    """A video the index knows; (size, mtime_ns) tell whether its file has changed since."""

    video: str
    size: int
    mtime_ns: int
    status: VideoStatus
    reason: str | None
    duration_seconds: float | None
    num_clips: int


@dataclass(frozen=True)
class ClipRow:
    """A span of a video that has an embedding; `clip_id` is never used for another clip."""

    clip_id: int
    video: str
    start_seconds: float
    end_seconds: float
    caption: str | None


class Records:
    """An open `records.sqlite`. Not to be shared between threads."""

    def __init__(self, file: Path) -> None:
        """Raises IndexStoreError when `file` is not SQLite, not ours, or of another schema version."""
        self._file = file
        with _one_line_errors(file):
            self._db = _connect(_uri(file))
            try:
                self._check_schema()
                self._db.execute("PRAGMA synchronous=FULL")
                rows = self._db.execute("SELECT key, value FROM manifest")
                self.manifest: dict[str, Any] = {key: json.loads(value) for key, value in rows}
            except BaseException:
                self._db.close()
                raise
        self.dimension: int = self.manifest["dimension"]

    @staticmethod
    def create(file: Path, manifest: dict[str, Any]) -> None:
        """Write a new, empty `file`; `manifest` values go in as JSON, `manifest["dimension"]` is D."""
        with _one_line_errors(file):
            db = _connect(f"{file.absolute().as_uri()}?mode=rwc")
            try:
                # Rows of some kilobytes: SQLite's 4 KiB pages would hold one each, half empty.
                db.execute("PRAGMA page_size=16384")
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(_SCHEMA.format(dimension=int(manifest["dimension"])))
                items = [(key, json.dumps(value)) for key, value in manifest.items()]
                db.executemany("INSERT INTO manifest VALUES (?, ?)", items)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            finally:
                db.close()

    def close(self) -> None:
        self._db.close()

    @property
    def generation(self) -> int:
        """Count of the transactions that changed the set of clips."""
        return self._rows("SELECT generation FROM state")[0][0]

    def tag(self) -> bytes:
        """16 bytes that name this very state of the clips: the generation, and a random part drawn with it
        (records put back from a backup can reach the same generation with other clips)."""
        generation, nonce = self._rows("SELECT generation, nonce FROM state")[0]
        return generation.to_bytes(8, "big") + nonce

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads inside see one state of the records, whatever a writer commits meanwhile."""
        with self._transaction("DEFERRED"):
            yield

    def video(self, video: str) -> VideoRow | None:
        rows = self._rows(
            f"SELECT {_VIDEO_COLUMNS} FROM videos WHERE video = CAST(? AS TEXT)", _sql_text(video)
        )
        return VideoRow(*rows[0]) if rows else None

    def videos(self, status: VideoStatus | None = None) -> list[VideoRow]:
        """All videos, or those of one status, in the order of their names."""
        rows = self._rows(
            f"SELECT {_VIDEO_COLUMNS} FROM videos WHERE status = coalesce(?, status) ORDER BY video", status
        )
        return [VideoRow(*row) for row in rows]

    def clips(self, video: str) -> list[ClipRow]:
        rows = self._rows(_CLIPS.format(where="video = CAST(? AS TEXT)"), _sql_text(video))
        return [ClipRow(*row) for row in rows]

    def clips_by_id(self, clip_ids: Iterable[int]) -> dict[int, ClipRow]:
        """One query however many ids there are."""
        where = "clip_id IN (SELECT value FROM json_each(?))"
        rows = self._rows(_CLIPS.format(where=where), json.dumps(sorted(clip_ids)))
        return {row[0]: ClipRow(*row) for row in rows}

    def clip_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (clip_ids_N ascending, video_ids_N), read from the small index, not from the wide rows."""
        with _one_line_errors(self._file):
            rows = self._db.execute("SELECT clip_id, video_id FROM clips INDEXED BY clips_of_video")
            pairs = np.fromiter(rows, dtype=[("clip_id", np.int64), ("video_id", np.int64)])
        pairs = pairs[np.argsort(pairs["clip_id"])]
        return pairs["clip_id"].copy(), pairs["video_id"].copy()

    def embeddings(self, after_clip_id: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks (int64 clip_ids_N ascending, float32 embeddings_ND) of the clips with larger ids."""
        with _one_line_errors(self._file):
            cursor = self._db.execute(
                "SELECT clip_id, embedding FROM clips WHERE clip_id > ? ORDER BY clip_id", (after_clip_id,)
            )
            while rows := cursor.fetchmany(ROWS_PER_READ):
                ids_N = np.array([clip_id for clip_id, _ in rows], dtype=np.int64)
                blob = b"".join(embedding for _, embedding in rows)
                yield ids_N, np.frombuffer(blob, dtype="<f4").reshape(len(rows), self.dimension)

    def num_clips(self) -> int:
        """Counted in the small index, some milliseconds for a million."""
        return self._rows("SELECT count(*) FROM clips INDEXED BY clips_of_video")[0][0]

    def totals(self) -> tuple[int, float]:
        """(number of clips, seconds they span)."""
        return self._rows("SELECT count(*), total(end_seconds - start_seconds) FROM clips")[0]

    def status_counts(self) -> dict[str, int]:
        """Number of videos of each status, zeros included."""
        found = dict(self._rows("SELECT status, count(*) FROM videos GROUP BY status"))
        return {status: found.get(status, 0) for status in get_args(VideoStatus)}

    def begin_video(self, video: str, size: int, mtime_ns: int) -> None:
        """Make `video` incomplete; its clips stay only if it was incomplete with the same size and mtime."""
        with self._transaction("IMMEDIATE"):
            row = self.video(video)
            if row and (row.status, row.size, row.mtime_ns) == ("incomplete", size, mtime_ns):
                return
            self._count_change(self._drop(video))
            self._db.execute(
                "INSERT INTO videos (video, size, mtime_ns, status)"
                " VALUES (CAST(? AS TEXT), ?, ?, 'incomplete')",
                (_sql_text(video), size, mtime_ns),
            )

    def add_clips(
        self,
        video: str,
        spans: Sequence[tuple[float, float]],
        captions: Sequence[str | None],
        embeddings_ND: np.ndarray,
        reason: str | None = None,
    ) -> None:
        with self._transaction("IMMEDIATE"):
            video_id = self._begun_video_id(video)
            if reason is not None:
                self._db.execute(
                    "UPDATE videos SET reason = CAST(? AS TEXT) WHERE video_id = ?",
                    (_sql_text(reason), video_id),
                )
            rows = [
                (video_id, float(start), float(end), _sql_text(caption), embedding_D.astype("<f4").tobytes())
                for (start, end), caption, embedding_D in zip(spans, captions, embeddings_ND, strict=True)
            ]
            self._db.executemany(
                "INSERT INTO clips (video_id, start_seconds, end_seconds, caption, embedding)"
                " VALUES (?, ?, ?, CAST(? AS TEXT), ?)",
                rows,
            )
            self._count_change(len(rows))

    def finish_video(
        self, video: str, status: VideoStatus, reason: str | None, duration_seconds: float | None
    ) -> None:
        with self._transaction("IMMEDIATE"):
            self._db.execute(
                "UPDATE videos SET status = ?, reason = CAST(? AS TEXT), duration_seconds = ?"
                " WHERE video_id = ?",
                (status, _sql_text(reason), duration_seconds, self._begun_video_id(video)),
            )

    def remove_videos(self, videos: Iterable[str]) -> int:
        """Number of clips removed; names the records do not know remove nothing."""
        with self._transaction("IMMEDIATE"):
            removed = sum(self._drop(video) for video in videos)
            self._count_change(removed)
            return removed

    def _drop(self, video: str) -> int:
        of_video = "WHERE video_id = (SELECT video_id FROM videos WHERE video = CAST(? AS TEXT))"
        removed = self._db.execute(f"DELETE FROM clips {of_video}", (_sql_text(video),)).rowcount
        self._db.execute("DELETE FROM videos WHERE video = CAST(? AS TEXT)", (_sql_text(video),))
        return removed

    def _count_change(self, num_clips_changed: int) -> None:
        if num_clips_changed:
            self._db.execute("UPDATE state SET generation = generation + 1, nonce = randomblob(8)")

    def _begun_video_id(self, video: str) -> int:
        rows = self._rows(
            "SELECT video_id FROM videos WHERE video = CAST(? AS TEXT) AND status = 'incomplete'",
            _sql_text(video),
        )
        if not rows:
            raise ValueError(f"{video}: not begun, or finished already; call begin_video first")
        return rows[0][0]

    def _rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        with _one_line_errors(self._file):
            return self._db.execute(sql, parameters).fetchall()

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
        with _one_line_errors(self._file):
            try:
                self._db.execute(f"BEGIN {kind}")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise

    def _check_schema(self) -> None:
        application_id = self._db.execute("PRAGMA application_id").fetchone()[0]
        if application_id != APPLICATION_ID:
            raise IndexStoreError(
                f"{self._file} is not an index of this program (application id {application_id:#x},"
                f" expected {APPLICATION_ID:#x}); name another folder"
            )
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise IndexStoreError(
                f"{self._file} has schema version {version}, this program reads {SCHEMA_VERSION};"
                " open it with the release that wrote it, or build the index again"
            )


def _connect(uri: str) -> sqlite3.Connection:
    # isolation_level None: transactions begin and end only where this module says so.
    db = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None)
    db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return db


def _uri(file: Path) -> str:
    """A read-only disk cannot hold the log's shared memory. Nobody writes there, so SQLite may do without,
    unless a killed writer left a log: its commits would be missed, and SQLite's own error is right."""
    log = Path(f"{file}-wal")
    disk_is_read_only = os.statvfs(file).f_flag & os.ST_RDONLY
    mode = "immutable=1" if disk_is_read_only and not (log.exists() and log.stat().st_size) else "mode=rw"
    return f"{file.absolute().as_uri()}?{mode}"


def _sql_text(text: str | None) -> bytes | None:
    """File names need not be UTF-8; their lone surrogates go in as the bytes that they stand for."""
    return None if text is None else text.encode("utf-8", "surrogateescape")


@contextmanager
def _one_line_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a mistake in this program, not the user's
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _DAMAGED:
            way_out = "it is damaged or not an index; restore it or build the index again in a new folder"
        elif code in _NO_ROOM_OR_RIGHT:
            way_out = "check free space and write permission and run again; what was committed is kept"
        else:
            way_out = "run again; what was committed is kept"
        raise IndexStoreError(f"{file}: {error}; {way_out}") from error
