"""Reports from arrays, numbers and PNG bytes: a self-contained HTML page, a terminal table, a line chart.

The page is light HTML with its style inside: no script and nothing loaded from elsewhere. Every function that
makes a piece of it takes plain text, escapes it, and returns `Html`; `page` joins the pieces.
"""

import base64
import html
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NewType

from numpy.typing import ArrayLike

from rlt_retrieval.errors import RetrievalError

Html = NewType("Html", str)
Cell = str | int | float | None

NO_VALUE = "–"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #626a76; --line: #dadde3; --page: #fff;
  --card: #f5f6f8; --right: #1a7f45; --wrong: #c0392b; --best: #e3f3e8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #9aa3b0; --line: #3a404a; --page: #15181d;
    --card: #1f242b; --right: #4cc380; --wrong: #f0756a; --best: #1d3d2a; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; }
.best { background: var(--best); font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: 1rem 0; }
figure { margin: 0; max-width: 100%; } img { display: block; max-width: 100%; border-radius: 3px; }
figcaption, .note { color: var(--soft); font-size: .87rem; margin-top: .25rem; }
.hit { background: var(--card); border: 3px solid var(--line); border-radius: 6px; padding: .4rem;
  max-width: 13rem; box-sizing: border-box; }
.hit.right { border-color: var(--right); } .hit.wrong { border-color: var(--wrong); border-style: dashed; }
.hit.right b { color: var(--right); } .hit.wrong b { color: var(--wrong); }
.query { font-weight: 600; margin: 1.6rem 0 -.5rem; }
"""


@dataclass(frozen=True)
class HitCard:
    """One hit as it is shown. `is_right` None: not known, so the frame has no colour. A hit may have no picture."""

    thumbnail_png: bytes | None
    rank: int
    score: float
    is_right: bool | None = None
    caption: str = ""


# ---- pieces of a page ----


def heading(text: str) -> Html:
    return Html(f"<h2>{html.escape(text)}</h2>")


def paragraph(text: str) -> Html:
    return Html(f"<p>{html.escape(text)}</p>")


def warning(text: str) -> Html:
    """A paragraph that stands out."""
    return Html(f"<p><strong>{html.escape(text)}</strong></p>")


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    best: Mapping[str, Literal["highest", "lowest"]] | None = None,
) -> Html:
    """A table; numbers are formatted and set to the right, None and NaN become a dash.

    best: header → which value of that column to mark (all of them on a tie).
    """
    body = [list(row) for row in rows]
    marked = {
        (row, column)
        for column, header in enumerate(headers)
        if best and header in best
        for row in _best_rows([line[column] for line in body], best[header])
    }
    numeric = [any(isinstance(line[column], int | float) for line in body) for column in range(len(headers))]
    classes = ["number" if is_numeric else "" for is_numeric in numeric]
    head = "".join(_cell("th", text, classes[column]) for column, text in enumerate(headers))
    lines = "".join(
        "<tr>"
        + "".join(
            _cell(
                "td", format_number(value), f"{classes[column]}{' best' if (row, column) in marked else ''}"
            )
            for column, value in enumerate(line)
        )
        + "</tr>"
        for row, line in enumerate(body)
    )
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def image_row(images: Iterable[tuple[bytes, str]]) -> Html:
    """PNG images side by side, each with its caption (which may be empty)."""
    figures = (_figure(png, caption) for png, caption in images)
    return Html(f'<div class="row">{"".join(figures)}</div>')


def hit_grid(results: Iterable[tuple[str, Sequence[HitCard]]]) -> Html:
    """For every query its text and its hits: thumbnail, rank, score, and a frame that says right or wrong."""
    return Html(
        "".join(
            f'<p class="query">“{html.escape(query)}”</p>'
            f'<div class="row">{"".join(_hit(card) for card in cards)}</div>'
            for query, cards in results
        )
    )


def page(title: str, parts: Iterable[Html]) -> str:
    """A whole HTML document from pieces made by the functions above."""
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def write_report(path: str | Path, document: str) -> None:
    """Write the page under a temporary name and rename it, so that `path` is whole or as it was.

    Raises RetrievalError when the folder is missing, full or not writable.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(document)
        os.chmod(temporary, 0o644)  # mkstemp's files are the user's alone; a report is made to be shown
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RetrievalError(
            f"{target}: the report cannot be written ({error.strerror or error}); "
            "choose another place or make room"
        ) from error


# ---- text and charts ----


