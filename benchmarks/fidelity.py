"""What pruning without training costs in fidelity, beside `random` and `frames` at the same compute.

    python benchmarks/fidelity.py videos MODEL my_videos/ [--layout joint]
    python benchmarks/fidelity.py events SEED0 SEED1 SEED2 [--layout joint]
    python benchmarks/fidelity.py shards RUN shards/test
    python benchmarks/fidelity.py stock my_videos/ --backbone ViT-B-16 --pretrained openai

MODEL and SEEDn are folders that train_frame_models.py wrote (n: the seed of the training, whose test clips are used
here); "videos" takes second halves, the parts that MODEL has not seen; "stock" takes any weights and whole videos.
Every model is compared with itself on all tokens. Errors are 1 - cosine, divided by the median distance between the
clips; pixel error is that of the full model on pictures whose dropped patches are copied forward, context error the
rest. Frames have the compute (rows of the encoder) of `rlt`, rounded up to whole frames.

Shapes: N clips, T frames, D embedding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from event_clips import held_out_clips
from torch import Tensor
from train_frame_models import found_first, moment_aucs, read_halves

from rlt_retrieval import VideoTextModel, pack
from rlt_retrieval.bench.clips import read_clips
from rlt_retrieval.bench.fidelity import copied_forward, neighbour_overlap, relative_errors
from rlt_retrieval.embed import LoaderOptions, embed_texts

THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
REFERENCES = ("anchor", "previous")
REFRESHES = ((0.1, 2), (0.1, 3), (0.1, 4), (0.1, 8), (0.2, 4))  # (threshold, refresh_every), reference anchor
NEIGHBOURS = 10
CLIPS_AT_ONCE = 32
RESAMPLES = 10_000


@dataclass(frozen=True)
class Embedded:
    """z_ND: float32; rows: that the encoder computed, a clip; frames: [T, D] a clip, layout "frame" only."""

    z_ND: np.ndarray
    rows: float
    frames: list[np.ndarray]


Quality = Callable[[Embedded], dict[str, np.ndarray]]  # values a query (or clip) by name


@dataclass(frozen=True)
class Case:
    """One set of clips and the model that reads it. quality: what is found, or None without captions."""

    model: VideoTextModel
    clips: Sequence[Tensor]
    quality: Quality | None = None


def settings_of_the_table() -> list[dict[str, Any]]:
    plain = [
        {"reference": reference, "threshold": threshold, "refresh_every": 0}
        for reference in REFERENCES
        for threshold in THRESHOLDS
    ]
    refreshed = [
        {"reference": "anchor", "threshold": threshold, "refresh_every": every}
        for threshold, every in REFRESHES
    ]
    return plain + refreshed


@torch.inference_mode()
def embedded(model: VideoTextModel, clips: Sequence[Tensor]) -> Embedded:
    tokens = [model.tokenizer(clip) for clip in clips]
    rows = float(np.mean([model.video.num_rows(clip) for clip in tokens]))
    frames, parts = [], []
    for first in range(0, len(tokens), CLIPS_AT_ONCE):
        packed = pack(tokens[first : first + CLIPS_AT_ONCE])
        if model.config.video.layout == "frame":
            frames += [z_TD.numpy() for z_TD in model.video.encode_frames(packed)]
        else:
            parts.append(model.encode_tokens(packed).numpy())
    if frames:
        sums = np.stack([z_TD.sum(0) for z_TD in frames])
        parts.append(sums / np.linalg.norm(sums, axis=1, keepdims=True))
    return Embedded(np.concatenate(parts), rows, frames)


def on_copied_pictures(full: VideoTextModel, pruned: VideoTextModel, clips: Sequence[Tensor]) -> np.ndarray:
    """float32 [N, D]: all tokens of pictures whose dropped patches are copied forward."""
    return embedded(full, [copied_forward(pruned.tokenizer(clip)) for clip in clips]).z_ND


def fidelity(
    case: Case, settings: dict[str, Any], full_model: VideoTextModel, full: Embedded
) -> dict[str, Any]:
    """One row of the table: `rlt` by these settings, and the two baselines at its compute."""
    pruned = case.model.with_settings(reducer="rlt", **settings)
    found = {"rlt": embedded(pruned, case.clips)}
    share = found["rlt"].rows / full.rows
    num_frames = case.model.config.video.num_frames
    frames_share = min(1.0, ceil(share * num_frames - 1e-9) / num_frames)
    found["random"] = embedded(pruned.with_settings(reducer="random"), case.clips)
    few_frames = case.model.with_settings(reducer="frames", keep_ratio=frames_share)
    found["frames"] = embedded(few_frames, case.clips)
    pixel = relative_errors(full.z_ND, on_copied_pictures(full_model, pruned, case.clips)).mean()
    row: dict[str, Any] = {**settings, "share": share, "frames_share": frames_share, "pixel_error": pixel}
    for name, one in found.items():
        row[f"{name}_error"] = relative_errors(full.z_ND, one.z_ND).mean()
        row[f"{name}_overlap"] = neighbour_overlap(full.z_ND, one.z_ND, min(NEIGHBOURS, len(one.z_ND) - 1))
        if case.quality:
            row[f"{name}_quality"] = case.quality(one)
    row["context_error"] = row["rlt_error"] - pixel
    return row


def table(case: Case) -> list[dict[str, Any]]:
    """Rows of `fidelity`, one for each setting, after one of the full model."""
    full_model = case.model.with_settings(reducer="none")
    full = embedded(full_model, case.clips)
    done: list[dict[str, Any]] = [{"full_quality": case.quality(full)} if case.quality else {}]
    for settings in settings_of_the_table():
        done.append(fidelity(case, settings, full_model, full))
        last = {key: value for key, value in done[-1].items() if not key.endswith("_quality")}
        print(json.dumps(last, default=float), file=sys.stderr, flush=True)
    return done


# --- losses of quality over seeds -------------------------------------------------------------------------------


def paired_loss(full_SQ: Sequence[np.ndarray], pruned_SQ: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean of full - pruned over all queries of all seeds, with its 95 % interval.

    A bootstrap over queries: each seed's are drawn anew with replacement, pairs together.
    """
    rng = np.random.default_rng(0)
    differences = [
        np.asarray(f, float) - np.asarray(p, float) for f, p in zip(full_SQ, pruned_SQ, strict=True)
    ]
    means = np.zeros(RESAMPLES)
    for values_Q in differences:
        # Of a resample only the counts of each value matter; a draw of all of them at once would need gigabytes.
        values, counts = np.unique(values_Q, return_counts=True)
        draws = rng.multinomial(len(values_Q), counts / len(values_Q), RESAMPLES)
        means += draws @ values / len(values_Q) / len(differences)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def joined(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tables of several seeds as one: means of figures, paired losses of qualities."""
    rows = []
    for row_of_seeds in zip(*(table[1:] for table in tables), strict=True):
        row = {
            key: value if isinstance(value, str) else float(np.mean([r[key] for r in row_of_seeds]))
            for key, value in row_of_seeds[0].items()
            if not key.endswith("_quality")
        }
        for name in ("rlt", "random", "frames"):
            for measure in row_of_seeds[0].get(f"{name}_quality", {}):
                full = [table[0]["full_quality"][measure] for table in tables]
                pruned = [r[f"{name}_quality"][measure] for r in row_of_seeds]
                row[f"{name}_loss_of_{measure}"] = paired_loss(full, pruned)
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table that goes into a result file."""
    measures = [key.removeprefix("rlt_loss_of_") for key in rows[0] if key.startswith("rlt_loss_of_")]
    names = ("rlt", "random", "frames")
    header = ["reference", "threshold", "refresh", "share", "error rlt (pixel + context)", "random", "frames"]
    header += [f"top-{NEIGHBOURS} {name}" for name in names]
    header += [f"{measure} loss {name}" for measure in measures for name in names]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        parts = f"{row['rlt_error']:.4f} ({row['pixel_error']:.4f} + {row['context_error']:.4f})"
        cells = [row["reference"], f"{row['threshold']:g}", f"{row['refresh_every']:.0f}"]
        cells += [f"{row['share']:.3f}", parts, f"{row['random_error']:.4f}", f"{row['frames_error']:.4f}"]
        cells += [f"{row[f'{name}_overlap']:.3f}" for name in names]
        for measure in measures:
            for name in names:
                mean, low, high = row[f"{name}_loss_of_{measure}"]
                cells.append(f"{mean:.4f} [{low:.4f}, {high:.4f}]")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --- cases ------------------------------------------------------------------------------------------------------


def in_layout(model: VideoTextModel, layout: str) -> VideoTextModel:
    """The model itself, or its towers' weights in layout "joint" with length bias and no trained time embedding."""
    if layout == model.config.video.layout:
        return model
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        model.export(weights)
        return VideoTextModel.create(
            model.config.model_cfg,
            weights,
            device=str(model.device),
            layout="joint",
            length_bias=True,
            num_frames=model.config.video.num_frames,
        )


def videos_case(folder: Path, videos: Path, layout: str) -> Case:
    model = in_layout(VideoTextModel.load(folder), layout)
    halves = read_halves(videos, model.transform.height, model.config.video.num_frames)
    return Case(model, list(halves.second_VTCHW))


def events_case(folder: Path, seed: int, num_clips: int, layout: str) -> Case:
    model = in_layout(VideoTextModel.load(folder), layout)
    clips = held_out_clips(seed, num_clips)
    z_text_ND = embed_texts(model, [clip.story.caption() for clip in clips])
    events = [index for index, clip in enumerate(clips) if clip.story.during]
    inside_ET = [clips[index].inside_T for index in events]
    z_during_ED = embed_texts(
        model, [during.caption() for clip in clips if (during := clip.story.during) is not None]
    )

    def quality(found: Embedded) -> dict[str, np.ndarray]:
        values = {"R@1": found_first(found.z_ND, z_text_ND)}
        if found.frames:
            values["AUC"] = moment_aucs([found.frames[index] for index in events], z_during_ED, inside_ET)
        return values

    return Case(model, [torch.from_numpy(clip.frames_TCHW) for clip in clips], quality)


def shards_case(run: Path, shards: Path) -> Case:
    model = VideoTextModel.load(run)
    clips, _ = read_clips([shards], model.transform, model.config.video.num_frames, LoaderOptions())
    z_text_ND = embed_texts(model, [clip.captions[0] for clip in clips])
    return Case(
        model,
        [clip.frames_TCHW for clip in clips],
        lambda found: {"R@1": found_first(found.z_ND, z_text_ND)},
    )


def stock_case(videos: Path, backbone: str, pretrained: str, layout: str) -> Case:
    model = VideoTextModel.create(backbone, pretrained, layout=layout, length_bias=layout == "joint")
    halves = read_halves(videos, model.transform.height, model.config.video.num_frames)
    return Case(model, [*halves.first_VTCHW, *halves.second_VTCHW])


def tables_of_seeds(
    models: Sequence[Path], seeds: Sequence[int], num_clips: int, layout: str
) -> list[list[dict[str, Any]]]:
    """A table a seed, each in a process of its own with its share of the cores."""
    cores = torch.get_num_threads()
    num_processes = min(len(models), cores)
    with ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, cores // num_processes),),
    ) as pool:
        return list(pool.map(_events_table, models, seeds, repeat(num_clips), repeat(layout)))


