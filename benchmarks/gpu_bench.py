"""What the parts of benchmarks/gpu.py share: rows, sizes, models, clips and the device's clock.

Shapes: B clips, T frames, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from measuring import planted_clip
from torch import Tensor

from rlt_retrieval import PackedTokens, VideoTextModel, pack
from rlt_retrieval.config import VideoSettings

KEEPS = (1.0, 0.7, 0.5, 0.2)
LAYOUTS = ("joint", "frame")
GROUP_SECONDS = 0.1  # a timing is of as many calls as fill this

Run = Callable[[], Any]


@dataclass(frozen=True)
class Aim:
    name: str
    value: float
    bar: float
    at_least: bool = True


@dataclass(frozen=True)
class Row:
    """What one case gave; figures by name with their unit; a case that could not run has a note alone."""

    part: int
    case: str
    figures: Mapping[str, float] = field(default_factory=dict)
    aims: tuple[Aim, ...] = ()
    note: str = ""


Case = tuple[str, Callable[[], Row]]  # its name, and how to measure it


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    backbones: Mapping[str, Any]
    clips: Mapping[str, int]  # of a backbone: as many as keep the card busy when few tokens are kept
    train_clips: Mapping[str, int]
    num_frames: int = 16
    matmul_side: int = 8192
    copy_bytes: int = 1 << 30
    tokenizer_clips: int = 256
    heads: int = 12
    attended_frames: int = 128
    attended_clip: int = 1568  # half the tokens of a clip
    vectors: int = 10_000_000
    cpu_vectors: int = 1_000_000
    dimension: int = 512
    lists: int = 4096
    batches: tuple[int, ...] = (1, 64, 1024)


FULL = Sizes(
    {"ViT-B-16": "ViT-B-16", "ViT-L-14": "ViT-L-14"},
    clips={"ViT-B-16": 64, "ViT-L-14": 16},
    train_clips={"ViT-B-16": 32, "ViT-L-14": 8},
)
TINY = Sizes(
    {
        "tiny": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        }
    },
    clips={"tiny": 2},
    train_clips={"tiny": 2},
    num_frames=4,
    matmul_side=64,
    copy_bytes=1 << 12,
    tokenizer_clips=2,
    heads=2,
    attended_frames=4,
    attended_clip=48,
    vectors=2000,
    cpu_vectors=1000,
    dimension=16,
    lists=8,
    batches=(1, 4),
)


class Bench:
    """A device, sizes, models, and what one part measured that another compares with."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.flops_ceiling: float | None = None
        self.copy_ceiling: float | None = None  # bytes read and written a second
        self.encode_seconds: float | None = None  # a clip: first backbone, layout frame, keep 0.5
        self.fastest_dense: dict[tuple[str, str], tuple[str, str]] = {}  # by flash attention, by any kernel

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def compiler(self) -> str:
        """Backend of torch.compile; on a CPU only what is captured is of interest."""
        return "inductor" if self.is_cuda else "eager"

    @property
    def first_backbone(self) -> str:
        return next(iter(self.sizes.backbones))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one Bench a process)
    def model(self, name: str, layout: str) -> VideoTextModel:
        """Random weights: this measures cost, never quality. No refresh, so that planted clips keep what is planted."""
        with torch.inference_mode(False):
            if layout == "frame":
                settings = {"layout": "frame", "num_frames": self.sizes.num_frames, "refresh_every": 0}
                return VideoTextModel.create(
                    self.sizes.backbones[name], None, device=str(self.device), **settings
                )
            frame = self.model(name, "frame")
            values = {**frame.config.video.model_dump(), "layout": layout}
            joint = VideoTextModel(frame.clip, replace(frame.config, video=VideoSettings(**values)))
            return joint.to(self.device).eval()

    def clips(self, model: VideoTextModel, keep: float, count: int) -> Tensor:
        """uint8 [B, T, 3, H, W] on the host: one clip, `count` times, that keeps about this share of its tokens."""
        frames = self.sizes.num_frames
        share = max(0.0, (keep - 1 / frames) / (1 - 1 / frames))  # the first frame is kept whole
        rng = np.random.default_rng(0)
        frames_TCHW = planted_clip(share, frames, model.transform.height, model.video.tower.patch_size, rng)
        return frames_TCHW.repeat(count, 1, 1, 1, 1)

    def pixels(self, model: VideoTextModel, frames_BTCHW: Tensor) -> Tensor:
        """Normalised, on the device: [B, T, 3, H, W]."""
        pixels = frames_BTCHW.to(self.device).float()
        return (pixels - model.video.pixel_mean) / model.video.pixel_std

    def packed(self, model: VideoTextModel, frames_BTCHW: Tensor) -> PackedTokens:
        """`clips` as loader workers make them, on the host."""
        return pack([model.tokenizer(frames_BTCHW[0])] * len(frames_BTCHW))

    def resident(self, packed: PackedTokens) -> PackedTokens:
        """Patches on the device, as the dense pixels are; the small rest on the host, where plans are made."""
        return replace(packed, patches=packed.patches.to(self.device))

    def seconds(self, runs: Mapping[str, Run], repeats: int = 5) -> dict[str, float]:
        """Median seconds a call of each, warmed up, in turns; calls follow each other as fast as they can."""
        calls = {name: self._warm_up(run) for name, run in runs.items()}
        times = [{name: self._group(run, calls[name]) for name, run in runs.items()} for _ in range(repeats)]
        return {name: statistics.median(row[name] for row in times) for name in runs}

    def _warm_up(self, run: Run) -> int:
        """How many calls make a group."""
        run()
        return max(1, min(100, int(GROUP_SECONDS / self._group(run, 1)))) if self.is_cuda else 1

    def _group(self, run: Run, calls: int) -> float:
        if not self.is_cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(calls):
            run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3 / calls

    def ceiling_share(self, flops: float, seconds: float) -> dict[str, float]:
        share = (
            {} if self.flops_ceiling is None else {"share of ceiling": flops / seconds / self.flops_ceiling}
        )
        return {"TFLOP/s": flops / seconds / 1e12, **share}
