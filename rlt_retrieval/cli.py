"""The command line: parse → one domain call → print. stdout is data, everything else goes to stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rlt_retrieval import __version__
from rlt_retrieval.console import (
    log_to_stderr,
    print_values,
    progress_bar,
    say,
    say_problem,
)
from rlt_retrieval.errors import ConfigError, RetrievalError

if TYPE_CHECKING:
    from rlt_retrieval.embed import LoaderOptions
    from rlt_retrieval.encoders.towers.catalogue import ModelRow
    from rlt_retrieval.eval.report_folder import Evaluated
    from rlt_retrieval.model import VideoTextModel
    from rlt_retrieval.training.loop import TrainResult

EXIT_ERROR, EXIT_SKIPPED, EXIT_INTERRUPTED = 1, 3, 130  # click's own for wrong usage: 2
WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # backbones that bring their own
SPLIT_FORMATS = ("ek100", "msrvtt")  # sources that are an official folder of annotations, with splits
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


def loader_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that decode videos."""
    command = click.option(
        "--decode-timeout-seconds",
        type=click.FloatRange(0, 86400, min_open=True),
        default=60.0,
        show_default=True,
        help="Longest wait for one clip; then its file counts as broken.",
    )(command)
    return click.option(
        "--workers", type=click.IntRange(0), help="Decoding processes. [default: a quarter of the cores]"
    )(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that take a trained model or stock weights; see `_model_maker`."""
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Video setting, e.g. num_frames=8."
        ),
        click.option("--pretrained", help="open_clip tag, weight file, or none (random). [default: openai]"),
        click.option("--backbone", help="open_clip model name. [default: ViT-B-16]"),
        click.option("--model", "model_path", help="A trained model: a run folder, or its model folder."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlt-retrieval")
def cli() -> None:
    """Text-to-video search whose cost follows what changes in a video.

    \b
    rlt-retrieval index build my.index my_videos/
    rlt-retrieval search my.index "opens the fridge"

    Exit codes: 0 ok, 1 error, 2 usage, 3 finished but some inputs were skipped, 130 interrupted.
    `--debug` with any command shows the traceback of an error.
    """


@cli.command()
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


@cli.group()
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
            num_workers=_num_workers(workers),
            timeout_seconds=decode_timeout_seconds,
            on_progress=on_progress,
        )
    for failure in report.failures:
        say(f"skipped {failure.shard}: {failure.reason} (clip {failure.key})")
    values = {"clips": report.num_clips, "shards": len(report.shards), "skipped": len(report.failures)}
    print_values({**count_clips(found), **values}, as_json)
    if report.failures or found.absent:
        say(f"what was left out is listed in {out_dir / 'failures.jsonl'}")
    _exit(EXIT_SKIPPED if report.failures or found.absent else 0)


@cli.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. optim.steps=100."
)
@device_option
@dry_run_option
@json_option
def train(recipe: str, overrides: tuple[str, ...], device: str, dry_run: bool, as_json: bool) -> None:
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
        result = run(settings, device=device, on_step=_training_step(advance))
    if result.is_first:
        _print_training(result, as_json)
    # Under torchrun a process that exits with anything but 0 has failed, and takes the others with it.
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    _exit(EXIT_SKIPPED if result.num_skipped and is_alone else 0)


@cli.group()
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

    make_model = _model_maker(model_path, backbone, pretrained, overrides, device)
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
            options=_loader(workers, decode_timeout_seconds),
            retry_failed=retry_failed,
            watcher=Watcher(say_problem, on_progress),
        )
    values = report.to_dict()
    print_values(values if as_json else {**values, "problems": len(report.problems)}, as_json)
    _exit(EXIT_SKIPPED if report.problems else 0)


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


@cli.command()
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


@cli.command("eval")
@click.argument("sources", metavar="[SHARDS]...", nargs=-1)
@click.option("--model", "model_path", help="A trained model: a run folder, or its model folder.")
@click.option(
    "--protocol",
    type=click.Choice(["ek100", "msrvtt", "captions"]),
    help="[default: ek100 for shards made from it, else captions]",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another video setting, e.g. reducer=none."
)
@click.option(
    "--query-bank",
    type=click.Path(path_type=Path),
    help="For a QB-norm row: a text file, one query a line, or the folder of the training shards. No test queries.",
)
@click.option(
    "--max-bad-fraction",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Give up when a larger share of the samples is bad.",
)
@click.option("--embeddings", type=click.Path(path_type=Path), help="An .npz instead of SHARDS and --model.")
@click.option(
    "--annotations", type=click.Path(path_type=Path), help="Official EK-100 annotations, for --embeddings."
)
@click.option("--split", type=click.Choice(["train", "test"]), help="Of --annotations. [default: test]")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    help="A second .npz: prints the paired difference.",
)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for JSON, Markdown, HTML and plots.")
@loader_options
@device_option
@json_option
def evaluate(
    sources: tuple[str, ...],
    model_path: str | None,
    protocol: Any,
    overrides: tuple[str, ...],
    query_bank: Path | None,
    max_bad_fraction: float,
    embeddings: Path | None,
    annotations: Path | None,
    split: Any,
    compare: Path | None,
    report: Path | None,
    workers: int | None,
    decode_timeout_seconds: float,
    device: str,
    as_json: bool,
) -> None:
    """Score a model on shards, or the embeddings of any model: mAP, nDCG, recall, both ways, by exact search.

    \b
    rlt-retrieval eval shards/test --model runs/finetune
    rlt-retrieval eval shards/ek100_test --model runs/ek100 --report reports/ek100
    rlt-retrieval eval --embeddings theirs.npz --annotations annotations/

    The .npz holds video_ids, video_embeddings, text_ids, text_embeddings (and maybe bank_embeddings); ids are narration
    ids, in any order. Scores are inner products of the embeddings as they are: normalise them first where cosine
    similarity is meant. An EK-100 set with clips missing is scored on what is there, says "partial", and exits with 3.
    """
    from rlt_retrieval.data.files import make_folder
    from rlt_retrieval.eval.report import metrics_table

    if not embeddings and not (sources and model_path):
        raise click.UsageError("give SHARDS and --model, or --embeddings and --annotations")
    if report:
        make_folder(report)  # a place that cannot be written shows before the work, not after it
    if embeddings:
        model_only = {"SHARDS": sources, "--model": model_path, "--protocol": protocol, "--set": overrides}
        _refuse("--embeddings", {**model_only, "--query-bank": query_bank})
        run = _evaluate_file(embeddings, annotations, split or "test", compare)
    else:
        _refuse("SHARDS", {"--annotations": annotations, "--split": split, "--compare": compare})
        loader = _loader(workers, decode_timeout_seconds, max_bad_fraction)
        run = _evaluate_model(sources, str(model_path), protocol, overrides, query_bank, loader, device)
    print(json.dumps(run.values, indent=2) if as_json else metrics_table({run.name: run.values}))
    if report:
        from rlt_retrieval.eval.report_folder import write_report_folder

        write_report_folder(report, run)
    _exit(EXIT_SKIPPED if run.values.get("skipped") or run.scored.is_partial else 0)


@cli.group()
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
    loader = _loader(workers, decode_timeout_seconds)
    with progress_bar("measuring") as on_progress:
        result = run_bench(makers, sources, loader, repeats=repeats, on_progress=on_progress)
    for line in result.skipped:
        say(f"skipped {line}")
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.to_markdown())
    if out:
        write_bench(out, result)
    _exit(EXIT_SKIPPED if result.skipped else 0)


@cli.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "with_unsupported", is_flag=True, help="Unsupported ones too, with the reason.")
@json_option
def models(names: tuple[str, ...], with_unsupported: bool, as_json: bool) -> None:
    """List the open_clip models whose image tower can read run-length tokens.

    With NAMEs: those whose name contains one of them, supported or not. The tags are the published weights.

    \b
    rlt-retrieval models
    rlt-retrieval models SigLIP2 --json
    """
    from rlt_retrieval.encoders.towers.catalogue import list_models

    rows = [row for row in list_models(names) if row.supported or with_unsupported or names]
    if not rows:
        raise ConfigError(f"no model of open_clip has {' or '.join(names)} in its name; try models --all")
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else _models_text(rows))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; errors that a user can cause are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 come out as they are
    try:
        code = cli.main(arguments, prog_name="rlt-retrieval", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = _report("interrupted; the same command continues", EXIT_INTERRUPTED, debug)
    except RetrievalError as error:
        code = _report(f"Error: {error}", EXIT_ERROR, debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing to say, nobody to say it to
        code = EXIT_ERROR
    except OSError as error:
        code = _report(f"Error: {_explain(error)}", EXIT_ERROR, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    way_out = "free space there" if error.errno in DISK_FULL else "check the path and its permissions"
    return f"{place}{error.strerror or error}; {way_out}, or choose another place"


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(" ".join(message.split()))
    return code


def _check_source_options(source: Path, format_: str, videos: Path | None, split: str | None) -> None:
    if format_ in SPLIT_FORMATS and (videos is None or split is None):
        raise click.UsageError(f"--format {format_} needs --videos DIR and --split train or test")
    if split and format_ not in SPLIT_FORMATS:
        raise click.UsageError(f"--split goes with --format {' or '.join(SPLIT_FORMATS)}")
    if videos and (format_ == "folder" or (format_ == "auto" and source.is_dir())):
        raise click.UsageError("--videos does not go with a folder of videos; a data set needs --format")


def _model_maker(
    model_path: str | None,
    backbone: str | None,
    pretrained: str | None,
    overrides: Sequence[str],
    device: str,
) -> Callable[[], VideoTextModel] | None:
    """How to make the model that was asked for; None where nothing was asked (the index's own, else stock)."""
    if model_path and (backbone or pretrained):
        raise click.UsageError("--model excludes --backbone and --pretrained")
    if backbone and not pretrained and not backbone.startswith(WITH_WEIGHTS):
        raise click.UsageError(
            f"--backbone {backbone} needs --pretrained: a tag, a weight file, or none (random)"
        )
    if not (model_path or backbone or pretrained or overrides):
        return None

    def make() -> VideoTextModel:
        from rlt_retrieval.config import parse_overrides, parse_video_settings
        from rlt_retrieval.model import VideoTextModel
        from rlt_retrieval.video_index import STOCK

        if model_path:
            model = VideoTextModel.load(model_path, device=device)
            return model.with_settings(**parse_overrides(overrides)) if overrides else model
        weights = None if pretrained == "none" else pretrained or STOCK[1]
        settings = parse_video_settings(overrides)
        return VideoTextModel.create(backbone or STOCK[0], weights, device=device, **settings)

    return make


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
        makers = [_model_maker(model_path, backbone, pretrained, overrides, device)]
    else:
        both = ([*overrides, f"layout={layout}"] for layout in ("frame", "joint"))
        makers = [_model_maker(None, backbone, pretrained, settings, device) for settings in both]
    return [make for make in makers if make]


def _models_text(rows: Sequence[ModelRow]) -> str:
    """A line a model; its tags, or why it is not supported, last: they may be long."""
    cells = [["model", "parameters", "GFLOPs a frame", "input", "pretrained tags (licence)"]]
    for row in rows:
        parameters = (row.image_parameters or 0) + (row.text_parameters or 0)
        size = "x".join(map(str, row.image_size or ()))
        tags = [tag.name if tag.licence == "unknown" else f"{tag.name} ({tag.licence})" for tag in row.tags]
        text = " + text" if row.text_parameters is None else ""
        numbers = (
            [f"{parameters:,.0f} M{text}", f"{row.gflops or 0:,.1f}", size] if row.supported else ["–"] * 3
        )
        cells.append(
            [row.name, *numbers, ", ".join(tags) if row.supported else row.reason.partition(": ")[0]]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:]), last])
        for name, *numbers, last in cells
    ]
    return "\n".join([*lines, "No licence beside a tag: not known here, see its model card."])


