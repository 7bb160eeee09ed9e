"""Our sampled decode against a bare PyAV loop that decodes the same packets and looks at none of them.

    python benchmarks/decode.py [--videos my_videos/] [--num-frames 16]

`decode_clip` takes 16 frames at 224 px (ViT-B/16's preprocessing) and decodes with one thread, as loader workers do.
The bare loop is timed with one thread, with PyAV's default (slice threads) and with frame threads. Judged are wall time
with one thread each; CPU time beside the loop that takes least of it; all files on all cores, ours by the product's own
pool with a worker a core (started before), the loop file by file with the threads that are fastest for each; and one
file alone on an idle machine beside the loop's fastest threads. Short files are made on the spot, one a codec and size;
--videos adds the first 10 s of every video of a folder. From a 10-minute file few frames are wanted, so we seek: the
loop decodes it whole.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import av
import numpy as np
from measuring import SECONDS, Run, alternated, publish, script_parser, verdict, videos

from rlt_retrieval.config import num_cores
from rlt_retrieval.data.loading import decode_frames
from rlt_retrieval.data.reader import Reader
from rlt_retrieval.data.video import FrameTransform, decode_clip
from rlt_retrieval.data.workers import Failure, WorkerPool

BAR = 1.1  # of the bare loop, on sums
LONG_BAR = 0.2  # of the bare loop's time and frames
FPS = 25
CODECS = {  # encoder: its quick settings
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "mpeg4": {"b": "2M"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "2M"},
    "libsvtav1": {"preset": "12"},
}
SHORT_SIZES, SHORT_FRAMES = ((360, 640), (720, 1280)), 150
LONG_SIZE, LONG_FRAMES, LONG_KEY_FRAMES = (120, 160), 600 * FPS, 5 * FPS
TRANSFORM = FrameTransform(224, 224)
TIMEOUT_SECONDS = 60.0
THREADS = {"one thread": ("NONE", 1), "slice threads": ("SLICE", 0), "frame threads": ("AUTO", 0)}


@dataclass(frozen=True)
class Case:
    """A file, its codec and size, median wall and CPU seconds of every loop and of "ours", frames they decode."""

    name: str
    picture: str
    times: dict[str, float]
    cpu_times: dict[str, float]
    bare_frames: int
    our_frames: int


# --- files ------------------------------------------------------------------------------------------------------


def write_video(
    path: Path, encoder: str, size: tuple[int, int], num_frames: int, key_frames: int = 250
) -> None:
    """A noisy texture that drifts, FPS frames a second, a key frame every `key_frames`."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 220, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
    texture = coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    texture = (texture + rng.integers(-12, 13, texture.shape)).astype(np.uint8)
    options = {"g": str(key_frames), **CODECS[encoder]}
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=FPS, options=options)
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        for i in range(num_frames):
            picture_HWC = np.roll(texture, (i, 2 * i), axis=(0, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, "rgb24")))
        out.mux(stream.encode(None))


def made_files(folder: Path) -> Iterator[Path]:
    """One short file for every size and every encoder of CODECS that this PyAV brings."""
    for encoder in (name for name in CODECS if name in av.codecs_available):
        for size in SHORT_SIZES:
            path = folder / f"{encoder} {size[0]}p.{'webm' if 'vp9' in encoder else 'mp4'}"
            write_video(path, encoder, size, SHORT_FRAMES)
            yield path


# --- what is compared -------------------------------------------------------------------------------------------


def bare_loop(path: Path, threads: str, end_seconds: float | None = None) -> int:
    """Frames decoded until one is past `end_seconds`, counted from the first."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_type, stream.codec_context.thread_count = THREADS[threads]
        number, first = 0, None
        for frame in container.decode(stream):
            number += 1
            first = frame.time if first is None else first
            if end_seconds is not None and frame.time is not None and frame.time - (first or 0) > end_seconds:
                break
    return number


def our_decode(path: Path, num_frames: int, end_seconds: float | None = None) -> None:
    decode_clip(path, num_frames=num_frames, transform=TRANSFORM, end_seconds=end_seconds)


def frames_we_decode(path: Path, num_frames: int, end_seconds: float | None = None) -> int:
    """Frames that come out of the decoder during our sampling, every pass over the file counted."""
    number = 0
    decode = Reader._decode

    def counting(reader: Reader) -> Iterator[av.VideoFrame]:
        nonlocal number
        for frame in decode(reader):
            number += isinstance(frame, av.VideoFrame)
            yield frame

    with mock.patch.object(Reader, "_decode", counting):
        our_decode(path, num_frames, end_seconds)
    return number


def measure(path: Path, num_frames: int, repeats: int, end_seconds: float | None = None) -> Case:
    runs: dict[str, Run] = {name: partial(bare_loop, path, name, end_seconds) for name in THREADS}
    runs["ours"] = partial(our_decode, path, num_frames, end_seconds)
    times, cpu_times = (alternated(runs, repeats, clock) for clock in (time.perf_counter, time.process_time))
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        picture = f"{stream.codec_context.name} {stream.width} x {stream.height}"
    bare_frames = bare_loop(path, "one thread", end_seconds)
    our_frames = frames_we_decode(path, num_frames, end_seconds)
    return Case(path.name, picture, times, cpu_times, bare_frames, our_frames)


def measure_folder(
    paths: Sequence[Path],
    cases: Sequence[Case],
    num_frames: int,
    repeats: int,
    end_seconds: float | None = None,
) -> dict[str, float]:
    """Wall seconds of all files on all cores: "ours", and "bare", file by file; cases: the same files, one by one."""
    loops = [(path, fastest(case)) for path, case in zip(paths, cases, strict=True)]
    tasks = [(str(path), num_frames, TRANSFORM, 0.0, end_seconds) for path in paths]

    def ours() -> None:
        for event in pool.run(decode_frames, tasks):
            assert not isinstance(event, Failure), event

    def bare() -> None:
        for path, threads in loops:
            bare_loop(path, threads, end_seconds)

    with WorkerPool(num_cores(), TIMEOUT_SECONDS) as pool:
        ours()
        return alternated({"ours": ours, "bare": bare}, repeats)


def fastest(case: Case) -> str:
    """The bare loop's threads that take the least wall time."""
    return min(THREADS, key=lambda name: case.times[name])


