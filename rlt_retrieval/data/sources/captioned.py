"""What caption files of any form have in common: where their videos lie, and lines that add up to one clip."""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlt_retrieval.data.sources import Source, SourceClip, part
from rlt_retrieval.errors import SourceError

Span = tuple[str, float, float | None]  # video as written (normalised), start and end in seconds


class CaptionedClips:
    """Gathers the clips of a caption file, line by line; lines of the same video, span and name are one clip.

    videos_dir: what the videos' paths are relative to, and those that are not there are only listed. None: they are
    relative to the file's folder, and one that is not there is an error.
    """

    def __init__(self, path: Path, videos_dir: str | Path | None) -> None:
        self._path = path
        self._may_lack = videos_dir is not None
        self._root = path.parent if videos_dir is None else Path(videos_dir)
        if not self._root.is_dir():
            raise SourceError(
                f"{self._root}: no such folder; give the folder that the videos' paths start from"
            )
        self._captions_of: dict[tuple[Span, str], dict[str, None]] = {}  # the inner dict: an ordered set
        self._span_of: dict[str, Span] = {}  # by name
        self._is_there: dict[str, bool] = {}

    def add(
        self, where: str, video: str, start: float, end: float | None, captions: Iterable[str], name: str = ""
    ) -> None:
        """One line. Raises SourceError, which begins with `where`, for what is wrong with it."""
        if not video:
            raise SourceError(f"{where}: no video; write its path relative to {self._root}")
        video = os.path.normpath(video)
        self._look_for(where, video)
        if end is not None and end <= start:
            raise SourceError(f"{where}: end_seconds {end:g} is not after start_seconds {start:g}")
        span = video, start, end
        name = name or _name(*span)
        if self._span_of.setdefault(name, span) != span:
            raise SourceError(f"{where}: the name '{name}' is that of another clip above; give each its own")
        self._captions_of.setdefault((span, name), {}).update(dict.fromkeys(captions))

    def source(self) -> Source:
        """All clips in order of first mention. Raises SourceError: no line, or not one video is there."""
        if not self._captions_of:
            raise SourceError(f"{self._path}: no rows; give at least one with a video and a caption")
        listed = (
            SourceClip(self._root / video, tuple(captions), name, start, end)
            for ((video, start, end), name), captions in self._captions_of.items()
        )
        present = {self._root / video for video, is_there in self._is_there.items() if is_there}
        clips, absent = part(listed, present, "check the folder of the videos")
        return Source(clips=clips, absent=absent)

    def _look_for(self, where: str, video: str) -> None:
        if video not in self._is_there:
            self._is_there[video] = (self._root / video).is_file()
        if not self._is_there[video] and not self._may_lack:
            raise SourceError(
                f"{where}: no such video {self._root / video}; paths are relative to the file's folder"
            )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a text file: what is wrong with the file itself as a SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def read_seconds(where: str, column: str, value: str | float) -> float:
    """Seconds from a cell or a JSON value. Raises SourceError unless they are a finite number, 0 or more."""
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise SourceError(f"{where}: {column} is '{value}'; write seconds as a number, 0 or more")
    return seconds


def _name(video: str, start_seconds: float, end_seconds: float | None) -> str:
    if start_seconds == 0 and end_seconds is None:
        return video
    return f"{video}@{start_seconds}-{'end' if end_seconds is None else end_seconds}"
