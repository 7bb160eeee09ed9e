"""Embeddings of somebody else's model: joined by id, in any order, and every mistake one line."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ek100_files import write_ek100_csvs
from ek100_oracle import clip_classes, clip_ids, oracle_embeddings, sentence_set

from rlt_retrieval.annotations import Ek100Clip, Ek100Sentence
from rlt_retrieval.errors import MetricsError, RetrievalError, SourceError
from rlt_retrieval.eval.embedding_file import REQUIRED, read_embeddings, write_embeddings
from rlt_retrieval.eval.report import metrics_table
from rlt_retrieval.eval.rescoring import QB_NORM
from rlt_retrieval.eval.scored import read_query_bank, score_embedding_file, with_extra_rows
from rlt_retrieval.eval.tables import markdown

NUM_CLIPS = 10


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Ten clips of five classes; the sentences are the first five narrations."""
    ids, classes = clip_ids(NUM_CLIPS), clip_classes(NUM_CLIPS)
    clips = [
        Ek100Clip(name, name.rpartition("_")[0], n, n + 1, f"narration {n}", classes[n])
        for n, name in enumerate(ids)
    ]
    sentences = [Ek100Sentence(clip.narration_id, clip.narration, clip.classes) for clip in clips[:5]]
    return write_ek100_csvs(tmp_path / "annotations", clips, sentences)


def whole_file() -> dict[str, np.ndarray]:
    """What a perfect model would write."""
    z = oracle_embeddings(clip_classes(NUM_CLIPS))
    ids = np.array(clip_ids(NUM_CLIPS))
    return {"video_ids": ids, "video_embeddings": z, "text_ids": ids[:5], "text_embeddings": z[:5]}


