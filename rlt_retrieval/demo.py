"""The demo: synthetic shards → train → index → search → evaluate → report.

It calls what the commands call, and holds no model, loading or metric code of its own.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlt_retrieval.config import Recipe, load_recipe
from rlt_retrieval.data.shards import ShardSample, iter_samples
from rlt_retrieval.data.synthetic import (
    DIRECTIONS,
    SPEC,
    Composition,
    SyntheticShards,
    write_synthetic_shards,
)
from rlt_retrieval.data.video import FrameTransform, decode_clip
from rlt_retrieval.embed import LoaderOptions, ShardScores, embed_texts, evaluate_shards
from rlt_retrieval.errors import ConfigError
from rlt_retrieval.eval.protocols import choice_accuracy
from rlt_retrieval.eval.report import (
    HitCard,
    Html,
    heading,
    hit_grid,
    image_row,
    line_chart_png,
    metrics_table,
    page,
    paragraph,
    table,
    write_report,
)
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training.loop import OnStep, train
from rlt_retrieval.video_index import Hit, VideoIndex, build_index
from rlt_retrieval.viz import film_strip, thumbnail_png, token_overlay

MARKER = "rlt-retrieval-demo.json"  # says that a folder is ours to replace
NUM_TRAIN, NUM_TRAIN_FAST = 4096, 256
STEPS_FAST = 8
CALIBRATION_STEPS = 8
NUM_QUERIES, HITS_PER_QUERY, SCALE = 3, 5, 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """`figures`: every number of the demo, for JSON; `table`: the same to read; `report`: the HTML file."""

    figures: dict[str, Any]
    table: str
    report: Path


@dataclass(frozen=True)
class _Trained:
    model: VideoTextModel
    losses: list[float]
    seconds: list[float]  # a step


def run_demo(
    out: Path,
    *,
    fast: bool = False,
    device: str = "auto",
    on_step: OnStep = lambda line, num_steps: None,
) -> DemoResult:
    """Run the whole demo into the folder `out`.

    Args:
        on_step: see `training.loop.train`.
        fast: few clips and steps and no dense half: shows that everything works, not how well.
    Raises:
        ConfigError: `out` holds something that no demo wrote.
    """
    started = time.perf_counter()
    _claim(out)
    logger.info("making synthetic videos …")
    data = write_synthetic_shards(
        out / "data", num_train=NUM_TRAIN_FAST if fast else NUM_TRAIN, seed=0, num_streams=8
    )
    recipe = _recipe(out, data, "rlt", steps=STEPS_FAST if fast else None)
    logger.info("training on run-length tokens, %d steps …", recipe.optim.steps)
    pruned = _train(recipe, device, on_step)
    scores = {"rlt/rlt": evaluate_shards(pruned.model, data.test, _loader(recipe))}
    figures: dict[str, Any] = {
        "training_seconds": sum(pruned.seconds),
        "training_steps": len(pruned.seconds),
        "keep_ratio": scores["rlt/rlt"].embeddings.keep_ratio,
        **_direction_figures(pruned.model, data, scores["rlt/rlt"], _loader(recipe)),
    }
    logger.info("indexing the held-out clips and searching them …")
    samples = [sample for sample in iter_samples(data.test) if isinstance(sample, ShardSample)]
    queries = [sample.captions[0] for sample in samples[:NUM_QUERIES]]
    hits = _index_and_search(out / "demo.index", pruned.model, data, queries, _loader(recipe))
    scores["rlt/dense"] = evaluate_shards(
        pruned.model.with_settings(reducer="none"), data.test, _loader(recipe)
    )
    figures["seconds"] = time.perf_counter() - started  # without the dense half

    losses = {"trained with RLT": pruned.losses}
    if not fast:
        dense = _train_dense(out, data, pruned, device, on_step)
        losses["trained dense"] = dense.losses
        scores["dense/dense"] = evaluate_shards(dense.model, data.test, _loader(recipe))
        scores["dense/rlt"] = evaluate_shards(
            dense.model.with_settings(reducer="rlt"), data.test, _loader(recipe)
        )
        figures["dense_training_seconds"] = sum(dense.seconds)
        figures["dense_training_steps"] = len(dense.seconds)
    figures["scores"] = {name: score.to_dict() for name, score in scores.items()}
    report = out / "report.html"
    write_report(report, _report(figures, losses, pruned.model, samples, queries, hits, fast))
    (out / MARKER).write_text(json.dumps(figures, indent=2))
    logger.info("report: %s", report)
    return DemoResult(figures, _text(figures, queries, hits), report)


def _claim(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(f"{out} is not empty and holds no earlier demo; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("{}")


def _recipe(
    out: Path, data: SyntheticShards, reducer: str, *, name: str = "", steps: int | None = None
) -> Recipe:
    """The demo recipe on these shards; warm-up shrinks with the number of steps."""
    recipe = load_recipe(
        "demo",
        [
            f"run_dir={json.dumps(str(out / 'runs' / (name or reducer)))}",
            f"data.train={json.dumps([str(path) for path in data.train])}",
            f"data.eval={json.dumps([str(path) for path in data.test])}",
            f"video.reducer={reducer}",
        ],
    )
    if steps is None:
        return recipe
    warmup = round(recipe.optim.warmup_steps * steps / recipe.optim.steps)
    optim = recipe.optim.model_copy(update={"steps": steps, "warmup_steps": warmup})
    return recipe.model_copy(update={"optim": optim})


def _loader(recipe: Recipe) -> LoaderOptions:
    return LoaderOptions(num_workers=recipe.data.num_workers)


def _train(recipe: Recipe, device: str, on_step: OnStep) -> _Trained:
    result = train(recipe, device=device, on_step=on_step)
    lines = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return _Trained(
        VideoTextModel.load(result.model_folder, device=device),
        [line["loss"] for line in lines],
        [line["seconds"] for line in lines],
    )


def _train_dense(
    out: Path, data: SyntheticShards, pruned: _Trained, device: str, on_step: OnStep
) -> _Trained:
    """The same recipe on all tokens, for as many steps as fit in the wall time of the pruned training."""
    calibration = _train(
        _recipe(out, data, "none", name="dense-calibration", steps=CALIBRATION_STEPS), device, on_step
    )
    step_seconds = statistics.median(calibration.seconds[1:])
    steps = max(1, round(sum(pruned.seconds) / step_seconds))
    logger.info("training on all tokens for the same time, %d steps …", steps)
    return _train(_recipe(out, data, "none", steps=steps), device, on_step)


def _index_and_search(
    path: Path, model: VideoTextModel, data: SyntheticShards, queries: Sequence[str], loader: LoaderOptions
) -> list[list[Hit]]:
    build_index(path, data.test, make_model=lambda: model, options=loader)
    with VideoIndex.open(path, model) as index:
        return index.search(queries, k=HITS_PER_QUERY)


def _direction_figures(
    model: VideoTextModel, data: SyntheticShards, scores: ShardScores, loader: LoaderOptions
) -> dict[str, float]:
    """How often the right one of four captions that differ in direction wins, on clips and on reversed clips."""
    backwards = evaluate_shards(model, data.reversed_test, loader)
    return {
        "direction_accuracy": _direction_accuracy(model, scores, data.test_compositions),
        "reversed_direction_accuracy": _direction_accuracy(
            model, backwards, [composition.reversed() for composition in data.test_compositions]
        ),
    }


def _direction_accuracy(
    model: VideoTextModel, scores: ShardScores, compositions: Sequence[Composition]
) -> float:
    directions = list(DIRECTIONS)
    captions = [c.with_direction(direction).caption() for c in compositions for direction in directions]
    choices_NCD = embed_texts(model, captions).reshape(len(compositions), len(directions), -1)
    right_N = np.array([directions.index(composition.direction) for composition in compositions])
    return choice_accuracy(scores.embeddings.z_ND, choices_NCD, right_N)


# ---- what a reader sees ----


def _text(figures: dict[str, Any], queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> str:
    lines = [metrics_table(figures["scores"]), "  (trained on / evaluated on)", ""]
    lines += [f"{name}: {value:.3f}" for name, value in figures.items() if isinstance(value, float)]
    for query, found in zip(queries, hits, strict=True):
        lines += ["", f'"{query}"']
        lines += [f"  {hit.rank}  {hit.score:.3f}  {hit.video.rpartition('#')[2]}" for hit in found]
    return "\n".join(lines)


def _report(
    figures: dict[str, Any],
    losses: dict[str, list[float]],
    model: VideoTextModel,
    samples: Sequence[ShardSample],
    queries: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    fast: bool,
) -> str:
    parts = [
        paragraph(_headline(figures, fast)),
        heading("Quality, trained on / evaluated on"),
        _score_table(figures),
    ]
    parts += [
        paragraph(
            "Direction of motion, among the four captions that differ in nothing else: "
            f"{figures['direction_accuracy']:.1%} right; on clips played backwards the opposite one wins on "
            f"{figures['reversed_direction_accuracy']:.1%}."
        ),
        heading("What is kept"),
        paragraph("Upper rows: the frames. Lower rows: kept patches as they are, dropped ones hatched."),
        image_row([_kept_and_dropped(model, sample) for sample in samples[:NUM_QUERIES]]),
        heading("Hits"),
        hit_grid(_cards(query, found, samples) for query, found in zip(queries, hits, strict=True)),
        heading("Training loss"),
        image_row([(_loss_chart(losses), "contrastive loss, mean of 10 steps")]),
    ]
    return page("Text-to-video retrieval with run-length tokens: the demo", parts)


def _headline(figures: dict[str, Any], fast: bool) -> str:
    recall = {name: scores["text_to_video"]["recall@1"] for name, scores in figures["scores"].items()}
    text = (
        f"Trained for {figures['training_seconds']:.0f} s ({figures['training_steps']} steps) and evaluated on "
        f"{figures['keep_ratio']:.0%} of the tokens, text→video R@1 is {recall['rlt/rlt']:.3f} on unseen compositions"
    )
    if fast:
        return text + ". This was the fast demo: its quality means nothing."
    return text + (
        f"; trained for the same wall time ({figures['dense_training_steps']} steps) and evaluated on all tokens it "
        f"is {recall['dense/dense']:.3f}."
    )


def _score_table(figures: dict[str, Any]) -> Html:
    columns = {"R@1": "recall@1", "R@5": "recall@5", "R@10": "recall@10", "mAP": "mAP"}
    rows = [
        [
            name,
            f"{scores['keep_ratio']:.0%}",
            *(scores["text_to_video"][key] for key in columns.values()),
            scores["video_to_text"]["recall@1"],
        ]
        for name, scores in figures["scores"].items()
    ]
    headers = ["run", "tokens kept", *(f"text→video {name}" for name in columns), "video→text R@1"]
    return table(headers, rows)


def _kept_and_dropped(model: VideoTextModel, sample: ShardSample) -> tuple[bytes, str]:
    clip = decode_clip(sample.media, num_frames=model.config.video.num_frames, transform=model.transform)
    tokens = model.tokenizer(clip.frames_TCHW)
    mask_thw = tokens.keep_mask
    _, tubelet_size, _, _, patch_size = tokens.patches.shape
    overlays = token_overlay(clip.frames_TCHW, mask_thw, patch_size, tubelet_size, scale=SCALE)
    kept = f"{int(mask_thw.sum())} of {mask_thw.numel()} tokens kept: {sample.captions[0]}"
    return film_strip(clip.frames_TCHW, overlays, scale=SCALE), kept


def _cards(query: str, found: Sequence[Hit], samples: Sequence[ShardSample]) -> tuple[str, list[HitCard]]:
    by_key = {sample.key: sample for sample in samples}
    cards = []
    for hit in found:
        sample = by_key[hit.video.rpartition("#")[2]]
        frames = decode_clip(
            sample.media, num_frames=3, transform=FrameTransform(SPEC.side, SPEC.side)
        ).frames_TCHW
        is_right = query in sample.captions
        picture = thumbnail_png(frames, scale=1, num_frames=3)
        cards.append(HitCard(picture, hit.rank, hit.score, is_right, sample.captions[0]))
    return query, cards


def _loss_chart(losses: dict[str, list[float]], width: int = 10) -> bytes:
    series = {
        name: (
            list(range(1, len(values) + 1)),
            [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))],
        )
        for name, values in losses.items()
    }
    return line_chart_png(series, "step", "loss", "")
