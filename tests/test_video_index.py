"""VideoIndex: what is added, resumed, replaced, refused and found.

The index is the one place where decoding, encoding and the store meet; the tests count the calls that must not
happen and stop a build between any two commits.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_rows import assert_same_rows, rows_of

import rlt_retrieval.video_index as video_index
from rlt_retrieval.data import loading
from rlt_retrieval.data.video import Clip
from rlt_retrieval.embed import LoaderOptions
from rlt_retrieval.errors import ConfigError, IndexMismatchError, IndexStoreError, ShardError, SourceError
from rlt_retrieval.indexing.store import ClipStore
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.video_index import Outcome, VideoIndex, Watcher, build_index, plan_build

HERE = LoaderOptions(num_workers=0)  # decode in this process, where calls can be counted
EVERY_CLIP = LoaderOptions(num_workers=0, token_budget=1)  # a commit after every clip

TinyVideo = Callable[..., Path]


@pytest.fixture
def videos(tmp_path: Path, tiny_video: TinyVideo) -> Path:
    """A good short video, a good long one, one cut off in the middle, and one that is no video."""
    folder = tmp_path / "videos"
    tiny_video(folder / "short.mp4", 1.0, seed=1)
    tiny_video(folder / "long.mp4", 5.0, seed=2)
    whole = tiny_video(folder / "torn.mp4", 4.0, seed=3).read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a word for every video decoded, batch encoded and model made."""
    seen: list[str] = []

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            seen.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    counted(loading, "iter_windows")
    counted(VideoTextModel, "encode_tokens")
    counted(VideoTextModel, "load")
    return seen


def build(path: Path, source: Path, model: VideoTextModel | None = None, **options: Any) -> Any:
    """`build_index` with windows of 2 s, decoding here."""
    make_model = (lambda: model) if model else None
    return build_index(
        path, [source], make_model=make_model, **{"options": HERE, "window_seconds": 2.0, **options}
    )


def status_of(report: Any) -> dict[str, str]:
    return {Path(outcome.video).name: outcome.status for outcome in report.problems}


# ------------------------------------------------------------------------------------------------- adding


def test_every_decodable_second_is_indexed_and_every_problem_reported(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel
) -> None:
    outcomes: list[Outcome] = []
    progress: list[tuple[int, int]] = []
    watcher = Watcher(outcomes.append, lambda done, total: progress.append((done, total)))
    report = build(tmp_path / "my.index", videos, tiny_model, watcher=watcher)

    rows = rows_of(tmp_path / "my.index")
    assert {Path(video).name: row[0] for video, row in rows.items()} == {
        "long.mp4": "ok", "short.mp4": "ok", "text.mp4": "failed", "torn.mp4": "partial",
    }  # fmt: skip
    # 5 s in windows of 2 s: the remainder is half a window, so it stands alone
    assert [span[:2] for span in rows[str(videos / "long.mp4")][3]] == [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0)]
    _, reason, duration, spans, _ = rows[str(videos / "torn.mp4")]
    assert 0 < duration < 4
    assert spans[-1][1] == duration
    assert f"{duration:.2f} of 4.00 s decoded" in reason
    assert rows[str(videos / "text.mp4")][1] == (
        "not a readable video file (Invalid data found when processing input)"
    )
    assert (report.added, report.unchanged, report.clips) == (3, 0, 3 + 1 + len(spans))
    assert status_of(report) == {"text.mp4": "failed", "torn.mp4": "partial"}
    assert sorted(outcome.status for outcome in outcomes) == ["failed", "ok", "ok", "partial"]
    assert progress == [(done, 4) for done in range(5)]


def test_a_repeated_build_decodes_and_encodes_nothing_and_makes_no_model(
    tmp_path: Path, videos: Path, tiny_model_path: Path, calls: list[str]
) -> None:
    model = VideoTextModel.load(tiny_model_path, device="cpu")
    first = build(tmp_path / "my.index", videos, model)
    assert calls.count("iter_windows") == 4
    calls.clear()

    outcomes: list[Outcome] = []
    again = build(tmp_path / "my.index", videos, watcher=Watcher(outcomes.append))

    assert calls == []
    assert (again.added, again.unchanged, again.clips) == (0, 4, 0)
    assert sorted(again.problems, key=str) == sorted(first.problems, key=str)
    assert outcomes == again.problems  # said again: the exit code is 3 again and the user wants to know why


