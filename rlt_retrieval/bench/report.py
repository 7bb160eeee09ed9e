"""A bench of reducers as text, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from rlt_retrieval import __version__
from rlt_retrieval.bench.clips import read_clips
from rlt_retrieval.bench.reducers import Progress, ReducerRow, ReducerTable, bench_reducers
from rlt_retrieval.config import num_cores
from rlt_retrieval.data.files import make_folder, write_whole
from rlt_retrieval.embed import LoaderOptions
from rlt_retrieval.eval.report import NO_VALUE, aligned_table
from rlt_retrieval.model import VideoTextModel

# Header, field of a row, factor to the header's unit, places behind the point.
COLUMNS = (
    ("FLOPs %", "flops_share", 100, 1),
    ("tokens %", "tokens_share", 100, 1),
    ("tokenizer ms", "tokenizer_seconds", 1e3, 1),
    ("encoder ms", "encoder_seconds", 1e3, 1),
    ("whole ms", "whole_seconds", 1e3, 1),
    ("peak MB", "peak_bytes", 1e-6, 1),
    ("error", "error", 1, 3),
    ("cosine", "cosine", 1, 4),
    ("overlap %", "overlap", 100, 1),
    ("pixel error", "pixel_error", 1, 3),
    ("context error", "context_error", 1, 3),
    ("text→video R@1 %", "text_to_video", 100, 1),
    ("video→text R@1 %", "video_to_text", 100, 1),
)
# What the plot shows against time: the first of these that the rows have.
QUALITIES = (
    ("text_to_video", 100, "text to video, recall at 1, percent"),
    ("overlap", 100, "nearest 10 clips that stay, percent"),
    ("cosine", 1, "cosine with the full model's embedding"),
    ("flops_share", 100, "FLOPs of the encoder, percent of the full model's"),
)


@dataclass(frozen=True)
class Bench:
    """Tables of one bench, and the clips that could not be read, a line each."""

    tables: tuple[ReducerTable, ...]
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: when, where and by what it was measured, and every number of the tables."""
        return {**surroundings(), **asdict(self)}

    def to_markdown(self) -> str:
        """The tables with their notes; readable as plain text too."""
        return "\n\n".join(map(table_text, self.tables))


def run_bench(
    makers: Sequence[Callable[[], VideoTextModel]],
    sources: Sequence[str | Path],
    options: LoaderOptions,
    *,
    repeats: int,
    on_progress: Progress = lambda done, total: None,
) -> Bench:
    """`bench_reducers` for each of some models of one input size, one after the other, on the same clips.

    Raises:
        SourceError, ShardError, ModelError, MetricsError: as `read_clips`, the makers and `bench_reducers`.
    """
    model = makers[0]()
    clips, skipped = read_clips(sources, model.transform, model.config.video.num_frames, options)
    tables = [bench_reducers(model, clips, repeats=repeats, on_progress=on_progress)]
    for make in makers[1:]:
        tables.append(bench_reducers(make(), clips, repeats=repeats, on_progress=on_progress))
    return Bench(tuple(tables), tuple(skipped))


def surroundings() -> dict[str, Any]:
    """Date, machine and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "platform": f"{platform.system()} {platform.machine()}",
            "gpu": device,
        },
        "versions": {
            "rlt-retrieval": __version__,
            "torch": torch.__version__,
            "open_clip": version("open_clip_torch"),
        },
    }


def write_bench(folder: Path, bench: Bench) -> None:
    """Write bench.json, bench.md and bench.png, each whole or not at all.

    Raises:
        ShardError: disk full, folder not writable.
    """
    make_folder(folder)
    _write(folder / "bench.json", json.dumps(bench.to_dict(), indent=2).encode())
    _write(folder / "bench.md", _page(bench).encode())
    _write(folder / "bench.png", plot(bench.tables))


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def surroundings_text() -> str:
    """`surroundings` on one line."""
    where = surroundings()
    machine = where["machine"]
    facts = [
        where["date"],
        f"{machine['cores']} cores ({machine['platform']}), {machine['threads']} threads",
        *([machine["gpu"]] if machine["gpu"] else []),
        *(f"{name} {number}" for name, number in where["versions"].items()),
    ]
    return ", ".join(facts)


def _page(bench: Bench) -> str:
    skipped = [f"Left out: {line}" for line in bench.skipped]
    layers = [_layers_text(table) for table in bench.tables]
    return (
        "\n\n".join(["# Token reducers", surroundings_text(), bench.to_markdown(), *layers, *skipped]) + "\n"
    )


def table_text(table: ReducerTable) -> str:
    """One layout: what was measured, the rows, and what must be said about them."""
    columns = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in table.rows)]
    cells = [["reducer", "settings", *(header for header, *_ in columns)]]
    cells += [
        [row.reducer, _settings_text(row)]
        + [_number(getattr(row, name), factor, places) for _, name, factor, places in columns]
        for row in table.rows
    ]
    model, notes = table.model, [f"- {note}" for note in table.notes]
    notes += [f"- {row.reducer}: {row.note}" for row in table.rows if row.note]
    lines = [
        f"## Layout {model['layout']}: {model['backbone']}, {model['weights']}",
        "",
        f"{table.clips['number']:,} clips of {model['num_frames']} frames, {model['size'][0]}x{model['size'][1]} "
        f"pixels, on {model['device']}; rlt: threshold {model['threshold']:g}, {model['reference']}; all others "
        "(but none) at its FLOPs, on the mean over clips. Times a clip, encoded alone: medians over clips of the least "
        f"of {table.repeats}. Peak memory: largest of a clip.",
        "",
        *aligned_table(cells),
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _layers_text(table: ReducerTable) -> str:
    rows = [["reducer", "rows of each block"]]
    rows += [[row.reducer, _runs_text(row.rows)] for row in table.rows if row.rows]
    return "\n".join(
        [
            f"Tokens and CLS in the MLP of each block, layout {table.model['layout']}:",
            "",
            *aligned_table(rows),
        ]
    )


def _runs_text(rows: Sequence[float]) -> str:
    """ "16 × 394, 200": equal neighbours once, with their number."""
    runs = [(value, len(list(same))) for value, same in groupby(round(rows_a_block) for rows_a_block in rows)]
    return ", ".join(f"{count} × {value:,}" if count > 1 else f"{value:,}" for value, count in runs)


def _settings_text(row: ReducerRow) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.settings.items()) or NO_VALUE


def _number(value: float | None, factor: float, places: int) -> str:
    return NO_VALUE if value is None else f"{factor * value:,.{places}f}"


def plot(tables: Sequence[ReducerTable]) -> bytes:
    """Quality against time a clip as PNG, a panel a table; where there is no quality, cost against time."""
    from rlt_retrieval.eval.plots import scatter_charts

    name, factor, ylabel = next(
        quality for quality in QUALITIES if getattr(tables[0].rows[0], quality[0]) is not None
    )
    panels = [
        (f"{table.model['backbone']}, layout {table.model['layout']}", _points(table, name, factor))
        for table in tables
    ]
    return scatter_charts(panels, "tokenizer and encoder, ms a clip (logarithmic)", ylabel)


def _points(table: ReducerTable, name: str, factor: float) -> dict[str, tuple[float, float]]:
    return {
        row.reducer: (1e3 * row.whole_seconds, factor * getattr(row, name))
        for row in table.rows
        if row.whole_seconds is not None
    }
