"""Encoding time against what a user would run instead, side by side in one run.

    python benchmarks/encode.py [--videos my_videos/] [--backbone ViT-B-16] [--num-frames 16] [--layouts frame joint]

    a  dense joint space-time ViT from open_clip's own blocks    d  open_clip's image tower frame by frame
    b  ours, layout joint, nothing pruned                         f  ours, layout frame, nothing pruned
    c  ours, layout joint, RLT                                    e  ours, layout frame, RLT

a and d are measured with PyTorch's attention fast path on and off (first clip); the faster one counts and is named. All
is in inference mode, one clip at a time; times are medians of alternated repetitions, from tokens (ours) or normalised
pixels (open_clip) to the embedding. Random weights: this measures cost, never quality. --videos takes the first 10 s of
every video of a folder, or of measuring.CLIPS alone if it holds them all; without it, clips with a planted share of
noise. Bars are judged on the sum over clips that keep at most 60 % of their tokens (b and f: over all). --save also
draws time against tokens kept.

Shapes: T frames, L tokens of a frame, D embedding.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from measuring import alternated, clips, publish, result_path, script_parser, seconds, verdict
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval import VideoTextModel, pack
from rlt_retrieval.data.files import write_whole
from rlt_retrieval.encoders.packing import PackedTokens
from rlt_retrieval.eval.report import aligned_table

JUDGED_SHARE = 0.6
EQUAL = {"fp32": 1e-4, "bf16": 1e-2}  # between components of unit vectors; bf16 has 8 bits
FULL = (("b", "a"), ("f", "d"))  # ours and its baseline, which give the same embedding
FULL_BAR = 1.05  # of the baseline's time
PRUNED_BARS: dict[tuple[str, str], Callable[[float], float]] = {  # likewise, given the share kept
    ("c", "a"): lambda keep: 0.85 * keep,
    ("e", "d"): lambda keep: keep + 0.05,
}
PANELS = (("frame", "e", "d"), ("joint", "c", "a"))  # layout, ours, dense

Run = Callable[[], Tensor]


class Row(NamedTuple):
    """One clip, by letter. keep: share of tokens; differences: largest from the baseline's embedding."""

    clip: str
    keep: dict[str, float]
    seconds: dict[str, float]
    differences: dict[str, float]


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
    """Models of the layouts, and the runs a … f on a clip."""

    def __init__(self, backbone: str, num_frames: int, layouts: list[str], dtype: torch.dtype) -> None:
        self.models = {
            layout: VideoTextModel.create(backbone, None, device="cpu", layout=layout, num_frames=num_frames)
            for layout in layouts
        }
        self.any = next(iter(self.models.values()))
        self.dtype = dtype
        self.fast_path: dict[str, bool] = {}
        self.notes: list[str] = []

    def keep(self, frames_TCHW: Tensor) -> dict[str, float]:
        """Share of tokens computed, by the letter of the run that prunes."""
        letters = {"joint": "c", "frame": "e"}
        tokens = {letters[layout]: model.tokenizer(frames_TCHW) for layout, model in self.models.items()}
        return {letter: len(clip) / clip.keep_mask.numel() for letter, clip in tokens.items()}

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
            setting = "on" if self.fast_path[name] else "off"
            self.notes.append(f"{name}: PyTorch's fast path {setting} (otherwise {other:.2f} times as long)")
        return with_fast_path(self.fast_path[name], run)


def measure(encoders: Encoders, name: str, frames_TCHW: Tensor, repeats: int) -> Row:
    """One clip by all runs."""
    runs = encoders.runs(frames_TCHW)
    differences = largest_differences(runs)
    return Row(name, encoders.keep(frames_TCHW), alternated(runs, repeats), differences)


def largest_differences(runs: dict[str, Run]) -> dict[str, float]:
    """Between ours with nothing pruned and its baseline; also warms up."""
    z = {name: run().float() for name, run in runs.items()}
    return {ours: float((z[ours] - z[dense]).abs().max()) for ours, dense in FULL if ours in z}


