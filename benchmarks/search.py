"""Searching an index of a million clips against FAISS called directly on the same vectors, and opening it.

    python benchmarks/search.py [--rows 1000000] [--dimension 512] [--repeats 5] [--save]

Random unit vectors are committed through the product's store, a thousand clips a video, so that its files are the real
ones. Compared, in turns in one process, both with all threads:

    search   `VideoIndex.search_vectors`, k = 10: vectors, then the found clips' records | `IndexFlatIP.search`
    open     `VideoIndex.open` until it can answer: from nothing held to the end of a first search of one query, less
             one such search of an open index | `faiss.read_index` of its vectors.faiss (files in the system's cache)

`search` stands behind the text tower: encoding as many texts (ViT-B-16, random weights) is listed beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measuring import Run, alternated, publish, script_parser, verdict

from rlt_retrieval import VideoIndex, VideoTextModel
from rlt_retrieval.embed import embed_texts
from rlt_retrieval.eval.report import aligned_table
from rlt_retrieval.indexing.store import VECTORS, ClipStore
from rlt_retrieval.indexing.vectors import require_faiss

K = 10
BATCHES = (1, 64)
CLIPS_PER_VIDEO = 1000
CLIP_SECONDS = 10.0
SEARCH_BAR = 1.1
OPEN_BAR = 2.0


def unit_vectors(num_rows: int, dimension: int, seed: int) -> np.ndarray:
    """float32 [N, D], of directions drawn evenly."""
    z_ND = np.random.default_rng(seed).standard_normal((num_rows, dimension), dtype=np.float32)
    z_ND /= np.linalg.norm(z_ND, axis=1, keepdims=True)
    return z_ND


def write_index(path: Path, z_ND: np.ndarray) -> None:
    """An index of these embeddings, written as `VideoIndex.add` does behind the encoder."""
    with ClipStore.create(path, {"dimension": z_ND.shape[1]}) as store, store.writing():
        for start in range(0, len(z_ND), CLIPS_PER_VIDEO):
            part_ND = z_ND[start : start + CLIPS_PER_VIDEO]
            video = f"videos/{start // CLIPS_PER_VIDEO:06}.mp4"
            spans = [(CLIP_SECONDS * i, CLIP_SECONDS * (i + 1)) for i in range(len(part_ND))]
            store.begin_video(video, size=len(part_ND), mtime_ns=0)
            store.add_clips(video, spans, [None] * len(spans), part_ND)
            store.finish_video(video, status="ok", duration_seconds=spans[-1][1])


def largest_difference(index: VideoIndex, flat: object, queries_QD: np.ndarray) -> float:
    """Between the scores of both; also warms up."""
    scores_QK, _ = flat.search(queries_QD, K)  # type: ignore[attr-defined]
    found = index.search_vectors(queries_QD, K)
    return float(np.abs(np.array([[hit.score for hit in hits] for hits in found]) - scores_QK).max())


def search_times(path: Path, z_ND: np.ndarray, repeats: int) -> dict[int, dict[str, float]]:
    """Median seconds by number of queries."""
    flat = require_faiss().IndexFlatIP(z_ND.shape[1])
    flat.add(z_ND)
    texts = VideoTextModel.create("ViT-B-16", None, device="cpu")
    times = {}
    with VideoIndex.open(path, device="cpu") as index:
        for batch in BATCHES:
            queries_QD = unit_vectors(batch, z_ND.shape[1], seed=batch)
            difference = largest_difference(index, flat, queries_QD)
            assert difference < 1e-5, f"scores differ from FAISS's by {difference}"
            runs: dict[str, Run] = {
                "faiss": lambda queries_QD=queries_QD: flat.search(queries_QD, K),  # type: ignore[misc]
                "ours": lambda queries_QD=queries_QD: index.search_vectors(queries_QD, K),  # type: ignore[misc]
                "text": lambda batch=batch: embed_texts(  # type: ignore[misc]
                    texts, [f"opens the {number} door of the fridge" for number in range(batch)]
                ),
            }
            times[batch] = alternated(runs, repeats)
    return times


def open_times(path: Path, dimension: int, repeats: int) -> dict[str, float]:
    """Median seconds of reading the file and of opening the index, with and without its first answer."""
    faiss = require_faiss()
    query_1D = unit_vectors(1, dimension, seed=0)

    def first_answer() -> None:
        with VideoIndex.open(path, device="cpu") as index:
            index.search_vectors(query_1D, K)

    with VideoIndex.open(path, device="cpu") as index:
        index.search_vectors(query_1D, K)
        runs: dict[str, Run] = {
            "read": lambda: faiss.read_index(str(path / VECTORS)),
            "first answer": first_answer,
            "search": lambda: index.search_vectors(query_1D, K),
        }
        times = alternated(runs, repeats)
    return {**times, "open": times["first answer"] - times["search"]}


def tables(searches: dict[int, dict[str, float]], opening: dict[str, float]) -> str:
    """Markdown: every case, then a line a bar."""
    cells = [["queries", "FAISS ms", "ours ms", "ratio", "encoding the texts ms"]]
    for batch, times in searches.items():
        milliseconds = [f"{1e3 * times[name]:,.1f}" for name in ("faiss", "ours", "text")]
        ratio = f"{times['ours'] / times['faiss']:.3f}"
        cells.append([str(batch), *milliseconds[:2], ratio, milliseconds[2]])
    opened = [["what", "s"]]
    opened += [
        ["faiss.read_index of vectors.faiss", f"{opening['read']:.3f}"],
        ["open until it can answer", f"{opening['open']:.3f}"],
        ["open with the answer to a first query", f"{opening['first answer']:.3f}"],
    ]
    lines = [
        verdict(f"search / FAISS, {batch} queries", times["ours"] / times["faiss"], SEARCH_BAR)
        for batch, times in searches.items()
    ]
    lines.append(verdict("open / reading vectors.faiss", opening["open"] / opening["read"], OPEN_BAR))
    return "\n".join(
        [*aligned_table(cells), "", *aligned_table(opened), "", *(f"- {line}" for line in lines)]
    )


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="clips in the index (default: %(default)s)"
    )
    parser.add_argument("--dimension", type=int, default=512, help="of a vector (default: %(default)s)")
    parser.set_defaults(repeats=5)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.index"
        z_ND = unit_vectors(options.rows, options.dimension, seed=1)
        write_index(path, z_ND)
        searches = search_times(path, z_ND, options.repeats)
        del z_ND
        opening = open_times(path, options.dimension, options.repeats)
    faiss = require_faiss()
    text = (
        f"{options.rows:,} clips x {options.dimension} float32, k = {K}, FAISS {faiss.__version__} with "
        f"{faiss.omp_get_max_threads()} threads; medians of {options.repeats} alternated repetitions.\n\n"
        f"{tables(searches, opening)}"
    )
    publish("search", "Searching and opening an index", text, options.save)


if __name__ == "__main__":
    main()
