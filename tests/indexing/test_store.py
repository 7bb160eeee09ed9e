"""ClipStore: what survives kills, writers beside readers, and search against brute force on the same rows."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlt_retrieval.indexing.store as module
from rlt_retrieval.errors import IndexStoreError, MissingDependencyError
from rlt_retrieval.indexing.records import Records
from rlt_retrieval.indexing.store import ClipRow, ClipStore
from rlt_retrieval.indexing.vectors import VectorIndex, saved_tag

REPOSITORY = Path(module.__file__).resolve().parents[2]
DIMENSION = 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ClipStore.create(tmp_path / "my.index", {"dimension": DIMENSION, "seed": 3}).close()
    return tmp_path / "my.index"


@pytest.fixture
def store(path: Path) -> Iterator[ClipStore]:
    with ClipStore.open(path) as store:
        yield store


def vectors_of(seed: int, size: int) -> np.ndarray:
    """Small whole numbers: sums are exact in any order, and there are ties."""
    return np.random.default_rng(seed).integers(-2, 3, (size, DIMENSION)).astype(np.float32)


def add_video(store: ClipStore, video: str, vectors_ND: np.ndarray, *, finish: bool = True) -> None:
    store.begin_video(video, len(vectors_ND), 1)
    spans = [(10.0 * i, 10.0 * i + 10) for i in range(len(vectors_ND))]
    store.add_clips(video, spans, [f"clip {i}" for i in range(len(vectors_ND))], vectors_ND)
    if finish:
        store.finish_video(video, status="ok", duration_seconds=10.0 * len(vectors_ND))


def brute_force(
    path: Path, queries_QD: np.ndarray, k: int, *, per_video: bool = False
) -> list[list[tuple[float, ClipRow]]]:
    """Plain numpy over the rows that are committed, read anew."""
    records = Records(path / "records.sqlite")
    rows = {clip.clip_id: clip for video in records.videos() for clip in records.clips(video.video)}
    vectors = {i: v_D for ids_N, v_ND in records.embeddings() for i, v_D in zip(ids_N, v_ND, strict=True)}
    records.close()
    assert sorted(vectors) == sorted(rows)
    answers = []
    for query_D in queries_QD:
        hits = sorted(((float(vectors[i] @ query_D), row) for i, row in rows.items()), key=order_of_hits)
        if per_video:
            hits = list({row.video: (score, row) for score, row in reversed(hits)}.values())
            hits.sort(key=order_of_hits)
        answers.append(hits[:k])
    return answers


def order_of_hits(hit: tuple[float, ClipRow]) -> tuple[float, int]:
    score, row = hit
    return -score, row.clip_id


def assert_search_is_exact(store: ClipStore) -> None:
    queries_QD = vectors_of(99, 3)
    for k, per_video in [(1, False), (5, False), (1000, False), (2, True), (1000, True)]:
        expected = brute_force(store.path, queries_QD, k, per_video=per_video)
        assert store.search(queries_QD, k, per_video=per_video) == expected


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def run_python(script: str, *arguments: object) -> tuple[int, str]:
    """(exit status, standard output)"""
    with start_python(script, *arguments) as process:
        output = process.communicate()[0]
    return process.returncode, output


# Creating and opening


def test_create_then_open(store: ClipStore) -> None:
    assert store.manifest == {"dimension": DIMENSION, "seed": 3}
    assert (store.dimension, store.generation) == (DIMENSION, 0)
    assert store.search(vectors_of(0, 2), 5) == [[], []]
    assert store.videos() == []
    counts = store.counts()
    assert (counts.clips, counts.hours) == (0, 0.0)
    assert counts.videos == {"incomplete": 0, "ok": 0, "partial": 0, "failed": 0}


def test_create_makes_parents_and_ordinary_permissions(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    path = tmp_path / "deep" / "er" / "my.index"
    ClipStore.create(path, {"dimension": 2}).close()
    assert [file.name for file in path.parent.iterdir()] == ["my.index"]
    assert path.stat().st_mode == beside.stat().st_mode


def refuse_to_create(path: Path, message: str) -> None:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(IndexStoreError, match=message) as caught:
        ClipStore.create(path, {"dimension": 2})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.rglob("*")) == before


def test_create_touches_nothing_that_is_there(path: Path, tmp_path: Path) -> None:
    refuse_to_create(path, "is an index already")
    (tmp_path / "folder").mkdir()
    refuse_to_create(tmp_path / "folder", "exists and is not an index")
    (tmp_path / "file").write_text("text")
    refuse_to_create(tmp_path / "file", "exists and is not an index")
    refuse_to_create(tmp_path / "file" / "my.index", r"cannot be created \(Not a directory\)")


def test_two_creators_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes between our look and our rename."""
    path = tmp_path / "my.index"
    real_create = Records.create

    def slower(file: Path, manifest: dict) -> None:
        monkeypatch.setattr(Records, "create", real_create)
        ClipStore.create(path, {"dimension": 5}).close()
        real_create(file, manifest)

    monkeypatch.setattr(Records, "create", slower)
    with pytest.raises(IndexStoreError, match="cannot be created"):
        ClipStore.create(path, {"dimension": 2})
    with ClipStore.open(path) as store:
        assert store.dimension == 5
    assert [file.name for file in tmp_path.iterdir()] == ["my.index"]


