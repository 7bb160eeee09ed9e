"""EPIC-KITCHENS-100 multi-instance retrieval: the official CSVs and the videos as they are downloaded.

Annotations: github.com/epic-kitchens/epic-kitchens-100-annotations, folder retrieval_annotations (Damen et al.,
"Rescaling Egocentric Vision", IJCV 2022). Videos: one file each, most often sorted by participant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlt_retrieval.annotations import (
    NUM_OFFICIAL_CLIPS,
    Ek100Clip,
    Ek100Dataset,
    Split,
    ek100_files,
    read_ek100_clips,
    read_ek100_sentences,
)
from rlt_retrieval.data.sources import Source, SourceClip, part
from rlt_retrieval.errors import SourceError

PLACES = (
    "{participant}",
    "{participant}/videos",
    "",
)  # where the video of a participant may lie; the first wins


@dataclass(frozen=True)
class Ek100Source(Source):
    """`clips` in CSV order and named by their narration_id; `dataset` has what scoring needs beside them."""

    dataset: Ek100Dataset

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.dataset.to_dict()}


def read_ek100(annotations_dir: str | Path, videos_dir: str | Path, split: Split) -> Ek100Source:
    """The clips of a split of the official CSVs, and where their videos lie.

    Found are P01/P01_101.MP4, P01/videos/P01_101.MP4 and P01_101.MP4 in `videos_dir`, the extension in any case.
    Clips of other videos are `absent`. `dataset` counts the clips of the published split, also for a CSV with fewer.

    Raises:
        AnnotationError: a CSV is missing or not what it should be.
        SourceError: no folder of videos, or none of the split's videos in it.
    """
    clips_csv, sentences_csv = ek100_files(annotations_dir, split)
    rows = read_ek100_clips(clips_csv)
    video_ids = list(dict.fromkeys(row.video_id for row in rows))
    root = Path(videos_dir)
    videos = _find_videos(root, video_ids)
    listed = (_clip(row, videos.get(row.video_id, _expected(root, row.video_id))) for row in rows)
    way_out = "give the folder that holds P01/P01_01.MP4, P01/videos/P01_01.MP4 or P01_01.MP4"
    clips, absent = part(listed, set(videos.values()), way_out)
    sentences = read_ek100_sentences(sentences_csv, rows)
    dataset = Ek100Dataset(split, NUM_OFFICIAL_CLIPS[split], tuple(sentences))
    return Ek100Source(clips=clips, absent=absent, dataset=dataset)


def _clip(row: Ek100Clip, video: Path) -> SourceClip:
    return SourceClip(
        video=video,
        captions=(row.narration,),
        name=row.narration_id,
        start_seconds=row.start_seconds,
        end_seconds=row.end_seconds,
        video_id=row.video_id,
        classes=row.classes,
    )


def _find_videos(root: Path, video_ids: Sequence[str]) -> dict[str, Path]:
    """Path by video_id, of those that are there; every folder is listed once."""
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise SourceError(f"{root}: {problem}; give the folder that holds the EPIC-KITCHENS-100 videos")
    participants = sorted({_participant(video_id) for video_id in video_ids})
    places = dict.fromkeys(
        root / place.format(participant=participant) for place in PLACES for participant in participants
    )
    found: dict[str, Path] = {}
    for place in places:
        for path in _list_mp4(place):
            found.setdefault(path.stem, path)
    return {video_id: found[video_id] for video_id in video_ids if video_id in found}


def _list_mp4(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4" and path.is_file())
    except OSError as error:
        raise SourceError(
            f"{folder}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _expected(root: Path, video_id: str) -> Path:
    """The first place that is looked at for a video."""
    return root / PLACES[0].format(participant=_participant(video_id)) / f"{video_id}.MP4"


def _participant(video_id: str) -> str:
    return video_id.split("_")[0]
