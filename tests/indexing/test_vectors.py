"""FAISS vectors: exact order with ties, files that must not be trusted, dispatch to a GPU."""

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt_retrieval.errors import IndexStoreError, MissingDependencyError
from rlt_retrieval.indexing import vectors as module
from rlt_retrieval.indexing.vectors import VectorIndex, saved_tag

TAG = bytes(range(16))


def ids_of(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64) * 3 + 2


def build(vectors_ND: np.ndarray, **placement: Any) -> VectorIndex:
    halves = np.array_split(np.arange(len(vectors_ND)), 2)
    ids_N = ids_of(len(vectors_ND))
    chunks = [(ids_N[half], vectors_ND[half]) for half in halves]
    return VectorIndex.build(vectors_ND.shape[1], chunks, **placement)


def brute_force(
    vectors_ND: np.ndarray, queries_QD: np.ndarray, k: int, groups_N: np.ndarray | None = None
) -> list[list[tuple[float, int]]]:
    """Sort every clip by (-score, id) in plain Python; keep the first of each group."""
    answers = []
    for query_D in queries_QD.astype(np.float64):
        scores = [float((vector_D * query_D).sum()) for vector_D in vectors_ND.astype(np.float64)]
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        if groups_N is not None:
            seen: set[int] = set()
            ranked = [i for i in ranked if not (groups_N[i] in seen or seen.add(groups_N[i]))]  # type: ignore[func-returns-value]
        answers.append([(scores[i], int(ids_of(len(scores))[i])) for i in ranked[:k]])
    return answers


