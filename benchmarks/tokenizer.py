"""What the run-length tokenizer costs beside the decode before it and the encode after it, on the CPU.

    python benchmarks/tokenizer.py [--videos my_videos/] [--all] [--num-frames 16] [--layouts frame joint]

Loader workers decode and tokenize with one torch thread, the encoder has them all: so it is judged. Every layout and
reference with its default settings; the encoder reads the very tokens (random weights: cost is measured, not quality).

    cut      all patches, each to one piece of memory
    mask     which of them are kept
    gather   the tokens of the mask: patches, positions, run lengths
    lengths  the run lengths alone
    whole    frames to tokens, in one call
    decode   the first 10 s of the file to frames of the model's size
    encode   tokens to the embedding

--videos takes the first 10 s of every video of a folder, or of CLIPS alone if it holds them all; without it, videos
with a planted share of noise. Times are medians of alternated repetitions; bars are judged on sums over the clips.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
import torch
from measuring import Run, alternated, publish, script_parser, verdict

from rlt_retrieval import RunLengthTokenizer, VideoTextModel, pack
from rlt_retrieval.data.video import Source, decode_clip, encode_mp4
from rlt_retrieval.encoders.tokenizer import run_lengths, tokens_of_patches
from rlt_retrieval.eval.report import aligned_table

PLANTED_FPS = 24
LAYOUTS = ("frame", "joint")
REFERENCES = ("previous", "anchor")
BARS = {"decode": 0.2, "encode": 0.02}  # of their time
ALL = ", all threads"
COLUMNS = ("cut", "mask", "gather", "lengths", "whole", f"whole{ALL}", "decode", f"decode{ALL}", "encode")


@dataclass(frozen=True)
class Row:
    """One clip in one case (layout and reference): share of tokens kept, seconds by column."""

    clip: str
    case: str
    keep: float
    seconds: dict[str, float]


def cases(backbone: str, num_frames: int, layouts: Sequence[str]) -> dict[str, VideoTextModel]:
    """A model for each layout and reference."""
    models = {
        layout: VideoTextModel.create(backbone, None, device="cpu", layout=layout, num_frames=num_frames)
        for layout in layouts
    }
    return {
        f"{layout}, {reference}": model.with_settings(reference=reference)
        for layout, model in models.items()
        for reference in REFERENCES
    }


def sources(folder: Path | None, everything: bool, side: int, patch: int) -> Iterator[tuple[str, Source]]:
    """(name, video) of a folder's videos; without a folder, of planted ones."""
    if folder is not None:
        yield from ((path.name, path) for path in measuring.videos(folder, everything))
        return
    rng = np.random.default_rng(0)
    for share in measuring.PLANTED_SHARES:
        num_frames = round(measuring.SECONDS * PLANTED_FPS)
        frames_TCHW = measuring.planted_clip(share, num_frames, side, patch, rng)
        yield f"planted {share:g}", encode_mp4(frames_TCHW.permute(0, 2, 3, 1).numpy(), fps=PLANTED_FPS)


def with_threads(num_threads: int, run: Run) -> Run:
    def threaded() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return threaded


def measure(models: Mapping[str, VideoTextModel], name: str, source: Source, repeats: int) -> list[Row]:
    """A row a case."""
    any_model = next(iter(models.values()))

    def decode() -> torch.Tensor:
        return decode_clip(
            source,
            num_frames=any_model.config.video.num_frames,
            transform=any_model.transform,
            end_seconds=measuring.SECONDS,
        ).frames_TCHW

    frames_TCHW = decode()
    runs = on_both_threads("decode", decode)
    for case, model in models.items():
        runs |= {f"{case}: {part}": run for part, run in parts(model, frames_TCHW).items()}
    taken = alternated(runs, repeats)
    return [
        Row(name, case, kept_share(model, frames_TCHW), seconds_of(case, taken))
        for case, model in models.items()
    ]


def seconds_of(case: str, taken: Mapping[str, float]) -> dict[str, float]:
    """By column: the case's own times, and decode's, which all share."""
    own = {part: f"{case}: {part}" for part in COLUMNS}
    return {part: taken[own[part] if own[part] in taken else part] for part in COLUMNS}


def on_both_threads(name: str, run: Run) -> dict[str, Run]:
    return {name: with_threads(1, run), f"{name}{ALL}": run}


def parts(model: VideoTextModel, frames_TCHW: torch.Tensor) -> dict[str, Run]:
    """What to time of a case."""
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, RunLengthTokenizer)
    patches_thwucpp = tokenizer.cut(frames_TCHW)
    mask_thw = tokenizer.keep_mask_of(patches_thwucpp)
    packed = pack([tokenizer(frames_TCHW)])
    return {
        **on_both_threads("whole", lambda: tokenizer(frames_TCHW)),
        "cut": with_threads(1, lambda: tokenizer.cut(frames_TCHW)),
        "mask": with_threads(1, lambda: tokenizer.keep_mask_of(patches_thwucpp)),
        "gather": with_threads(1, lambda: tokens_of_patches(patches_thwucpp, mask_thw)),
        "lengths": with_threads(1, lambda: run_lengths(mask_thw)),
        "encode": lambda: model.encode_tokens(packed),
    }


def kept_share(model: VideoTextModel, frames_TCHW: torch.Tensor) -> float:
    tokens = model.tokenizer(frames_TCHW)
    return len(tokens) / math.prod(tokens.grid)


# --- the result -------------------------------------------------------------------------------------------------


def judged(rows: Sequence[Row]) -> list[str]:
    """A line a case and bar: the tokenizer's time, summed over the clips, by that of decode or encode."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        sums = {part: sum(row.seconds[part] for row in rows if row.case == case) for part in COLUMNS}
        lines += [
            verdict(f"{case}: whole/{part}", sums["whole"] / sums[part], bar) for part, bar in BARS.items()
        ]
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A line a clip and case, in milliseconds."""
    cells = [["clip", "layout, reference", "keep", *COLUMNS]]
    for row in rows:
        times = (f"{1e3 * row.seconds[part]:.{0 if part in BARS else 2}f}" for part in COLUMNS)
        cells.append([row.clip, row.case, f"{row.keep:.3f}", *times])
    return aligned_table(cells)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--all", action="store_true", help="every video of the folder")
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    options = parser.parse_args()
    models = cases(options.backbone, options.num_frames, options.layouts)
    some = next(iter(models.values()))
    rows = []
    with torch.inference_mode():
        for name, source in sources(
            options.videos, options.all, some.transform.height, some.video.tower.patch_size
        ):
            rows += measure(models, name, source, options.repeats)
            print(*rows[-len(models) :], sep="\n", file=sys.stderr, flush=True)
    what = f"{options.backbone}, {options.num_frames} frames; ms, with one thread but encode and where said."
    text = [f"{what} What the columns are: benchmarks/tokenizer.py.", "", *table(rows), ""]
    text += [f"- {line}" for line in judged(rows)]
    publish(f"tokenizer-{options.num_frames}-frames", "Tokenizing time", "\n".join(text), options.save)


if __name__ == "__main__":
    main()
