"""The command that measures token reducers side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlt_retrieval.cli.options import (
    device_option,
    finish,
    json_option,
    loader_options,
    model_maker,
    model_options,
    to_loader_options,
)
from rlt_retrieval.console import progress_bar, say

if TYPE_CHECKING:
    from rlt_retrieval.model import VideoTextModel


@click.group()
def bench() -> None:
    """Measure what a model costs and what it loses."""


@bench.command("reducers")
@click.argument("sources", metavar="CLIPS...", nargs=-1, required=True)
@model_options
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of each timing.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for bench.json, .md and .png.")
@loader_options
@device_option
@json_option
def bench_reducers(
    sources: tuple[str, ...],
    model_path: str | None,
    backbone: str | None,
    pretrained: str | None,
    overrides: tuple[str, ...],
    repeats: int,
    out: Path | None,
    workers: int | None,
    decode_timeout_seconds: float,
    device: str,
    as_json: bool,
) -> None:
    """Compare all token reducers at the cost of run-length tokens.

    CLIPS are videos, folders of them (captions in side files), caption files (CSV, JSON lines) and .tar shards.
    Of a video that is not cut by a caption file, the first 10 seconds are taken. Stock weights are measured in
    the layouts frame and joint, a trained model in its own.

    \b
    rlt-retrieval bench reducers my_videos/ --model runs/finetune
    rlt-retrieval bench reducers my_videos/ --out bench_out \\
        --backbone ViT-B-32 --pretrained none
    """
    from rlt_retrieval.bench.report import run_bench, write_bench
    from rlt_retrieval.data.files import make_folder

    makers = _model_makers(model_path, backbone, pretrained, overrides, device)
    if out:
        make_folder(out)  # a place that cannot be written shows before the work, not after it
    loader = to_loader_options(workers, decode_timeout_seconds)
    with progress_bar("measuring") as on_progress:
        result = run_bench(makers, sources, loader, repeats=repeats, on_progress=on_progress)
    for line in result.skipped:
        say(f"skipped {line}")
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.to_markdown())
    if out:
        write_bench(out, result)
    finish(result.skipped)


def _model_makers(
    model_path: str | None,
    backbone: str | None,
    pretrained: str | None,
    overrides: Sequence[str],
    device: str,
) -> list[Callable[[], VideoTextModel]]:
    """A trained model in its own layout; stock weights in the layout that was asked for, else in both."""
    from rlt_retrieval.config import parse_overrides

    if model_path or "layout" in parse_overrides(overrides):
        makers = [model_maker(model_path, backbone, pretrained, overrides, device)]
    else:
        both = ([*overrides, f"layout={layout}"] for layout in ("frame", "joint"))
        makers = [model_maker(None, backbone, pretrained, settings, device) for settings in both]
    return [make for make in makers if make]
