"""EPIC-KITCHENS-100 multi-instance retrieval: the official CSV rows, their classes, and who is relevant to whom.

Source: Damen et al., "Rescaling Egocentric Vision", IJCV 2022, section on multi-instance retrieval, and the files of
github.com/epic-kitchens/epic-kitchens-100-annotations/tree/master/retrieval_annotations.

Shapes: V clips (videos, rows), S sentences (texts, columns), C noun classes.
"""

from __future__ import annotations

import ast
import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.errors import AnnotationError

Split = Literal["train", "test"]
NUM_OFFICIAL_CLIPS: dict[Split, int] = {"train": 67_217, "test": 9_668}
POSITIVE_RELEVANCY = 0.1  # a training positive is strictly above
MAX_CLASS_ID = 10_000  # EK-100 has 97 verbs and 300 nouns; a `ClassTable` is as wide as the largest noun
ROWS_PER_CHUNK = 512  # bounds the working memory of a relevancy matrix

CLIP_COLUMNS = (
    *("narration_id", "video_id", "start_timestamp", "stop_timestamp"),
    *("narration", "verb_class", "all_noun_classes"),
)

logger = logging.getLogger(__name__)
Row = TypeVar("Row")


class Classes(NamedTuple):
    """What relevancy is computed from: the verb's class id and the set of noun class ids, sorted, each once."""

    verb: int
    nouns: tuple[int, ...]

    @classmethod
    def of(cls, verb: int, nouns: Iterable[int]) -> Classes:
        return cls(verb, tuple(sorted(set(nouns))))


@dataclass(frozen=True)
class Ek100Clip:
    """A row of a clip CSV: [start_seconds, end_seconds) of the video `video_id`."""

    narration_id: str
    video_id: str
    start_seconds: float
    end_seconds: float
    narration: str
    classes: Classes


@dataclass(frozen=True)
class Ek100Sentence:
    """A row of a sentence CSV: a text to search by, under the narration it was first used for."""

    narration_id: str
    text: str
    classes: Classes


# --- the official files -------------------------------------------------------------------------------------


def read_ek100_clips(path: str | Path) -> list[Ek100Clip]:
    """Rows of EPIC_100_retrieval_train.csv or …_test.csv in their order.

    Raises:
        AnnotationError: missing or no such CSV, a missing column, a cell that is no time, class or list, a
            narration_id twice; names file and line.
    """

    def parse(row: Mapping[str, str]) -> Ek100Clip:
        start_seconds, end_seconds = _seconds(row["start_timestamp"]), _seconds(row["stop_timestamp"])
        if end_seconds <= start_seconds:
            raise ValueError(f"stop_timestamp {row['stop_timestamp']} is not after start_timestamp")
        classes = Classes.of(_class_id(int(row["verb_class"])), _class_ids(row["all_noun_classes"]))
        return Ek100Clip(
            row["narration_id"], row["video_id"], start_seconds, end_seconds, row["narration"], classes
        )

    clips = _read(Path(path), CLIP_COLUMNS, parse)
    _check_unique(Path(path), (clip.narration_id for clip in clips))
    return clips


def read_ek100_sentences(path: str | Path, clips: Iterable[Ek100Clip]) -> list[Ek100Sentence]:
    """Rows of EPIC_100_retrieval_train_sentence.csv or …_test_sentence.csv in their order, with their own texts.

    The text of the last rows of both published files (train: 21, test: 7) is that of the row above; ids and classes
    are right. So the text comes from the clip of the same narration_id; where `clips` lacks it, from the row below for
    rows of that shifted end, else from the row itself. A last row whose text is nowhere is left out, and said.
    Classes are the file's own columns (train), else those of the clip (test).

    Raises:
        AnnotationError: as `read_ek100_clips`; a row without class columns whose clip is not there.
    """
    path = Path(path)
    clip_of = {clip.narration_id: clip for clip in clips}
    rows = _read(path, ("narration_id", "narration"), dict)
    _check_unique(path, (row["narration_id"] for row in rows))
    texts = [row["narration"] for row in rows]
    # No text repeats before the shifted end, so the first that repeats the one above it begins it.
    repeats = (i for i in range(1, len(texts)) if texts[i] == texts[i - 1])
    first_shifted = next(repeats, len(texts))
    below = [*texts[:first_shifted], *texts[first_shifted + 1 :], None][: len(texts)]
    sentences = []
    for row, text_below in zip(rows, below, strict=True):
        narration_id = row["narration_id"]
        clip = clip_of.get(narration_id)
        text = clip.narration if clip else text_below
        if text is None:
            logger.warning(
                "%s: %s is left out, its text is in no file; give the whole clip CSV", path, narration_id
            )
            continue
        sentences.append(Ek100Sentence(narration_id, text, _sentence_classes(path, row, clip)))
    return sentences