@pytest.mark.parametrize("k", [1, 7, 60, 300, 1000])
@pytest.mark.parametrize("num_queries", [1, 30])  # FAISS takes another way (BLAS) from 20 queries on
@pytest.mark.parametrize("num_groups", [None, 4, 40])
def test_search_equals_brute_force(
    rng: np.random.Generator, k: int, num_queries: int, num_groups: int | None
) -> None:
    vectors_ND = rng.standard_normal((300, 24), dtype=np.float32)
    vectors_ND[100:150] = vectors_ND[:50]  # equal clips, whose scores BLAS may round differently
    queries_QD = rng.standard_normal((num_queries, 24), dtype=np.float32)
    groups_N = None if num_groups is None else rng.integers(0, num_groups, 300)
    found = build(vectors_ND).search(queries_QD, k, groups_N)
    assert found == brute_force(vectors_ND, queries_QD, k, groups_N)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_go_to_the_lowest_ids(data: st.DataObject) -> None:
    """Few distinct values: ties everywhere, also across the edge of what FAISS is first asked for."""
    size, k = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 12))
    values = st.lists(st.integers(-1, 1), min_size=2 * size, max_size=2 * size)
    vectors_ND = np.array(data.draw(values), dtype=np.float32).reshape(size, 2)
    groups_N = data.draw(st.sampled_from([None, np.arange(size) % 5, np.arange(size) // 20]))
    queries_QD = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    found = build(vectors_ND).search(queries_QD, k, groups_N)
    assert found == brute_force(vectors_ND, queries_QD, k, groups_N)


def test_no_clips_and_no_queries() -> None:
    queries_QD = np.ones((2, 4), dtype=np.float32)
    assert build(np.empty((0, 4), dtype=np.float32)).search(queries_QD, 5) == [[], []]
    assert build(np.ones((3, 4), dtype=np.float32)).search(queries_QD[:0], 5) == []


def test_scores_beyond_float32_are_still_ordered() -> None:
    vectors_ND = np.full((100, 2), 1e30, dtype=np.float32) * np.arange(1, 101, dtype=np.float32)[:, None]
    queries_QD = np.full((1, 2), 1e30, dtype=np.float32)
    for query_QD in (queries_QD, -queries_QD):
        assert build(vectors_ND).search(query_QD, 3) == brute_force(vectors_ND, query_QD, 3)


def test_append_continues_a_build(rng: np.random.Generator) -> None:
    vectors_ND = rng.standard_normal((500, 8), dtype=np.float32)
    vectors_ND[400:] *= 50  # the bound on rounding must follow the new, longer vectors
    index = VectorIndex.build(8, [])
    for start in range(0, 500, 100):
        index.append([(ids_of(500)[start : start + 100], vectors_ND[start : start + 100])])
        index.search(vectors_ND[:1], 3)
    assert len(index) == 500
    assert index.search(vectors_ND[:25], 20) == brute_force(vectors_ND, vectors_ND[:25], 20)


def test_saved_file_is_read_by_us_and_by_plain_faiss(tmp_path: Path, rng: np.random.Generator) -> None:
    vectors_ND = rng.standard_normal((200, 8), dtype=np.float32)
    path = tmp_path / "vectors.faiss"
    index = build(vectors_ND)
    index.save(path, TAG)
    assert saved_tag(path) == TAG
    loaded = VectorIndex.load(path, TAG, 200)
    assert loaded is not None
    assert loaded.search(vectors_ND[:3], 9) == index.search(vectors_ND[:3], 9)
    plain_ids_QK = faiss.read_index(str(path)).search(vectors_ND[:3], 9)[1]
    assert plain_ids_QK.tolist() == [
        [clip_id for _, clip_id in hits] for hits in index.search(vectors_ND[:3], 9)
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.faiss"]


def test_only_a_whole_file_of_this_very_state_is_loaded(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "vectors.faiss"
    assert saved_tag(path) is None
    assert VectorIndex.load(path, TAG, 20) is None
    build(rng.standard_normal((20, 8), dtype=np.float32)).save(path, TAG)
    whole = path.read_bytes()
    assert VectorIndex.load(path, TAG[::-1], 20) is None
    assert VectorIndex.load(path, TAG, 21) is None
    for cut in [0, 1, 30, len(whole) // 2, len(whole) - 40, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert VectorIndex.load(path, TAG, 20) is None, cut
    for flipped in [*rng.integers(0, len(whole), 60), len(whole) - 1]:
        path.write_bytes(whole[:flipped] + bytes([whole[flipped] ^ 0x10]) + whole[flipped + 1 :])
        assert VectorIndex.load(path, TAG, 20) is None, flipped
    path.write_bytes(whole)
    assert VectorIndex.load(path, TAG, 20) is not None


def test_a_format_that_this_faiss_cannot_read_is_rebuilt(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors.faiss"
    monkeypatch.setattr(faiss, "write_index", lambda index, writer: None)
    build(rng.standard_normal((20, 8), dtype=np.float32)).save(path, TAG)  # a valid trailer behind no payload
    assert saved_tag(path) == TAG
    assert VectorIndex.load(path, TAG, 20) is None


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors.faiss"
    index = build(rng.standard_normal((20, 8), dtype=np.float32))
    index.save(path, TAG)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IndexStoreError, match=r"vectors\.faiss cannot be written \(No space left") as caught:
        index.save(path, TAG[::-1])
    assert "\n" not in str(caught.value)
    assert saved_tag(path) == TAG
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.faiss"]


def test_without_faiss_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rlt-retrieval\[cpu\]"') as caught:
        VectorIndex.build(4, [])
    assert "\n" not in str(caught.value)


class StandInGpu:
    """What faiss-gpu adds to `faiss`: a copy of a flat index that computes in half precision."""

    __slots__ = ("copies", "half", "widths")  # as FAISS's own classes, it takes no further attributes

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_gpus: int = 1) -> None:
        self.copies: list[tuple[int, int, bool]] = []  # (device, size, float16)
        self.widths: list[int] = []
        options = type("GpuClonerOptions", (), {"useFloat16": False})
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        monkeypatch.setattr(faiss, "GpuClonerOptions", options, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: num_gpus)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", self.copy, raising=False)

    def copy(self, resources: object, device: int, flat: Any, options: Any) -> "StandInGpu":
        self.copies.append((device, flat.ntotal, options.useFloat16))
        self.half = faiss.IndexFlatIP(flat.d)
        vectors_ND = flat.reconstruct_n(0, flat.ntotal)
        self.half.add(vectors_ND.astype(np.float16).astype(np.float32))
        return self

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.widths.append(k)
        return self.half.search(queries_QD.astype(np.float16).astype(np.float32), k)


def unit_rows(rng: np.random.Generator, size: int, dimension: int) -> np.ndarray:
    """Rows so close to one another that half precision changes their order."""
    rows = 1 + 0.02 * rng.standard_normal((size, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("float16", [False, True])
def test_a_gpu_gives_the_cpus_results(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, float16: bool
) -> None:
    vectors_ND, queries_QD = unit_rows(rng, 4000, 16), unit_rows(rng, 5, 16)
    expected = build(vectors_ND).search(queries_QD, 10)
    gpu = StandInGpu(monkeypatch)
    index = build(vectors_ND, device="cuda:1", float16=float16)
    assert gpu.copies == [(1, 4000, float16)]
    assert index.search(queries_QD, 10) == expected
    assert gpu.widths, "the GPU was never asked"
    half_ids_QK = ids_of(4000)[gpu.search(queries_QD, 10)[1]]
    assert half_ids_QK.tolist() != [[clip_id for _, clip_id in hits] for hits in expected], (
        "nothing was tested"
    )


def test_a_loaded_index_still_bounds_the_rounding(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the largest norm, which the file brings, half precision would decide the order."""
    vectors_ND, queries_QD = 50 * unit_rows(rng, 4000, 16), unit_rows(rng, 5, 16)
    index = build(vectors_ND)
    index.save(tmp_path / "vectors.faiss", TAG)
    StandInGpu(monkeypatch)
    loaded = VectorIndex.load(tmp_path / "vectors.faiss", TAG, 4000, device="cuda", float16=True)
    assert loaded is not None
    assert loaded.search(queries_QD, 10) == index.search(queries_QD, 10)


def test_a_gpu_is_not_asked_for_more_than_it_can_give(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors_ND = np.tile(
        unit_rows(rng, 1, 16), (5000, 1)
    )  # all alike: the candidates grow to the whole index
    gpu = StandInGpu(monkeypatch)
    index = build(vectors_ND, device="cuda")
    (hits,) = index.search(vectors_ND[:1], 10)
    assert [clip_id for _, clip_id in hits] == ids_of(10).tolist()
    assert gpu.widths
    assert max(gpu.widths) <= 2048


def test_a_gpu_copy_follows_appends(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = StandInGpu(monkeypatch)
    vectors_ND = unit_rows(rng, 300, 16)
    index = VectorIndex.build(16, [], device="cuda")
    assert gpu.copies == []  # nothing to copy yet
    index.append([(ids_of(300), vectors_ND)])
    assert gpu.copies == [(0, 300, False)]
    assert index.search(vectors_ND[:4], 5) == brute_force(vectors_ND, vectors_ND[:4], 5)


def test_no_gpu_is_said_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    StandInGpu(monkeypatch, num_gpus=0)
    module._say_cpu_once.cache_clear()
    vectors_ND = rng.standard_normal((50, 8), dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            index = build(vectors_ND, device="cuda")
            assert index.search(vectors_ND[:1], 3) == brute_force(vectors_ND, vectors_ND[:1], 3)
    assert [record.getMessage() for record in caplog.records] == [
        "search runs on the CPU: this faiss sees no GPU (the extra rlt-retrieval[gpu] brings one that can)"
    ]
