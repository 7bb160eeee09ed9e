"""benchmarks/decode.py at a tiny size: what it counts and sums, never how fast."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import decode


def test_the_bare_loop_counts_frames_whatever_its_threads(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    decode.write_video(path, "libx264", (32, 48), 60, key_frames=20)
    assert [decode.bare_loop(path, threads) for threads in decode.THREADS] == [60] * 3
    assert (
        decode.bare_loop(path, "one thread", end_seconds=1.0) == 27
    )  # 0 … 1.04 s, the first one past the end


def test_a_short_file_is_decoded_once_and_a_long_one_in_part(tmp_path: Path) -> None:
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    decode.write_video(short, "libx264", (32, 48), 60, key_frames=250)
    decode.write_video(long, "libx264", (32, 48), 2000, key_frames=50)
    assert 16 <= decode.measure(short, 16, repeats=1).our_frames <= 60
    case = decode.measure(long, 4, repeats=1)
    assert case.bare_frames == 2000
    assert case.our_frames <= 5 * 50 + 8


def test_a_folder_is_decoded_by_the_pool_and_by_the_loop_that_was_fastest_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path in paths:
        decode.write_video(path, "libx264", (32, 48), 12)
    looped = []
    monkeypatch.setattr(decode, "bare_loop", lambda *arguments: looped.append(arguments))
    times = dict.fromkeys((*decode.THREADS, "ours"), 2.0)
    cases = [
        decode.Case("a", "h264", {**times, "one thread": 1.0}, times, 12, 12),
        decode.Case("b", "h264", {**times, "frame threads": 1.0}, times, 12, 12),
    ]
    folder = decode.measure_folder(paths, cases, 4, repeats=1, end_seconds=0.2)
    assert set(folder) == {"ours", "bare"}
    assert looped == [(paths[0], "one thread", 0.2), (paths[1], "frame threads", 0.2)]


@pytest.mark.parametrize("encoder", decode.CODECS)
def test_every_codec_that_is_there_makes_files_that_decode(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder not in decode.av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    monkeypatch.setattr(decode, "CODECS", {encoder: decode.CODECS[encoder]})
    monkeypatch.setattr(decode, "SHORT_SIZES", ((72, 96),))
    monkeypatch.setattr(decode, "SHORT_FRAMES", 12)
    (path,) = decode.made_files(tmp_path)
    assert decode.measure(path, 4, repeats=1).bare_frames == 12


def test_promises_are_judged_on_sums_of_wall_and_cpu_time() -> None:
    """Hand-worked: 4 of 4 s with one thread, of 2 s with frame threads, of 5 CPU s; 1 of 10 s and 30 of 600 frames."""
    times = {"one thread": 2.0, "slice threads": 3.0, "frame threads": 1.0, "ours": 2.0}
    cpu_times = {"one thread": 2.6, "slice threads": 3.0, "frame threads": 2.5, "ours": 2.0}
    cases = [
        decode.Case("a", "h264", times, cpu_times, 5, 6),
        decode.Case("b", "vp9", times, cpu_times, 7, 8),
    ]
    both = decode.total(cases, "all")
    assert (both.bare_frames, both.our_frames, both.times["slice threads"]) == (12, 14, 6.0)
    assert both.cpu_times["one thread"] == 5.2
    long_times = {"one thread": 10.0, "slice threads": 11.0, "frame threads": 12.0, "ours": 1.0}
    folder = {"ours": 3.0, "bare": 2.5}
    lines = list(
        decode.verdicts([(both, folder)], decode.Case("long", "h264", long_times, long_times, 600, 30))
    )
    assert [line.split(": ", 1)[1] for line in lines] == [
        "ours / bare loop, one thread each: 1.000, bar ≤ 1.100: reached",
        "CPU time, ours / bare loop, frame threads (its least): 0.800, bar ≤ 1.100: reached",
        "all cores, ours (a worker each) / bare loop, its fastest threads: 1.200, bar ≤ 1.100: NOT reached",
        "one file alone, ours (one thread) / bare loop, frame threads: 2.000, bar ≤ 1.100: NOT reached",
        "time, ours / bare loop, one thread: 0.100, bar ≤ 0.200: reached",
        "frames decoded, ours / bare loop: 0.050, bar ≤ 0.200: reached",
    ]
    assert decode.table([both]).splitlines()[-1].split(" | ")[-3:] == ["1.00", "12", "14 |"]
