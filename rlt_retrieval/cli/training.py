"""The commands that train: by a recipe, and the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlt_retrieval.cli.options import device_option, dry_run_option, finish, json_option, threads_option
from rlt_retrieval.console import print_values, progress_bar

if TYPE_CHECKING:
    from rlt_retrieval.training.loop import TrainResult


@click.command()
@click.option(
    "--out", default="demo_out", show_default=True, help="Folder of everything that the demo makes."
)
@click.option("--fast", is_flag=True, help="A few steps on a few clips: shows that it works, not how well.")
@device_option
@json_option
def demo(out: str, fast: bool, device: str, as_json: bool) -> None:
    """Make synthetic videos, train on them, index and search them, and write a report.

    \b
    rlt-retrieval demo --out demo_out
    """
    from rlt_retrieval.demo import run_demo

    with progress_bar("training") as advance:
        result = run_demo(Path(out), fast=fast, device=device, on_step=_training_step(advance))
    print(json.dumps(result.figures, indent=2) if as_json else result.table)


@click.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. optim.steps=100."
)
@threads_option
@device_option
@dry_run_option
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], threads: int | None, device: str, dry_run: bool, as_json: bool
) -> None:
    """Train by a recipe: a TOML file, or the name of one that ships (demo, finetune, …).

    Killed and started again with the same command, it continues where it was.

    \b
    rlt-retrieval train finetune --set 'data.train=["shards/train"]'
    torchrun --nproc-per-node 8 -m rlt_retrieval train finetune
    """
    from rlt_retrieval.config import load_recipe

    settings = load_recipe(recipe, overrides)
    if dry_run:
        print(settings.model_dump_json(indent=2))
        return
    from rlt_retrieval.training.loop import train as run

    with progress_bar("training") as advance:
        result = run(settings, device=device, num_threads=threads, on_step=_training_step(advance))
    if result.is_first:
        _print_training(result, as_json)
    # Under torchrun a process that exits with anything but 0 has failed, and takes the others with it.
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    finish(result.num_skipped and is_alone)


def _training_step(advance: Callable[..., None]) -> Callable[[dict[str, Any], int], None]:
    return lambda line, num_steps: advance(line["step"], num_steps, f"loss {line['loss']:.3f}")


def _print_training(result: TrainResult, as_json: bool) -> None:
    """The last line of the run; for a reader, the scores of its evaluation as the table that `eval` prints."""
    from rlt_retrieval.eval.report import metrics_table

    last = dict(result.last)
    scores = None if as_json else last.pop("eval", None)
    print_values({"model": str(result.model_folder), **last, "skipped": result.num_skipped}, as_json)
    if scores:
        print(metrics_table({"eval": scores}))