def metrics_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of several runs as a text table, one line a run and direction.

    results: run name → `to_dict()` of `ProtocolResult`, `Evaluation`, `Ek100Result` or `Scored`. Extra rows and the run
    it is compared with come below a run. Below the table one line a run says how much was ranked, how sure the means
    are, and which queries were left out or tied; then come the paired differences.
    """
    lines = [
        (name, direction.replace("_", " "), row[direction])
        for run, result in results.items()
        for name, row in _rows_of(run, result).items()
        for direction in DIRECTIONS
        if direction in row
    ]
    columns = [name for name in SHORT_NAMES if any(name in scores for _, _, scores in lines)]
    rows = [["run", "direction", *(SHORT_NAMES[name] for name in columns)]]
    rows += [
        [run, direction, *(_metric(name, scores.get(name)) for name in columns)]
        for run, direction, scores in lines
    ]
    notes = [f"{run}: {note}" for run, result in results.items() if (note := _counts(result))]
    notes += [line for run, result in results.items() for line in _differences(run, result)]
    return "\n".join(aligned_table(rows) + notes)


def line_chart_png(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, ylabel: str, title: str
) -> bytes:
    """A line chart as PNG; series: name → (x, y)."""
    # Not at the top: a metric must not pay for, or need, a plotting library.
    from rlt_retrieval.eval.plots import line_chart

    return line_chart(series, xlabel, ylabel, title)


def format_number(value: Cell) -> str:
    """Text as it is, whole numbers with thousands marked, others to three places (one from 100 on)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NO_VALUE
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


DIRECTIONS = ("text_to_video", "video_to_text", "mean")
SHORT_NAMES = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "median_rank": "median rank",
    "mean_rank": "mean rank",
    "mAP": "mAP",
    "nDCG": "nDCG",
}


def _metric(name: str, value: Cell) -> str:
    """A rank to one place (medians end in .0 or .5), everything else as numbers go."""
    if name.endswith("_rank") and isinstance(value, float):
        return f"{value:,.1f}"
    return format_number(value)


def _rows_of(run: str, result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    rows = {run: result, **result.get("extra_rows", {})}
    if "comparison" in result:
        rows[result["comparison"]["with"]] = result["comparison"]["values"]
    return rows


def _differences(run: str, result: Mapping[str, Any]) -> list[str]:
    if "comparison" not in result:
        return []
    lines = [f"{run} minus {result['comparison']['with']}, with 95 % intervals over videos:"]
    for metric, directions in result["comparison"]["difference"].items():
        for direction, row in directions.items():
            around = " to ".join(f"{bound:+.4f}" for bound in row["interval"] or ())
            lines.append(
                f"  {metric} {direction.replace('_', ' ')}: {row['difference']:+.4f}  {around}".rstrip()
            )
    return lines


def _counts(result: Mapping[str, Any]) -> str:
    """What was ranked, and whatever was left out or tied, in words; empty when nothing is known of it."""
    said = []
    if "num_videos" in result:
        kind = "clips" if "num_source_videos" in result else "videos"  # EK-100 cuts its clips out of videos
        said.append(f"{result['num_videos']:,} {kind}, {result['num_texts']:,} texts")
    if result.get("num_merged_texts"):
        said.append(f"{result['num_merged_texts']:,} repeated captions merged")
    for direction in DIRECTIONS:
        for key, count in result.get(direction, {}).items():
            if count and key.endswith(("left_out", "tied")):
                said.append(f"{direction.replace('_', ' ')} {key.replace('_', ' ')}: {count:,}")
    for name, intervals in result.get("intervals", {}).items():
        if interval := intervals["mean"]:
            over = f"{result['num_source_videos']:,} videos"
            said.append(f"mean {name}, 95 % interval over {over}: {interval[0]:.3f} to {interval[1]:.3f}")
    if "extra_rows_note" in result:
        said.append(result["extra_rows_note"])
    return "; ".join([*([result["note"]] if result.get("note") else []), *said])


def aligned_table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = (f"{'-' * (width + 1)}{'-' if column < 2 else ':'}" for column, width in enumerate(widths))
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]


def _best_rows(values: Sequence[Cell], which: Literal["highest", "lowest"]) -> list[int]:
    numbers = {
        row: value
        for row, value in enumerate(values)
        if isinstance(value, int | float) and not math.isnan(value)
    }
    if not numbers:
        return []
    best = max(numbers.values()) if which == "highest" else min(numbers.values())
    return [row for row, value in numbers.items() if value == best]


def _cell(tag: str, text: str, css_class: str) -> str:
    attribute = f' class="{css_class.strip()}"' if css_class else ""
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"


def _figure(png: bytes, caption: str) -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{_image(png, caption)}{below}</figure>"


def _hit(card: HitCard) -> str:
    verdict = {True: "right", False: "wrong", None: ""}[card.is_right]
    mark = f" <b>{verdict}</b>" if verdict else ""
    note = f'<div class="note">{html.escape(card.caption)}</div>' if card.caption else ""
    picture = _image(card.thumbnail_png, card.caption) if card.thumbnail_png else ""
    return (
        f'<div class="hit {verdict}">{picture}'
        f"<div>{card.rank}. {format_number(card.score)}{mark}</div>{note}</div>"
    )


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