def test_a_killed_create_leaves_no_index(tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        from rlt_retrieval.indexing.store import ClipStore
        Path.rename = lambda *_: os.kill(os.getpid(), 9)
        ClipStore.create(sys.argv[1], {"dimension": 2})
    """
    assert run_python(script, tmp_path / "my.index")[0] == -signal.SIGKILL
    with pytest.raises(IndexStoreError, match="no such index"):
        ClipStore.open(tmp_path / "my.index")
    ClipStore.create(tmp_path / "my.index", {"dimension": 2}).close()


def test_open_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nothing", "no such index; build it with"),
        ("folder", r"no records\.sqlite in it"),
    ]:
        with pytest.raises(IndexStoreError, match=message) as caught:
            ClipStore.open(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dimension", [None, 0, 2.5, "8", True])
def test_create_needs_a_dimension(tmp_path: Path, dimension: object) -> None:
    with pytest.raises(ValueError, match="dimension"):
        ClipStore.create(tmp_path / "my.index", {"dimension": dimension})


def test_reading_imports_neither_torch_nor_faiss() -> None:
    script = """
        import sys
        import rlt_retrieval.indexing.store
        assert not {"torch", "faiss"} & set(sys.modules)
    """
    assert run_python(script)[0] == 0


# Writing


def test_changes_need_the_writer_lock(store: ClipStore) -> None:
    for change in (
        lambda: store.begin_video("a", 1, 1),
        lambda: store.add_clips("a", [], [], vectors_of(0, 0)),
        lambda: store.finish_video("a", status="ok"),
        lambda: store.remove_videos(["a"]),
        store.save_vectors,
    ):
        with pytest.raises(RuntimeError, match="writing"):
            change()


def test_add_clips_refuses_what_does_not_fit(store: ClipStore) -> None:
    good_ND, span = vectors_of(0, 2), (0.0, 1.0)
    with store.writing():
        store.begin_video("a", 1, 1)
        for bad_ND in (good_ND.astype(np.float64), good_ND[:, 1:], good_ND[0], good_ND * np.float32(np.nan)):
            with pytest.raises(ValueError, match="embeddings"):
                store.add_clips("a", [span] * len(bad_ND), [None] * len(bad_ND), bad_ND)
        with pytest.raises(ValueError, match="1 spans, 2 captions, 2 embeddings"):
            store.add_clips("a", [span], [None, None], good_ND)
    assert store.counts().clips == 0
    with pytest.raises(ValueError, match="queries"):
        store.search(good_ND.astype(np.float64), 1)
    with pytest.raises(ValueError, match="k must be"):
        store.search(good_ND, 0)


def test_counts_and_rows(store: ClipStore) -> None:
    with store.writing():
        add_video(store, "b.mp4", vectors_of(1, 9))
        add_video(store, "a.mp4", vectors_of(2, 3), finish=False)
        store.begin_video("bad.mp4", 1, 1)
        store.finish_video("bad.mp4", status="failed", reason="no frame")
    counts = store.counts()
    assert (counts.clips, counts.hours) == (12, 120 / 3600)
    assert counts.videos == {"incomplete": 1, "ok": 1, "partial": 0, "failed": 1}
    assert counts.bytes_on_disk > (store.path / "vectors.faiss").stat().st_size
    assert [clip.clip_id for clip in store.clips("a.mp4")] == [10, 11, 12]
    assert [row.video for row in store.videos("failed")] == ["bad.mp4"]
    assert_search_is_exact(store)  # clips of the incomplete video are committed, so they are found


def test_an_incomplete_video_resumes_where_it_stopped(store: ClipStore) -> None:
    with store.writing():
        add_video(store, "a.mp4", vectors_of(1, 3), finish=False)
    with store.writing():
        row = store.begin_video("a.mp4", 3, 1)
        assert (row.status, row.num_clips) == ("incomplete", 3)
        store.add_clips("a.mp4", [(30.0, 34.0)], ["last"], vectors_of(2, 1))
        store.finish_video("a.mp4", status="ok")
    assert [(clip.start_seconds, clip.caption) for clip in store.clips("a.mp4")][-1] == (30.0, "last")
    assert store.counts().clips == 4
    assert_search_is_exact(store)


def test_a_changed_file_replaces_its_clips(store: ClipStore) -> None:
    with store.writing():
        add_video(store, "a.mp4", vectors_of(1, 5))
        add_video(store, "b.mp4", vectors_of(2, 2))
    store.search(vectors_of(0, 1), 3)
    with store.writing():
        add_video(store, "a.mp4", vectors_of(3, 4))  # its size is the number of clips
    assert [clip.clip_id for clip in store.clips("a.mp4")] == [8, 9, 10, 11]
    assert_search_is_exact(store)


def test_without_faiss_rows_are_read_and_nothing_is_begun(
    store: ClipStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert store.videos() == []
    assert store.counts().clips == 0
    with pytest.raises(MissingDependencyError, match=r"rlt-retrieval\[gpu\]"), store.writing():
        pytest.fail("an hour of encoding would be done before the first search fails")


def test_a_second_writer_is_told_who_the_first_is(path: Path, store: ClipStore) -> None:
    script = """
        import sys, time
        from rlt_retrieval.indexing.store import ClipStore
        with ClipStore.open(sys.argv[1]).writing():
            print("locked", flush=True)
            time.sleep(60)
    """
    writer = start_python(script, path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "locked\n"
    with pytest.raises(
        IndexStoreError, match=f"being written by another process .pid {writer.pid}."
    ) as caught:
        store.writing().__enter__()
    assert "\n" not in str(caught.value)
    writer.kill()
    writer.communicate()
    with store.writing(), ClipStore.open(path) as other:
        with pytest.raises(IndexStoreError, match=f"pid {os.getpid()}"):
            other.writing().__enter__()
        with pytest.raises(RuntimeError, match="writing"):
            other.begin_video("a", 1, 1)


def interrupted(store: ClipStore) -> None:
    add_video(store, "a.mp4", vectors_of(1, 3), finish=False)
    raise IndexStoreError("test")


def test_the_lock_is_free_after_an_error(store: ClipStore) -> None:
    with pytest.raises(IndexStoreError, match="test"), store.writing():
        interrupted(store)
    with pytest.raises(RuntimeError, match="writing"):
        store.remove_videos(["a.mp4"])
    with store.writing():
        assert store.begin_video("a.mp4", 3, 1).num_clips == 3


def test_unwritable_folder(path: Path, store: ClipStore) -> None:
    (path / "writer.lock").mkdir()
    with pytest.raises(IndexStoreError, match=r"cannot be written \(Is a directory\)"):
        store.writing().__enter__()


# vectors.faiss


def filled(path: Path) -> Path:
    with ClipStore.open(path) as store, store.writing():
        for seed in range(4):
            add_video(store, f"{seed}.mp4", vectors_of(seed, 5))
    return path / "vectors.faiss"


def fail_to_build(*_: object, **__: object) -> None:
    raise AssertionError("rebuilt, though vectors.faiss was good")


def test_good_vectors_are_not_rebuilt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    monkeypatch.setattr(VectorIndex, "build", fail_to_build)
    with ClipStore.open(path) as store:
        assert_search_is_exact(store)
        with store.writing():
            add_video(store, "new.mp4", vectors_of(7, 3))  # appended to what the search had loaded
        assert_search_is_exact(store)
    with ClipStore.open(path) as store:
        assert_search_is_exact(store)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "flipped", "foreign", "stale"])
def test_bad_vectors_are_rebuilt_and_saved(path: Path, tmp_path: Path, damage: str) -> None:
    file = filled(path)
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "stale":
        with ClipStore.open(path) as store, store.writing():
            store.remove_videos(["0.mp4"])
            add_video(store, "0.mp4", vectors_of(8, 5))
        file.write_bytes(good)
    elif damage == "foreign":  # same generation, same ids, another index
        ClipStore.create(tmp_path / "other", {"dimension": DIMENSION}).close()
        with ClipStore.open(tmp_path / "other") as other, other.writing():
            for seed in range(4):
                add_video(other, f"{seed}.mp4", vectors_of(seed + 50, 5))
        file.write_bytes((tmp_path / "other" / "vectors.faiss").read_bytes())
    else:
        changed = {"empty": b"", "torn": good[:-100], "flipped": good[:200] + b"\xff" + good[201:]}
        file.write_bytes(changed[damage])
    with ClipStore.open(path) as store:
        assert_search_is_exact(store)
    records = Records(path / "records.sqlite")
    assert VectorIndex.load(file, records.tag(), records.num_clips()) is not None
    records.close()


def test_a_reader_leaves_the_file_to_a_running_writer(path: Path) -> None:
    file = filled(path)
    before = file.read_bytes()
    with ClipStore.open(path) as writer, ClipStore.open(path) as reader:
        with writer.writing():
            add_video(writer, "new.mp4", vectors_of(7, 3))
            assert_search_is_exact(reader)
            assert file.read_bytes() == before
        assert file.read_bytes() != before
        assert_search_is_exact(reader)


def test_a_reader_that_cannot_save_still_answers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path).unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with ClipStore.open(path) as store:
        assert_search_is_exact(store)
    assert not list(path.glob("vectors*"))


def test_what_a_killed_save_leaves_is_cleared_away(path: Path) -> None:
    script = """
        import os, sys
        import numpy as np
        from rlt_retrieval.indexing.store import ClipStore
        os.replace = lambda *_: os.kill(os.getpid(), 9)
        with ClipStore.open(sys.argv[1]).writing() as store:
            store.begin_video("a.mp4", 1, 1)
            store.add_clips("a.mp4", [(0, 1)], [None], np.ones((1, 8), dtype=np.float32))
            store.save_vectors()
    """
    assert run_python(script, path)[0] == -signal.SIGKILL
    assert len(list(path.glob("vectors.faiss.*.tmp"))) == 1
    with ClipStore.open(path) as store:
        assert_search_is_exact(store)
        assert store.counts().clips == 1
        with store.writing():
            pass
    assert not list(path.glob("*.tmp"))


# Readers beside a writer


def test_an_open_reader_sees_each_commit(path: Path) -> None:
    with ClipStore.open(path) as writer, ClipStore.open(path) as reader, writer.writing():
        for seed in range(4):
            add_video(writer, f"{seed}.mp4", vectors_of(seed, 6), finish=seed % 2 == 0)
            assert reader.generation == writer.generation
            assert_search_is_exact(reader)
        writer.remove_videos(["1.mp4"])
        assert_search_is_exact(reader)


def test_a_search_answers_from_one_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer drops every video while the reader is between FAISS and the look-up of the rows."""
    filled(path)
    queries_QD = vectors_of(0, 2)
    expected = brute_force(path, queries_QD, 5)
    real_search = VectorIndex.search
    with ClipStore.open(path) as writer, ClipStore.open(path) as reader, writer.writing():

        def search_while_all_is_removed(*arguments: object) -> object:
            found = real_search(*arguments)  # type: ignore[arg-type]
            writer.remove_videos([row.video for row in writer.videos()])
            return found

        with monkeypatch.context() as patch:
            patch.setattr(VectorIndex, "search", search_while_all_is_removed)
            assert reader.search(queries_QD, 5) == expected
        assert reader.search(queries_QD, 5) == [[], []]


def test_a_refresh_that_is_interrupted_is_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    with ClipStore.open(path) as store:
        store.search(vectors_of(0, 1), 5)
        with store.writing():
            add_video(store, "new.mp4", vectors_of(7, 3))
            add_video(store, "newer.mp4", vectors_of(8, 3))
            with monkeypatch.context() as patch:
                patch.setattr(VectorIndex, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    store.search(vectors_of(0, 1), 5)
            assert_search_is_exact(store)


changes = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 3), st.integers(1, 2)),
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(0, 6)),
    st.tuples(st.just("finish"), st.integers(0, 3), st.sampled_from(["ok", "partial", "failed"])),
    st.tuples(st.just("remove"), st.sets(st.integers(0, 3)), st.none()),
    st.tuples(st.just("search"), st.integers(1, 9), st.booleans()),
    st.tuples(st.just("save"), st.none(), st.none()),
)


