"""Official-form EPIC-KITCHENS-100 CSVs with rows that a test chooses."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rlt_retrieval.annotations import Ek100Clip, Ek100Sentence

CLIP_HEADER = [
    *(
        "narration_id",
        "participant_id",
        "video_id",
        "narration_timestamp",
        "start_timestamp",
        "stop_timestamp",
    ),
    *("start_frame", "stop_frame", "narration", "verb", "verb_class", "noun", "noun_class", "all_nouns"),
    "all_noun_classes",
]


def write_ek100_csvs(
    folder: Path, clips: Sequence[Ek100Clip], sentences: Sequence[Ek100Sentence], split: str = "test"
) -> Path:
    """EPIC_100_retrieval_<split>.csv and …_sentence.csv (test columns) in `folder`, which is given back."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"EPIC_100_retrieval_{split}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([CLIP_HEADER, *map(_clip_row, clips)])
    with (folder / f"EPIC_100_retrieval_{split}_sentence.csv").open("w", newline="") as file:
        rows = [[sentence.narration_id, sentence.text] for sentence in sentences]
        csv.writer(file).writerows([["narration_id", "narration"], *rows])
    return folder


def _clip_row(clip: Ek100Clip) -> list[str]:
    start, stop = _timestamp(clip.start_seconds), _timestamp(clip.end_seconds)
    verb, nouns = clip.classes
    noun_names = str([f"noun{noun}" for noun in nouns])
    return [
        *(clip.narration_id, clip.video_id[:3], clip.video_id, start, start, stop, "0", "1", clip.narration),
        *(f"verb{verb}", str(verb), f"noun{nouns[0]}", str(nouns[0]), noun_names, str(list(nouns))),
    ]


def _timestamp(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"00:{int(minutes):02}:{rest:05.2f}"
