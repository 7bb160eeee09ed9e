"""The command that makes shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rlt_retrieval.cli.options import dry_run_option, finish, json_option, loader_options, to_num_workers
from rlt_retrieval.console import print_values, progress_bar, say

SPLIT_FORMATS = ("ek100", "msrvtt")  # sources that are an official folder of annotations, with splits


@click.group()
def shards() -> None:
    """Make WebDataset shards."""


@shards.command("make")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(["auto", "folder", "csv", "jsonl", *SPLIT_FORMATS]),
    default="auto",
    show_default=True,
    help="What SOURCE is.",
)
@click.option(
    "--videos",
    type=click.Path(path_type=Path),
    help="Folder of the videos that SOURCE names; those that are not there are listed and left out.",
)
@click.option(
    "--split", type=click.Choice(["train", "test"]), help="Of ek100 or msrvtt (Training-9k and 1k-A)."
)
@click.option(
    "--clips-per-shard", type=click.IntRange(1), default=256, show_default=True, help="Clips in one .tar."
)
@click.option(
    "--short-side", type=click.IntRange(16), default=288, show_default=True, help="Pixels; never enlarged."
)
@loader_options
@dry_run_option
@json_option
def shards_make(
    source: Path,
    out_dir: Path,
    format_: Any,
    videos: Path | None,
    split: Any,
    clips_per_shard: int,
    short_side: int,
    workers: int | None,
    decode_timeout_seconds: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Cut captioned clips out of videos and write them as shards.

    SOURCE is a folder of videos (captions in side files, video.txt beside video.mp4, one a line), a CSV with the
    columns video,caption[,start_seconds,end_seconds], JSON lines {"video": …, "captions": [...]}, or the folder of
    the official annotations of EPIC-KITCHENS-100 or MSR-VTT.

    \b
    rlt-retrieval shards make clips.csv shards/train
    rlt-retrieval shards make clips.jsonl shards/test --videos my_videos
    rlt-retrieval shards make annotations/ shards/test --format ek100 \\
        --videos EPIC-KITCHENS --split test
    """
    from rlt_retrieval.data.making import count_clips, make_shards, plan_shards
    from rlt_retrieval.data.sources import read_source

    _check_source_options(source, format_, videos, split)
    found = read_source(source, format_, videos_dir=videos, split=split)
    for video, num_clips in found.missing.items():
        say(f"missing {video}: {num_clips} {'clip' if num_clips == 1 else 'clips'}")
    if dry_run:
        sizes = {"samples_per_shard": clips_per_shard, "short_side": short_side}
        print_values(plan_shards(found, **sizes), as_json)
        return
    with progress_bar("cutting clips") as on_progress:
        report = make_shards(
            found.clips,
            out_dir,
            absent=found.absent,
            dataset=found.describe(),
            samples_per_shard=clips_per_shard,
            short_side=short_side,
            num_workers=to_num_workers(workers),
            timeout_seconds=decode_timeout_seconds,
            on_progress=on_progress,
        )
    for failure in report.failures:
        say(f"skipped {failure.shard}: {failure.reason} (clip {failure.key})")
    values = {"clips": report.num_clips, "shards": len(report.shards), "skipped": len(report.failures)}
    print_values({**count_clips(found), **values}, as_json)
    if report.failures or found.absent:
        say(f"what was left out is listed in {out_dir / 'failures.jsonl'}")
    finish(report.failures or found.absent)


def _check_source_options(source: Path, format_: str, videos: Path | None, split: str | None) -> None:
    if format_ in SPLIT_FORMATS and (videos is None or split is None):
        raise click.UsageError(f"--format {format_} needs --videos DIR and --split train or test")
    if split and format_ not in SPLIT_FORMATS:
        raise click.UsageError(f"--split goes with --format {' or '.join(SPLIT_FORMATS)}")
    if videos and (format_ == "folder" or (format_ == "auto" and source.is_dir())):
        raise click.UsageError("--videos does not go with a folder of videos; a data set needs --format")
