"""A training step on pruned clips against the same step on all their tokens.

    python benchmarks/train_step.py [--videos my_videos/] [--backbone ViT-B-16] [--num-frames 16] [--batch-size 2]

The product's own `train_step`: both towers forward, InfoNCE, backward, clipping, AdamW; fp32, random weights, one
micro-batch. Pruned and dense (reducer "none") take the same clips, captions, model and optimizer in turns. Without
--videos, clips with a planted share of noise; with it, the first 10 s of every video of a folder, or of CLIPS alone if
it holds them all, neighbours together in a batch.

The whole step is judged, on sums over the batches that keep at most JUDGED_SHARE; every batch is listed. The text tower
and the optimizer cost the same however many tokens are kept: their times alone are listed, and the rest of each step as
the video part. Peak memory is that of the process above what it held before the step (weights and AdamW's moments, no
gradients), in a step of its own before the timed ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from measuring import Run, alternated, clips, planted_clip, publish, script_parser, verdict
from torch import Tensor

from rlt_retrieval import VideoTextModel
from rlt_retrieval.bench.memory import peak_bytes
from rlt_retrieval.config import Recipe
from rlt_retrieval.data.loading import TrainBatch, TrainClip
from rlt_retrieval.eval.report import aligned_table
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.loop import build_optimizer, create_loss, create_model, train_step

PLANTED_KEEPS = (1.0, 0.55, 0.24)
CAPTION = "someone opens the door of the fridge and takes out the milk"
MEMORY_ALLOWANCE = 0.15
JUDGED_SHARE = 0.6
LAYOUTS = ("frame", "joint")
HEADERS = (
    *("clips", "layout", "keep", "dense s", "pruned s", "ratio", "dense video s", "pruned video s", "ratio"),
    *("text s", "optimizer s", "dense peak MB", "pruned peak MB", "ratio"),
)

Batch = list[Tensor]  # clips, uint8 [T, 3, H, W]


@dataclass(frozen=True)
class Case:
    """One batch in one layout: seconds and peak bytes of the pruned and of the dense step."""

    name: str
    layout: str
    keep: float
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int | None]

    @property
    def time_ratio(self) -> float:
        return self.seconds["pruned"] / self.seconds["dense"]

    @property
    def memory_ratio(self) -> float | None:
        pruned, dense = self.peak_bytes["pruned"], self.peak_bytes["dense"]
        return pruned / dense if pruned and dense else None


@dataclass
class Trainer:
    """The product's training state for one layout."""

    recipe: Recipe
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.ranks = Ranks(0, 1, self.device)
        self.model = create_model(self.recipe, self.device)
        self.loss = create_loss(self.recipe, self.model, self.ranks)
        self.optimizer = build_optimizer(self.model, self.recipe)

    def tokenized(self, frames: Batch) -> dict[str, TrainBatch]:
        """The batch pruned, as the recipe says, and dense."""
        models = {"pruned": self.model, "dense": self.model.with_settings(reducer="none")}
        return {name: _train_batch(model, frames) for name, model in models.items()}

    def step(self, batch: TrainBatch) -> None:
        train_step(self.model, self.loss, self.optimizer, batch, 1, self.recipe, self.ranks)

    def fixed_parts(self) -> dict[str, Run]:
        """What a step costs whatever is pruned: the text tower's pass, and what the optimizer does."""
        captions = [CAPTION] * self.recipe.optim.batch_size
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def optimize() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optim.max_grad_norm)
            self.optimizer.step()

        return {
            "text": lambda: self.model.encode_text(captions).sum().backward(),  # type: ignore[no-untyped-call]
            "optimizer": optimize,
        }


def _train_batch(model: VideoTextModel, frames: Batch) -> TrainBatch:
    tokens = [model.tokenizer(frames_TCHW) for frames_TCHW in frames]
    return TrainBatch([TrainClip(f"clip-{i}", CAPTION, t) for i, t in enumerate(tokens)], {})


def recipe_of(options: argparse.Namespace, layout: str) -> Recipe:
    """Weights hardly move, so that all steps do the same work."""
    return Recipe.model_validate(
        {
            "run_dir": "nowhere",
            "model": {"backbone": options.backbone, "pretrained": "none"},
            "video": {"layout": layout, "num_frames": options.num_frames},
            "data": {"train": ["none"], "num_streams": 1},
            "optim": {
                "steps": 2,
                "batch_size": options.batch_size,
                "learning_rate": 1e-6,
                "precision": "fp32",
            },
        }
    )


