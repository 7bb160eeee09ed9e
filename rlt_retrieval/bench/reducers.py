"""All token reducers on the same clips, at the encoder's cost of RLT: cost, time, memory, fidelity, retrieval.

Shapes: N clips, T frames, D embedding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlt_retrieval.bench.clips import BenchClip
from rlt_retrieval.bench.fidelity import copied_forward
from rlt_retrieval.bench.matching import Matched, match
from rlt_retrieval.bench.memory import peak_bytes
from rlt_retrieval.bench.quality import NEIGHBOURS, Judge
from rlt_retrieval.config import REDUCERS, Reducer
from rlt_retrieval.encoders.packing import VideoTokens, pack
from rlt_retrieval.errors import MetricsError, ModelError
from rlt_retrieval.model import VideoTextModel

FAR = 0.02  # from the target's FLOPs; a row that is farther says so

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReducerRow:
    """One reducer. A number that could not be had, or means nothing, is None; `note` or a table's note says why.

    settings: those that are not the model's own. flops: of the encoder, a clip, on the mean over clips; flops_share,
    tokens_share: of the full model's. rows: what each block's MLP reads, on the mean. Seconds a clip: median over clips
    of the least of the repeats. peak_bytes: of encoding one clip, the largest of all clips. error, cosine, overlap:
    see `bench.fidelity`, means over clips. pixel_error: of the full model on the pictures with copied patches;
    context_error: the rest of `error`. The last two: recall at 1.
    """

    reducer: Reducer
    note: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    flops: float | None = None
    flops_share: float | None = None
    tokens_share: float | None = None
    rows: tuple[float, ...] = ()
    tokenizer_seconds: float | None = None
    encoder_seconds: float | None = None
    whole_seconds: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    cosine: float | None = None
    overlap: float | None = None
    pixel_error: float | None = None
    context_error: float | None = None
    text_to_video: float | None = None
    video_to_text: float | None = None


@dataclass(frozen=True)
class ReducerTable:
    """All reducers in one model's layout. model, clips: what was measured; notes: what holds for all rows."""

    model: Mapping[str, Any]
    clips: Mapping[str, int]
    repeats: int
    notes: tuple[str, ...]
    rows: tuple[ReducerRow, ...]


@dataclass
class _Run:
    """A reducer while it is measured."""

    matched: Matched
    z: list[NDArray[np.float32]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)  # a clip: tokenizer, encoder, whole
    peaks: list[int | None] = field(default_factory=list)

    @property
    def z_ND(self) -> NDArray[np.float32]:
        return np.stack(self.z)


def bench_reducers(
    model: VideoTextModel,
    clips: Sequence[BenchClip],
    reducers: Sequence[Reducer] = REDUCERS,
    repeats: int = 3,
    on_progress: Progress = lambda done, total: None,
) -> ReducerTable:
    """Measure reducers in a model's layout, each at the FLOPs of `rlt` by the model's own settings.

    "none" and "rlt" are measured whether asked for or not: the others are compared with them. Clips are encoded one at
    a time, the reducers in turn, so that what disturbs the machine disturbs all. A model created with random weights
    gets no fidelity and no retrieval. `on_progress(steps done, steps in all)`.
    """
    chosen: list[Reducer] = [name for name in REDUCERS if name in ("none", "rlt", *reducers)]
    frames = [clip.frames_TCHW for clip in clips]
    steps = _Steps(len(chosen) + len(clips), on_progress)
    target = match(model, "rlt", frames, None)
    runs: dict[Reducer, _Run] = {}
    reasons: dict[Reducer, str] = {}
    for reducer in chosen:
        try:
            runs[reducer] = _Run(match(model, reducer, frames, target.cost.flops))
        except (ModelError, ValueError) as error:
            reasons[reducer] = str(error)
        steps.next()
    for frames_TCHW in frames:
        _measure(list(runs.values()), frames_TCHW, repeats)
        steps.next()
    rows = [
        _row(name, runs[name], runs["none"], target) if name in runs else ReducerRow(name, reasons[name])
        for name in chosen
    ]
    why_no_quality = _why_no_quality(model, clips)
    if not why_no_quality:
        try:
            rows = _judged(rows, model, runs, clips)
        except MetricsError as error:  # the costs are measured, and stay
            why_no_quality = f"{error}: cost only"
    counts = {"number": len(clips), "captioned": sum(bool(clip.captions) for clip in clips)}
    notes = _notes(rows[0], why_no_quality)
    return ReducerTable(describe_model(model), counts, repeats, tuple(notes), tuple(rows))


class _Steps:
    def __init__(self, total: int, on_progress: Progress) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def next(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total)


def describe_model(model: VideoTextModel) -> dict[str, Any]:
    """For JSON: backbone, weights (a tag, a file's or run's name, "random"), layout, settings, size of the input."""
    origin, video = model.origin or {}, model.config.video
    place = Path(origin.get("path") or origin.get("pretrained") or "unknown")
    weights = "random" if is_random(model) else _name(place)
    return {
        "backbone": model.config.backbone,
        "weights": weights,
        "device": model.device.type,
        "num_frames": video.num_frames,
        "size": list(model.config.preprocess_cfg["size"]),
        "layout": video.layout,
        "length_bias": video.length_bias,
        "threshold": video.threshold,
        "reference": video.reference,
        "refresh_every": video.refresh_tubelets,
        "tubelet_size": video.tubelet_size,
    }


