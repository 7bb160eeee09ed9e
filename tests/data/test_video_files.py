"""Real clips and broken files: what decodes is taken, the rest is said, nothing crashes."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from made_videos import SMALL, same, windows

from rlt_retrieval.data.timeline import count_windows
from rlt_retrieval.data.video import FrameTransform, decode_clip
from rlt_retrieval.errors import VideoDecodeError

BROKEN = {  # file: seconds that decode, whether it counts as partial; None: no frame
    "decord__corrupted.mp4": (5.0, "1 packet lost"),
    "exoplayer__invalid-bitstream.webm": None,
    "exoplayer__video_desks.3gp": (5.02, None),
    "file-type__fixture-corrupt.mkv": None,
    "file-type__fixture-dash.mp4": None,
    "file-type__fixture-isom.mp4": None,
    "file-type__fixture-moov.mov": None,
    "file-type__fixture.ogv": None,
    "file-type__fixture2.mkv": (1.584, "1.58 of 1132.05 s decoded"),
    "media__sample_audio_only.mp4": None,
    "media__sample_missing_stsd.mp4": (1.001, None),
    "media__sample_with_fake_auxiliary_tracks.mp4": (0.2, None),
    "media__video_init.mp4": None,
    "mediabunny__annex-b.mp4": (0.5, "0.50 of 35.23 s decoded"),
    "moviepy__result.webm": None,
    "mp4parse-rust__invalid_userdata.mp4": None,
    "mp4parse-rust__test_case_1185230.mp4": None,
    "mp4parse-rust__zero_empty_stsc.mp4": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(shared_data: Path, name: str) -> None:
    path = shared_data / "bad_videos" / name
    expected = BROKEN[name]
    if expected is None:
        for source in (path, path.read_bytes()):
            with pytest.raises(VideoDecodeError) as raised:
                windows(source)
            assert "\n" not in str(raised.value)
        return
    seconds, problem = expected
    _, summary = windows(path)
    assert summary.duration_seconds == pytest.approx(seconds, abs=0.01)
    assert problem is None if summary.problem is None else (problem or "?") in summary.problem


def test_every_broken_file_has_an_expectation(shared_data: Path) -> None:
    with open(shared_data / "bad_videos" / "manifest.csv") as file:
        assert {row["video"] for row in csv.DictReader(file)} == set(BROKEN)


def manifest(shared_data: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    with open(shared_data / "videos" / "manifest.csv") as file:
        for row in csv.DictReader(file):
            yield shared_data / "videos" / row["video"], row


@pytest.mark.parametrize("largest", [250_000, pytest.param(10_000_000, marks=pytest.mark.acceptance)])
def test_no_honest_file_is_called_partial(shared_data: Path, opened: Callable[[], int], largest: int) -> None:
    unlike = {"torchcodec__nasa_13013.mp4", "file-type__fixture.mpg"}  # another stream; a guessed duration
    number = 0
    for path, row in manifest(shared_data):
        if path.stat().st_size > largest:
            continue
        clips, summary = windows(path, window_seconds=10.0)
        number += 1
        assert summary.problem is None, (path.name, summary)
        assert len(clips) == count_windows(summary.duration_seconds, 10.0)
        if path.name not in unlike:
            assert summary.duration_seconds == pytest.approx(float(row["duration_s"]), abs=0.06), path.name
    assert number >= 20
    # One pass each, but for three whose claimed end is missing or wrong: those decode their last window again.
    assert opened() - number <= 3


@pytest.mark.parametrize(
    "name",
    [
        "mediabunny__cursed-vfr.mp4",
        "mmaction2__test.avi",
        "media__sample_h265.ts",
        "torchcodec__h265_video.mp4",
        "torchcodec__test_non_zero_start.mp4",
        "datasets__test_video_66x50.mov",
        "moviepy__no_duration.webm",
        "sample-videos__again.mkv",
        "exoplayer__video_1.mp4",
    ],
)
def test_real_files_resume_and_cut_as_they_play(shared_data: Path, name: str) -> None:
    path = shared_data / "videos" / name
    _, summary = windows(path)
    options = {"window_seconds": summary.duration_seconds / 3.4}
    clips, _ = windows(path, **options)
    assert len(clips) == 3
    for k in range(1, 3):
        assert all(map(same, windows(path, first_window=k, **options)[0], clips[k:]))
    for clip in clips:
        span = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
        assert same(clip, decode_clip(path, num_frames=4, transform=SMALL, **span))


def test_packed_b_frames_in_avi_play_in_order(shared_data: Path) -> None:
    """FFmpeg guesses 1, 2, 4, 3, 5 for this file's presentation times."""
    clip = decode_clip(shared_data / "videos" / "mmaction2__test.avi", num_frames=164, transform=SMALL)
    np.testing.assert_allclose(clip.pts_seconds, np.arange(164) / 25)


def test_numbered_frames_are_found_by_seeking(shared_data: Path) -> None:
    """A scene cut at a known frame: 10 fps, blue until 1 s, red until 2 s, then green."""
    path = shared_data / "videos" / "pyscenedetect__counter.mp4"
    for start, channel in ((0.0, 2), (1.0, 0), (2.0, 1)):
        clip = decode_clip(path, num_frames=10, transform=SMALL, start_seconds=start, end_seconds=start + 1)
        assert (clip.frames_TCHW.float().mean((2, 3)).argmax(1) == channel).all()


def test_rotated_twins_stand_upright(shared_data: Path) -> None:
    """The paper with the number is higher than wide once its 90 degrees are applied."""
    path = shared_data / "videos" / "exoplayer__video_1.mp4"
    clip = decode_clip(path, num_frames=1, transform=FrameTransform(88, 88, resize_mode="longest"))
    columns = (clip.frames_TCHW[0] > 0).any(0).any(0)
    assert int(columns.sum()) == 72  # 288 of 352 pixels wide