def test_retry_failed_tries_failed_and_partial_files_again_and_no_others(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, calls: list[str]
) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    before = rows_of(tmp_path / "my.index")
    calls.clear()
    report = build(tmp_path / "my.index", videos, tiny_model, retry_failed=True)
    assert calls.count("iter_windows") == 2
    assert status_of(report) == {"text.mp4": "failed", "torn.mp4": "partial"}
    assert_same_rows(rows_of(tmp_path / "my.index"), before)


def test_a_changed_file_replaces_its_rows(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, calls: list[str]
) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    before = rows_of(tmp_path / "my.index")
    tiny_video(videos / "long.mp4", 2.0, seed=9)
    tiny_video(videos / "text.mp4", 1.0, seed=8)
    calls.clear()
    report = build(tmp_path / "my.index", videos, tiny_model)
    after = rows_of(tmp_path / "my.index")
    assert (report.added, report.unchanged, calls.count("iter_windows")) == (2, 2, 2)
    assert [span[:2] for span in after[str(videos / "long.mp4")][3]] == [(0.0, 2.0)]
    assert after[str(videos / "text.mp4")][0] == "ok"
    for name in ("short.mp4", "torn.mp4"):
        np.testing.assert_array_equal(after[str(videos / name)][-1], before[str(videos / name)][-1])


def test_a_vanished_file_is_reported_and_kept_until_removed(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo
) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    elsewhere = tiny_video(tmp_path / "videos2" / "other.mp4")  # its folder's name begins like the other's
    build(tmp_path / "my.index", elsewhere, tiny_model)
    (videos / "long.mp4").unlink()
    elsewhere.unlink()

    report = build(tmp_path / "my.index", videos, tiny_model)
    assert status_of(report) == {"text.mp4": "failed", "torn.mp4": "partial", "long.mp4": "vanished"}

    with VideoIndex.open(tmp_path / "my.index", tiny_model) as index:
        assert str(videos / "long.mp4") in {hit.video for hit in index.search("red", k=100)}
        assert index.remove([videos / "long.mp4", "never/there.mp4"]) == 3
        assert str(videos / "long.mp4") not in {hit.video for hit in index.search("red", k=100)}
    assert "long.mp4" not in status_of(build(tmp_path / "my.index", videos, tiny_model))


# ------------------------------------------------------------------------------------------------ resuming


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("num_commits", [1, 2, 3, 4])
def test_a_build_stopped_after_any_commit_resumes_at_the_next_window(
    tmp_path: Path,
    videos: Path,
    tiny_model: VideoTextModel,
    monkeypatch: pytest.MonkeyPatch,
    num_commits: int,
) -> None:
    build(tmp_path / "whole.index", videos, tiny_model, options=EVERY_CLIP)
    commit = ClipStore.add_clips

    def stop_later(self: ClipStore, *arguments: Any, **facts: Any) -> None:
        if num_clips(tmp_path / "my.index") == num_commits:
            raise Stopped
        commit(self, *arguments, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "add_clips", stop_later)
        with pytest.raises(Stopped):
            build(tmp_path / "my.index", videos, tiny_model, options=EVERY_CLIP)
    assert num_clips(tmp_path / "my.index") == num_commits

    report = build(tmp_path / "my.index", videos, tiny_model)
    assert report.clips == num_clips(tmp_path / "whole.index") - num_commits
    assert_same_rows(rows_of(tmp_path / "my.index"), rows_of(tmp_path / "whole.index"))


