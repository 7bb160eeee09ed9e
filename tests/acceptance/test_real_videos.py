"""The command over real clips and files that other projects keep because they break decoders."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlt_retrieval.indexing.store import ClipStore
from rlt_retrieval.video_index import DEFAULT_WINDOW_SECONDS

pytestmark = pytest.mark.acceptance

SLACK_SECONDS = 0.1  # containers round, and many give the end of the last packet of any stream
# Those bad files that have a frame, and the seconds to the end of the last one that a plain PyAV loop decodes
# (bad packets passed over); all others must be reported as failed.
DECODABLE = {
    "decord__corrupted.mp4": ("partial", 5.0),  # 49 of 50 frames, the last among them
    "file-type__fixture2.mkv": ("partial", 37 / 23.976),
    "mediabunny__annex-b.mp4": ("partial", 0.5),
    "exoplayer__video_desks.3gp": ("ok", 5.02),
    "media__sample_missing_stsd.mp4": ("ok", 1.001),  # it is the sound that lacks its codec
    "media__sample_with_fake_auxiliary_tracks.mp4": ("ok", 0.2),
}
NO_LENGTH = {"file-type__fixture.mpg": 4 / 3}  # a raw stream: end of its 19 frames by FFmpeg's clock


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlt_retrieval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def expectations(shared_data: Path) -> dict[str, tuple[str, float | None]]:
    """Status and decodable seconds of every file, by its path."""
    expected: dict[str, tuple[str, float | None]] = {}
    for folder in ("videos", "bad_videos"):
        with (shared_data / folder / "manifest.csv").open() as file:
            for row in csv.DictReader(file):
                name, path = row["video"], str(shared_data / folder / row["video"])
                if folder == "videos":
                    expected[path] = ("ok", NO_LENGTH.get(name) or float(row["duration_s"]))
                else:
                    expected[path] = DECODABLE.get(name, ("failed", None))
    return expected


def test_every_file_with_a_frame_is_indexed_and_every_other_reported(
    shared_data: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    index_path = tmp_path / "my.index"
    build = ["index", "build", index_path, shared_data / "videos", shared_data / "bad_videos"]
    build += ["--model", tiny_model_path, "--device", "cpu", "--json"]

    first = run(*build)
    assert first.returncode == 3, first.stderr
    assert "Traceback" not in first.stderr
    report = json.loads(first.stdout)
    expected = expectations(shared_data)
    problems = {problem["video"]: problem for problem in report["problems"]}
    assert problems.keys() == {video for video, (status, _) in expected.items() if status != "ok"}
    assert all(problem["reason"] for problem in problems.values())
    assert report["added"] == sum(status != "failed" for status, _ in expected.values())

    spans = {}
    with ClipStore.open(index_path) as store:
        assert {row.video for row in store.videos()} == expected.keys()
        for row in store.videos():
            status, seconds = expected[row.video]
            assert row.status == status, row
            assert row.status == problems.get(row.video, {"status": "ok"})["status"]
            spans[row.video] = [(clip.start_seconds, clip.end_seconds) for clip in store.clips(row.video)]
            check_spans(spans[row.video], seconds, row.video)
    assert report["clips"] == sum(map(len, spans.values()))

    search = run("search", index_path, "a dog in the snow", "-k", "1000", "--device", "cpu", "--json")
    assert search.returncode == 0, search.stderr
    hits = [json.loads(line) for line in search.stdout.splitlines()]
    assert [hit["rank"] for hit in hits] == list(range(1, report["clips"] + 1))
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    found: dict[str, list[tuple[float, float]]] = {video: [] for video in expected}
    for hit in hits:
        found[hit["video"]].append((hit["start_seconds"], hit["end_seconds"]))
    assert {video: sorted(of_video) for video, of_video in found.items()} == spans

    again = run(*build)
    assert again.returncode == 3, again.stderr
    repeated = json.loads(again.stdout)
    assert (repeated["added"], repeated["unchanged"], repeated["clips"]) == (0, len(expected), 0)
    assert sorted(repeated["problems"], key=str) == sorted(report["problems"], key=str)


def check_spans(spans: list[tuple[float, float]], seconds: float | None, video: str) -> None:
    """Whole windows one after the other from 0, the last one up to half longer or shorter, to the last frame."""
    if seconds is None:
        assert spans == []
        return
    assert spans[0][0] == 0
    assert spans[-1][1] == pytest.approx(seconds, abs=SLACK_SECONDS), video
    for (start, end), (following, _) in itertools.pairwise(spans):
        assert (end - start, end) == (DEFAULT_WINDOW_SECONDS, following)
    longest = 1.5 * DEFAULT_WINDOW_SECONDS
    shortest = 0.5 * DEFAULT_WINDOW_SECONDS if len(spans) > 1 else 0
    assert shortest <= spans[-1][1] - spans[-1][0] < longest