# --- the result -------------------------------------------------------------------------------------------------


def judged(rows: Sequence[Row], precision: str) -> list[str]:
    """A line a bar: the ratio of summed times, what it must reach, over which clips."""
    lines = []
    for ours, dense in FULL:
        if ours in rows[0].seconds:
            largest = max(row.differences[ours] for row in rows)
            lines.append(
                verdict(f"{ours}/{dense} over {len(rows)} clips", ratio(rows, ours, dense), FULL_BAR)
            )
            equal = EQUAL[precision]
            lines.append(verdict(f"largest |{ours} - {dense}| in units of {equal:g}", largest / equal, 1))
    for (ours, dense), bar in PRUNED_BARS.items():
        counted = [row for row in rows if row.keep.get(ours, 1) <= JUDGED_SHARE]
        if counted:
            keep = statistics.mean(row.keep[ours] for row in counted)
            name = f"{ours}/{dense} over {len(counted)} clips, keep {keep:.3f}"
            lines.append(verdict(name, ratio(counted, ours, dense), bar(keep)))
    return lines


def ratio(rows: Sequence[Row], ours: str, dense: str) -> float:
    """Of summed times."""
    return sum(row.seconds[ours] for row in rows) / sum(row.seconds[dense] for row in rows)


def table(rows: Sequence[Row]) -> list[str]:
    """A line a clip: tokens kept and seconds."""
    letters = list(rows[0].seconds)
    kept = [letter for letter in ("c", "e") if letter in letters]
    cells = [["clip", *(f"keep {letter}" for letter in kept), *(f"{letter}, s" for letter in letters)]]
    for row in rows:
        cells.append(
            [row.clip, *(f"{row.keep[k]:.3f}" for k in kept), *(f"{row.seconds[x]:.3f}" for x in letters)]
        )
    return aligned_table(cells)


def plot(rows: Sequence[Row]) -> bytes:
    """PNG: time by the dense model's against the share of tokens kept, a panel a layout."""
    panels = [panel for panel in PANELS if panel[1] in rows[0].seconds]
    figure = Figure(figsize=(4.6 * len(panels), 4.0), dpi=110, layout="constrained")
    for axes, (layout, ours, dense) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        points = sorted((row.keep[ours], row.seconds[ours] / row.seconds[dense]) for row in rows)
        axes.plot([0, 1], [1, 1], color="grey", linewidth=1.4, label="dense, open_clip's blocks")
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1.4, label="ideal: time as tokens")
        axes.plot(*zip(*points, strict=True), "o", color="tab:orange", label="ours, a clip each")
        axes.set(xlim=(0, 1.02), ylim=(0, None), title=f"layout {layout}")
        axes.set(xlabel="share of tokens kept", ylabel="encoding time, dense = 1")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--all", action="store_true", help="every video of the folder")
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layouts", nargs="+", choices=("frame", "joint"), default=["frame", "joint"])
    options = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    encoders = Encoders(options.backbone, options.num_frames, options.layouts, dtype)
    patch, rows = encoders.any.video.tower.patch_size, []
    with torch.inference_mode():
        for name, frames_TCHW in clips(
            options.videos, options.num_frames, encoders.any.transform, patch, options.all
        ):
            rows.append(measure(encoders, name, frames_TCHW, options.repeats))
            print(rows[-1], file=sys.stderr, flush=True)
    what = f"{options.backbone}, {options.num_frames} frames, {options.precision}, random weights"
    text = [f"{what}. What the letters are: benchmarks/encode.py.", "", *table(rows), ""]
    text += [f"- {line}" for line in (*judged(rows, options.precision), *encoders.notes)]
    name = f"encode-{options.num_frames}-frames-{options.precision}" + "-all-clips" * options.all
    publish(name, "Encoding time", "\n".join(text), options.save)
    if options.save:
        write_whole(result_path(name, "png"), lambda file: file.write(plot(rows)))


if __name__ == "__main__":
    main()