def test_a_resumed_video_remembers_the_packets_lost_before(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass starts behind the damage and sees none: the video must not end as "ok"."""
    tiny_video(tmp_path / "videos" / "a.mp4", 8.0)
    whole = loading.iter_windows

    def damaged(*arguments: Any, first_window: int, **options: Any) -> Iterator[Clip]:
        windows = whole(*arguments, first_window=first_window, **options)
        lost = None if first_window else "1 packet lost (InvalidDataError after 0.10 s)"
        while True:
            try:
                yield replace(next(windows), lost=lost)
            except StopIteration as stop:
                return replace(stop.value, problem=lost)

    monkeypatch.setattr(loading, "iter_windows", damaged)
    commit = ClipStore.add_clips

    def stop_later(self: ClipStore, *arguments: Any, **facts: Any) -> None:
        if num_clips(tmp_path / "my.index") == 2:
            raise Stopped
        commit(self, *arguments, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "add_clips", stop_later)
        with pytest.raises(Stopped):
            build(tmp_path / "my.index", tmp_path / "videos", tiny_model, options=EVERY_CLIP)
    report = build(tmp_path / "my.index", tmp_path / "videos", tiny_model, options=EVERY_CLIP)
    assert [(problem.status, problem.reason) for problem in report.problems] == [
        ("partial", "1 packet lost (InvalidDataError after 0.10 s)")
    ]


def test_a_loss_that_both_passes_see_is_told_once(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last window, whose row names the lost packet, and the end of a torn video."""
    torn = tiny_video(tmp_path / "videos" / "torn.mp4", 9.0, fps=16, size=64, seed=3)
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (expected,) = build(tmp_path / "whole.index", torn, tiny_model).problems
    assert expected.reason is not None
    assert "lost" in expected.reason
    assert "decoded" in expected.reason

    def stop(*arguments: Any, **facts: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "finish_video", stop)
        with pytest.raises(Stopped):
            build(tmp_path / "my.index", torn, tiny_model, options=EVERY_CLIP)
    assert build(tmp_path / "my.index", torn, tiny_model).problems == [expected]


def test_a_video_with_all_windows_committed_but_not_finished_is_finished(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed pass starts behind the last window: that must be no decode error."""
    build(tmp_path / "whole.index", videos, tiny_model)
    finish = ClipStore.finish_video

    def stop(self: ClipStore, video: str, **facts: Any) -> None:
        if facts["status"] == "failed":
            finish(self, video, **facts)
        else:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "finish_video", stop)
        for _ in range(3):  # one video a round
            with pytest.raises(Stopped):
                build(tmp_path / "my.index", videos, tiny_model, options=EVERY_CLIP)
    assert num_clips(tmp_path / "my.index") > 0

    report = build(tmp_path / "my.index", videos, tiny_model)
    assert status_of(report) == {"text.mp4": "failed", "torn.mp4": "partial"}
    assert_same_rows(rows_of(tmp_path / "my.index"), rows_of(tmp_path / "whole.index"))


def num_clips(index_path: Path) -> int:
    with ClipStore.open(index_path) as store:
        return store.counts().clips


# ------------------------------------------------------------------------------------------------- sources


def test_files_folders_shards_and_folders_with_shards_are_sources(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, tiny_shards: Callable[..., list[Path]]
) -> None:
    folder = tmp_path / "data"
    tiny_video(folder / "a.MP4")
    tiny_video(folder / "deep" / "b.mp4")
    tiny_video(folder / ".hidden" / "c.mp4")
    braces = tiny_video(tmp_path / "odd {1}.mp4")  # a name that looks like a pattern of shards
    shard = tiny_shards(folder / "shards", ["a red square", "", "a circle"])[0]
    shutil.copytree(folder / "shards", folder / ".trash")

    def indexed(*sources: Path | str) -> dict[str, str | None]:
        shutil.rmtree(tmp_path / "my.index", ignore_errors=True)
        build_index(tmp_path / "my.index", sources, make_model=lambda: tiny_model, options=HERE)
        rows = rows_of(tmp_path / "my.index")
        return {os.path.relpath(video, tmp_path): row[3][0][2] for video, row in rows.items()}

    in_shard = {
        "data/shards/clips-000000.tar#clip-00": "a red square",
        "data/shards/clips-000000.tar#clip-01": None,
        "data/shards/clips-000000.tar#clip-02": "a circle",
    }
    assert indexed(folder / "a.MP4") == {"data/a.MP4": None}
    assert indexed(braces) == {"odd {1}.mp4": None}
    assert indexed(shard) == in_shard
    assert indexed(folder / "shards" / "clips-{000000..000000}.tar") == in_shard
    assert indexed(shard.parent, shard) == in_shard  # named twice, indexed once
    assert indexed(folder) == {"data/a.MP4": None, "data/deep/b.mp4": None, **in_shard}


def test_a_torn_shard_gives_its_whole_samples_and_one_failure(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_shards: Callable[..., list[Path]]
) -> None:
    shard = tiny_shards(tmp_path / "shards", ["one", "two", "three"])[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: content.index(b"clip-02") + 600])  # in its first member
    report = build(tmp_path / "my.index", shard, tiny_model)
    assert report.added == 2
    (problem,) = report.problems
    assert problem.status == "failed"
    assert "truncated" in problem.reason
    assert build(tmp_path / "my.index", shard, tiny_model).problems == [problem]


@pytest.mark.parametrize(
    "name", ["missing", "missing.tar", "missing/{0..3}.tar", "empty", "notes", "empty.tar"]
)
def test_a_source_without_video_is_refused_before_anything_is_made(
    tmp_path: Path, videos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    (tmp_path / "empty.tar").write_bytes(bytes(10240))

    def no_model() -> VideoTextModel:
        raise AssertionError("a model was made")

    for sources in ([tmp_path / name], [videos, tmp_path / name]):
        with pytest.raises((SourceError, ShardError), match=name.split("/")[0]) as error:
            build_index(tmp_path / "my.index", sources, make_model=no_model)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "my.index").exists()


def test_a_dry_run_counts_and_leaves_nothing(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo
) -> None:
    assert plan_build(tmp_path / "my.index", [videos]) == {"to_do": 4, "unchanged": 0, "problems": []}
    assert not (tmp_path / "my.index").exists()
    build(tmp_path / "my.index", videos, tiny_model)
    tiny_video(videos / "new.mp4")
    plan = plan_build(tmp_path / "my.index", [videos])
    assert (plan["to_do"], plan["unchanged"], len(plan["problems"])) == (1, 4, 2)
    assert plan_build(tmp_path / "my.index", [videos], retry_failed=True)["to_do"] == 3
    assert str(videos / "new.mp4") not in rows_of(tmp_path / "my.index")


# ----------------------------------------------------------------------------------- hangs and other writers


def hang_on_some(
    source: str, sampling: Any, window_seconds: float, first_window: int
) -> Iterator[loading.TokenizedClip]:
    """Worker job: decodes as it should, but never returns from files of these names."""
    while "hang" in source:
        time.sleep(60)
    return (yield from loading.tokenize_windows(source, sampling, window_seconds, first_window))


def test_a_decoder_that_never_returns_costs_its_own_file_only(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "hang", "z"):
        tiny_video(tmp_path / "videos" / f"{name}.mp4")
    monkeypatch.setattr(video_index, "tokenize_windows", hang_on_some)
    options = LoaderOptions(num_workers=1, decode_timeout_seconds=2.0)
    report = build(tmp_path / "my.index", tmp_path / "videos", tiny_model, options=options)
    assert (report.added, status_of(report)) == (2, {"hang.mp4": "failed"})
    assert report.problems[0].reason == "no reply for 2 s: killed"


def test_a_build_that_breaks_off_waits_for_no_decoder(
    tmp_path: Path, tiny_model: VideoTextModel, tiny_video: TinyVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C once waited for the worker's timeout; here that is an hour. The hung worker must be gone too."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    tiny_video(tmp_path / "videos" / "hang.mp4")
    monkeypatch.setattr(video_index, "tokenize_windows", hang_on_some)

    def stop(outcome: Outcome) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        build(
            tmp_path / "my.index", tmp_path / "videos", tiny_model,
            options=LoaderOptions(num_workers=1, decode_timeout_seconds=3600), watcher=Watcher(stop),
        )  # fmt: skip
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_a_second_writer_is_told_who_writes(tmp_path: Path, videos: Path, tiny_model: VideoTextModel) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    with ClipStore.open(tmp_path / "my.index") as other, other.writing():
        with pytest.raises(IndexStoreError, match=f"being written by another process .pid {os.getpid()}"):
            build(tmp_path / "my.index", videos, tiny_model)
        with VideoIndex.open(tmp_path / "my.index", tiny_model) as reader:
            assert len(reader.search("anything", k=2)) == 2


# ------------------------------------------------------------------------------- what an index holds on to


def test_another_model_or_window_is_refused(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel, make_tiny_model: Callable[..., VideoTextModel]
) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    with pytest.raises(
        IndexMismatchError, match=r"my\.index was built with another model .a configured backbone . random"
    ):
        VideoIndex.open(tmp_path / "my.index", make_tiny_model(seed=1))
    with pytest.raises(IndexMismatchError, match=r"other video settings .threshold"):
        VideoIndex.open(tmp_path / "my.index", make_tiny_model(threshold=0.2))
    with pytest.raises(IndexMismatchError, match="windows of 2 s, not 5 s"):
        build(tmp_path / "my.index", videos, window_seconds=5.0)
    build(tmp_path / "my.index", videos, window_seconds=None)  # not said: the index's own
    VideoIndex.open(tmp_path / "my.index", make_tiny_model()).close()  # the same weights, made anew


def test_the_model_is_made_again_from_the_manifest_and_checked(
    tmp_path: Path, videos: Path, make_tiny_model: Callable[..., VideoTextModel]
) -> None:
    model_path = tmp_path / "model"
    make_tiny_model(seed=3).save(model_path)
    build(tmp_path / "my.index", videos, VideoTextModel.load(model_path, device="cpu"))
    with VideoIndex.open(tmp_path / "my.index", device="cpu") as index:
        assert index.search("a dog")[0].rank == 1
    make_tiny_model(seed=4).save(model_path)  # trained on, say: its texts no longer fit the stored clips
    with (
        VideoIndex.open(tmp_path / "my.index", device="cpu") as index,
        pytest.raises(IndexMismatchError, match="built with another model"),
    ):
        index.search("a dog")


def test_a_model_made_by_create_is_made_again_too(
    tmp_path: Path, videos: Path, tiny_model: VideoTextModel
) -> None:
    build(tmp_path / "my.index", videos, tiny_model)
    with VideoIndex.open(tmp_path / "my.index", device="cpu") as index:
        assert index.manifest["model"]["seed"] == 0
        assert index.model.sha256() == tiny_model.sha256()


@pytest.mark.parametrize("window_seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_window_must_have_a_length(
    tmp_path: Path, tiny_model: VideoTextModel, window_seconds: float
) -> None:
    with pytest.raises(ConfigError, match="window_seconds"):
        VideoIndex.create(tmp_path / "my.index", tiny_model, window_seconds=window_seconds)
    assert not (tmp_path / "my.index").exists()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_no_index_is_said_before_a_model_is_made(
    tmp_path: Path, videos: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "my.index")

    def no_model() -> VideoTextModel:
        raise AssertionError("a model was made")

    with pytest.raises(IndexStoreError, match="is not an index"):
        build_index(tmp_path / "my.index", [videos], make_model=no_model)


# ------------------------------------------------------------------------------------------------ searching


@pytest.fixture
def index(tmp_path: Path, videos: Path, tiny_model: VideoTextModel) -> Iterator[VideoIndex]:
    build(tmp_path / "my.index", videos, tiny_model)
    with VideoIndex.open(tmp_path / "my.index", tiny_model) as opened:
        yield opened


def test_hits_are_the_inner_products_of_the_stored_clips_in_order(
    index: VideoIndex, tiny_model: VideoTextModel
) -> None:
    hits = index.search("a dog jumps", k=100)
    z_D = tiny_model.encode_text(["a dog jumps"]).detach().numpy()[0]
    expected = sorted(
        (
            (float(z_ND[number] @ z_D), video, spans[number][:2])
            for video, (*_, spans, z_ND) in rows_of(index.path).items()
            for number in range(len(spans))
        ),
        key=lambda row: -row[0],
    )
    assert [hit.rank for hit in hits] == list(range(1, len(expected) + 1))
    np.testing.assert_allclose([hit.score for hit in hits], [row[0] for row in expected], atol=1e-6)
    assert {(h.video, (h.start_seconds, h.end_seconds)) for h in hits} == {row[1:] for row in expected}


def test_a_list_of_texts_gives_a_list_of_lists_and_vectors_the_same(
    index: VideoIndex, tiny_model: VideoTextModel
) -> None:
    """A text's embedding may differ by rounding with the texts beside it; its hits may not."""
    texts = ["a dog", "a cat", "a dog"]
    found = index.search(texts, k=3)
    z_QD = tiny_model.encode_text(texts).detach().numpy()
    alone = [index.search(text, k=3) for text in texts]
    for others in (alone, index.search_vectors(z_QD, k=3)):
        scores = [[hit.score for hit in hits] for hits in others]
        np.testing.assert_allclose([[hit.score for hit in hits] for hits in found], scores, atol=1e-6)
        assert found == [
            [replace(hit, score=own.score) for hit, own in zip(hits, owns, strict=True)]
            for hits, owns in zip(others, found, strict=True)
        ]
    assert found[0] == found[2]
    assert index.search([], k=3) == []


def test_per_video_keeps_the_best_clip_of_each_video(index: VideoIndex) -> None:
    every = index.search("a dog", k=100)
    best: dict[str, float] = {}
    for hit in every:
        best.setdefault(hit.video, hit.score)
    hits = index.search("a dog", k=100, per_video=True)
    assert {hit.video: hit.score for hit in hits} == best
    assert [hit.rank for hit in hits] == [1, 2, 3]


def test_the_device_and_the_precision_reach_the_store(
    tmp_path: Path, index: VideoIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only CUDA is passed on: FAISS knows no other device, and must not be asked for 'auto' or 'mps'."""
    asked: list[tuple[str, bool]] = []

    def opened(path: Path, *, device: str, float16: bool) -> None:
        asked.append((device, float16))

    monkeypatch.setattr(ClipStore, "open", opened)
    for device in ("cpu", "auto", "cuda:1"):
        monkeypatch.setattr(video_index, "resolve_device", fake_resolve_device)
        VideoIndex.open(index.path, device=device, float16=True)
    assert asked == [("cpu", True), ("cpu", True), ("cuda:1", True)]


def fake_resolve_device(device: str) -> Any:
    import torch

    return torch.device("cpu" if device == "auto" else device)
