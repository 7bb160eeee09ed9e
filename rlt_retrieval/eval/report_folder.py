"""The folder that `eval --report` leaves: result.json, result.md, report.html, plots, and the embeddings.

Shapes: V clips.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.data.files import make_folder, write_whole
from rlt_retrieval.eval.embedding_file import write_embeddings
from rlt_retrieval.eval.examples import Pictures, example_queries
from rlt_retrieval.eval.metrics import evaluate_queries, recall_at_k
from rlt_retrieval.eval.protocols import Pairs
from rlt_retrieval.eval.report import heading, image_row, page, paragraph, table, warning, write_report
from rlt_retrieval.eval.scored import Scored
from rlt_retrieval.eval.tables import facts, markdown, result_tables

HEAT_MAP_SIDE = 40
RECALL_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation as a report shows it.

    values: everything for result.json, a superset of `scored.to_dict()`. kept_share_V: share of tokens kept of each
    clip (None: not known). pictures: thumbnails of clips by row (None: there are no videos to show).
    """

    name: str
    scored: Scored
    values: Mapping[str, Any]
    kept_share_V: NDArray[np.float64] | None = None
    pictures: Pictures | None = None


def write_report_folder(folder: Path, run: Evaluated) -> None:
    """Write the report's files, each whole or not at all; earlier ones of the same name are replaced.

    Raises:
        ShardError, RetrievalError: disk full, folder not writable.
    """
    make_folder(folder)
    # The numbers first: a plot or a picture that fails must not lose them.
    _write(folder / "result.json", json.dumps({"name": run.name, **run.values}, indent=2).encode())
    _write(folder / "result.md", markdown(run.name, run.values).encode())
    plots = _plots(run)
    for name, png in plots.items():
        _write(folder / f"{name}.png", png)
    scored = run.scored
    write_embeddings(
        folder / "embeddings.npz",
        scored.clip_ids,
        scored.z_video_VD,
        scored.text_ids,
        scored.z_text_TD,
        scored.z_bank_BD,
    )
    write_report(folder / "report.html", _html(run, plots))


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def _html(run: Evaluated, plots: Mapping[str, bytes]) -> str:
    note = [warning(run.scored.note)] if run.scored.note else []
    parts = [*note, paragraph(" ".join(facts(run.values)))]
    for title, remark, headers, rows in result_tables(run.name, run.values):
        parts += [heading(title), *([paragraph(remark)] if remark else []), table(headers, rows)]
    parts += [heading("Plots"), image_row((png, "") for png in plots.values())]
    return page(f"Evaluation of {run.name}", [*parts, *example_queries(run.scored, run.pictures)])


# ---- plots ----


def _plots(run: Evaluated) -> dict[str, bytes]:
    """File name without .png → picture."""
    from rlt_retrieval.eval.plots import heat_maps, histogram, recall_curves  # they load matplotlib

    pairs = run.scored.pairs
    clip_queries, text_queries = evaluate_queries(pairs.similarity, pairs.relevancy)
    by_direction = {"text to video": text_queries, "video to text": clip_queries}
    precisions = {
        name: q.average_precision[~np.isnan(q.average_precision)] for name, q in by_direction.items()
    }
    num_texts, num_clips = (len(values) for values in precisions.values())  # those left out have no AP
    title = f"Average precision of {num_texts:,} text and {num_clips:,} clip queries"
    plots = {
        "average_precision": histogram(precisions, "AP of a query", "share of queries", title),
        "recall": recall_curves(_recall_at(pairs)),
        "similarity": heat_maps(
            _sample_maps(pairs), "text (one that fits a row)", "clip (row of the sample)"
        ),
    }
    if run.kept_share_V is not None:
        plots["tokens_kept"] = histogram(
            {"clips": run.kept_share_V}, "share of tokens kept", "share of clips", "Tokens kept per clip"
        )
    return plots


def _recall_at(pairs: Pairs) -> dict[str, tuple[list[int], list[float]]]:
    """Recall of the best right item (relevancy 1), k up to the number of items."""
    scores = recall_at_k(pairs.similarity, pairs.relevancy == 1, RECALL_KS)
    num_videos, num_texts = pairs.similarity.shape
    curves = {}
    for name, ranks, num_items in (
        ("text to video", scores.text_to_video, num_videos),
        ("video to text", scores.video_to_text, num_texts),
    ):
        ks = [k for k in RECALL_KS if k <= num_items]
        curves[name] = (ks, [ranks.recall[k] for k in ks])
    return curves


def _sample_maps(pairs: Pairs) -> dict[str, NDArray[Any]]:
    """Similarity and relevancy of evenly spaced clips and, for each, one of its most relevant texts."""
    num_clips = len(pairs.similarity)
    step = math.ceil(num_clips / HEAT_MAP_SIDE)
    rows = np.arange(0, num_clips, step)
    columns = list(dict.fromkeys(pairs.relevancy[rows].argmax(axis=1).tolist()))
    part = np.ix_(rows, columns)
    sample = f"one clip every {step:,} rows" if step > 1 else "every clip"
    return {
        f"Similarity, {sample}": pairs.similarity[part],
        f"Relevancy, {sample}": pairs.relevancy[part].astype(float),
    }