def apply(store: ClipStore, kind: str, first: object, second: object, seed: int) -> None:
    video = f"{first}.mp4"
    row = store.video(video)
    if kind == "begin":
        store.begin_video(video, second, 1)  # type: ignore[arg-type]
    elif kind == "remove":
        store.remove_videos([f"{name}.mp4" for name in first])  # type: ignore[attr-defined]
    elif kind == "save":
        store.save_vectors()
    elif kind == "add" and row and row.status == "incomplete":
        vectors_ND = vectors_of(seed, second)  # type: ignore[arg-type]
        store.add_clips(video, [(0, 1)] * len(vectors_ND), [None] * len(vectors_ND), vectors_ND)
    elif kind == "finish" and row and row.status == "incomplete":
        store.finish_video(video, status=second)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.lists(changes, max_size=25))
def test_any_sequence_of_changes_keeps_search_exact(sequence: list[tuple]) -> None:
    """The writer and a reader that stays open, asked at random times, and one that opens at the end."""
    queries_QD = vectors_of(99, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.index"
        with ClipStore.create(path, {"dimension": DIMENSION}) as writer, ClipStore.open(path) as reader:
            with writer.writing():
                for seed, (kind, first, second) in enumerate(sequence):
                    if kind == "search":
                        expected = brute_force(path, queries_QD, first, per_video=second)
                        assert reader.search(queries_QD, first, per_video=second) == expected
                        assert writer.search(queries_QD, first, per_video=second) == expected
                    else:
                        apply(writer, kind, first, second, seed)
            assert_search_is_exact(reader)
        with ClipStore.open(path) as late:
            assert saved_tag(path / "vectors.faiss") is not None
            assert_search_is_exact(late)


# Kills and full disks

WRITER = """
    import sys
    import numpy as np
    from rlt_retrieval.indexing.store import ClipStore

    with ClipStore.open(sys.argv[1]).writing() as store:
        for number in range(200):
            video = f"{number}.mp4"
            row = store.video(video)
            if row and row.status != "incomplete":
                continue
            vectors_ND = np.random.default_rng(number).integers(-2, 3, (6, 8)).astype(np.float32)
            for i in range(store.begin_video(video, number, number).num_clips, 6, 2):
                spans = [(i, i + 1), (i + 1, i + 2)]
                store.add_clips(video, spans, [video, None], vectors_ND[i : i + 2])
                print(number, i + 2, flush=True)
            store.finish_video(video, status="ok", duration_seconds=6.0)
            if number % 5 == 0:
                store.save_vectors()
"""


def rows_of(store: ClipStore) -> list[tuple]:
    return [(row, store.clips(row.video)) for row in store.videos()]


def test_kills_lose_no_committed_clip(tmp_path: Path, path: Path) -> None:
    rng = np.random.default_rng(20)
    endings = []
    for moment in range(5):
        writer = start_python(WRITER, path)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(rng.integers(5, 25))]
        for _ in range(rng.integers(0, 20_000)):
            pass  # some hundred microseconds, to hit other places than right after a commit
        writer.kill()
        lines += writer.communicate()[0].splitlines()
        endings.append(writer.returncode)
        with ClipStore.open(path) as store:
            for number, num_clips in (line.split() for line in lines if line.strip()):
                row = store.video(f"{number}.mp4")
                assert row is not None, moment
                assert row.num_clips >= int(num_clips), moment
            assert_search_is_exact(store)
    assert set(endings) <= {-signal.SIGKILL, 0}
    assert -signal.SIGKILL in endings, "the writer was never killed at work: give it more videos"
    assert run_python(WRITER, path)[0] == 0
    ClipStore.create(tmp_path / "straight", {"dimension": DIMENSION}).close()
    assert run_python(WRITER, tmp_path / "straight")[0] == 0
    with ClipStore.open(path) as store, ClipStore.open(tmp_path / "straight") as straight:
        assert rows_of(store) == rows_of(straight)
        queries_QD = vectors_of(99, 3)
        assert store.search(queries_QD, 1200) == straight.search(queries_QD, 1200)
        assert_search_is_exact(store)


def test_a_full_disk_is_one_line_and_keeps_what_was_committed(path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    script = """
        import resource, sys
        import numpy as np
        from rlt_retrieval.errors import IndexStoreError
        from rlt_retrieval.indexing.store import ClipStore

        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        try:
            with ClipStore.open(sys.argv[1]).writing() as store:
                store.begin_video("long.mp4", 1, 1)
                for i in range(100_000):
                    store.add_clips("long.mp4", [(i, i + 1)], [None], np.ones((1, 8), dtype=np.float32))
        except IndexStoreError as error:
            print(i, str(error))
    """
    committed, _, message = run_python(script, path)[1].strip().partition(" ")
    assert "records.sqlite" in message
    assert message.endswith("check free space and write permission and run again; what was committed is kept")
    assert "\n" not in message
    with ClipStore.open(path) as store:
        assert store.counts().clips == int(committed) > 0
        assert_search_is_exact(store)
        with store.writing():
            assert store.begin_video("long.mp4", 1, 1).num_clips == int(committed)
