"""Batches cut by token budget against batches of a fixed number of clips, on clips of very different motion.

    python benchmarks/batching.py [--backbone ViT-S-16] [--num-frames 8] [--num-clips 18] [--whole-clips 2]

Films with planted shares of noise, SHARES in a shuffled order, of WINDOWS clips each: those of a film move alike, and
come one after the other, as when a folder is indexed. The budget is what --whole-clips clips have with every
token kept. "same memory" is the fixed number whose largest batch would stay within it: --whole-clips. "same mean" gives
as many batches as the budget does. Inference is `embed_clips` in one thread; training is one step of the
product's own loop (gradient caching joins the micro-batches: all three give the same gradients), AdamW's moments held
before. Random weights, fp32 on a CPU. Times are medians of alternated repetitions, three times as many for inference,
which is as much shorter; peak memory is the median of PEAK_RUNS runs of their own, above what was held before.

Bars: the budget is not slower than either (SLACK for noise), and peaks lower than the same mean. Below the same memory
it cannot peak, only reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import Run, alternated, planted_clip, publish, script_parser, verdict
from train_step import CAPTION, Trainer, recipe_of

from rlt_retrieval import VideoTextModel
from rlt_retrieval.bench.memory import peak_bytes
from rlt_retrieval.data.batching import batches_by_budget
from rlt_retrieval.data.loading import TrainBatch, TrainClip
from rlt_retrieval.embed import LoaderOptions, embed_clips
from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.eval.report import aligned_table

SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
WINDOWS = 3
SLACK = 1.03
PEAK_RUNS = 3
CUTS = {
    "embed": "rlt_retrieval.embed.batches_by_budget",
    "train": "rlt_retrieval.training.loop.batches_by_budget",
}

Cut = Callable[[Iterable[Any], Callable[[Any], int], int], Iterator[list[Any]]]


@dataclass(frozen=True)
class Way:
    """One way to cut a stream into batches, and what came of it: rows of each batch, seconds, bytes."""

    name: str
    batch_rows: list[int]
    seconds: float
    peak_bytes: int | None


def mixed_clips(model: VideoTextModel, num_clips: int) -> list[VideoTokens]:
    """Tokens of clips, film after film, whose motion goes through SHARES in a shuffled order."""
    rng = np.random.default_rng(0)
    films = rng.permutation([SHARES[index % len(SHARES)] for index in range(math.ceil(num_clips / WINDOWS))])
    shares = films.repeat(WINDOWS)[:num_clips]
    side, patch = model.transform.height, model.video.tower.patch_size
    num_frames = model.config.video.num_frames
    return [model.tokenizer(planted_clip(share, num_frames, side, patch, rng)) for share in shares]


def fixed(size: int) -> Cut:
    """A cut that counts clips and knows no tokens."""

    def cut(elements: Iterable[Any], count: Callable[[Any], int], budget: int) -> Iterator[list[Any]]:
        waiting = iter(elements)
        while batch := list(islice(waiting, size)):
            yield batch

    return cut


def cuts(rows: Sequence[int], budget: int, whole_clips: int) -> dict[str, Cut]:
    """The budget, and the two fixed numbers of clips that it is held against."""
    num_batches = len(list(batches_by_budget(rows, int, budget)))
    return {
        "budget": batches_by_budget,
        "same memory": fixed(whole_clips),
        "same mean": fixed(math.ceil(len(rows) / num_batches)),
    }


def compare(
    run: Run,
    ways: Mapping[str, Cut],
    place: str,
    rows: Sequence[int],
    budget: int,
    device: torch.device,
    repeats: int,
) -> list[Way]:
    """Time and memory of `run` with each way of cutting put at `place`."""

    def with_cut(cut: Cut) -> Run:
        def cut_run() -> None:
            with mock.patch(place, cut):
                run()

        return cut_run

    runs = {name: with_cut(cut) for name, cut in ways.items()}
    run()
    times = alternated(runs, repeats)
    peaks = [{name: peak_bytes(run, device)[1] for name, run in runs.items()} for _ in range(PEAK_RUNS)]
    return [
        Way(name, [sum(batch) for batch in cut(rows, int, budget)], times[name], _median(peaks, name))
        for name, cut in ways.items()
    ]


def _median(peaks: Sequence[Mapping[str, int | None]], name: str) -> int | None:
    found = [peak[name] for peak in peaks]
    return None if None in found else round(np.median(found))


def measure(trainer: Trainer, whole_clips: int, repeats: int) -> dict[str, list[Way]]:
    """Inference and training of one batch of the trainer's recipe, each by every way."""
    model = trainer.model
    clips = mixed_clips(model, trainer.recipe.optim.batch_size)
    rows = [model.video.num_rows(tokens) for tokens in clips]
    whole = model.video.num_rows(model.with_settings(reducer="none").tokenizer(_noise(model)))
    budget = whole_clips * whole
    ways = cuts(rows, budget, whole_clips)
    optim = trainer.recipe.optim.model_copy(update={"token_budget": budget})
    trainer.recipe = trainer.recipe.model_copy(update={"optim": optim})
    batch = TrainBatch([TrainClip(f"clip-{i}", CAPTION, tokens) for i, tokens in enumerate(clips)], {})
    loader = LoaderOptions(token_budget=budget, num_threads=1)

    def embed() -> None:
        assert sum(map(len, embed_clips(model.eval(), enumerate(clips), loader))) == len(clips)

    def train() -> None:
        model.train()
        trainer.step(batch)

    return {
        name: compare(run, ways, CUTS[name], rows, budget, trainer.device, times)
        for name, run, times in (("embed", embed, 3 * repeats), ("train", train, repeats))
    }


