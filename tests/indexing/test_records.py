"""SQLite records: what is kept, what moves the generation, which files are refused."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlt_retrieval.errors import IndexStoreError
from rlt_retrieval.indexing.records import ClipRow, Records, VideoRow

MANIFEST = {"dimension": 3, "model": {"backbone": "ViT-B-16", "pretrained": None}, "sampling": [16, 10.0]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Records.create(tmp_path / "records.sqlite", MANIFEST)
    return tmp_path / "records.sqlite"


@pytest.fixture
def records(file: Path) -> Iterator[Records]:
    records = Records(file)
    yield records
    records.close()


def add(records: Records, video: str, *first_values: float) -> None:
    embeddings_ND = np.array([[value, 0, 1] for value in first_values], dtype=np.float32)
    spans = [(10.0 * i, 10.0 * i + 10) for i in range(len(first_values))]
    records.add_clips(video, spans, [None] * len(spans), embeddings_ND)


def test_rows_come_back_as_they_went_in(records: Records) -> None:
    records.begin_video("a.mp4", 7, 1_700_000_000_123_456_789)
    embeddings_ND = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
    records.add_clips("a.mp4", [(0.0, 0.1), (0.1, 2.5)], ["näher — 近い\0", None], embeddings_ND)
    records.finish_video("a.mp4", "partial", "2.5 of 4.0 s decoded", 2.5)

    assert records.manifest == MANIFEST
    assert records.dimension == 3
    assert records.video("a.mp4") == VideoRow(
        "a.mp4", 7, 1_700_000_000_123_456_789, "partial", "2.5 of 4.0 s decoded", 2.5, 2
    )
    assert records.clips("a.mp4") == [
        ClipRow(1, "a.mp4", 0.0, 0.1, "näher — 近い\0"),
        ClipRow(2, "a.mp4", 0.1, 2.5, None),
    ]
    ((ids_N, read_ND),) = records.embeddings()
    assert ids_N.tolist() == [1, 2]
    assert read_ND.dtype == np.float32
    np.testing.assert_array_equal(read_ND, embeddings_ND)
    assert records.video("b.mp4") is None
    assert records.clips("b.mp4") == []


def test_file_names_that_are_not_utf8(records: Records) -> None:
    name = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")  # what os.listdir gives for a Latin-1 name
    records.begin_video(name, 1, 1)
    add(records, name, 1.0)
    records.finish_video(name, "ok", f"{name} is short", None)
    assert [(row.video, row.reason) for row in records.videos()] == [(name, f"{name} is short")]
    assert [clip.video for clip in records.clips_by_id([1]).values()] == [name]
    assert records.remove_videos([name]) == 1


def test_videos_by_name_and_status(records: Records) -> None:
    for name, status in [("b", "ok"), ("a", "failed"), ("c", "ok")]:
        records.begin_video(name, 1, 1)
        records.finish_video(name, status, None, None)  # type: ignore[arg-type]
    records.begin_video("d", 1, 1)
    assert [row.video for row in records.videos()] == ["a", "b", "c", "d"]
    assert [row.video for row in records.videos("ok")] == ["b", "c"]
    assert records.status_counts() == {"incomplete": 1, "ok": 2, "partial": 0, "failed": 1}


@pytest.mark.parametrize(
    ("finish_as", "size", "mtime_ns", "kept"),
    [
        (None, 5, 6, 2),  # resumed
        (None, 4, 6, 0),  # another file under that name
        (None, 5, 7, 0),
        ("failed", 5, 6, 0),
        ("ok", 5, 6, 0),
        ("partial", 5, 6, 0),
    ],
)
def test_begin_keeps_only_what_an_interrupted_run_left(
    records: Records, finish_as: str | None, size: int, mtime_ns: int, kept: int
) -> None:
    records.begin_video("a", 5, 6)
    add(records, "a", 1.0, 2.0)
    if finish_as:
        records.finish_video("a", finish_as, "reason", 1.0)  # type: ignore[arg-type]
    records.begin_video("a", size, mtime_ns)
    assert records.video("a") == VideoRow("a", size, mtime_ns, "incomplete", None, None, kept)


def test_ids_are_never_reused(records: Records) -> None:
    records.begin_video("a", 1, 1)
    add(records, "a", 1.0, 2.0)
    assert records.remove_videos(["a", "unknown"]) == 2
    records.begin_video("b", 1, 1)
    add(records, "b", 3.0)
    assert records.clips("b")[0].clip_id == 3


def test_generation_moves_with_clips_and_with_nothing_else(records: Records) -> None:
    tags = [records.tag()]
    records.begin_video("a", 1, 1)
    records.begin_video("b", 1, 1)
    records.finish_video("b", "failed", "no frame", None)
    records.remove_videos(["b"])
    assert (records.generation, records.tag()) == (0, tags[0])
    records.begin_video("b", 1, 1)
    add(records, "a", 1.0)
    tags.append(records.tag())
    add(records, "b", 1.0, 2.0)
    tags.append(records.tag())
    records.remove_videos(["a", "b"])
    tags.append(records.tag())
    assert records.generation == 3
    assert len(set(tags)) == 4
    assert {len(tag) for tag in tags} == {16}


def test_tags_of_two_indexes_differ_at_the_same_generation(tmp_path: Path) -> None:
    tags = []
    for name in ("one", "two"):
        Records.create(tmp_path / name, MANIFEST)
        records = Records(tmp_path / name)
        tags.append(records.tag())
        records.close()
    assert tags[0] != tags[1]


def test_a_refused_change_leaves_nothing(records: Records) -> None:
    records.begin_video("a", 1, 1)
    before = records.tag()
    with pytest.raises(ValueError, match="shorter"):
        records.add_clips("a", [(0, 1), (1, 2)], [None], np.ones((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="begin_video first"):
        add(records, "never begun", 1.0)
    records.finish_video("a", "ok", None, None)
    with pytest.raises(ValueError, match="begin_video first"):
        add(records, "a", 1.0)
    with pytest.raises(ValueError, match="begin_video first"):
        records.finish_video("a", "ok", None, None)
    assert records.tag() == before
    assert records.totals() == (0, 0.0)


def test_a_snapshot_does_not_move(file: Path, records: Records) -> None:
    records.begin_video("a", 1, 1)
    reader = Records(file)
    with reader.snapshot():
        before = reader.tag()
        add(records, "a", 1.0)
        assert reader.tag() == before
        assert reader.clip_ids()[0].tolist() == []
    assert reader.tag() == records.tag()
    assert reader.clip_ids()[0].tolist() == [1]
    reader.close()


def test_look_up_of_more_ids_than_a_statement_has_parameters(records: Records) -> None:
    records.begin_video("a", 1, 1)
    add(records, "a", *range(10))
    found = records.clips_by_id(range(3, 300_000))
    assert sorted(found) == list(range(3, 11))
    assert records.clips_by_id([]) == {}


def test_embeddings_after_an_id_come_in_chunks(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlt_retrieval.indexing.records.ROWS_PER_READ", 4)
    records.begin_video("a", 1, 1)
    add(records, "a", *range(10))
    chunks = list(records.embeddings(after_clip_id=1))
    assert [ids_N.tolist() for ids_N, _ in chunks] == [[2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert np.concatenate([vectors_ND[:, 0] for _, vectors_ND in chunks]).tolist() == list(range(1, 10))


def foreign_database(file: Path) -> None:
    db = sqlite3.connect(file)
    db.execute("CREATE TABLE songs (title TEXT)")
    db.close()


def newer_schema(file: Path) -> None:
    Records.create(file, MANIFEST)
    db = sqlite3.connect(file)
    db.execute("PRAGMA user_version=2")
    db.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_database, "is not an index of this program"),
        (newer_schema, "has schema version 2, this program reads 1"),
        (
            lambda file: file.write_text("not a database " * 99),
            "file is not a database; it is damaged or not",
        ),
        (lambda file: file.write_bytes(b""), "is not an index of this program"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, make, message: str) -> None:
    file = tmp_path / "records.sqlite"
    make(file)
    with pytest.raises(IndexStoreError, match=message) as caught:
        Records(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_read_only_disk_is_read_without_a_log(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite cannot make its shared memory there; the stand-in only says that the disk is read-only."""
    monkeypatch.setattr("os.statvfs", lambda _: type("Statvfs", (), {"f_flag": 1}))
    records = Records(file)
    assert records.totals() == (0, 0.0)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    records.close()


def test_a_log_left_on_a_read_only_disk_is_not_passed_over(
    file: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.begin_video("a", 1, 1)
    add(records, "a", 1.0)  # in the log as long as `records` is open
    monkeypatch.setattr("os.statvfs", lambda _: type("Statvfs", (), {"f_flag": 1}))
    reader = Records(file)
    assert reader.totals()[0] == 1
    reader.close()
