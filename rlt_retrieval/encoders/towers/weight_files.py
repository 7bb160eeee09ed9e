"""Reading the tensors of weight files, and nothing else of them."""

from __future__ import annotations

import argparse
import pickle
import shlex
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlt_retrieval.errors import ModelError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_ZIP, _PICKLE = b"PK", b"\x80"  # how files begin
_OLD_TORCH = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_KEEP_TENSORS = (
    "import pickle, sys, torch; c = {read}; "
    's = c.state_dict() if hasattr(c, "state_dict") else c.get("state_dict", c); '
    'torch.save({{"state_dict": {{k: v for k, v in s.items() if torch.is_tensor(v)}}}}, sys.argv[2])'
)


def safe_tensors() -> torch.serialization.safe_globals:
    """Published checkpoints hold their command line beside the tensors; nothing else is unpickled."""
    return torch.serialization.safe_globals([argparse.Namespace])


def read_tensors(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, mapped from the disk where its format allows.

    Args:
        name: of the model they are for, as errors call it.
        path: a safetensors file, or one of `torch.save` with a state dict as such or under "state_dict".
    Returns:
        Tensors by name, without the prefix `module.` of distributed training.
    Raises:
        ModelError: a file that cannot be read, or not without running code of its own; then the message holds the
            command that keeps its tensors only.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with safe_tensors():
                content = torch.load(
                    str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
    except pickle.UnpicklingError as error:
        raise _does_not_unpickle(name, path, error) from error
    except Exception as error:  # torch raises many kinds for a file that is torn or something else
        raise does_not_load(name, path, error) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict):
        return {}
    return {
        str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)
    }


def does_not_load(name: str, path: Path | str | None, error: Exception) -> ModelError:
    """The error for weights that are unreadable or do not fit the model called `name`."""
    return ModelError(f"the weights {path} do not load into {name}: {short_reason(error)}")


def short_reason(error: Exception) -> str:
    """What an error says, on one line."""
    return textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__


def _does_not_unpickle(name: str, path: Path, error: pickle.UnpicklingError) -> ModelError:
    with path.open("rb") as file:
        head = file.read(len(_OLD_TORCH))
    if not head.startswith((_ZIP, _PICKLE)):
        return does_not_load(name, path, ValueError("torch.save did not write this file; download it again"))
    by_torch = head.startswith((_ZIP, _OLD_TORCH))
    read = 'torch.load(sys.argv[1], map_location="cpu", weights_only=False)'
    code = _KEEP_TENSORS.format(read=read if by_torch else 'pickle.load(open(sys.argv[1], "rb"))')
    command = shlex.join(("python", "-c", code, str(path), str(path.with_suffix(".tensors.pt"))))
    found = textwrap.shorten(str(error).partition("WeightsUnpickler error: ")[2], 80, placeholder=" …")
    return ModelError(
        f"the weights {path} do not load into {name}: they hold more than tensors, and unpickling that can run any "
        f"code ({found}); if you trust the file, keep its tensors and load those: {command}"
    )
