"""The run folder: whose recipe it is, and metrics.jsonl with TensorBoard beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlt_retrieval.config import Recipe
from rlt_retrieval.errors import CheckpointError
from rlt_retrieval.training.checkpoint import has_checkpoint
from rlt_retrieval.training.distributed import Ranks

# Keys that may differ between the starts of one run: none of them changes a step (but for rounding).
FREE_KEYS = {
    *("data.num_workers", "data.decode_timeout_seconds", "data.max_bad_fraction", "data.eval"),
    *("optim.token_budget", "optim.gradient_checkpointing", "eval_every", "checkpoint_every"),
}


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def model_folder(run: Path) -> Path:
    return run / "model"


def claim_run(run: Path, recipe: Recipe, ranks: Ranks) -> None:
    """Write the recipe to the run folder, or check that the checkpoints there are of this recipe.

    Raises:
        CheckpointError: they are of another recipe (names the keys), or the folder cannot be written.
    """
    path = run / "recipe.json"
    values = recipe.model_dump(mode="json")
    try:
        run.mkdir(parents=True, exist_ok=True)
        if has_checkpoint(checkpoint_folder(run)):
            changed = sorted(set(_changed(json.loads(path.read_text()), values)) - FREE_KEYS)
            if changed:
                raise CheckpointError(
                    f"{run} was begun with another recipe ({', '.join(changed)} changed); use another run_dir, "
                    "or delete this one"
                )
        elif ranks.is_first:
            for stale in run.glob("failures*.jsonl"):  # of a start that got nowhere; its shards may be mended
                stale.unlink()
            _write_whole(path, json.dumps(values, indent=2))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to go on with this recipe") from error
    except OSError as error:
        raise _write_error(run, error) from error
    ranks.barrier()


def _changed(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _changed(before.get(key), now.get(key), f"{prefix}.{key}".lstrip("."))
    elif before != now:
        yield prefix


class MetricsLog:
    """metrics.jsonl (each step exactly once) and TensorBoard.

    Raises (from all of it):
        CheckpointError: the run folder cannot be written.
    """

    def __init__(self, run: Path, step_done: int) -> None:
        """Open the run's log and drop the lines after `step_done`, which will be written again."""
        self._path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step_done]
        try:
            _write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step_done + 1)
        except OSError as error:
            raise _write_error(run, error) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.close()

    def write(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in _flat(line):
                self._board.add_scalar(name, value, line["step"])
            self._board.flush()  # its own thread would keep up to two minutes of them back
        except OSError as error:
            raise _write_error(self._path, error) from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; what a kill tore off is left out."""
    path = run / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_error(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or error
    return CheckpointError(f"cannot write to {path}: {reason}; free space or choose another run_dir")
