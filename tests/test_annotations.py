"""The official retrieval annotations: every known trap of the files, and relevancies against a slow set-based rule."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval import annotations
from rlt_retrieval.annotations import (
    NUM_OFFICIAL_CLIPS,
    Classes,
    ClassTable,
    Ek100Clip,
    Ek100Dataset,
    Ek100Sentence,
    ek100_files,
    ek100_relevancy,
    read_dataset,
    read_ek100_clips,
    read_ek100_sentences,
    relevancy,
)
from rlt_retrieval.errors import AnnotationError

CLIP_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
    "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
Write = Callable[..., Path]


def clip_row(narration_id: str, narration: str, verb: object, nouns: str, **changes: str) -> str:
    times = {"start": "00:00:01.00", "stop": "00:01:02.50", **changes}
    video_id = narration_id.rpartition("_")[0]
    return (
        f"{narration_id},P01,{video_id},00:00:00.560,{times['start']},{times['stop']},1,113,{narration},"
        f"take,{verb},plate,2,['plate'],\"{nouns}\""
    )


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, header, *rows)` gives the path of that CSV."""

    def file(name: str, *lines: str) -> Path:
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return file


def clips_of(write: Write, *rows: str) -> list[Ek100Clip]:
    return read_ek100_clips(write("clips.csv", CLIP_HEADER, *rows))


# ------------------------------------------------------------------------------------------------ clip rows


def test_a_clip_row_has_its_span_in_seconds_and_its_nouns_as_a_sorted_set(write: Write) -> None:
    (clip,) = clips_of(write, clip_row("P01_11_0", "take plate", 7, "[9, 2, 9]", stop="01:01:02.50"))
    assert clip == Ek100Clip("P01_11_0", "P01_11", 1.0, 3662.5, "take plate", Classes(7, (2, 9)))