def _evaluate_model(
    sources: Sequence[str],
    model_path: str,
    protocol: Any,
    overrides: tuple[str, ...],
    query_bank: Path | None,
    loader: LoaderOptions,
    device: str,
) -> Evaluated:
    from dataclasses import replace

    from rlt_retrieval.config import parse_overrides
    from rlt_retrieval.embed import embed_texts, evaluate_shards, middle_frames
    from rlt_retrieval.eval.report_folder import Evaluated
    from rlt_retrieval.eval.scored import read_query_bank, with_extra_rows
    from rlt_retrieval.model import VideoTextModel
    from rlt_retrieval.viz import thumbnail_png

    queries = read_query_bank(query_bank) if query_bank else None
    model = VideoTextModel.load(model_path, device=device)
    model = model.with_settings(**parse_overrides(overrides)) if overrides else model
    with progress_bar("embedding clips") as on_progress:
        scores = evaluate_shards(model, sources, loader, protocol=protocol, on_progress=on_progress)
    for failure in scores.skipped:
        say(f"skipped {failure.key} in {failure.shard}: {failure.reason}")
    z_bank = embed_texts(model, queries) if queries else None
    scores = replace(scores, scored=with_extra_rows(replace(scores.scored, z_bank_BD=z_bank)))
    return Evaluated(
        Path(model_path).name,
        scores.scored,
        scores.to_dict(),
        kept_share_V=scores.embeddings.kept_tokens / scores.embeddings.all_tokens,
        pictures=lambda rows: [
            None if frames is None else thumbnail_png(frames)
            for frames in middle_frames(scores.embeddings, rows, loader)
        ],
    )


