"""A CSV of captioned clips: video, caption, and optionally start_seconds, end_seconds, caption_2, …"""

from __future__ import annotations

import csv
import math
import os.path
import re
from collections.abc import Iterator
from pathlib import Path

from rlt_retrieval.data.sources import SourceClip
from rlt_retrieval.errors import SourceError

Span = tuple[str, float, float | None]  # video as written (normalised), start and end in seconds


def read_csv(path: str | Path) -> list[SourceClip]:
    """Clips of a UTF-8 CSV (a byte order mark is fine), in order of first mention.

    Videos are relative to the CSV's folder. Rows with the same video and span are one clip with all their
    captions. Other columns are ignored.

    Raises:
        SourceError: with file and line: missing column, wrong number of cells, empty caption, bad number,
            end ≤ start, missing video file; or the file is missing, empty or no UTF-8 CSV.
    """
    path = Path(path)
    captions_of: dict[Span, dict[str, None]] = {}  # a dict as an ordered set
    for where, row in _rows(path):
        span = _read_span(path, where, row)
        captions_of.setdefault(span, {}).update(dict.fromkeys(_read_captions(where, row)))
    if not captions_of:
        raise SourceError(f"{path}: no rows; give at least one line video,caption below the header")
    return [
        SourceClip(path.parent / video, tuple(captions), _name(video, start, end), start, end)
        for (video, start, end), captions in captions_of.items()
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", cells by column) of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for column in ("video", "caption"):
                if column not in header:
                    raise SourceError(
                        f"{path}, line 1: no column '{column}', found: {', '.join(header) or 'nothing'}"
                    )
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if cells and len(cells) != len(header):
                    raise SourceError(
                        f"{where}: {len(cells)} cells, the header has {len(header)}; "
                        "quote captions that hold a comma"
                    )
                if cells:
                    yield where, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); check the quotes"
        ) from error


def _read_span(path: Path, where: str, row: dict[str, str]) -> Span:
    if not row["video"]:
        raise SourceError(f"{where}: no video; write its path relative to the CSV's folder")
    video = os.path.normpath(row["video"])
    if not (path.parent / video).is_file():
        raise SourceError(
            f"{where}: no such video {path.parent / video}; paths are relative to the CSV's folder"
        )
    start_seconds = _read_seconds(where, row, "start_seconds") or 0.0
    end_seconds = _read_seconds(where, row, "end_seconds")
    if end_seconds is not None and end_seconds <= start_seconds:
        raise SourceError(
            f"{where}: end_seconds {end_seconds:g} is not after start_seconds {start_seconds:g}"
        )
    return video, start_seconds, end_seconds


def _read_seconds(where: str, row: dict[str, str], column: str) -> float | None:
    text = row.get(column)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise SourceError(f"{where}: {column} is '{text}'; write seconds as a number, 0 or more")
    return seconds


def _read_captions(where: str, row: dict[str, str]) -> list[str]:
    if not row["caption"]:
        raise SourceError(f"{where}: empty caption; write one or delete the row")
    further = sorted(
        (name for name in row if re.fullmatch(r"caption_\d+", name)), key=lambda name: int(name[8:])
    )
    return [row["caption"], *(row[name] for name in further if row[name])]


def _name(video: str, start_seconds: float, end_seconds: float | None) -> str:
    if start_seconds == 0 and end_seconds is None:
        return video
    return f"{video}@{start_seconds}-{'end' if end_seconds is None else end_seconds}"
