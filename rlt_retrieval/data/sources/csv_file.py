"""A CSV of captioned clips: video, caption, and optionally start_seconds, end_seconds, caption_2, …"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from rlt_retrieval.data.sources import Source
from rlt_retrieval.data.sources.captioned import CaptionedClips, read_seconds, reading
from rlt_retrieval.errors import SourceError


def read_csv(path: str | Path, videos_dir: str | Path | None = None) -> Source:
    """Clips of a UTF-8 CSV (a byte order mark is fine), in order of first mention.

    Videos are relative to the CSV's folder, where each must be, or to `videos_dir`, where some may be absent. Rows with
    the same video and span are one clip with all their captions. Other columns are ignored.

    Raises:
        SourceError: with file and line: missing column, wrong number of cells, empty caption, bad number,
            end ≤ start, missing video file; or the file is missing, empty or no UTF-8 CSV.
    """
    path = Path(path)
    clips = CaptionedClips(path, videos_dir)
    for where, row in _rows(path):
        start = _cell_seconds(where, row, "start_seconds") or 0.0
        end = _cell_seconds(where, row, "end_seconds")
        clips.add(where, row["video"], start, end, _read_captions(where, row))
    return clips.source()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", cells by column) of every row that is not blank."""
    try:
        with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
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
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); check the quotes"
        ) from error


def _cell_seconds(where: str, row: dict[str, str], column: str) -> float | None:
    text = row.get(column)
    return read_seconds(where, column, text) if text else None


def _read_captions(where: str, row: dict[str, str]) -> list[str]:
    if not row["caption"]:
        raise SourceError(f"{where}: empty caption; write one or delete the row")
    further = sorted(
        (name for name in row if re.fullmatch(r"caption_\d+", name)), key=lambda name: int(name[8:])
    )
    return [row["caption"], *(row[name] for name in further if row[name])]
