"""The commands that build an index, inspect it and search in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from rlt_retrieval.cli.options import (
    device_option,
    dry_run_option,
    finish,
    json_option,
    loader_options,
    model_maker,
    model_options,
    threads_option,
    to_loader_options,
)
from rlt_retrieval.console import print_values, progress_bar, say, say_problem


@click.group()
def index() -> None:
    """Build and inspect an index of videos."""


@index.command("build")
@click.argument("index_path", metavar="INDEX", type=click.Path(path_type=Path))
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@model_options
@click.option(
    "--window-seconds", type=click.FloatRange(0, min_open=True), help="Length of a clip. [default: 10]"
)
@click.option("--retry-failed", is_flag=True, help="Try files again that failed before.")
@loader_options
@threads_option
@device_option
@dry_run_option
@json_option
def index_build(
    index_path: Path,
    sources: tuple[str, ...],
    model_path: str | None,
    backbone: str | None,
    pretrained: str | None,
    overrides: tuple[str, ...],
    window_seconds: float | None,
    retry_failed: bool,
    workers: int | None,
    decode_timeout_seconds: float,
    threads: int | None,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Index videos, folders of videos and .tar shards; what is there already is not done again.

    \b
    rlt-retrieval index build my.index my_videos/
    rlt-retrieval index build my.index my_videos/ --model runs/finetune
    """
    from rlt_retrieval.video_index import Watcher, build_index, plan_build

    make_model = model_maker(model_path, backbone, pretrained, overrides, device)
    if dry_run:
        print_values(plan_build(index_path, sources, retry_failed=retry_failed), as_json)
        return
    with progress_bar("indexing") as on_progress:
        report = build_index(
            index_path,
            sources,
            make_model=make_model,
            device=device,
            window_seconds=window_seconds,
            options=to_loader_options(workers, decode_timeout_seconds, threads=threads),
            retry_failed=retry_failed,
            watcher=Watcher(say_problem, on_progress),
        )
    values = report.to_dict()
    print_values(values if as_json else {**values, "problems": len(report.problems)}, as_json)
    finish(report.problems)


@index.command("info")
@click.argument("index_path", metavar="INDEX", type=click.Path(path_type=Path))
@json_option
def index_info(index_path: Path, as_json: bool) -> None:
    """Say what an index holds and how it was made.

    \b
    rlt-retrieval index info my.index
    """
    from rlt_retrieval.indexing.store import ClipStore

    with ClipStore.open(index_path) as store:
        problems = [
            {"status": row.status, "video": row.video, "reason": row.reason}
            for row in store.videos()
            if row.status != "ok"
        ]
        print_values({**asdict(store.counts()), **store.manifest, "problems": problems}, as_json)


@click.command()
@click.argument("index_path", metavar="INDEX", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="How many hits.")
@click.option("--per-video", is_flag=True, help="At most one hit, the best, of each video.")
@click.option("--float16", is_flag=True, help="Half-precision vectors on the GPU.")
@device_option
@json_option
def search(
    index_path: Path, text: str, k: int, per_video: bool, float16: bool, device: str, as_json: bool
) -> None:
    """Find the clips that fit a text best, one line a hit.

    \b
    rlt-retrieval search my.index "opens the fridge" -k 5
    """
    from rlt_retrieval.video_index import VideoIndex

    with VideoIndex.open(index_path, device=device, float16=float16) as opened:
        hits = opened.search(text, k, per_video=per_video)
    for hit in hits:
        span = f"{hit.start_seconds:8.1f} – {hit.end_seconds:.1f} s"
        print(
            json.dumps(asdict(hit)) if as_json else f"{hit.rank:3}  {hit.score:.4f}  {span:20}  {hit.video}"
        )
    if not hits:
        say(f"{index_path} holds no clip yet; add videos with: rlt-retrieval index build {index_path} SOURCE")
