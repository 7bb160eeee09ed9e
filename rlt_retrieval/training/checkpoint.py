"""Checkpoints: model, optimiser, random state and data position, written whole or not at all, never pickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlt_retrieval.data.streams import StreamPosition
from rlt_retrieval.errors import CheckpointError

KEEP_LAST = 2  # the newest, and one before it in case its disk block went bad
_PREFIX = "step-"
_PART = ".part"  # one name, so that what a killed save left behind is cleared by the next


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside tensors: the step done, and where every logical stream stands."""

    step: int
    positions: dict[int, StreamPosition]


def save_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write `folder`/step-NNNNNNNN under a temporary name, flush and rename it; drop all but the last two.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    final, part = folder / f"{_PREFIX}{state.step:08d}", folder / _PART
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        try:
            _write(part, state, model, optimizer)
            os.replace(part, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _flush(folder)
        for old in _checkpoints(folder)[:-KEEP_LAST]:
            os.replace(old, part)  # nothing half-deleted keeps its name either
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; free space or change run_dir"
        ) from error


def _write(part: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    part.mkdir()
    save_file(_tensors(model.state_dict()), part / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), part / "optimizer.safetensors")
    save_file(_random_state(), part / "random.safetensors")
    positions = {str(s): [p.epoch, p.index] for s, p in state.positions.items()}
    (part / "state.json").write_text(json.dumps({"step": state.step, "positions": positions}))
    for file in part.iterdir():
        _flush(file)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
    """Restore the newest checkpoint in `folder`; None if there is none.

    Raises:
        CheckpointError: a checkpoint that does not fit the model or cannot be read.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    try:
        model.load_state_dict(load_file(found[-1] / "model.safetensors"))
        _restore_optimizer(load_file(found[-1] / "optimizer.safetensors"), model, optimizer)
        _restore_random(load_file(found[-1] / "random.safetensors"))
        values = json.loads((found[-1] / "state.json").read_text())
        positions = {int(s): StreamPosition(*pair) for s, pair in values["positions"].items()}
        return TrainState(values["step"], positions)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        way_out = "go on from the one before" if len(found) > 1 else "begin again"
        raise CheckpointError(
            f"checkpoint {found[-1]} cannot be restored: {reason}; delete it to {way_out}"
        ) from error


def has_checkpoint(folder: Path) -> bool:
    """Whether `load_checkpoint` would find one."""
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by parameter name."""
    return {
        f"{key}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters[name]
        # the step too: fused AdamW wants it beside the parameter
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