def _events_table(folder: Path, seed: int, num_clips: int, layout: str) -> list[dict[str, Any]]:
    return table(events_case(folder, seed, num_clips, layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    videos = commands.add_parser("videos")
    videos.add_argument("models", type=Path, nargs=1)
    videos.add_argument("folder", type=Path)
    events = commands.add_parser("events")
    events.add_argument("models", type=Path, nargs="+")
    events.add_argument("--num-clips", type=int, default=1024)
    events.add_argument("--seeds", type=int, nargs="+", help="of the models [default: 0, 1, …]")
    shards = commands.add_parser("shards")
    shards.add_argument("models", type=Path, nargs=1)
    shards.add_argument("folder", type=Path)
    stock = commands.add_parser("stock")
    stock.add_argument("folder", type=Path)
    stock.add_argument("--backbone", default="ViT-B-16")
    stock.add_argument("--pretrained", default="openai")
    for command in (videos, events, stock):
        command.add_argument("--layout", choices=("frame", "joint"), default="frame")
    for command in (videos, events, shards, stock):
        command.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.command == "videos":
        tables = [table(videos_case(options.models[0], options.folder, options.layout))]
    elif options.command == "shards":
        tables = [table(shards_case(options.models[0], options.folder))]
    elif options.command == "stock":
        tables = [table(stock_case(options.folder, options.backbone, options.pretrained, options.layout))]
    else:
        seeds = options.seeds or range(len(options.models))
        tables = tables_of_seeds(options.models, seeds, options.num_clips, options.layout)
    rows = joined(tables)
    full = tables[0][0].get("full_quality", {})
    for measure in full:
        means = [float(np.mean(table[0]["full_quality"][measure])) for table in tables]
        print(f"full model, {measure}: {', '.join(f'{mean:.4f}' for mean in means)}")
    print(markdown(rows))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
