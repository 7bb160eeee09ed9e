"""The tables of a report, with published results beside ours: cells as text, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlt_retrieval.eval.published import EK100_ROWS, MSRVTT_ROWS
from rlt_retrieval.eval.report import DIRECTIONS, NO_VALUE, SHORT_NAMES

Values = Mapping[str, Any]  # what result.json holds: `Scored.to_dict()` and maybe more


class Table(NamedTuple):
    """Cells as they are to be read, for Markdown and HTML alike."""

    title: str
    remark: str
    headers: list[str]
    rows: list[list[str]]


def result_tables(name: str, values: Values) -> list[Table]:
    """The tables of one evaluation; values: what result.json holds."""
    beside = {"ek100": _beside_ek100, "msrvtt": _beside_msrvtt}.get(values["protocol"])
    extra = values.get("extra_rows", {})
    tables = [*([beside(name, values)] if beside else []), _directions("By direction", "", {name: values})]
    if extra:
        remark = "These use more than one query at a time: not comparable with the rows above, nor with each other."
        tables.append(_directions("Extra rows", remark, extra))
    if "comparison" in values:
        tables.append(_difference(values["comparison"]))
    return tables


def _beside_ek100(name: str, values: Values) -> Table:
    mean = values["mean"]
    ours = [_labelled(name, values), *(_shown(key, mean[key]) for key in ("mAP", "nDCG")), "this evaluation"]
    return Table(
        "Beside published results",
        "EPIC-KITCHENS-100 multi-instance retrieval, test split, percent, mean of both directions.",
        ["model", "mAP", "nDCG", "source"],
        [*map(list, EK100_ROWS), ours],
    )


def _beside_msrvtt(name: str, values: Values) -> Table:
    keys = ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank")
    scores = values["text_to_video"]
    ours = [_labelled(name, values), *(_shown(key, scores[key]) for key in keys), "this evaluation"]
    return Table(
        "Beside published results",
        "MSR-VTT 1k-A, text to video, recall in percent.",
        ["model", *(SHORT_NAMES[key] for key in keys), "source"],
        [*map(list, MSRVTT_ROWS), ours],
    )


def _labelled(name: str, values: Values) -> str:
    return f"{name} ({values['note']})" if values["note"] else name


def _directions(title: str, remark: str, results: Mapping[str, Values]) -> Table:
    """A row for every name and direction; shares in percent, 95 % intervals beside them where they are known."""
    lines = [
        (name, direction, result)
        for name, result in results.items()
        for direction in DIRECTIONS
        if direction in result
    ]
    metrics = [name for name in SHORT_NAMES if any(name in result[where] for _, where, result in lines)]
    counts = sorted(
        {key for _, where, result in lines for key in result[where] if key.endswith(("left_out", "tied"))}
    )
    rows = [
        [name, where.replace("_", " ")]
        + [_with_interval(metric, where, result) for metric in metrics]
        + [f"{result[where][count]:,}" if count in result[where] else NO_VALUE for count in counts]
        for name, where, result in lines
    ]
    headers = [*(SHORT_NAMES[name] for name in metrics), *(count.replace("_", " ") for count in counts)]
    return Table(title, remark, ["row", "direction", *headers], rows)


def _difference(comparison: Values) -> Table:
    headers = ["metric", "direction", "difference", "95 % interval"]
    rows = []
    for metric, directions in comparison["difference"].items():
        for direction, row in directions.items():
            around = " to ".join(f"{100 * bound:+.2f}" for bound in row["interval"] or ()) or NO_VALUE
            rows.append([metric, direction.replace("_", " "), f"{100 * row['difference']:+.2f}", around])
    remark = "Paired: both are averaged over the same resamples of videos. In points of percent."
    return Table(f"Minus {comparison['with']}", remark, headers, rows)


def _with_interval(metric: str, direction: str, result: Values) -> str:
    scores = result[direction]
    if metric not in scores:
        return NO_VALUE
    interval = result.get("intervals", {}).get(metric, {}).get(direction)
    around = f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else ""
    return _shown(metric, scores[metric]) + around


def _shown(metric: str, value: float) -> str:
    return f"{value:,.1f}" if metric.endswith("_rank") else f"{100 * value:.2f}"


def facts(values: Values) -> list[str]:
    """What was ranked and how, in sentences."""
    said = [
        f"Protocol {values['protocol']}: {values['num_videos']:,} clips against {values['num_texts']:,} texts, "
        "by inner product, exact search."
    ]
    if values.get("num_merged_texts"):
        said.append(f"{values['num_merged_texts']:,} captions equal an earlier one and are merged with it.")
    if "keep_ratio" in values:
        said.append(f"Tokens kept: {values['keep_ratio']:.1%}. Samples skipped: {values['skipped']:,}.")
    said.append("Ties count against the query; “tied” says for how many queries that decided the order.")
    said.append("“left out” counts queries with nothing to find in this set: they are in no mean.")
    if "extra_rows_note" in values:
        said.append(f"{values['extra_rows_note'].capitalize()}.")
    if "intervals" in values:
        said.append(
            "In brackets: 95 % intervals from a bootstrap over videos with the gallery fixed; they say nothing of the "
            "spread between training runs."
        )
    return said


def markdown(name: str, values: Values) -> str:
    """The whole of result.md."""
    parts = [f"# Evaluation of {name}", *([f"**{values['note']}**"] if values["note"] else [])]
    parts.append("\n".join(facts(values)))
    for title, remark, headers, rows in result_tables(name, values):
        lines = [headers, ["---"] * len(headers), *rows]
        parts += [f"## {title}", *([remark] if remark else []), "\n".join(map(_markdown_row, lines))]
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
