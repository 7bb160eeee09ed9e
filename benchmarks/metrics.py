"""Time and working memory of mAP and nDCG, both directions in one call, at the size of the EK-100 test split.

    python benchmarks/metrics.py [--repeats 3] [--save]

Random float32 scores, and random soft relevancies with the levels and shares of the official matrix (0.17 % equal to
1, 11 % above 0). Memory is the highest sum of numpy's own allocations above the inputs (numpy reports them to
tracemalloc). The bars: a fifth of 24 s and a quarter of 2 GiB, what the official evaluation code is said to take on two
cores. That code was not at hand, so the two were not measured side by side.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
from measuring import alternated, publish, script_parser, verdict

from rlt_retrieval.eval import evaluate

BAR_SECONDS, BAR_MEBIBYTES = 4.8, 512
SHAPE = 9668, 3842
LEVELS = np.array([0.0, 1 / 6, 0.25, 0.5, 2 / 3, 0.75, 1.0])
SHARES = np.array([0.8863, 0.01, 0.02, 0.075, 0.002, 0.005, 0.0017])


def random_case(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and relevancies float64, both [videos, texts]."""
    rng = np.random.default_rng(seed)
    similarity_VT = rng.uniform(-1, 1, shape).astype(np.float32)
    return similarity_VT, rng.choice(LEVELS, shape, p=SHARES / SHARES.sum())


def peak_mebibytes(similarity_VT: np.ndarray, relevancy_VT: np.ndarray) -> float:
    tracemalloc.start()
    evaluate(similarity_VT, relevancy_VT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak_bytes / 2**20


def main() -> None:
    options = script_parser(__doc__).parse_args()
    case = random_case(SHAPE, seed=0)
    median = alternated({"evaluate": lambda: evaluate(*case)}, options.repeats)["evaluate"]
    lines = [
        f"{SHAPE[0]:,} clips x {SHAPE[1]:,} sentences, float32 scores, float64 relevancies, numpy {np.__version__}; "
        f"both metrics and both directions in one call, median of {options.repeats}. The bars: benchmarks/metrics.py.",
        "",
        f"- {verdict('seconds', median, BAR_SECONDS)}",
        f"- {verdict('peak above the inputs, MiB', peak_mebibytes(*case), BAR_MEBIBYTES)}",
    ]
    publish("metrics", "mAP and nDCG at the size of the EK-100 test split", "\n".join(lines), options.save)


if __name__ == "__main__":
    main()
