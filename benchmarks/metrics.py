"""Time and working memory of mAP and nDCG, both directions in one call, at the size of the EK-100 test split.

    python benchmarks/metrics.py [--quick] [--repeats 3]

Random float32 scores, and random soft relevancies with the levels and shares of the official matrix (0.17 % equal to
1, 11 % above 0). Memory is the highest sum of numpy's own allocations above the inputs (numpy reports them to
tracemalloc). The bar: a fifth of the official evaluation code's time on the same machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import tracemalloc

import numpy as np

from rlt_retrieval.eval import evaluate

FULL, QUICK = (9668, 3842), (1000, 400)
LEVELS = np.array([0.0, 1 / 6, 0.25, 0.5, 2 / 3, 0.75, 1.0])
SHARES = np.array([0.8863, 0.01, 0.02, 0.075, 0.002, 0.005, 0.0017])


def random_case(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and relevancies float64, both [videos, texts]."""
    rng = np.random.default_rng(seed)
    similarity_VT = rng.uniform(-1, 1, shape).astype(np.float32)
    return similarity_VT, rng.choice(LEVELS, shape, p=SHARES / SHARES.sum())


def seconds(similarity_VT: np.ndarray, relevancy_VT: np.ndarray) -> float:
    started = time.perf_counter()
    evaluate(similarity_VT, relevancy_VT)
    return time.perf_counter() - started


def peak_mebibytes(similarity_VT: np.ndarray, relevancy_VT: np.ndarray) -> float:
    tracemalloc.start()
    evaluate(similarity_VT, relevancy_VT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK[0]} x {QUICK[1]} instead of {FULL[0]} x {FULL[1]}"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    case = random_case(QUICK if options.quick else FULL, seed=0)
    times = [seconds(*case) for _ in range(options.repeats)]
    print(
        f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {case[0].shape[0]} x {case[0].shape[1]}"
    )
    print(f"seconds: median {statistics.median(times):.2f}, best {min(times):.2f} of {options.repeats}")
    print(f"peak above the inputs: {peak_mebibytes(*case):.0f} MiB")


if __name__ == "__main__":
    main()