def batches(options: argparse.Namespace, model: VideoTextModel) -> Iterator[tuple[str, Batch]]:
    """(name, clips): one batch for each planted share of kept tokens, or a folder's videos, neighbours together."""
    patch, count = model.video.tower.patch_size, options.num_frames
    if options.videos is None:
        rng = np.random.default_rng(0)
        for keep in PLANTED_KEEPS:
            share = (keep * count - 1) / (count - 1)  # of later frames: the first one is kept whole
            side = model.transform.height
            yield (
                f"planted {keep:g}",
                [planted_clip(share, count, side, patch, rng) for _ in range(options.batch_size)],
            )
        return
    named = list(clips(options.videos, count, model.transform, patch))
    for start in range(0, len(named) - options.batch_size + 1, options.batch_size):
        part = named[start : start + options.batch_size]
        yield ", ".join(name for name, _ in part), [frames_TCHW for _, frames_TCHW in part]


def measured(trainer: Trainer, name: str, frames: Batch, repeats: int) -> Case:
    """Peak memory in a first step of each, which warms up, then times in turns."""
    steps = trainer.tokenized(frames)
    runs: dict[str, Run] = {
        kind: lambda batch=batch: trainer.step(batch)  # type: ignore[misc]
        for kind, batch in steps.items()
    }
    if not trainer.optimizer.state:
        runs["pruned"]()  # makes AdamW's moments
    peaks = {}
    for kind, run in runs.items():
        trainer.optimizer.zero_grad(set_to_none=True)
        _, peaks[kind] = peak_bytes(run, trainer.device)
    seconds = alternated(runs, repeats)
    num_tokens = {kind: sum(len(clip.tokens) for clip in batch.clips) for kind, batch in steps.items()}
    keep = num_tokens["pruned"] / num_tokens["dense"]
    return Case(name, trainer.recipe.video.layout, keep, seconds, peaks)


def fixed_seconds(trainer: Trainer, repeats: int) -> dict[str, float]:
    """Seconds of the parts of a step that do not depend on the clips; after a step, so that gradients are there."""
    for run in trainer.fixed_parts().values():
        run()
    return alternated(trainer.fixed_parts(), repeats)


def table(cases: Sequence[Case], fixed: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: every case, then a line a bar."""
    rows = [list(HEADERS)]
    for case in cases:
        parts = fixed[case.layout]
        video = {kind: seconds - sum(parts.values()) for kind, seconds in case.seconds.items()}
        rows.append(
            [case.name, case.layout, f"{case.keep:.3f}"]
            + [f"{case.seconds[kind]:.2f}" for kind in ("dense", "pruned")]
            + [f"{case.time_ratio:.3f}"]
            + [f"{video[kind]:.2f}" for kind in ("dense", "pruned")]
            + [f"{video['pruned'] / video['dense']:.3f}"]
            + [f"{parts[name]:.2f}" for name in ("text", "optimizer")]
            + [_megabytes(case.peak_bytes[kind]) for kind in ("dense", "pruned")]
            + ["" if case.memory_ratio is None else f"{case.memory_ratio:.3f}"]
        )
    return "\n".join([*aligned_table(rows), "", *(f"- {line}" for line in judged(cases))])


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{1e-6 * num_bytes:,.0f}"


def judged(cases: Sequence[Case]) -> list[str]:
    """Two lines a layout: the ratios of sums over the batches that keep at most JUDGED_SHARE, and their bars."""
    lines = []
    for layout in dict.fromkeys(case.layout for case in cases):
        counted = [case for case in cases if case.layout == layout and case.keep <= JUDGED_SHARE]
        if not counted:
            continue
        keep = statistics.mean(case.keep for case in counted)  # all have as many tokens when dense
        what = f"layout {layout}, {len(counted)} batches, keep {keep:.3f}"
        lines.append(verdict(f"time, {what}", _ratio([case.seconds for case in counted]), keep))
        peaks = [case.peak_bytes for case in counted]
        if all(peak for case in peaks for peak in case.values()):
            lines.append(verdict(f"peak memory, {what}", _ratio(peaks), keep + MEMORY_ALLOWANCE))
    return lines


def _ratio(values: Sequence[Mapping[str, float | None]]) -> float:
    """Of sums, pruned to dense."""
    pruned, dense = (sum(value[kind] or 0 for value in values) for kind in ("pruned", "dense"))
    return pruned / dense


def run(options: argparse.Namespace) -> None:
    cases: list[Case] = []
    fixed = {}
    for layout in options.layouts:
        trainer = Trainer(recipe_of(options, layout))
        for batch in batches(options, trainer.model):
            cases.append(measured(trainer, *batch, options.repeats))
            print(cases[-1], file=sys.stderr, flush=True)
        fixed[layout] = fixed_seconds(trainer, options.repeats)
    text = (
        f"{options.backbone}, {options.num_frames} frames, batches of {options.batch_size}; medians of "
        f"{options.repeats} alternated repetitions.\n\n{table(cases, fixed)}"
    )
    publish("train_step", "A training step, pruned against dense", text, options.save)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