def _noise(model: VideoTextModel) -> torch.Tensor:
    """Any clip: without a reducer every one has the same number of rows."""
    shape = (model.config.video.num_frames, 3, model.transform.height, model.transform.width)
    return torch.zeros(shape, dtype=torch.uint8)


def page(results: Mapping[str, Sequence[Way]], num_clips: int) -> str:
    cells = [["work", "cut", "batches", "mean rows", "largest rows", "seconds", "clips/s", "peak MB"]]
    lines = []
    for work, ways in results.items():
        for way in ways:
            peak = "n/a" if way.peak_bytes is None else f"{way.peak_bytes / 1e6:,.0f}"
            counts = [len(way.batch_rows), round(np.mean(way.batch_rows)), max(way.batch_rows)]
            speed = [f"{way.seconds:.2f}", f"{num_clips / way.seconds:.2f}"]
            cells.append([work, way.name, *(f"{count:,}" for count in counts), *speed, peak])
        budget, *others = ways
        for way in others:
            lines.append(verdict(f"{work}, time / {way.name}", budget.seconds / way.seconds, SLACK))
            if budget.peak_bytes and way.peak_bytes:
                bar = 1.0 if way.name == "same mean" else SLACK
                lines.append(verdict(f"{work}, peak / {way.name}", budget.peak_bytes / way.peak_bytes, bar))
    return "\n".join([*aligned_table(cells), "", *(f"- {line}" for line in lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--backbone", default="ViT-S-16")
    parser.add_argument("--layout", choices=("frame", "joint"), default="frame")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--num-clips", dest="batch_size", type=int, default=18)
    parser.add_argument(
        "--whole-clips", type=int, default=2, help="that the budget holds (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    trainer = Trainer(recipe_of(options, options.layout), torch.device(options.device))
    text = page(measure(trainer, options.whole_clips, options.repeats), options.batch_size)
    title = (
        f"Batches by token budget: {options.backbone}, {options.num_frames} frames, layout {options.layout}"
    )
    publish("batching", title, text, options.save)


if __name__ == "__main__":
    main()
