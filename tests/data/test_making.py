"""Making shards: what is left out, going on after a stop, whose folder it is. Cutting is mostly a fake."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlt_retrieval.annotations import Classes
from rlt_retrieval.data import making
from rlt_retrieval.data.making import MakeReport, make_shards, plan_shards
from rlt_retrieval.data.shards import ShardSample, read_shard
from rlt_retrieval.data.sources import Source, SourceClip
from rlt_retrieval.data.video import encode_mp4
from rlt_retrieval.errors import ShardError


def fake_cut(video: Path, *, start_seconds: float, end_seconds: float, short_side: int) -> bytes:
    if "bad" in video.name:
        raise ValueError(f"{video.name}: no frame")
    return f"{video.name} {start_seconds} {end_seconds} {short_side}".encode()


@pytest.fixture
def clips(tmp_path, monkeypatch) -> list[SourceClip]:
    """Seven clips, the fourth unreadable."""
    monkeypatch.setattr(making, "cut_span", fake_cut)
    videos = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4", "bad.mp4", "e.mp4", "f.mp4", "g.mp4")]
    for video in videos:
        video.write_bytes(b"v")
    return [SourceClip(video, (f"caption {i}",), video.name, i, i + 1.5) for i, video in enumerate(videos)]


def make(clips: list[SourceClip], out_dir: Path, **changes) -> MakeReport:
    settings = {
        "samples_per_shard": 3,
        "short_side": 32,
        "num_workers": 0,
        "timeout_seconds": 10.0,
        **changes,
    }
    return make_shards(clips, out_dir, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_make_leaves_out_and_lists_what_cannot_be_read(clips, tmp_path):
    progress = []
    report = make(clips, tmp_path / "out", on_progress=lambda *counts: progress.append(counts))
    assert progress == [(i, 7) for i in range(1, 8)]
    assert [path.name for path in report.shards] == [f"clips-00000{i}.tar" for i in range(3)]
    assert report.num_clips == 6
    (failure,) = report.failures
    assert (failure.key, failure.shard) == ("bad~2emp4", str(clips[3].video))
    assert "no frame" in failure.reason
    samples = [sample for path in report.shards for sample in read_shard(path)]
    assert [s.captions[0] for s in samples] == [f"caption {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert samples[1].media == b"b.mp4 1 2.5 32"
    assert (samples[1].video_id, samples[1].start_seconds, samples[1].end_seconds) == (
        str(clips[1].video),
        1.0,
        2.5,
    )
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["num_clips"], dataset["num_failures"], len(dataset["shards"])) == (6, 1, 3)
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("stop_after", range(7))
def test_a_stopped_make_goes_on_where_it_was(clips, tmp_path, monkeypatch, stop_after):
    make(clips, tmp_path / "whole")

    def stop(num_done: int, _: int) -> None:
        if num_done > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(clips, tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out" / "dataset.json").exists()
    cuts = []
    monkeypatch.setattr(
        making, "cut_span", lambda video, **span: cuts.append(video) or fake_cut(video, **span)
    )
    report = make(clips, tmp_path / "out")
    assert cuts == [clip.video for clip in clips[stop_after // 3 * 3 :]]
    assert report.num_clips == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    cuts.clear()
    assert make(clips, tmp_path / "out") == report  # all there
    assert not cuts


def test_make_refuses_other_clips_changed_files_and_foreign_folders(clips, tmp_path):
    make(clips, tmp_path / "out")
    for others, changes, difference in [
        (clips[:5], {}, "clips: 7 then, 5 now"),
        (clips, {"samples_per_shard": 2}, "clips per shard: 3 then, 2 now"),
        (clips, {"short_side": 16}, "short side: 32 then, 16 now"),
        (clips[:6], {"short_side": 16}, "short side: 32 then, 16 now; clips: 7 then, 6 now"),
    ]:
        expected = rf"holds shards of other clips or settings \({difference}\); choose an empty folder"
        with pytest.raises(ShardError, match=expected):
            make(others, tmp_path / "out", **changes)
    clips[0].video.write_bytes(b"longer")
    expected = r"other clips .*\(7 clips then and now, but they or their video files have changed\)"
    with pytest.raises(ShardError, match=expected):
        make(clips, tmp_path / "out")
    for damaged in (b"{", b"[]", b"{}", b"\xff"):
        (tmp_path / "out" / "plan.json").write_bytes(damaged)
        with pytest.raises(ShardError, match=r"\(its plan\.json is damaged\)"):
            make(clips, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ShardError, match=r"not empty \(thesis\.tex\)"):
        make(clips, tmp_path / "mine")
    with pytest.raises(ShardError, match="no clip to make shards from"):
        make([], tmp_path / "new")
    with pytest.raises(ShardError, match="given to two samples"):
        make([clips[0], clips[0]], tmp_path / "new")
    with pytest.raises(ShardError, match=r"none of the clips could be read \(first: .*bad\.mp4"):
        make([clips[3]], tmp_path / "new")


def test_make_passes_ids_and_classes_on_and_lists_what_is_absent(clips, tmp_path):
    marked = [
        replace(clip, video_id=f"P01_{i}", classes=Classes(i, (i, 9))) for i, clip in enumerate(clips[:3])
    ]
    gone = [SourceClip(tmp_path / "gone.mp4", ("x",), f"gone {i}", video_id="P02_1") for i in (0, 1)]
    settings = {"absent": gone, "dataset": {"format": "ek100", "missing_videos": {"P02_1": 2}}}
    for _ in range(2):  # a repeat lists nothing twice
        report = make([*marked, clips[3]], tmp_path / "out", **settings)
        assert (report.num_clips, [failure.key for failure in report.failures]) == (3, ["bad~2emp4"])
        lines = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
        assert [(line["key"], line["reason"]) for line in lines] == [
            ("gone~200", "no such video"),
            ("gone~201", "no such video"),
            ("bad~2emp4", "ValueError: bad.mp4: no frame"),
        ]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == {
        "num_clips": 3,
        "num_failures": 1,
        "num_missing_clips": 2,
        "shards": ["clips-000000.tar"],
        **settings["dataset"],
    }
    samples = [sample for sample in read_shard(report.shards[0]) if isinstance(sample, ShardSample)]
    assert [(s.video_id, s.classes) for s in samples] == [(c.video_id, c.classes) for c in marked]


def test_a_video_that_came_since_is_never_mixed_in_silently(clips, tmp_path):
    make(clips[:2], tmp_path / "out", absent=clips[2:3])
    before = contents(tmp_path / "out")
    with pytest.raises(ShardError, match=r"\(clips: 2 then, 3 now\); choose an empty folder"):
        make(clips[:3], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ShardError, match="given to two samples"):
        make(clips[:2], tmp_path / "new", absent=clips[:1])


def test_the_plan_of_plain_clips_is_what_it_always_was_and_ids_and_classes_change_it(tmp_path):
    plain = SourceClip(tmp_path / "gone.mp4", ("x",), "a", 1.0, 2.5)
    row = json.dumps((str(plain.video), (), 1.0, 2.5, ("x",), "a")).encode()
    plans = {
        making._plan([clip], 3, 32)
        for clip in (plain, replace(plain, video_id="v"), replace(plain, classes=Classes(1, (2,))))
    }
    assert len(plans) == 3
    assert hashlib.sha256(row).hexdigest().encode() in making._plan([plain], 3, 32)


def test_plan_counts_hours_and_bytes_where_all_spans_are_known(tmp_path):
    spans = [SourceClip(tmp_path / "a.mp4", ("x",), str(i), i, i + 1800.0) for i in range(5)]
    source = Source(clips=spans[:4], absent=[replace(clip, video_id="P01") for clip in spans[4:]])
    figures = {"clips": 4, "captioned": 4, "missing_videos": 1, "missing_clips": 1, "shards": 2}
    hours = {"hours": 2.0, "expected_gb": 0.576, "missing_hours": 0.5}
    assert plan_shards(source, samples_per_shard=3) == {**figures, **hours}
    assert plan_shards(source, samples_per_shard=3, short_side=144)["expected_gb"] == 0.144
    whole = Source(clips=[*spans, SourceClip(tmp_path / "a.mp4", (), "whole")])
    assert plan_shards(whole, samples_per_shard=6) == {"clips": 6, "captioned": 5, "shards": 1}
    assert "missing_hours" not in plan_shards(Source(clips=spans, absent=whole.clips), samples_per_shard=6)


def test_make_cuts_real_video_in_worker_processes(tmp_path):
    frames = np.zeros((10, 32, 48, 3), np.uint8)
    (tmp_path / "v.mp4").write_bytes(encode_mp4(frames, fps=10))
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    clips = [
        SourceClip(tmp_path / "v.mp4", ("all",), "all"),
        SourceClip(tmp_path / "v.mp4", ("part",), "part", 0.2, 0.6),
        SourceClip(tmp_path / "broken.mp4", ("none",), "none"),
        SourceClip(tmp_path / "gone.mp4", ("none",), "gone"),
    ]
    report = make_shards(
        clips, tmp_path / "out", samples_per_shard=10, short_side=16, num_workers=2, timeout_seconds=60.0
    )
    whole, part = read_shard(report.shards[0])
    assert (whole.captions, part.captions) == (("all",), ("part",))
    assert len(part.media) < len(whole.media)
    assert [failure.key for failure in report.failures] == ["none", "gone"]
    assert [failure.shard for failure in report.failures] == [str(clip.video) for clip in clips[2:]]
    with pytest.raises(ShardError, match=r"\(first: [^ ]*broken\.mp4: not a readable video file"):
        make_shards(clips[2:], tmp_path / "new", samples_per_shard=10, num_workers=0, timeout_seconds=60.0)
