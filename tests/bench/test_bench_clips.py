"""Clips of a bench, from everything that holds videos."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlt_retrieval.bench import clips as bench_clips
from rlt_retrieval.bench.clips import BenchClip, read_clips
from rlt_retrieval.data.video import FrameTransform, decode_clip
from rlt_retrieval.embed import LoaderOptions
from rlt_retrieval.errors import SourceError

TRANSFORM = FrameTransform(32, 32)
HERE = LoaderOptions(num_workers=0)


def read(*sources: Path) -> tuple[list[BenchClip], list[str]]:
    return read_clips(sources, TRANSFORM, 4, HERE)


@pytest.fixture
def videos(tmp_path: Path, tiny_video: Callable[..., Path]) -> Path:
    """Two videos, a captioned one in a sub-folder, a broken file."""
    tiny_video(tmp_path / "videos" / "a.mp4", seed=0)
    tiny_video(tmp_path / "videos" / "sub" / "b.mp4", seed=1)
    (tmp_path / "videos" / "sub" / "b.txt").write_text("a dog\nan animal\n")
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    return tmp_path / "videos"


def test_a_folder_with_captions_and_a_broken_file(videos: Path) -> None:
    clips, problems = read(videos)
    assert [(clip.name, clip.captions) for clip in clips] == [
        ("a.mp4", ()),
        ("sub/b.mp4", ("a dog", "an animal")),
    ]
    assert all(clip.frames_TCHW.shape == (4, 3, 32, 32) for clip in clips)
    (problem,) = problems
    assert problem.startswith(f"{videos}/bad.mp4: not a readable video file")


def test_a_file_has_its_captions_too_and_sources_add_up(videos: Path) -> None:
    clips, problems = read(videos / "sub" / "b.mp4", videos / "a.mp4")
    assert [(clip.name, clip.captions) for clip in clips] == [
        ("b.mp4", ("a dog", "an animal")),
        ("a.mp4", ()),
    ]
    assert not problems


def test_a_file_is_cut_to_the_window_and_a_span_is_not(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (videos / "clips.jsonl").write_text(
        json.dumps({"video": "a.mp4", "captions": ["x"], "start_seconds": 0.25, "end_seconds": 1.0})
    )

    def frames(start: float, end: float) -> torch.Tensor:
        path = str(videos / "a.mp4")
        clip = decode_clip(path, num_frames=4, transform=TRANSFORM, start_seconds=start, end_seconds=end)
        return clip.frames_TCHW

    (whole,), _ = read(videos / "a.mp4")
    monkeypatch.setattr(bench_clips, "DEFAULT_WINDOW_SECONDS", 0.5)
    (half,), _ = read(videos / "a.mp4")
    (span,), _ = read(videos / "clips.jsonl")
    assert torch.equal(whole.frames_TCHW, frames(0, 10))
    assert torch.equal(half.frames_TCHW, frames(0, 0.5))
    assert torch.equal(span.frames_TCHW, frames(0.25, 1.0))
    assert span.captions == ("x",)
    assert not torch.equal(half.frames_TCHW, whole.frames_TCHW)


def test_shards_and_folders_of_them(tmp_path: Path, tiny_shards: Callable[..., list[Path]]) -> None:
    shards = tiny_shards(tmp_path / "shards", ["one", "", "three"], samples_per_shard=2)
    clips, problems = read(tmp_path / "shards")
    assert [(clip.name, clip.captions) for clip in clips] == [
        ("clip-00", ("one",)), ("clip-01", ()), ("clip-02", ("three",)),
    ]  # fmt: skip
    assert not problems
    assert [clip.name for clip in read(shards[1])[0]] == ["clip-02"]
    shards[0].write_bytes(shards[0].read_bytes()[:3000])
    clips, problems = read(tmp_path / "shards")
    assert [clip.name for clip in clips] == ["clip-02"]
    assert "truncated" in problems[0]


def test_nothing_that_decodes_is_one_line(videos: Path) -> None:
    with pytest.raises(SourceError, match=r"bad\.mp4: no clip can be decoded \(.*not a readable video"):
        read(videos / "bad.mp4")
    with pytest.raises(SourceError, match="no such folder or file"):
        read(videos / "missing.mp4")
