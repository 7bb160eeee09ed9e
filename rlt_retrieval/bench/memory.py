"""The most memory that a piece of work holds at once, above what was held before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_PROCESS = Path("/proc/self")  # Linux alone has it


def peak_bytes(work: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What `work` returns, and its peak: on CUDA of torch's allocator, on Linux of the process, else None.

    The process's is what the kernel counts in pages: noise of a few hundred kilobytes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return work(), torch.cuda.max_memory_allocated(device) - held
    if device.type != "cpu" or not _restart_peak():
        return work(), None
    held = _status_bytes("VmRSS")
    return work(), _status_bytes("VmHWM") - held


def _restart_peak() -> bool:
    """Whether the kernel forgot the highest use so far; free memory that malloc keeps would hide the next peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError):  # no such file here, or no glibc
        return False
    return True


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return 1024 * int(found[1])