@pytest.mark.parametrize(
    "nouns",
    [
        "__import__('os').system('touch pwned')",
        "[__import__('os').system('touch pwned')]",
        "[open('pwned', 'w').close() or 1]",
        "{2}",
        "2",
        "[2.0]",
        "[True]",
        "['2']",
        "[-1]",
        "[10001]",
        "[1000000000000]",
        "[2",
        "",
        "[" * 5000,
    ],
)
def test_a_noun_cell_is_a_list_of_numbers_or_refused_without_effect(
    write: Write, nouns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnnotationError, match=r"clips\.csv, line 2: .* is not a list of class ids") as error:
        clips_of(write, clip_row("P01_11_0", "take plate", 0, nouns))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (clip_row("P01_11_0", "x", "take", "[2]"), "line 2: invalid literal for int.*take.*official file"),
        (
            clip_row("P01_11_0", "x", 10**30, "[2]"),
            r"clips\.csv, line 2: 10{30} is not a class id \(0 to 10000\)",
        ),
        (clip_row("P01_11_0", "x", -1, "[2]"), "line 2: -1 is not a class id"),
        (clip_row("P01_11_0", "x", 0, "[2]", start="1.5"), "line 2: '1.5' is not a time hh:mm:ss.ff"),
        (clip_row("P01_11_0", "x", 0, "[2]", stop="00:00:01.00"), "stop_timestamp 00:00:01.00 is not after"),
        ("P01_11_0,P01", "line 2: expected 15 cells"),
        (clip_row("P01_11_0", "x,y", 0, "[2]"), "line 2: expected 15 cells"),
    ],
)
def test_a_bad_clip_row_is_named_by_file_and_line(write: Write, row: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        clips_of(write, row)


def test_a_bad_clip_file_is_one_line(write: Write, tmp_path: Path) -> None:
    row = clip_row("P01_11_0", "x", 0, "[2]")
    with pytest.raises(AnnotationError, match="narration_id P01_11_0 is there twice"):
        clips_of(write, row, row)
    with pytest.raises(AnnotationError, match="no rows below the header"):
        clips_of(write)
    with pytest.raises(AnnotationError, match=r"no column 'video_id'"):
        read_ek100_clips(write("other.csv", "narration_id,narration", "a,b"))
    with pytest.raises(AnnotationError, match=r"none\.csv: cannot be read"):
        read_ek100_clips(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(CLIP_HEADER.encode() + b"\ncaf\xe9\n")
    with pytest.raises(AnnotationError, match="not a UTF-8 CSV"):
        read_ek100_clips(tmp_path / "latin.csv")


# ------------------------------------------------------------------------------------------------ sentences


SHIFTED = (
    "b_0,open door",
    "b_1,wash cup",
    "b_2,wash cup",
    "b_3,cut slice",
    "b_4,stop",
)  # true: cut, stop, stir


def test_the_shifted_end_takes_its_texts_from_the_clips(write: Write) -> None:
    texts = ["open door", "wash cup", "cut slice", "stop", "stir"]
    clips = clips_of(
        write, *(clip_row(f"b_{i}", text, i, f"[{i}]") for i, text in reversed(list(enumerate(texts))))
    )
    sentences = read_ek100_sentences(write("s.csv", "narration_id,narration", *SHIFTED), clips)
    assert [sentence.text for sentence in sentences] == texts
    assert [sentence.narration_id for sentence in sentences] == [
        f"b_{i}" for i in range(5)
    ]  # the CSV's order
    assert [sentence.classes for sentence in sentences] == [Classes(i, (i,)) for i in range(5)]


def test_without_its_clip_a_shifted_text_is_that_of_the_row_below(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    header = "narration_id,narration,verb_class,noun_classes"
    rows = [f'{row},{i},"[{i}]"' for i, row in enumerate(SHIFTED)]
    sentences = read_ek100_sentences(write("s.csv", header, *rows), [])
    assert [sentence.text for sentence in sentences] == ["open door", "wash cup", "cut slice", "stop"]
    assert [sentence.classes.verb for sentence in sentences] == [0, 1, 2, 3]
    assert "b_4 is left out, its text is in no file" in caplog.text
    (last,) = clips_of(write, clip_row("b_4", "stir", 9, "[9]"))
    whole = read_ek100_sentences(write("s.csv", header, *rows), [last])
    assert (whole[4].text, whole[4].classes) == ("stir", Classes(4, (4,)))  # its own columns


def test_a_sentence_without_classes_and_clip_is_refused(write: Write) -> None:
    path = write("s.csv", "narration_id,narration", "b_0,open door")
    with pytest.raises(AnnotationError, match="b_0 is in no row of the clip CSV"):
        read_ek100_sentences(path, [])
    path = write("s.csv", "narration_id,narration,verb_class,noun_classes", "b_0,open,0,exit()")
    with pytest.raises(AnnotationError, match=r"b_0: 'exit\(\)' is not a list of class ids"):
        read_ek100_sentences(path, [])


def test_official_test_sentences_have_the_text_and_classes_of_their_clip(shared_data: Path) -> None:
    clips = read_ek100_clips(shared_data / "ek100_mir" / "EPIC_100_retrieval_test.csv")
    path = shared_data / "ek100_mir" / "EPIC_100_retrieval_test_sentence.csv"
    sentences = read_ek100_sentences(path, clips)
    clip_of = {clip.narration_id: clip for clip in clips}
    raw = annotations._read(path, ("narration_id", "narration"), dict)
    assert (len(clips), len(sentences)) == (NUM_OFFICIAL_CLIPS["test"], 3842)
    for sentence in sentences:
        clip = clip_of[sentence.narration_id]
        assert (sentence.text, sentence.classes) == (clip.narration, clip.classes)
    assert [s.narration_id for s in sentences] == [row["narration_id"] for row in raw]
    wrong = [i for i, row in enumerate(raw) if row["narration"] != clip_of[row["narration_id"]].narration]
    assert set(range(3835, 3842)) - {3837} == set(wrong)  # row 3837 gets the right text by chance
    assert sentences[3841].text == "stir"


def test_official_training_sentences_without_clips_take_the_row_below(shared_data: Path) -> None:
    folder = shared_data / "ek100_mir"
    path = folder / "EPIC_100_retrieval_train_sentence.csv"
    clips = read_ek100_clips(folder / "EPIC_100_retrieval_train_partial.csv")
    clip_of = {clip.narration_id: clip for clip in clips}
    alone = read_ek100_sentences(path, [])
    raw = annotations._read(path, ("narration_id", "narration"), dict)
    assert len(alone) == len(raw) - 1 == 15_988  # the text of the last row is in no other row
    known = [sentence for sentence in alone if sentence.narration_id in clip_of]
    assert len(known) > 5_000
    assert all(sentence.text == clip_of[sentence.narration_id].narration for sentence in known)
    changed = [
        i
        for i, (row, sentence) in enumerate(zip(raw, alone, strict=False))
        if row["narration"] != sentence.text
    ]
    assert changed == list(range(15_968, 15_988))  # with the last one, 21 rows
    # eight labels of the clips differ: the sentence file's own columns count
    assert sum(sentence.classes != clip_of[sentence.narration_id].classes for sentence in known) == 8


def test_the_files_of_a_split_are_found_in_the_repository_and_in_its_folder(
    write: Write, tmp_path: Path
) -> None:
    with pytest.raises(AnnotationError, match=r"no EPIC_100_retrieval_test\.csv and .*give a clone of"):
        ek100_files(tmp_path, "test")
    folder = tmp_path / "retrieval_annotations"
    folder.mkdir()
    names = ("EPIC_100_retrieval_test.csv", "EPIC_100_retrieval_test_sentence.csv")
    for present, missing in (names, names[::-1]):
        (folder / present).touch()
        with pytest.raises(AnnotationError, match=rf"/retrieval_annotations: no {missing}; give"):
            ek100_files(tmp_path, "test")
        (folder / present).unlink()
    with pytest.raises(AnnotationError, match="/none: no such folder; give a clone of"):
        ek100_files(tmp_path / "none", "test")
    for name in names:
        (folder / name).touch()
    assert ek100_files(tmp_path, "test") == ek100_files(folder, "test") == tuple(folder / n for n in names)


# ------------------------------------------------------------------------------------------------ relevancy


def slow_relevancy(clip: Classes, sentence: Classes) -> float:
    """The definition, with Python's sets."""
    either = set(clip.nouns) | set(sentence.nouns)
    overlap = len(set(clip.nouns) & set(sentence.nouns)) / len(either) if either else 0.0
    return 0.5 * (clip.verb == sentence.verb) + 0.5 * overlap


any_classes = st.builds(Classes.of, st.integers(0, 4), st.lists(st.integers(0, 9), max_size=6))


@given(st.lists(any_classes, max_size=7), st.lists(any_classes, min_size=1, max_size=7))
def test_relevancy_is_that_of_sets(clips: list[Classes], sentences: list[Classes]) -> None:
    matrix_VS = relevancy(clips, sentences)
    slow = [[slow_relevancy(clip, sentence) for sentence in sentences] for clip in clips]
    np.testing.assert_array_equal(matrix_VS, np.array(slow).reshape(len(clips), len(sentences)))
    assert matrix_VS.dtype == np.float64


@given(st.lists(any_classes, min_size=1, max_size=6))
def test_relevancy_is_symmetric_and_1_for_equal_classes_with_nouns(classes: list[Classes]) -> None:
    matrix_VV = relevancy(classes, classes)
    np.testing.assert_array_equal(matrix_VV, matrix_VV.T)
    np.testing.assert_array_equal(np.diag(matrix_VV), [1.0 if nouns else 0.5 for _, nouns in classes])


@given(any_classes, st.lists(any_classes, min_size=1, max_size=9))
def test_positives_are_the_rows_strictly_above_a_tenth(clip: Classes, sentences: list[Classes]) -> None:
    expected = [i for i, sentence in enumerate(sentences) if slow_relevancy(clip, sentence) > 0.1]
    assert ClassTable(sentences).positives_of(clip).tolist() == expected


def test_one_shared_noun_of_five_is_exactly_a_tenth_and_no_positive() -> None:
    table = ClassTable([Classes(1, (0, 1, 2, 3, 4)), Classes(1, (0, 1, 2, 3)), Classes(0, (9,))])
    clip = Classes(0, (0,))
    np.testing.assert_array_equal(table.relevancy_to([clip]), [[0.1, 0.125, 0.5]])
    assert table.positives_of(clip).tolist() == [1, 2]
    # the same share from larger sets: 3 of 15
    assert ClassTable([Classes(1, tuple(range(15)))]).positives_of(Classes(0, (0, 1, 2))).size == 0


def test_classes_that_no_sentence_has_count_in_the_union() -> None:
    table = ClassTable([Classes(0, (1,))])
    np.testing.assert_array_equal(table.relevancy_to([Classes(3, (1, 250))]), [[0.25]])
    np.testing.assert_array_equal(ClassTable([Classes(0, ())]).relevancy_to([Classes(0, ())]), [[0.5]])


def test_the_official_test_matrix_has_the_known_figures(shared_data: Path) -> None:
    folder = shared_data / "ek100_mir"
    matrix_VS = ek100_relevancy(
        folder / "EPIC_100_retrieval_test.csv", folder / "EPIC_100_retrieval_test_sentence.csv"
    )
    assert (matrix_VS.shape, matrix_VS.dtype) == ((9668, 3842), np.float64)
    assert np.count_nonzero(matrix_VS == 1) == 62_535
    assert np.count_nonzero(matrix_VS) == 4_224_956
    assert matrix_VS.sum() == pytest.approx(2_040_309.2333, abs=1e-3)
    clips = read_ek100_clips(folder / "EPIC_100_retrieval_test.csv")
    sentences = read_ek100_sentences(folder / "EPIC_100_retrieval_test_sentence.csv", clips)
    table = ClassTable([sentence.classes for sentence in sentences])
    for row in (0, 511, 512, 5_000, 9_667):  # on demand, on both sides of a chunk's edge
        np.testing.assert_array_equal(table.relevancy_to([clips[row].classes])[0], matrix_VS[row])


def test_rows_of_the_training_split_come_on_demand(shared_data: Path) -> None:
    folder = shared_data / "ek100_mir"
    clips = read_ek100_clips(folder / "EPIC_100_retrieval_train_partial.csv")
    sentences = read_ek100_sentences(folder / "EPIC_100_retrieval_train_sentence.csv", clips)
    table = ClassTable([sentence.classes for sentence in sentences])
    for clip in clips[::9_000]:
        slow = [slow_relevancy(clip.classes, sentence.classes) for sentence in sentences]
        np.testing.assert_array_equal(table.relevancy_to([clip.classes])[0], slow)
        assert table.positives_of(clip.classes).size > 0


# ------------------------------------------------------------------------------------------------ dataset.json


def dataset(split: str = "test") -> Ek100Dataset:
    sentences = (
        Ek100Sentence("P01_11_0", "take plate", Classes(0, (2, 9))),
        Ek100Sentence("b", "é", Classes(1, ())),
    )
    return Ek100Dataset(split, 9_668, sentences)  # type: ignore[arg-type]


def test_a_dataset_survives_its_json_and_is_read_from_beside_the_shards(tmp_path: Path) -> None:
    for folder in ("a", "b", "plain", "folder"):
        (tmp_path / folder).mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"num_clips": 2, **dataset().to_dict()}))
    (tmp_path / "folder" / "dataset.json").write_text(json.dumps({"num_clips": 2}))
    found = read_dataset([tmp_path / "a" / "clips-000000.tar", tmp_path / "b" / "clips-000000.tar"])
    assert found == dataset()
    assert found is not None
    np.testing.assert_array_equal(found.table.relevancy_to([Classes(0, (2, 9))]), [[1.0, 0.0]])
    assert read_dataset([tmp_path / "plain" / "clips-000000.tar"]) is None
    assert read_dataset([tmp_path / "folder" / "clips-000000.tar"]) is None
    with pytest.raises(AnnotationError, match="hold shards of different data sets"):
        read_dataset([tmp_path / "a" / "clips-000000.tar", tmp_path / "plain" / "clips-000000.tar"])


