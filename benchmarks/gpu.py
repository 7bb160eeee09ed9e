"""All questions about a GPU in one run: seven parts, one table, JSON.

    python benchmarks/gpu.py --quick [--parts 1 2] [--out FOLDER] [--save]     at most 8 minutes
    python benchmarks/gpu.py --device cpu --tiny --quick                       every code path, times that mean nothing

    1  ceilings: bf16 matmul, device copy                 5  attention kernels against each other
    2  encoding against open_clip's dense blocks          6  host to device: bytes, and what overlaps
    3  a training step, the same; compiled, checkpointed  7  FAISS on the GPU against the CPU
    4  tokenizing frames that are on the GPU

A case that fails or lacks its package is a line with the reason. With --quick a part starts no case after its share of
the time, nor any part after QUICK_SECONDS in all; what is left out is a line too. Random weights and clips with a
planted share of noise: this measures cost, never quality. Times are medians of CUDA events around groups of calls,
warmed up, baselines in turns with ours; model FLOPs are counted by rlt_retrieval/bench/costs.py (a training step is
three times the forward pass, without recomputation).
--out writes gpu.json after every case, so that nothing is lost when a run is cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_bench import FULL, TINY, Aim, Bench, Case, Row
from gpu_model_parts import encode, train
from gpu_parts import attention, ceilings, search, tokenize, transfer
from measuring import publish, result_path, script_parser, verdict

from rlt_retrieval.bench.report import surroundings
from rlt_retrieval.data.files import make_folder, write_whole
from rlt_retrieval.eval.report import aligned_table

# What answers each part, and for how many seconds it may start cases with --quick. Training comes late: a case that
# compiles takes a minute beyond them. Our own kernels come last: after a fault in one, this process has no GPU.
PARTS: dict[int, tuple[Callable[[Bench], Iterator[Case]], float]] = {
    1: (ceilings, 15),
    2: (encode, 90),
    5: (attention, 40),
    6: (transfer, 15),
    7: (search, 60),
    3: (train, 120),
    4: (tokenize, 40),
}
QUICK_SECONDS = 430.0  # then no case starts; a compilation under way ends within 8 minutes
TITLES = {
    1: "ceilings",
    2: "encode",
    3: "train step",
    4: "tokenize",
    5: "attention",
    6: "host to device",
    7: "search",
}


def measured(part: int, bench: Bench, seconds_left: float) -> Iterator[Row]:
    """The rows of a part, whose cases start within `seconds_left`; whatever goes wrong in a case is its note."""
    cases, _ = PARTS[part]
    deadline = time.monotonic() + seconds_left
    for name, measure in cases(bench):
        if time.monotonic() > deadline:
            yield Row(
                part, name, note=f"left out: the {max(0.0, seconds_left):.0f} s of part {part} are over"
            )
            continue
        try:
            if bench.is_cuda:
                torch.cuda.empty_cache()
            yield measure()
        except Exception as error:  # a benchmark of many things must not end with one of them
            yield Row(part, name, note=f"failed: {reason(error)}")


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".replace("|", "/")[:200]


def as_text(rows: list[Row]) -> str:
    """One table, then one line an aim."""
    cells = [["part", "case", "figures", "note"]]
    for row in rows:
        cells.append([f"{row.part} {TITLES[row.part]}", row.case, figures_text(row), row.note])
    lines = [judged(aim) for row in rows for aim in row.aims]
    return "\n".join([*aligned_table(cells), "", *(f"- {line}" for line in lines)])


def figures_text(row: Row) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in row.figures.items())


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def judged(aim: Aim) -> str:
    return verdict(aim.name, aim.value, aim.bar, at_least=aim.at_least)


def as_json(rows: list[Row], is_tiny: bool) -> bytes:
    """Where it was measured, every figure, every aim."""
    report: dict[str, Any] = {
        **surroundings(),
        "meaningless times": is_tiny,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(report, indent=2).encode()


def main(arguments: list[str] | None = None) -> list[Row]:
    options = parse(arguments)
    bench = Bench(torch.device(options.device), TINY if options.tiny else FULL)
    started, rows = time.monotonic(), list[Row]()
    for part in options.parts:
        left = QUICK_SECONDS - (time.monotonic() - started)
        for row in measured(part, bench, min(PARTS[part][1], left) if options.quick else math.inf):
            print(f"{part} {row.case}: {figures_text(row)} {row.note}", flush=True)
            rows.append(row)
            if options.out:
                keep(options.out / "gpu.json", as_json(rows, options.tiny))
    rows.sort(key=lambda row: row.part)
    note = "Tiny sizes: the times mean nothing.\n\n" if options.tiny else ""
    text = note + as_text(rows)
    if options.out:
        keep(options.out / "gpu.md", text.encode())
    publish("gpu", "What the GPU does", text, options.save)
    if options.save:
        keep(result_path("gpu", "json"), as_json(rows, options.tiny))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="at most 8 minutes: parts stop when their time is over"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that run anywhere; times mean nothing")
    parser.add_argument("--parts", nargs="+", type=int, choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --tiny runs every code path without one")
    return options


def keep(path: Path, content: bytes) -> None:
    make_folder(path.parent)
    write_whole(path, lambda file: file.write(content))


if __name__ == "__main__":
    main()
