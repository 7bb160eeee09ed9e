"""Where clips come from: one reader a format, all giving a `Source`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlt_retrieval.annotations import Classes, Split
from rlt_retrieval.errors import SourceError

Format = Literal["auto", "folder", "csv", "jsonl", "ek100", "msrvtt"]


@dataclass(frozen=True)
class SourceClip:
    """One clip of a source: span [start, end) of a video (end None: to its end), captions (maybe none).

    `name` is unique in its source and does not depend on where the source lies. `video_id`: the video's name in its
    data set (None: it has none but the path). `classes`: what relevancies are computed from, where a data set has them.
    """

    video: Path
    captions: tuple[str, ...]
    name: str
    start_seconds: float = 0.0
    end_seconds: float | None = None
    video_id: str | None = None
    classes: Classes | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The clips of a source; `absent` are those whose video file is not there (their `video`: where it should be)."""

    clips: list[SourceClip]
    absent: list[SourceClip] = field(default_factory=list)

    @property
    def missing(self) -> dict[str, int]:
        """For every missing video (its id, else its path) the number of its clips, in order of first mention."""
        return dict(Counter(clip.video_id or str(clip.video) for clip in self.absent))

    def describe(self) -> dict[str, Any]:
        """What goes into dataset.json beside the counts."""
        return {"missing_videos": self.missing} if self.absent else {}


def part(
    clips: Iterable[SourceClip], present: Container[Path], way_out: str
) -> tuple[list[SourceClip], list[SourceClip]]:
    """(clips, absent) by whether the video is `present`. Raises SourceError, ending in `way_out`, if none is."""
    there: list[SourceClip] = []
    absent: list[SourceClip] = []
    for clip in clips:
        (there if clip.video in present else absent).append(clip)
    if not there:
        num_videos = len({clip.video for clip in absent})
        raise SourceError(
            f"{absent[0].video}: no such video, nor any other of the {num_videos} of this source; {way_out}"
        )
    return there, absent


def read_source(
    source: str | Path,
    format: Format = "auto",
    *,
    videos_dir: str | Path | None = None,
    split: Split | None = None,
) -> Source:
    """Clips of a source; "auto" takes folders and files named .csv or .jsonl for what they are.

    videos_dir: where the videos lie; "ek100" and "msrvtt" need it, as they need a `split`. With it, a "csv" or "jsonl"
    lists videos that are not there as absent; without it, they are relative to the file and an error.

    Raises:
        SourceError: missing, empty, unreadable, or of no known format. AnnotationError: as `read_ek100`.
    """
    # here, because all readers need SourceClip
    from rlt_retrieval.data.sources.csv_file import read_csv
    from rlt_retrieval.data.sources.ek100 import read_ek100
    from rlt_retrieval.data.sources.folder import read_folder
    from rlt_retrieval.data.sources.jsonl_file import read_jsonl
    from rlt_retrieval.data.sources.msrvtt import read_msrvtt

    path = Path(source)
    format = _guess_format(path) if format == "auto" else format
    if format == "folder":
        return Source(clips=read_folder(path))
    if format == "csv":
        return read_csv(path, videos_dir)
    if format == "jsonl":
        return read_jsonl(path, videos_dir)
    if videos_dir is None or split is None:
        raise ValueError(f"format {format!r} needs videos_dir and split")
    return (read_ek100 if format == "ek100" else read_msrvtt)(path, videos_dir, split)


def _guess_format(path: Path) -> Format:
    if path.is_dir():
        return "folder"
    if path.suffix.lower() == ".csv":
        return "csv"
    if path.suffix.lower() == ".jsonl":
        return "jsonl"
    problem = "neither a folder nor a .csv or .jsonl file" if path.exists() else "no such folder or file"
    raise SourceError(f"{path}: {problem}; give a folder of videos, a CSV (video,caption) or a JSONL file")