@pytest.mark.parametrize(
    "values",
    [
        "{",
        "[]",
        '{"format": "ek100"}',
        json.dumps(
            {**dataset().to_dict(), "sentences": [{"narration_id": "a", "text": "b", "classes": [1]}]}
        ),
        json.dumps({**dataset().to_dict(), "sentences": 3}),
        *(
            json.dumps({**dataset().to_dict(), **wrong})
            for wrong in (
                *({"num_official_clips": value} for value in ("many", "7", 0, -1, 7.0, True, None)),
                *({"split": value} for value in ("validation", 1, None, ["test"])),
                *({"sentences": value} for value in ([], {}, "ab", [1], [{}], None)),
            )
        ),
        *(
            json.dumps({**dataset().to_dict(), "sentences": [{"narration_id": "a", "text": "b", **wrong}]})
            for wrong in (
                *(
                    {"classes": [value, [2]]}
                    for value in (-1, 1.0, "1", True, None, 10_001, 10**30, float("inf"))
                ),
                *({"classes": [1, [value]]} for value in (-1, 2.5, "2", False, None, 10**12)),
                *({"classes": value} for value in ([1, 2], [1, "2"], [1, {}], [1, [2], 3], "12", None)),
                *(
                    {"classes": [1, [2]], name: value}
                    for name in ("narration_id", "text")
                    for value in (3, None)
                ),
            )
        ),
    ],
)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path: Path, values: str) -> None:
    (tmp_path / "dataset.json").write_text(values)
    with pytest.raises(AnnotationError, match=r"dataset\.json: not a whole dataset\.json") as error:
        read_dataset([tmp_path / "clips-000000.tar"])
    assert "\n" not in str(error.value)