def ek100_files(folder: str | Path, split: Split) -> tuple[Path, Path]:
    """Clip and sentence CSV of a split in the official repository, its retrieval_annotations, or a copy of that.

    Raises:
        AnnotationError: no such folder, or what of the two is not in it.
    """
    folder = Path(folder)
    names = f"EPIC_100_retrieval_{split}.csv", f"EPIC_100_retrieval_{split}_sentence.csv"
    places = (folder, folder / "retrieval_annotations")
    place = max(places, key=lambda place: sum((place / name).is_file() for name in names))
    missing = [name for name in names if not (place / name).is_file()]
    if not missing:
        return place / names[0], place / names[1]
    problem = f"{place}: no {' and '.join(missing)}" if folder.is_dir() else f"{folder}: no such folder"
    raise AnnotationError(
        f"{problem}; give a clone of "
        "github.com/epic-kitchens/epic-kitchens-100-annotations or its folder retrieval_annotations"
    )


def _sentence_classes(path: Path, row: Mapping[str, str], clip: Ek100Clip | None) -> Classes:
    if "verb_class" in row and "noun_classes" in row:
        try:
            return Classes.of(_class_id(int(row["verb_class"])), _class_ids(row["noun_classes"]))
        except ValueError as error:
            raise AnnotationError(
                f"{path}, {row['narration_id']}: {error}; take the official file"
            ) from error
    if clip is None:
        raise AnnotationError(
            f"{path}: {row['narration_id']} is in no row of the clip CSV; give the clip CSV of the same split"
        )
    return clip.classes


def _read(path: Path, columns: Sequence[str], parse: Callable[[dict[str, str]], Row]) -> list[Row]:
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise AnnotationError(f"{path}: no column {missing[0]!r}; take the official file")
            for row in reader:
                try:
                    if None in row or None in row.values():
                        raise ValueError(f"expected {len(reader.fieldnames or ())} cells")
                    rows.append(parse(row))
                except ValueError as error:
                    raise AnnotationError(
                        f"{path}, line {reader.line_num}: {error}; take the official file"
                    ) from error
    except OSError as error:
        raise AnnotationError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path}: not a UTF-8 CSV ({error}); take the official file") from error
    if not rows:
        raise AnnotationError(f"{path}: no rows below the header; take the official file")
    return rows