def _evaluate_file(path: Path, annotations: Path | None, split: Any, compare: Path | None) -> Evaluated:
    if annotations is None:
        raise click.UsageError("--embeddings needs --annotations: the folder of the official CSVs")
    from rlt_retrieval.eval.report_folder import Evaluated
    from rlt_retrieval.eval.scored import comparison, score_embedding_file, with_extra_rows

    scored = with_extra_rows(score_embedding_file(path, annotations, split))
    values = scored.to_dict()
    if compare:
        other = score_embedding_file(compare, annotations, split)
        values["comparison"] = comparison(scored, str(compare), other)
    return Evaluated(str(path), scored, values)


def _refuse(chosen: str, excluded: dict[str, Any]) -> None:
    """Wrong usage: options that mean nothing beside the chosen one."""
    given = [name for name, value in excluded.items() if value]
    if given:
        raise click.UsageError(f"{chosen} excludes {', '.join(given)}")


def _loader(
    workers: int | None, decode_timeout_seconds: float, max_bad_fraction: float = 0.1
) -> LoaderOptions:
    from rlt_retrieval.embed import LoaderOptions

    return LoaderOptions(_num_workers(workers), decode_timeout_seconds, max_bad_fraction)


def _num_workers(workers: int | None) -> int:
    from rlt_retrieval.config import default_num_workers

    return default_num_workers() if workers is None else workers


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


def _exit(code: int) -> None:
    click.get_current_context().exit(code)