def _name(place: Path) -> str:
    """A tag as it is, a file's or a run's own name without its folders."""
    if not place.is_absolute():
        return str(place)
    return place.parent.name if place.name == "model" else place.name


def is_random(model: VideoTextModel) -> bool:
    """Whether the model was created without weights; what was trained and loaded again was not."""
    return model.origin is not None and model.origin.get("pretrained", "") is None


# ------------------------------------------------------------------------------------------ cost and time


def _measure(runs: Sequence[_Run], frames_TCHW: Tensor, repeats: int) -> None:
    """Embedding first, which also warms up; then memory, then the times."""
    for run in runs:
        tokens = run.matched.model.tokenizer(frames_TCHW)
        encode = functools.partial(_encode, run.matched.model, tokens)
        run.z.append(encode())
        _, peak = peak_bytes(encode, run.matched.model.device)
        run.peaks.append(peak)
        run.seconds.append([np.inf] * 3)
    for _ in range(repeats):
        for run in runs:
            run.seconds[-1] = list(map(min, run.seconds[-1], _times(run.matched.model, frames_TCHW)))


def _times(model: VideoTextModel, frames_TCHW: Tensor) -> tuple[float, float, float]:
    """Seconds of the tokenizer, of the encoder with its plan and transfers, and of both."""
    start = time.perf_counter()
    tokens = model.tokenizer(frames_TCHW)
    tokenized = time.perf_counter()
    _encode(model, tokens)
    end = time.perf_counter()
    return tokenized - start, end - tokenized, end - start


def _encode(model: VideoTextModel, tokens: VideoTokens) -> NDArray[np.float32]:
    with torch.inference_mode():
        return model.encode_tokens(pack([tokens]))[0].float().cpu().numpy()


def _row(reducer: Reducer, run: _Run, full: _Run, target: Matched) -> ReducerRow:
    cost, full_cost = run.matched.cost, full.matched.cost
    off = cost.flops / target.cost.flops - 1
    is_far = reducer != "none" and abs(off) > FAR
    tokenizer, encoder, whole = np.median(run.seconds, axis=0).tolist()
    peaks = [peak for peak in run.peaks if peak is not None]
    return ReducerRow(
        reducer,
        note=f"its nearest to rlt's FLOPs is {off:+.1%}" if is_far else "",
        settings=run.matched.changes,
        flops=cost.flops,
        flops_share=cost.flops / full_cost.flops,
        tokens_share=cost.tokens / full_cost.tokens,
        rows=cost.rows,
        tokenizer_seconds=tokenizer,
        encoder_seconds=encoder,
        whole_seconds=whole,
        peak_bytes=max(peaks, default=None),
    )


# ------------------------------------------------------------------------------- fidelity and retrieval


def _judged(
    rows: Sequence[ReducerRow],
    model: VideoTextModel,
    runs: Mapping[Reducer, _Run],
    clips: Sequence[BenchClip],
) -> list[ReducerRow]:
    judge = Judge(model, clips, runs["none"].z_ND)
    judged = []
    for row in rows:
        scores = judge.scores(runs[row.reducer].z_ND) if row.reducer in runs else {}
        judged.append(replace(row, **scores))
        if row.reducer == "rlt" and model.config.video.layout == "frame":
            pixel_error = judge.error(_z_of_copies(runs, clips))
            parts = {"pixel_error": pixel_error, "context_error": scores["error"] - pixel_error}
            judged[-1] = replace(judged[-1], **parts)
    return judged


def _z_of_copies(runs: Mapping[Reducer, _Run], clips: Sequence[BenchClip]) -> NDArray[np.float32]:
    """float32 [N, D]: the full model on pictures whose patches that RLT drops are copied forward."""
    rlt, full = runs["rlt"].matched.model, runs["none"].matched.model
    copies = (copied_forward(rlt.tokenizer(clip.frames_TCHW)) for clip in clips)
    return np.stack([_encode(full, full.tokenizer(frames_TCHW)) for frames_TCHW in copies])


def _why_no_quality(model: VideoTextModel, clips: Sequence[BenchClip]) -> str:
    if is_random(model):
        return "random weights: cost only"
    return "" if len(clips) > 1 else "one clip: nothing to compare its embedding with, cost only"


def _notes(full: ReducerRow, why_no_quality: str) -> list[str]:
    notes = [why_no_quality] if why_no_quality else []
    if not why_no_quality and full.overlap is None:
        notes.append(f"{NEIGHBOURS + 1} clips or fewer: all are neighbours of each other, no overlap")
    if not why_no_quality and full.text_to_video is None:
        notes.append("clips without a caption: no retrieval")
    if full.peak_bytes is None:
        notes.append("peak memory can be read on CUDA and Linux only")
    return notes
