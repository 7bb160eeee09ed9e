"""Where clips come from: one reader a format, all giving `SourceClip`s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlt_retrieval.errors import SourceError


@dataclass(frozen=True)
class SourceClip:
    """One clip of a source: span [start, end) of a video (end None: to its end), captions (maybe none).

    `name` is unique in its source and does not depend on where the source lies.
    """

    video: Path
    captions: tuple[str, ...]
    name: str
    start_seconds: float = 0.0
    end_seconds: float | None = None


def read_source(source: str | Path, format: Literal["auto", "folder", "csv"] = "auto") -> list[SourceClip]:
    """Clips of a source; "auto" takes folders and files named .csv for what they are.

    Raises:
        SourceError: missing, empty, unreadable, or of no known format.
    """
    # here, because both readers need SourceClip
    from rlt_retrieval.data.sources.csv_file import read_csv
    from rlt_retrieval.data.sources.folder import read_folder

    path = Path(source)
    if format == "folder" or (format == "auto" and path.is_dir()):
        return read_folder(path)
    if format == "csv" or (format == "auto" and path.suffix.lower() == ".csv"):
        return read_csv(path)
    problem = "neither a folder nor a .csv file" if path.exists() else "no such folder or file"
    raise SourceError(f"{path}: {problem}; give a folder of videos or a CSV with columns video,caption")