# --- the result -------------------------------------------------------------------------------------------------


def total(cases: Iterable[Case], name: str) -> Case:
    cases = list(cases)
    times, cpu_times = (
        {run: sum(seconds[run] for seconds in part) for run in part[0]}
        for part in zip(*((case.times, case.cpu_times) for case in cases), strict=True)
    )
    counts = (sum(case.bare_frames for case in cases), sum(case.our_frames for case in cases))
    return Case(f"**{name}**", "", times, cpu_times, *counts)


def table(cases: Sequence[Case]) -> str:
    """Milliseconds, frames decoded, and our time as a share of the loop with one thread."""
    heads = ["file", "picture", *(f"bare, {name} ms" for name in THREADS), "ours ms", "ours / one thread"]
    lines = [[*heads, "frames, bare", "frames, ours"], ["---"] * (len(heads) + 2)]
    for case in cases:
        ratio = case.times["ours"] / case.times["one thread"]
        times = (f"{1000 * case.times[run]:.1f}" for run in (*THREADS, "ours"))
        lines.append(
            [case.name, case.picture, *times, f"{ratio:.2f}", str(case.bare_frames), str(case.our_frames)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(short: Sequence[tuple[Case, dict[str, float]]], long: Case) -> Iterator[str]:
    """The promises: for sums over short files, with the seconds of them all on all cores, and for the long file."""
    for case, folder in short:
        name = case.name.strip("*")
        share = case.times["ours"] / case.times["one thread"]
        yield verdict(f"{name}: ours / bare loop, one thread each", share, BAR)
        least = min(THREADS, key=lambda name: case.cpu_times[name])
        share = case.cpu_times["ours"] / case.cpu_times[least]
        yield verdict(f"{name}: CPU time, ours / bare loop, {least} (its least)", share, BAR)
        share = folder["ours"] / folder["bare"]
        yield verdict(f"{name}: all cores, ours (a worker each) / bare loop, its fastest threads", share, BAR)
        share = case.times["ours"] / case.times[fastest(case)]
        yield verdict(f"{name}: one file alone, ours (one thread) / bare loop, {fastest(case)}", share, BAR)
    share = long.times["ours"] / long.times[fastest(long)]
    yield verdict(f"{long.name}: time, ours / bare loop, {fastest(long)}", share, LONG_BAR)
    yield verdict(
        f"{long.name}: frames decoded, ours / bare loop", long.our_frames / long.bare_frames, LONG_BAR
    )


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=Path, help="a folder of videos to measure too")
    parser.add_argument("--num-frames", type=int, default=16, help="wanted of a file (default: %(default)s)")
    options = parser.parse_args()
    asked = (options.num_frames, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        paths = list(made_files(Path(folder)))
        made = [measure(path, *asked) for path in paths]
        sums = [(total(made, "made files"), measure_folder(paths, made, *asked))]
        path = Path(folder) / "10 minutes.mp4"
        write_video(path, "libx264", LONG_SIZE, LONG_FRAMES, LONG_KEY_FRAMES)
        long = measure(path, *asked)
    found = []
    if options.videos:
        paths = videos(options.videos, everything=True)
        found = [measure(path, *asked, SECONDS) for path in paths]
        sums.append((total(found, "real files"), measure_folder(paths, found, *asked, SECONDS)))
    text = table([*made, *found, *(case for case, _ in sums), long])
    lines = "\n".join(f"- {line}" for line in verdicts(sums, long))
    publish("decode", f"Sampled decode of {options.num_frames} frames", f"{text}\n\n{lines}", options.save)


if __name__ == "__main__":
    main()
