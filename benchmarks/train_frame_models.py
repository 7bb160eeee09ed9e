"""Train the small models of the fidelity tables: their layout is "frame", and they never see a pruned token.

    python benchmarks/train_frame_models.py events runs/events/seed0 --seed 0
    python benchmarks/train_frame_models.py videos runs/real_vit my_videos/

"events": both towers, on the clips of event_clips.py, by the product's own training step; tested on clips of other
contents. "videos": an image tower alone, to tell the videos of a folder apart by frames of their first halves; tested
on frames of their second halves. Its text tower stays as random as it was.

Shapes: N clips, E clips with an event, V videos, T frames of a clip or of half a video, B pictures, D embedding.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from event_clips import SPEC, EventClip, held_out_clips, training_clips
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.config import DataRecipe, ModelRecipe, OptimRecipe, Recipe, VideoSettings
from rlt_retrieval.data.geometry import random_box
from rlt_retrieval.data.loading import TrainBatch, TrainClip
from rlt_retrieval.data.sources.folder import list_videos
from rlt_retrieval.data.video import FrameTransform, decode_clip
from rlt_retrieval.errors import VideoDecodeError
from rlt_retrieval.eval.protocols import inner_products
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training.distributed import join_ranks
from rlt_retrieval.training.loop import build_optimizer, create_loss, create_model, train_step
from rlt_retrieval.training.schedule import learning_rate

REPORT_EVERY = 25  # steps
CLIPS_AT_ONCE = 32
INITIAL_SCALE = 20.0  # of cosines


class Phase(NamedTuple):
    """A part of a training: `batch_size` clips a step, in groups that are hard to tell apart."""

    num_steps: int
    batch_size: int
    group_size: int
    num_frames: int


# Backdrops first; then clips that share one, which ask for shapes and companions, and events of an eighth of a clip.
EVENT_PHASES = (Phase(250, 96, 1, 3), Phase(250, 48, 4, 8))
EVENT_VISION = {"patch_size": 8, "width": 96}
EVENT_LAYERS = 2
OPTIM = OptimRecipe(
    steps=sum(phase.num_steps for phase in EVENT_PHASES),
    batch_size=96,
    token_budget=1_000_000,
    learning_rate=1.5e-3,
    final_learning_rate=1e-5,
    warmup_steps=50,
    weight_decay=0.05,
    precision="fp32",
)

MIN_SECONDS = 2.0  # of a video whose halves can differ
LARGER = 1.25  # side of the pictures that crops are taken from, by the model's
CROP_SCALE = (0.5, 1.0)  # of the picture's area
VIDEO_VISION = {"patch_size": 16, "width": 128, "layers": 4}
VIDEO_SIDE, VIDEO_STEPS, VIDEO_BATCH_SIZE = 128, 400, 64


# --- scores -------------------------------------------------------------------------------------------------


class EventScores(NamedTuple):
    """found_first_N: bool, whether caption n finds clip n first (R@1 is the mean); moment_auc_E: float64."""

    found_first_N: np.ndarray
    moment_auc_E: np.ndarray


@torch.inference_mode()
def score_events(model: VideoTextModel, clips: Sequence[EventClip]) -> EventScores:
    """Clips are looked for by their captions, moments by the caption of what is shown during the event only."""
    z_video_ND = np.concatenate([model.encode_video(frames).cpu().numpy() for frames in _parts(clips)])
    events = [clip for clip in clips if clip.story.during]
    z_frames_ETD = [z_TD.cpu().numpy() for frames in _parts(events) for z_TD in model.encode_frames(frames)]
    z_text_ND = model.encode_text([clip.story.caption() for clip in clips]).cpu().numpy()
    shown_E = [clip.story.during.caption() for clip in events if clip.story.during]
    z_during_ED = model.encode_text(shown_E).cpu().numpy()
    return EventScores(
        found_first(z_video_ND, z_text_ND),
        moment_aucs(z_frames_ETD, z_during_ED, [clip.inside_T for clip in events]),
    )


def _parts(clips: Sequence[EventClip]) -> list[list[Tensor]]:
    frames_NTCHW = [torch.from_numpy(clip.frames_TCHW) for clip in clips]
    return [frames_NTCHW[i : i + CLIPS_AT_ONCE] for i in range(0, len(clips), CLIPS_AT_ONCE)]


def found_first(z_video_ND: np.ndarray, z_text_ND: np.ndarray) -> np.ndarray:
    """bool [N]: whether text n has clip n alone on top of all clips; a tie counts against it."""
    similarity_NN = inner_products(z_video_ND, z_text_ND)
    right_N = similarity_NN.diagonal().copy()
    np.fill_diagonal(similarity_NN, -np.inf)
    return right_N > similarity_NN.max(axis=0)


def moment_aucs(
    z_frames_ETD: Sequence[np.ndarray], z_during_ED: np.ndarray, inside_ET: Sequence[np.ndarray]
) -> np.ndarray:
    """How well frames tell the moment of each event: float64 [E], area under the ROC curve, a tie counting half.

    z_frames_ETD: one [T, D] a clip; z_during_ED: of the caption of what the event shows; inside_ET: bool [T] a clip.
    """
    aucs = []
    for z_TD, z_D, inside_T in zip(z_frames_ETD, z_during_ED, inside_ET, strict=True):
        scores_T = inner_products(z_TD, z_D[None])[:, 0]
        lead_IO = scores_T[inside_T][:, None] - scores_T[~inside_T][None]
        aucs.append(np.mean((lead_IO > 0) + 0.5 * (lead_IO == 0)))
    return np.array(aucs)


# --- models -------------------------------------------------------------------------------------------------


def recipe(seed: int, optim: OptimRecipe, side: int, vision: dict[str, int]) -> Recipe:
    """A small two-tower model in layout "frame" on all tokens. Nothing is read from or written to its folders."""
    backbone = {
        "embed_dim": 128,
        "init_logit_scale": math.log(INITIAL_SCALE),
        "vision_cfg": {"image_size": side, "head_width": 32, "pos_embed_type": "sin_cos_2d", **vision},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    }
    return Recipe(
        run_dir="unused",
        seed=seed,
        model=ModelRecipe(pretrained="none", backbone_config=backbone),
        video=VideoSettings(layout="frame", reducer="none", num_frames=16),
        data=DataRecipe(train=("made here",), num_streams=1),
        optim=optim,
    )


def train_events(
    seed: int, phases: Sequence[Phase] = EVENT_PHASES, num_test: int = 1024, layers: int = EVENT_LAYERS
) -> VideoTextModel:
    """A model that has never seen the contents of `held_out_clips(seed, num_test)`; in eval mode.

    It may train on clips of fewer frames than it is tested on: no frame knows of another.
    """
    optim = OPTIM.model_copy(update={"steps": sum(phase.num_steps for phase in phases)})
    chosen = recipe(seed, optim, SPEC.side, {**EVENT_VISION, "layers": layers})
    ranks = join_ranks("cpu")
    model = create_model(chosen, ranks.device)
    loss, optimizer = create_loss(chosen, model, ranks), build_optimizer(model, chosen)
    for step, batch in enumerate(_batches(model, seed, phases, num_test), start=1):
        line = train_step(model, loss, optimizer, batch, step, chosen, ranks)
        _report(step, optim.steps, line["loss"])
    return model.eval()


def _batches(
    model: VideoTextModel, seed: int, phases: Sequence[Phase], num_test: int
) -> Iterator[TrainBatch]:
    for phase in phases:
        spec = replace(SPEC, num_frames=phase.num_frames)
        clips = training_clips(seed, phase.group_size, spec, num_test)
        for _ in range(phase.num_steps):
            batch = itertools.islice(clips, phase.batch_size)
            yield TrainBatch([_train_clip(model, str(i), clip) for i, clip in enumerate(batch)], {})


def _report(step: int, num_steps: int, loss: float) -> None:
    if step % REPORT_EVERY == 0:
        print(f"{time.strftime('%H:%M:%S')} step {step} of {num_steps}: loss {loss:.3f}", flush=True)


def _train_clip(model: VideoTextModel, key: str, clip: EventClip) -> TrainClip:
    return TrainClip(key, clip.story.caption(), model.tokenizer(torch.from_numpy(clip.frames_TCHW)))


# --- an image tower for real videos -------------------------------------------------------------------------


class Halves(NamedTuple):
    """Frames of the first and of the second half of each video: uint8 [V, T, 3, side, side]."""

    first_VTCHW: Tensor
    second_VTCHW: Tensor


def read_halves(folder: Path, side: int, num_frames: int = 16) -> Halves:
    """Evenly spaced frames of all videos of a folder that decode and last `MIN_SECONDS`."""
    first, second = [], []
    for path in list_videos(folder):
        try:
            clip = decode_clip(path, num_frames=2 * num_frames, transform=FrameTransform(side, side))
        except VideoDecodeError as error:
            print(f"left out: {error}")
            continue
        if clip.end_seconds >= MIN_SECONDS:
            first.append(clip.frames_TCHW[:num_frames])
            second.append(clip.frames_TCHW[num_frames:])
    return Halves(torch.stack(first), torch.stack(second))


def train_on_videos(frames_VTCHW: Tensor, side: int, steps: int, seed: int = 0) -> VideoTextModel:
    """A model whose image embeddings tell the videos apart; in eval mode.

    One direction a video, thrown away afterwards, is the right answer for each of its frames: cross-entropy over
    scaled cosines, on random crops, half of them mirrored.
    """
    optim = OPTIM.model_copy(update={"steps": steps})
    chosen = recipe(seed, optim, side, VIDEO_VISION)
    model = create_model(chosen, torch.device("cpu"))
    directions_VD = nn.Parameter(torch.randn(len(frames_VTCHW), model.dimension))
    optimizer = build_optimizer(model, chosen)
    optimizer.add_param_group({"params": [directions_VD], "weight_decay": 0.0, "lr_scale": 1.0})
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim) * group["lr_scale"]
        video_B = torch.from_numpy(rng.integers(len(frames_VTCHW), size=VIDEO_BATCH_SIZE))
        frame_B = rng.integers(frames_VTCHW.shape[1], size=VIDEO_BATCH_SIZE)
        pictures = [augmented(frames_VTCHW[v, t], side, rng) for v, t in zip(video_B, frame_B, strict=True)]
        z_BD = model.encode_video(torch.stack(pictures)[:, None])
        loss = F.cross_entropy(INITIAL_SCALE * z_BD @ F.normalize(directions_VD, dim=1).T, video_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _report(step, steps, float(loss.detach()))
    return model.eval()


def augmented(frame_CHW: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """uint8 [3, side, side]: a random crop, mirrored half of the time."""
    _, height, width = frame_CHW.shape
    box = random_box(rng, CROP_SCALE, height, width)
    top, left = round(box.top * height), round(box.left * width)
    crop_CHW = frame_CHW[:, top : top + round(box.height * height), left : left + round(box.width * width)]
    scaled_CHW = F.interpolate(crop_CHW[None].float(), (side, side), mode="bilinear", antialias=True)[0]
    picture_CHW = scaled_CHW.round().clamp(0, 255).to(torch.uint8)
    return picture_CHW.flip(-1) if rng.random() < 0.5 else picture_CHW


@torch.inference_mode()
def video_figures(model: VideoTextModel, halves: Halves) -> dict[str, float]:
    """How well second halves are told apart by first halves, and how far apart videos lie (1 - cosine)."""
    first_VD, second_VD = model.encode_video(halves.first_VTCHW), model.encode_video(halves.second_VTCHW)
    frames_KD = model.encode_video(halves.second_VTCHW.flatten(0, 1)[:, None])
    video_K = torch.arange(len(second_VD)).repeat_interleave(halves.second_VTCHW.shape[1])
    between_VV = 1 - second_VD @ second_VD.T
    others = ~torch.eye(len(second_VD), dtype=torch.bool)
    video_V = torch.arange(len(second_VD))
    return {
        "videos": len(second_VD),
        "frames of second halves whose nearest first half is their own": _share(frames_KD, first_VD, video_K),
        "second halves whose nearest first half is their own": _share(second_VD, first_VD, video_V),
        "median distance of second half to first": float((1 - (first_VD * second_VD).sum(1)).median()),
        "median distance of second halves of different videos": float(between_VV[others].median()),
    }


def _share(queries_KD: Tensor, items_VD: Tensor, right_K: Tensor) -> float:
    return float(((queries_KD @ items_VD.T).argmax(1) == right_K).float().mean())


# --- command line -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    events = commands.add_parser("events", help="two towers on the clips of event_clips.py")
    videos = commands.add_parser("videos", help="an image tower on the videos of a folder")
    for command in (events, videos):
        command.add_argument("out", type=Path, help="folder for the model")
        command.add_argument("--seed", type=int, default=0)
    events.add_argument("--layers", type=int, default=EVENT_LAYERS, help="blocks of the image tower")
    videos.add_argument("folder", type=Path, help="videos")
    options = parser.parse_args()
    if options.command == "events":
        model = train_events(options.seed, layers=options.layers)
        scores = score_events(model, held_out_clips(options.seed))
        figures = {"R@1": scores.found_first_N.mean(), "moment AUC": scores.moment_auc_E.mean()}
    else:
        larger = read_halves(options.folder, round(VIDEO_SIDE * LARGER))
        model = train_on_videos(larger.first_VTCHW, VIDEO_SIDE, VIDEO_STEPS, options.seed)
        figures = video_figures(model, read_halves(options.folder, VIDEO_SIDE))
    model.save(options.out)
    print("\n".join(f"{name}: {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
