"""How the commands speak: data on stdout; messages, problems and progress on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlt_retrieval.video_index import Outcome


def say(message: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    print(message, file=sys.stderr, flush=True)


def say_problem(outcome: Outcome) -> None:
    """A line for a video that was not indexed whole; nothing for one that was."""
    if outcome.status != "ok":
        say(f"{outcome.status:8}  {outcome.video}: {outcome.reason}")


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """On stdout: JSON, or one `key  value` line each; the rows of a list of tables follow it, a line each."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        rows = value if isinstance(value, list) else []
        print(f"{key:{width}}  {len(value) if isinstance(value, list) else _plain(value)}")
        for row in rows:
            print("  " + "  ".join(map(str, row.values())))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar with time left on a terminal's stderr, else nothing. Call what it gives with (done[, total[, note]])."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=False, transient=True
    )
    task = bar.add_task(what, total=None, note="")

    def advance(done: int, total: int | None = None, note: str = "") -> None:
        bar.start()  # not before there is something to show: other ranks of a training have nothing
        bar.update(task, completed=done, total=total, note=note)

    try:
        yield advance
    finally:
        bar.stop()


class _ToStderr(logging.Handler):
    """Writes to whatever sys.stderr is now: a progress bar puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_to_stderr() -> None:
    """Show what the package logs (choices made for the user), one plain line each."""
    logger = logging.getLogger("rlt_retrieval")
    logger.handlers = [_ToStderr()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
