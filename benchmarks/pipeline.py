"""`index build` end to end against decoding alone and encoding alone, and what a long file costs in memory.

    python benchmarks/pipeline.py [--videos my_videos/] [--minutes 20] [--model ViT-B-16] [--workers N] [--threads N]

Every measurement is a fresh process. "index" is VideoIndex.create + add of files in a folder, with the start of the
worker processes and all that is written; "decode" and "encode" are windows of the same film by the workers' own job in
one thread, then their tokens by the same loop with the same threads, in CPU seconds of all threads. Every copy of a
film costs the same, so these are measured on two STAGES_SHARE-ths of them, before the index and after it (a machine's
speed drifts), and multiplied. Bar on a CPU: wall seconds of
the index ≤ 1.10 x (CPU seconds of decode + encode) / cores; on CUDA: ≤ 1.15 x the slower stage (decode / workers,
encode).

Three kinds of film, each indexed until there are --minutes of it (workers take seconds to start, whatever there is to
index, which is counted): --videos takes FILMS out of a folder; without it they are made on the spot. Beside them:
open_clip's image tower frame by frame on the same windows, by its faster attention path, all threads, without decoding.
Random weights: this measures cost, never quality.

On a CPU, the film named in CROWDED is also indexed with other numbers of workers and threads than the defaults.

Memory: highest resident memory of the process and of its workers, added up, when a file of 2 and one of 20 minutes is
indexed with the two-layer SMALL model; bar: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import frame_by_frame, with_fast_path
from measuring import publish, script_parser, seconds, verdict

from rlt_retrieval import VideoIndex, VideoTextModel
from rlt_retrieval.config import default_num_workers, num_cores
from rlt_retrieval.data.loading import tokenize_windows
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.data.video import encode_mp4, iter_windows
from rlt_retrieval.embed import LoaderOptions, embed_clips, model_sampling
from rlt_retrieval.eval.report import aligned_table
from rlt_retrieval.video_index import DEFAULT_WINDOW_SECONDS

FILMS = {
    "static camera": "sample-videos__one-by-one-person-detection.mp4",
    "screen recording": "video2dataset__test_video.mp4",
    "handheld": "ask-anything__making_cake.mp4",
}
CROWDED = "screen recording"  # decoding takes a larger share of it than of the others
CPU_BAR, CUDA_BAR, MEMORY_BAR = 1.10, 1.15, 1.10
STAGES_SHARE = 10
BASELINE_WINDOWS = 3  # of each kind that open_clip encodes; the cost is the same for all
MADE_SECONDS, MADE_FPS, MADE_SIZE = 20, 15, (180, 320)
LONG_FPS, LONG_SIZE = 5, (96, 128)
POLL_SECONDS = 0.5  # the kernel keeps the highest; polling takes time from what is measured
WORKER = "rlt_retrieval.data.workers"  # in the command line of a worker process
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

Job = dict[str, Any]


# --- films ------------------------------------------------------------------------------------------------------


def films(folder: Path | None, minutes: float, out: Path) -> dict[str, list[Path]]:
    """By kind, the files to index: copies of one film, as many as make up the minutes."""
    found = {path.name: path for path in list_videos(folder)} if folder else {}
    chosen: dict[str, list[Path]] = {}
    for number, (kind, name) in enumerate(FILMS.items()):
        source = found[name] if folder else _write(out / name, made_film(kind))
        place = out / str(number)
        place.mkdir()
        copies = math.ceil(60 * minutes / film_seconds(source))
        chosen[kind] = [Path(shutil.copyfile(source, place / f"{copy}.mp4")) for copy in range(copies)]
    return chosen


def film_seconds(path: Path) -> float:
    """Up to the end of the last frame."""
    import av

    with av.open(str(path)) as film:
        return float(film.duration / av.time_base)


def made_film(kind: str) -> bytes:
    """A walker before a still wall, a page that changes every 4 s, or a wall under a camera that shakes."""
    rng = np.random.default_rng(0)
    height, width = MADE_SIZE
    margin = 16
    wall = rng.integers(60, 200, (height // 4 + 2 * margin, width // 4 + 2 * margin, 3), dtype=np.uint8)
    wall = wall.repeat(4, 0).repeat(4, 1)
    frames = np.empty((MADE_SECONDS * MADE_FPS, height, width, 3), np.uint8)
    for t, frame in enumerate(frames):
        page = t // (4 * MADE_FPS)
        shake = rng.integers(-3, 4, 2) + (t % 60) if kind == "handheld" else (0, 0)
        frame[:] = wall[shake[0] + 3 :, shake[1] + 3 :][:height, :width]
        if kind == "screen recording":
            frame[:] = 240
            frame[20 : 40 + 20 * page, 20:300:2] = 30
        if kind == "static camera":
            frame[60:140, t % (width - 40) : t % (width - 40) + 40] = 20
    return encode_mp4(frames, fps=MADE_FPS)


def long_film(minutes: float) -> bytes:
    """Small pictures, a few of which come round again and again."""
    pictures = np.random.default_rng(0).integers(0, 256, (50, *LONG_SIZE, 3), dtype=np.uint8)
    return encode_mp4(pictures[np.arange(round(60 * minutes * LONG_FPS)) % len(pictures)], fps=LONG_FPS)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- in a fresh process -----------------------------------------------------------------------------------------


def index_job(model: VideoTextModel, job: Job) -> dict[str, float]:
    """Wall seconds of create + add, CPU seconds of all its processes, and what the index holds."""
    options = LoaderOptions(num_workers=job["workers"], num_threads=job["threads"])
    started, used = time.perf_counter(), _cpu_seconds() + _cpu_seconds(resource.RUSAGE_CHILDREN)
    with VideoIndex.create(job["index"], model) as index:
        report = index.add(job["files"], options=options)
        wall = time.perf_counter() - started
        used = _cpu_seconds() + _cpu_seconds(resource.RUSAGE_CHILDREN) - used  # workers have ended
        assert not report.problems, report.problems
        hours = index.counts().hours
        return {"wall": wall, "cpu": used, "clips": report.clips, "video_seconds": 3600 * hours}


def stages_job(model: VideoTextModel, job: Job) -> dict[str, float]:
    """CPU seconds of decoding in one thread, then of encoding (CUDA: wall)."""
    num_threads = job["threads"] or torch.get_num_threads()
    torch.set_num_threads(1)
    sampling = model_sampling(model)
    started = _cpu_seconds()
    clips = [
        clip for file in job["files"] for clip in tokenize_windows(file, sampling, DEFAULT_WINDOW_SECONDS, 0)
    ]
    decoded, encoding = _cpu_seconds(), time.perf_counter()
    batches = embed_clips(
        model, enumerate(clip.tokens for clip in clips), LoaderOptions(num_threads=num_threads)
    )
    assert sum(map(len, batches)) == len(clips)
    on_cpu = model.device.type == "cpu"
    encode = _cpu_seconds() - decoded if on_cpu else time.perf_counter() - encoding
    kept, cells = (
        sum(counts)
        for counts in zip(
            *((len(clip.tokens), model.video.num_cells(clip.grid)) for clip in clips), strict=True
        )
    )
    return {"decode": decoded - started, "encode": encode, "clips": len(clips), "keep": kept / cells}


def open_clip_job(model: VideoTextModel, job: Job) -> dict[str, float]:
    """Seconds of a window by open_clip's image tower, frame by frame; which attention path was the faster."""
    windows = list(islice(_pixels(model, job["files"]), BASELINE_WINDOWS))

    def encode(enabled: bool) -> Callable[[], None]:
        def all_windows() -> None:
            for pixels_TCHW in windows:
                with_fast_path(enabled, lambda pixels=pixels_TCHW: frame_by_frame(model.clip, pixels).cpu())()

        return all_windows

    with torch.inference_mode():
        frame_by_frame(model.clip, windows[0])
        times = {enabled: seconds(encode(enabled)) / len(windows) for enabled in (False, True)}
    return {"window": min(times.values()), "fast_path": times[True] < times[False]}