def _check_unique(path: Path, narration_ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for narration_id in narration_ids:
        if narration_id in seen:
            raise AnnotationError(
                f"{path}: narration_id {narration_id} is there twice; take the official file"
            )
        seen.add(narration_id)


def _seconds(timestamp: str) -> float:
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", timestamp)
    if not match:
        raise ValueError(f"{timestamp!r} is not a time hh:mm:ss.ff")
    hours, minutes, seconds = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


@cache
def _class_ids(text: str) -> tuple[int, ...]:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(map(is_class_id, values)):
        raise ValueError(f"{text!r:.80} is not a list of class ids (0 to {MAX_CLASS_ID})")
    return tuple(values)


def _class_id(value: Any) -> int:
    if not is_class_id(value):
        raise ValueError(f"{value!r:.80} is not a class id (0 to {MAX_CLASS_ID})")
    return int(value)


def is_class_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_CLASS_ID  # type: True is no class


# --- relevancy ----------------------------------------------------------------------------------------------


class ClassTable:
    """Classes of many clips or sentences as arrays: `relevancy_to` is one row of a relevancy matrix at a time."""

    def __init__(self, classes: Sequence[Classes]) -> None:
        num_classes = 1 + max((max(nouns) for _, nouns in classes if nouns), default=0)
        self.verb_S = np.array([verb for verb, _ in classes], np.int64)
        self.nouns_SC = np.zeros((len(classes), num_classes), np.float32)  # 0 and 1: products count exactly
        for row, (_, nouns) in enumerate(classes):
            self.nouns_SC[row, list(nouns)] = 1
        self.num_nouns_S = self.nouns_SC.sum(axis=1)

    def relevancy_to(self, clips: Sequence[Classes]) -> NDArray[np.float64]:
        """float64 [V, S]: ½·[same verb class] + ½·|nouns in both| / |nouns in either| (0 where both are empty)."""
        shared_VS, either_VS, same_verb_VS = self._counts(clips)
        relevancy_VS = np.divide(
            shared_VS, either_VS, out=np.zeros(shared_VS.shape), where=either_VS > 0, dtype=np.float64
        )
        relevancy_VS += same_verb_VS
        relevancy_VS *= 0.5
        return relevancy_VS

    def positives_of(self, clip: Classes) -> NDArray[np.int64]:
        """Rows with a relevancy strictly above `POSITIVE_RELEVANCY` to a clip, increasing."""
        return np.flatnonzero(self.relevancy_to([clip])[0] > POSITIVE_RELEVANCY)

    def _counts(self, clips: Sequence[Classes]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
        known = self.nouns_SC.shape[1]
        wanted_VC = np.zeros((len(clips), known), np.float32)
        for row, (_, nouns) in enumerate(clips):
            wanted_VC[row, [noun for noun in nouns if noun < known]] = 1
        num_nouns_V1 = np.array([[len(nouns)] for _, nouns in clips], np.float32).reshape(-1, 1)
        shared_VS = wanted_VC @ self.nouns_SC.T
        either_VS = num_nouns_V1 + self.num_nouns_S - shared_VS
        same_verb_VS = np.array([verb for verb, _ in clips], np.int64)[:, None] == self.verb_S
        return shared_VS, either_VS, same_verb_VS


def relevancy(clips: Sequence[Classes], sentences: Sequence[Classes]) -> NDArray[np.float64]:
    """float64 [V, S] in [0, 1]: relevancy of every clip to every sentence, built a few rows at a time."""
    table = ClassTable(sentences)
    relevancy_VS = np.empty((len(clips), len(sentences)))
    for start in range(0, len(clips), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        relevancy_VS[rows] = table.relevancy_to(clips[rows])
    return relevancy_VS


def ek100_relevancy(clips: str | Path, sentences: str | Path) -> NDArray[np.float64]:
    """The relevancy matrix [clips, sentences] of a clip CSV and its sentence CSV, in their order.

    ½·[same verb class] + ½·IoU of the noun class sets (Damen et al. 2022). For the test split: 9,668 x 3,842, 297 MB.

    Raises:
        AnnotationError: as `read_ek100_clips` and `read_ek100_sentences`.
    """
    rows = read_ek100_clips(clips)
    columns = read_ek100_sentences(sentences, rows)
    return relevancy([clip.classes for clip in rows], [sentence.classes for sentence in columns])


# --- the data set beside the shards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Ek100Dataset:
    """What scoring and training need beside the clips: the sentences of a split, in CSV order.

    num_official_clips: clips of the whole split; a set with fewer is partial and not comparable.
    """

    split: Split
    num_official_clips: int
    sentences: tuple[Ek100Sentence, ...]

    @cached_property
    def table(self) -> ClassTable:
        return ClassTable([sentence.classes for sentence in self.sentences])

    def to_dict(self) -> dict[str, Any]:
        """For dataset.json."""
        return {"format": "ek100", **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ek100Dataset:
        """Inverse of `to_dict`; other keys are ignored. Raises KeyError, TypeError or ValueError on another form."""
        split, num_official_clips, rows = (
            values[name] for name in ("split", "num_official_clips", "sentences")
        )
        if split not in NUM_OFFICIAL_CLIPS:
            raise ValueError(f"split is {split!r:.80}")
        if type(num_official_clips) is not int or num_official_clips < 1:
            raise ValueError(f"num_official_clips is {num_official_clips!r:.80}")
        if not isinstance(rows, list | tuple) or not rows:
            raise ValueError("no list of sentences")
        return cls(split, num_official_clips, tuple(map(_sentence_from_dict, rows)))


def _sentence_from_dict(row: Mapping[str, Any]) -> Ek100Sentence:
    narration_id, text, (verb, nouns) = row["narration_id"], row["text"], row["classes"]
    if not isinstance(narration_id, str) or not isinstance(text, str):
        raise TypeError(f"narration_id {narration_id!r:.80} or its text is no string")
    if not isinstance(nouns, list | tuple):
        raise TypeError(f"the nouns of {narration_id!r:.80} are no list")
    return Ek100Sentence(narration_id, text, Classes.of(_class_id(verb), map(_class_id, nouns)))


def read_dataset(shards: Iterable[str | Path]) -> Ek100Dataset | None:
    """The data set that `dataset.json` beside some shards describes; None where there is none, or no EK-100 one.

    Raises:
        AnnotationError: a damaged dataset.json, or shards of different data sets.
    """
    folder_of = {_read_dataset(folder / "dataset.json"): folder for folder in _folders(shards)}
    if len(folder_of) > 1:
        first, second, *_ = folder_of.values()
        raise AnnotationError(f"{first} and {second} hold shards of different data sets; give those of one")
    return next(iter(folder_of), None)


def _folders(shards: Iterable[str | Path]) -> Iterator[Path]:
    yield from dict.fromkeys(Path(shard).parent for shard in shards)


def _read_dataset(path: Path) -> Ek100Dataset | None:
    try:
        values = json.loads(path.read_text())
        if values.get("format") != "ek100":
            return None
        return Ek100Dataset.from_dict(values)
    except FileNotFoundError:
        return None
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise AnnotationError(
            f"{path}: not a whole dataset.json ({error!r}); make the shards again"
        ) from error
