"""MSR-VTT with the 1k-A split: 1,000 test clips with one sentence each, the other 9,000 with twenty to train on.

Data set: Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016. The test
pairs are those of Yu et al., "A Joint Sequence Fusion Model for Video Question Answering and Retrieval", ECCV 2018
(MSRVTT_JSFUSION_test.csv); all videos outside it are the training set that papers call Training-9k.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt_retrieval.annotations import Split
from rlt_retrieval.data.sources import Source, SourceClip, part
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.errors import SourceError

TEST_FILES = ("MSRVTT_JSFUSION_test.csv",)
WHOLE_FILES = ("MSRVTT_data.json", "videodatainfo.json")  # all 10,000 videos in one
PART_FILES = (
    "train_val_videodatainfo.json",
    "test_videodatainfo.json",
)  # the same in two, as first published
NUM_OFFICIAL_VIDEOS: dict[Split, int] = {"train": 9_000, "test": 1_000}

Captions = dict[str, list[str]]  # by video_id

logger = logging.getLogger(__name__)


def read_msrvtt(annotations_dir: str | Path, videos_dir: str | Path, split: Split) -> Source:
    """Clips of 1k-A ("test") or Training-9k ("train"): whole videos, each under its video_id.

    Videos (video0.mp4, …) are found at any depth of `videos_dir`; those that are not there are absent.

    Raises:
        SourceError: an annotation file is missing or not what it should be, no folder of videos, or none of the
            split's videos in it.
    """
    folder = Path(annotations_dir)
    test_captions = _read_test(_find(folder, TEST_FILES))
    captions = test_captions if split == "test" else _read_training(folder, test_captions)
    if len(captions) != NUM_OFFICIAL_VIDEOS[split]:
        logger.warning(
            "%s: %d videos in the %s split, the official one has %d; numbers will not be comparable",
            *(folder, len(captions), split, NUM_OFFICIAL_VIDEOS[split]),
        )
    return _locate(captions, Path(videos_dir))


def _locate(captions: Captions, videos_dir: Path) -> Source:
    path_of = {path.stem: path for path in reversed(list_videos(videos_dir))}
    listed = (
        SourceClip(
            path_of.get(video_id, videos_dir / f"{video_id}.mp4"),
            tuple(dict.fromkeys(texts)),
            video_id,
            video_id=video_id,
        )
        for video_id, texts in captions.items()
    )
    way_out = "give the folder that holds video0.mp4, video1.mp4, … at any depth"
    clips, absent = part(listed, set(path_of.values()), way_out)
    return Source(clips=clips, absent=absent)


def _find(folder: Path, names: Sequence[str]) -> Path:
    """The first of some files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(f"{folder}: no {' or '.join(names)}; give the folder with the MSR-VTT annotations")


def _read_test(path: Path) -> Captions:
    """The sentence of every row of the 1k-A CSV (key, vid_key, video_id, sentence)."""
    captions: Captions = {}
    for where, row in _csv_rows(path):
        video_id, sentence = row.get("video_id", "").strip(), row.get("sentence", "").strip()
        if not video_id or not sentence:
            raise SourceError(f"{where}: no video_id or no sentence; take the published file")
        if video_id in captions:
            raise SourceError(f"{where}: {video_id} is there twice; take the published file")
        captions[video_id] = [sentence]
    if not captions:
        raise SourceError(f"{path}: no rows with video_id and sentence; take the published file")
    return captions


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise SourceError(
                        f"{where}: not the {len(reader.fieldnames or ())} cells of the header; "
                        "take the published file, or quote sentences that hold a comma"
                    )
                yield where, row
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: not a UTF-8 CSV ({error}); take the published file") from error


def _read_training(folder: Path, test: Captions) -> Captions:
    """All captions, in file order, of all videos that the 1k-A CSV lacks."""
    parts = [folder / name for name in PART_FILES]
    in_two = all(path.is_file() for path in parts)
    paths = parts if in_two else [_find(folder, (*WHOLE_FILES, " with ".join(PART_FILES)))]
    captions: Captions = {}
    for path in paths:
        video_ids, sentences = _read_json(path)
        captions |= {video_id: [] for video_id in video_ids if video_id not in test}
        for video_id, sentence in sentences:
            if video_id in captions:
                captions[video_id].append(sentence)
    if bare := [video_id for video_id, texts in captions.items() if not texts]:
        raise SourceError(f"{paths[0]}: no sentence for {bare[0]}; take the published file")
    if not captions:
        raise SourceError(f"{paths[0]}: no video outside the 1k-A test split; take the published file")
    return captions


def _read_json(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """(ids of "videos", (video_id, caption) of "sentences") of a videodatainfo file."""
    try:
        data: Any = json.loads(path.read_bytes())
        videos = [_string(video, "video_id") for video in data["videos"]]
        sentences = [(_string(row, "video_id"), _string(row, "caption").strip()) for row in data["sentences"]]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: no JSON with videos and sentences ({error!r:.100}); take the published file"
        ) from error
    return videos, [(video_id, caption) for video_id, caption in sentences if caption]


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r:.40}, no string")
    return value