def _pixels(model: VideoTextModel, files: Sequence[str]) -> Iterator[torch.Tensor]:
    for file in files:
        for clip in iter_windows(
            file,
            num_frames=model.config.video.num_frames,
            transform=model.transform,
            window_seconds=DEFAULT_WINDOW_SECONDS,
        ):
            frames_TCHW = clip.frames_TCHW.to(model.device).float()
            yield (frames_TCHW - model.video.pixel_mean) / model.video.pixel_std


def _cpu_seconds(whose: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


JOBS: dict[str, Callable[[VideoTextModel, Job], dict[str, float]]] = {
    "index": index_job,
    "stages": stages_job,
    "open_clip": open_clip_job,
}


def run_job(text: str) -> None:
    """Entry point of a fresh process: one JSON line in, one out."""
    job = json.loads(text)
    model = VideoTextModel.load(job["model"], device=job["device"])
    print(json.dumps(JOBS[job["name"]](model, job)))


# --- from outside -----------------------------------------------------------------------------------------------


def fresh(name: str, **job: Any) -> dict[str, float]:
    """The result of a job in a process of its own, with `whole` (its wall seconds) and `peak` (bytes)."""
    command = [sys.executable, __file__, "--job", json.dumps({"name": name, **job})]
    started, peaks = time.perf_counter(), dict[int, int]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peaks.update(peak_bytes_of(process.pid))
            time.sleep(POLL_SECONDS)
        assert process.stdout
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the job {name} failed (exit status {process.returncode})")
    result = json.loads(printed.splitlines()[-1])
    return {**result, "whole": time.perf_counter() - started, "peak": sum(peaks.values())}


def peak_bytes_of(process_id: int) -> dict[int, int]:
    """Highest resident memory so far of a process and of its loader workers, by process id (Linux).

    What else it starts for a moment is left out: until it runs a program of its own, it shows this one's memory.
    """
    peaks = {}
    with suppress(OSError):  # it may end at any moment
        tasks = Path(f"/proc/{process_id}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        workers = [child for child in children if WORKER in Path(f"/proc/{child}/cmdline").read_text()]
        for number in (process_id, *workers):
            status = Path(f"/proc/{number}/status").read_text()
            if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
                peaks[number] = 1024 * int(found[1])
    return peaks


def measure_kind(files: Sequence[Path], common: Job, out: Path, repeats: int) -> dict[str, float]:
    """Medians of all that is measured of one kind of film, in turns."""
    job = {**common, "files": [str(file) for file in files]}
    part = {**job, "files": job["files"][: math.ceil(len(files) / STAGES_SHARE)]}
    times = len(files) / len(part["files"])
    rounds = []
    for number in range(repeats):
        place = out / f"{files[0].parent.name}-{number}.index"
        before = fresh("stages", **part)
        indexed = fresh("index", index=str(place), **job)
        after = fresh("stages", **part)
        stages = {name: times * (before[name] + after[name]) / 2 for name in ("decode", "encode")}
        rounds.append({"keep": before["keep"], **stages, **indexed})
    row = {key: statistics.median(values[key] for values in rounds) for key in rounds[0]}
    return {**row, **{f"open_clip {key}": value for key, value in fresh("open_clip", **job).items()}}


def measure_crowding(
    files: Sequence[Path], common: Job, out: Path, cores: int
) -> dict[tuple[int, int], float]:
    """Wall seconds of indexing, by (workers, threads), from fewer than there are cores to twice as many."""
    ways = dict.fromkeys([(1, max(1, cores // 2)), (1, cores), (cores, cores), (cores, 2 * cores)])
    job = {**common, "files": [str(file) for file in files]}
    walls = {}
    for workers, threads in ways:
        place = out / f"crowded-{workers}-{threads}.index"
        walls[workers, threads] = fresh(
            "index", **{**job, "index": str(place), "workers": workers, "threads": threads}
        )["wall"]
    return walls


def measure_memory(minutes: Sequence[float], common: Job, out: Path) -> dict[float, float]:
    """Peak bytes of indexing one file of each length with the small model, by length."""
    model = out / "small"
    VideoTextModel.create(SMALL, None, device="cpu").save(model)
    peaks = {}
    for length in minutes:
        file = _write(out / f"{length:g}.mp4", long_film(length))
        job = {**common, "model": str(model), "files": [str(file)]}
        peaks[length] = fresh("index", index=str(out / f"{length:g}.index"), **job)["peak"]
    return peaks


# --- the page ---------------------------------------------------------------------------------------------------


def limit(row: Mapping[str, float], common: Job, cores: int) -> float:
    """The least wall seconds that the two stages allow."""
    if common["device"] == "cpu":
        return (row["decode"] + row["encode"]) / cores
    return max(row["decode"] / max(1, common["workers"]), row["encode"])


def page(
    rows: Mapping[str, Mapping[str, float]],
    crowding: Mapping[tuple[int, int], float],
    peaks: Mapping[float, float],
    common: Job,
    cores: int,
) -> str:
    header = [
        "film",
        "windows",
        "kept",
        "decode CPU s",
        "encode CPU s",
        "index CPU s",
        "index wall s",
        "wall / limit",
        "start s",
    ]
    cells = [[*header, "h/h ours", "h/h open_clip"]]
    for kind, row in rows.items():
        numbers = [row[name] for name in ("decode", "encode", "cpu", "wall")]
        window_seconds = row["video_seconds"] / row["clips"]
        speeds = [row["video_seconds"] / row["wall"], window_seconds / row["open_clip window"]]
        cells.append(
            [
                *(kind, f"{row['clips']:.0f}", f"{row['keep']:.3f}"),
                *(f"{number:.2f}" for number in numbers),
                *(f"{row['wall'] / limit(row, common, cores):.3f}", f"{row['whole'] - row['wall']:.1f}"),
                *(f"{speed:.1f}" for speed in speeds),
            ]
        )
    bar = CPU_BAR if common["device"] == "cpu" else CUDA_BAR
    share = sum(row["wall"] for row in rows.values()) / sum(
        limit(row, common, cores) for row in rows.values()
    )
    short, long = peaks.values()
    paths = {kind: "on" if row["open_clip fast_path"] else "off" for kind, row in rows.items()}
    return "\n".join(
        [
            *aligned_table(cells),
            "",
            f"{common['workers']} workers, {common['threads'] or torch.get_num_threads()} threads; h/h: hours of video "
            "indexed an hour (open_clip: encoding alone, fast path "
            + ", ".join(f"{path} for {kind}" for kind, path in paths.items())
            + "); start: imports and the model, before the index.",
            "",
            *(
                f"- {CROWDED}, {workers} workers, {threads} threads: {wall:.2f} s"
                for (workers, threads), wall in crowding.items()
            ),
            "",
            *(
                f"- Peak of a file of {minutes:g} minutes: {peak / 1e6:,.0f} MB."
                for minutes, peak in peaks.items()
            ),
            "",
            f"- {verdict('index / limit, all films', share, bar)}",
            f"- {verdict('memory of the long file / of the short', long / short, MEMORY_BAR)}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=20, help="of each kind of film (default: %(default)s)"
    )
    parser.add_argument(
        "--long", type=float, nargs=2, default=(2, 20), help="minutes of the two files for memory"
    )
    parser.add_argument("--model", help="a saved model (default: ViT-B-16 with random weights)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=default_num_workers())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.set_defaults(repeats=1)  # of minutes each
    options = parser.parse_args(arguments)
    if options.job:
        run_job(options.job)
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if not options.model:
            VideoTextModel.create("ViT-B-16", None, device="cpu").save(out / "model")
        common: Job = {
            "model": options.model or str(out / "model"),
            "device": options.device,
            "workers": options.workers,
            "threads": options.threads,
        }
        chosen = films(options.videos, options.minutes, out)
        rows = {kind: measure_kind(files, common, out, options.repeats) for kind, files in chosen.items()}
        on_cpu = options.device == "cpu"
        crowding = measure_crowding(chosen[CROWDED][::2], common, out, num_cores()) if on_cpu else {}
        peaks = measure_memory(options.long, common, out)
    text = page(rows, crowding, peaks, common, num_cores())
    publish("pipeline", "Indexing end to end", text, options.save)


if __name__ == "__main__":
    main()