def saved(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "theirs.npz"
    np.savez(path, **arrays)
    return path


def test_rows_in_any_order_are_joined_by_id(
    tmp_path: Path, annotations: Path, rng: np.random.Generator
) -> None:
    arrays = whole_file()
    for kind in ("video", "text"):
        order = rng.permutation(len(arrays[f"{kind}_ids"]))
        for name in (f"{kind}_ids", f"{kind}_embeddings"):
            arrays[name] = arrays[name][order]
    scored = score_embedding_file(saved(tmp_path, **arrays), annotations, "test")
    assert scored.to_dict()["mean"]["mAP"] == pytest.approx(1, abs=1e-6)
    assert scored.clip_ids == clip_ids(NUM_CLIPS)  # CSV order
    assert (
        scored.note == "partial, 10 of 9,668, not comparable; 5 of 3,842 sentences"
    )  # all of this CSV, but that is not all of the official


def test_rows_under_wrong_ids_score_less(tmp_path: Path, annotations: Path) -> None:
    arrays = whole_file()
    arrays["video_ids"] = np.roll(arrays["video_ids"], 1)
    scored = score_embedding_file(saved(tmp_path, **arrays), annotations, "test")
    assert scored.to_dict()["mean"]["mAP"] < 0.8


def test_missing_clips_make_it_partial(tmp_path: Path, annotations: Path) -> None:
    arrays = whole_file()
    arrays["video_ids"], arrays["video_embeddings"] = arrays["video_ids"][3:], arrays["video_embeddings"][3:]
    scored = score_embedding_file(saved(tmp_path, **arrays), annotations, "test")
    assert scored.is_partial
    assert scored.clip_ids == clip_ids(NUM_CLIPS)[3:]
    assert scored.to_dict()["note"] == "partial, 7 of 9,668, not comparable; 5 of 3,842 sentences"
    assert scored.to_dict()["mean"]["mAP"] == pytest.approx(1, abs=1e-6)


def test_a_bank_in_the_file_gives_a_qb_norm_row(tmp_path: Path, annotations: Path) -> None:
    arrays = whole_file()
    path = saved(tmp_path, **arrays, bank_embeddings=arrays["text_embeddings"])
    assert QB_NORM in with_extra_rows(score_embedding_file(path, annotations, "test")).to_dict()["extra_rows"]


@pytest.mark.parametrize("kind", ["video", "text", "bank"])
def test_without_unit_norm_there_are_no_extra_rows(tmp_path: Path, annotations: Path, kind: str) -> None:
    arrays = whole_file()
    arrays["bank_embeddings"] = arrays["text_embeddings"].copy()
    arrays[f"{kind}_embeddings"] = arrays[f"{kind}_embeddings"].copy()
    arrays[f"{kind}_embeddings"][3] *= 1.01
    scored = with_extra_rows(score_embedding_file(saved(tmp_path, **arrays), annotations, "test"))
    values, note = scored.to_dict(), "extra rows need unit-norm embeddings; left out"
    assert "extra_rows" not in values
    assert values["extra_rows_note"] == note
    assert note in metrics_table({"theirs": values})
    assert note.capitalize() in markdown("theirs", values)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    arrays = whole_file()
    write_embeddings(tmp_path / "ours.npz", *arrays.values(), arrays["text_embeddings"])
    file = read_embeddings(tmp_path / "ours.npz")
    assert (file.video_ids, file.text_ids) == (clip_ids(10), clip_ids(5))
    np.testing.assert_array_equal(file.z_video_ND, arrays["video_embeddings"])
    np.testing.assert_array_equal(file.z_bank_ND, arrays["text_embeddings"])


def foreign(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == ids[4], "P99_01_1", ids)


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[2, 1] = np.nan
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_ids": None}, r"theirs\.npz: no key 'text_ids'; expected video_ids, video_embeddings"),
        ({"video_ids": lambda ids: ids[[0, 0, *range(2, 10)]]}, "video id 'P01_01_0' is there twice"),
        ({"video_ids": foreign}, r"'P99_01_1' \(1 such\) is not in .*test\.csv"),
        ({"text_ids": foreign}, r"text id 'P99_01_1' .*test_sentence\.csv"),
        ({"video_ids": lambda ids: np.arange(10)}, "video_ids are int64"),
        ({"video_embeddings": with_nan}, "video_embeddings of P03_01_2 holds NaN or infinity"),
        ({"text_embeddings": lambda z: z[:, :2]}, r"is float64 \(5, 2\), expected floats of shape \(5, 5\)"),
        ({"video_embeddings": lambda z: z[:9]}, r"\(9, 5\), expected floats of shape \(10, 5\)"),
        ({"video_embeddings": lambda z: z.astype(int)}, "video_embeddings is int64"),
        (
            {"text_ids": lambda ids: ids[:4], "text_embeddings": lambda z: z[:4]},
            "1 of 5 sentences have no embedding .first P02_01_4.; embed every sentence",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named(tmp_path: Path, annotations: Path, changes: dict, message: str) -> None:
    arrays = whole_file()
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
    with pytest.raises(MetricsError, match=message) as raised:
        score_embedding_file(saved(tmp_path, **arrays), annotations, "test")
    assert "\n" not in str(raised.value)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    arrays = whole_file()
    arrays["text_ids"] = np.array([Trap(tmp_path / "sprung")] * 5, dtype=object)
    np.savez(tmp_path / "trap.npz", **arrays)
    np.save(tmp_path / "trap.npy", arrays["text_ids"])
    for name in ("trap.npz", "trap.npy"):
        with pytest.raises(MetricsError, match=r"not an \.npz of plain arrays"):
            read_embeddings(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """An .npz whose every member holds the content."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in REQUIRED:
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def with_flag(path: Path, place: int, flag: int) -> Path:
    """Change a field of every header, local and central (where it lies two bytes on)."""
    content = bytearray(path.read_bytes())
    for magic, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = content.find(magic)
        while start >= 0:
            content[start + place + shift] = flag
            start = content.find(magic, start + 1)
    path.write_bytes(content)
    return path


HUGE = npy(np.zeros(10)).replace(b"(10,), }" + b" " * 14, b"(1000000000000000,), }")
ODD_FILES = {
    "too large for memory": (lambda p: zipped(p, HUGE), "do not fit in memory"),
    "torn header": (lambda p: zipped(p, npy(np.zeros(10)).replace(b"}", b" ")), "not an .npz of plain arrays"),
    "encrypted": (lambda p: with_flag(zipped(p, npy(np.eye(2))), 6, 1), "not an .npz of plain arrays .*encrypted"),
    "unknown compression": (lambda p: with_flag(zipped(p, npy(np.eye(2))), 8, 77), "not an .npz of plain arrays"),
    "not arrays": (lambda p: zipped(p, b"text"), "video_ids is not an array"),
    "objects": (lambda p: zipped(p, npy(np.array(["a"], object))), r"Python objects; write ids as ids\.astype\(str\)"),
    "long header": (lambda p: zipped(p, npy(np.zeros(1, [(f"f{n}" * 9, "f4") for n in range(900)]))), "Header info"),
    "a single array": (lambda p: p.write_bytes(npy(np.eye(2))) and p, r"single array \(\.npy\)"),
    "text": (lambda p: p.write_text("video_ids") and p, "not an .npz of plain arrays; write it with numpy.savez"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_is_one_line_and_no_advice_to_unpickle(tmp_path: Path, name: str) -> None:
    make, message = ODD_FILES[name]
    with pytest.raises(MetricsError, match=message) as raised:
        read_embeddings(make(tmp_path / "odd.npz"))
    assert "\n" not in str(raised.value)
    assert "pickle" not in str(raised.value)


def test_damaged_lzma_is_one_line(tmp_path: Path) -> None:
    path = zipped(tmp_path / "odd.npz", npy(np.arange(1000.0)), zipfile.ZIP_LZMA)
    content = bytearray(path.read_bytes())
    start = content.find(b"video_ids.npy") + 40
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(MetricsError, match=r"not an \.npz of plain arrays"):
        read_embeddings(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"cannot be read \(No such file"):
        read_embeddings(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.eye(2))
    whole = saved(tmp_path, **whole_file()).read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "empty.npz", "array.npy", "torn.npz"):
        with pytest.raises(MetricsError, match=r"not an \.npz of plain arrays"):
            read_embeddings(tmp_path / name)


# ---- query banks ----


def test_a_bank_is_the_lines_of_a_file_each_once(tmp_path: Path) -> None:
    path = tmp_path / "bank.txt"
    path.write_text("open fridge\n\n close fridge \nopen fridge\n")
    assert read_query_bank(path) == ["open fridge", "close fridge"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_bank_without_queries_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bank.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"one a line|one query a line"):
        read_query_bank(path)


def test_the_test_split_is_no_bank(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "dataset.json").write_text(json.dumps(sentence_set(10, split).to_dict()))
    assert read_query_bank(tmp_path / "train") == [f"sentence {n}" for n in range(5)]
    with pytest.raises(SourceError, match="sentences of the test split; a query bank must not be"):
        read_query_bank(tmp_path / "test")


def test_a_folder_without_sentences_is_no_bank(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="no EPIC-KITCHENS-100 sentences in it"):
        read_query_bank(tmp_path)
