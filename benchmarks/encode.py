"""How encoding time follows the share of tokens kept: ours beside a dense ViT from open_clip's own blocks, in one run.

    python benchmarks/encode.py [--backbone ViT-B-32] [--num-frames 8] [--repeats 3]

Clips have a still background and a square of noise that covers a planted share of the patches, anew in each frame.
Random weights: this measures cost, never quality. Times are medians of alternated repetitions; "dense" feeds every
token of the clip and one CLS through the tower's blocks, with PyTorch's attention fast path on or off: the faster
one counts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rlt_retrieval import VideoTextModel, pack

SHARES = (1.0, 0.5, 0.25, 0.05)
NUM_CLIPS = 2


def planted_clip(share: float, num_frames: int, side: int, patch: int, rng: np.random.Generator) -> Tensor:
    """uint8 [T, 3, side, side]: about `share` of the patches of every frame are noise, the rest stands still."""
    frames = np.repeat(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8), num_frames, axis=0)
    places = side // patch
    rows = round(places * share)
    frames[:, :, : rows * patch] = rng.integers(0, 256, (num_frames, 3, rows * patch, side), dtype=np.uint8)
    return torch.from_numpy(frames)


def dense(visual: nn.Module, frames_TCHW: Tensor) -> Tensor:
    """Joint space-time attention over every token, by open_clip's own modules."""
    pixels = frames_TCHW.float() / 255
    tokens_TLD = visual._embeds(pixels)  # type: ignore[operator]
    joint_1LD = torch.cat([tokens_TLD[:1, :1], tokens_TLD[:, 1:].flatten(0, 1)[None]], dim=1)
    return visual._pool(visual.transformer(joint_1LD))[0]  # type: ignore[operator]


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, repetitions alternated, one warm-up before."""
    for run in runs.values():
        run()
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(row[name] for row in times) for name in runs}


def with_fast_path(enabled: bool, run: Callable[[], object]) -> Callable[[], object]:
    def switched() -> object:
        torch.backends.mha.set_fastpath_enabled(enabled)
        return run()

    return switched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-32")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    settings = {"device": "cpu", "num_frames": options.num_frames, "layout": "joint"}
    model = VideoTextModel.create(options.backbone, None, **settings)
    visual: nn.Module = model.clip.visual  # type: ignore[assignment]
    rng = np.random.default_rng(0)
    print(
        f"{options.backbone}, {options.num_frames} frames, {NUM_CLIPS} clips, torch {torch.__version__}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'kept':>6} {'dense s':>9} {'ours s':>9} {'ours/dense':>11}")
    for share in SHARES:
        size, patch = model.transform.height, model.tokenizer.patch_size
        clips = [planted_clip(share, options.num_frames, size, patch, rng) for _ in range(NUM_CLIPS)]
        packed = pack([model.tokenizer(clip) for clip in clips])
        runs: dict[str, Callable[[], object]] = {
            "dense": with_fast_path(False, lambda clips=clips: [dense(visual, clip) for clip in clips]),  # type: ignore[misc]
            "dense, fast path": with_fast_path(
                True, lambda clips=clips: [dense(visual, clip) for clip in clips]
            ),  # type: ignore[misc]
            "ours": lambda packed=packed: model.encode_tokens(packed),  # type: ignore[misc]
        }
        with torch.inference_mode():
            times = measure(runs, options.repeats)
        best = min(times["dense"], times["dense, fast path"])
        all_tokens = sum(t * h * w for t, h, w in packed.grids)
        print(
            f"{packed.num_tokens / all_tokens:6.2f} {best:9.3f} {times['ours']:9.3f} {times['ours'] / best:11.2f}"
        )


if __name__ == "__main__":
    main()
