"""The command that scores a model, or embeddings of any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlt_retrieval.cli.options import (
    device_option,
    finish,
    json_option,
    load_model,
    loader_options,
    model_path_option,
    threads_option,
    to_loader_options,
)
from rlt_retrieval.console import progress_bar, say

if TYPE_CHECKING:
    from rlt_retrieval.embed import LoaderOptions
    from rlt_retrieval.eval.report_folder import Evaluated


@click.command("eval")
@click.argument("sources", metavar="[SHARDS]...", nargs=-1)
@model_path_option
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
@threads_option
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
    threads: int | None,
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
        loader = to_loader_options(workers, decode_timeout_seconds, max_bad_fraction, threads)
        run = _evaluate_model(sources, str(model_path), protocol, overrides, query_bank, loader, device)
    print(json.dumps(run.values, indent=2) if as_json else metrics_table({run.name: run.values}))
    if report:
        from rlt_retrieval.eval.report_folder import write_report_folder

        write_report_folder(report, run)
    finish(run.values.get("skipped") or run.scored.is_partial)


def _evaluate_model(
    sources: Sequence[str],
    model_path: str,
    protocol: Any,
    overrides: tuple[str, ...],
    query_bank: Path | None,
    loader: LoaderOptions,
    device: str,
) -> Evaluated:
    from rlt_retrieval.embed import embed_texts, evaluate_shards, middle_frames
    from rlt_retrieval.eval.report_folder import Evaluated
    from rlt_retrieval.eval.scored import read_query_bank, with_extra_rows
    from rlt_retrieval.viz import thumbnail_png

    queries = read_query_bank(query_bank) if query_bank else None
    model = load_model(model_path, overrides, device)
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
