"""Exact inner-product search over clip embeddings, with FAISS; the only module that imports `faiss`.

Shapes: N clips, D embedding dimensions, Q queries.

`vectors.faiss` is derived from the records and says from which state of them. It is FAISS's own format (an
`IndexIDMap` over an `IndexFlatIP`, which `faiss.read_index` reads), then a trailer, which `read_index` does
not reach: the records' tag, the payload's length, the largest norm (so that opening need not look at every
vector) and the CRC-32 of all before it. So one rename puts vectors and tag in place together; the checksum is
verified before FAISS parses anything.
"""

import logging
import os
import struct
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rlt_retrieval.errors import IndexStoreError, MissingDependencyError

logger = logging.getLogger(__name__)

IO_BYTES = 1 << 20
MAX_GPU_CANDIDATES = 2048  # FAISS's k-selection on a GPU goes no further
GPU_UNIT_ERROR = 2.0**-9  # both vectors rounded to 11 bits (float16, TF32), doubled
SCORES_PER_STEP = 1 << 22

_FACTS = struct.Struct("<8s16sQd")  # magic, tag, payload bytes, largest norm
_CHECKSUM = struct.Struct("<I")  # CRC-32 of the payload and the facts
_MAGIC = b"RLTVEC02"

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]  # (int64 ids_N ascending, float32 vectors_ND)


def require_faiss() -> Any:
    """The module `faiss`. Raises MissingDependencyError, which names the extras, if it cannot be imported."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f'faiss cannot be imported ({error}): pip install "rlt-retrieval[cpu]" or "rlt-retrieval[gpu]"'
        ) from error
    return faiss


class VectorIndex:
    """Clip ids and their vectors.

    FAISS proposes candidates (on the CPU or a GPU, in float32 or float16). Their order is decided by inner
    products of the float32 vectors in float64: it depends on neither device nor batch, and equal vectors tie.
    """

    def __init__(
        self, id_map: Any, largest_norm: float, *, device: str = "cpu", float16: bool = False
    ) -> None:
        """`id_map`: an `IndexIDMap` over an `IndexFlatIP`, ids ascending; use `build` or `load`."""
        self._faiss = require_faiss()
        self._id_map = id_map
        self._flat = self._faiss.downcast_index(id_map.index)
        self._device, self._float16 = device, float16
        self._largest_norm = largest_norm
        self._update()

    @classmethod
    def build(
        cls, dimension: int, chunks: Chunks, *, device: str = "cpu", float16: bool = False
    ) -> "VectorIndex":
        faiss = require_faiss()
        id_map = faiss.IndexIDMap(faiss.IndexFlatIP(dimension))
        return cls(id_map, _add(id_map, chunks), device=device, float16=float16)

    @classmethod
    def load(
        cls, path: Path, tag: bytes, num_clips: int, *, device: str = "cpu", float16: bool = False
    ) -> "VectorIndex | None":
        """The saved index, or None if `path` is missing, torn, or not that of `tag` with `num_clips` clips."""
        faiss = require_faiss()
        try:
            with open(path, "rb") as file:
                trailer = _read_trailer(file)
                if trailer is None or trailer.tag != tag or not _is_whole(file, trailer):
                    return None
                file.seek(0)
                id_map = faiss.read_index(faiss.PyCallbackIOReader(file.read, IO_BYTES))
        except (OSError, RuntimeError):  # the second is FAISS's own, e.g. for a format of another release
            return None
        if id_map.ntotal != num_clips:
            return None
        return cls(id_map, trailer.largest_norm, device=device, float16=float16)

    def append(self, chunks: Chunks) -> None:
        """Add clips whose ids are larger than all that are there."""
        self._largest_norm = max(self._largest_norm, _add(self._id_map, chunks))
        self._update()

    def save(self, path: Path, tag: bytes) -> None:
        """Replace `path` in one rename. Raises IndexStoreError (disk full, …) and leaves it as it was."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            try:
                with open(temporary, "wb") as file:
                    self._write(file, tag)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise IndexStoreError(
                f"{path} cannot be written ({error.strerror}); check free space and write permission,"
                " the records are complete without it"
            ) from error

    def search(
        self, queries_QD: np.ndarray, k: int, groups_N: np.ndarray | None = None
    ) -> list[list[tuple[float, int]]]:
        """For each query up to `k` (score, clip id), by score descending, then id ascending.

        With `groups_N` (one integer a clip) only the best clip of each group counts. FAISS is asked for ever
        more candidates until no clip outside them can belong to the answer, rounding taken into account.
        """
        answers: list[list[tuple[float, int]]] = [[] for _ in queries_QD]
        pending = np.arange(len(queries_QD))
        width = 2 * k + 16
        while pending.size:
            width = min(width, len(self))
            bounds, positions = self._candidates(queries_QD[pending], width)
            settled = np.zeros(pending.size, dtype=bool)
            for row, query in enumerate(pending):
                best = self._rank(queries_QD[query], positions[row], k, groups_N)
                answers[query] = [(score, int(self.ids_N[position])) for score, position in best]
                settled[row] = width == len(self) or (len(best) == k and best[-1][0] > bounds[row])
            pending = pending[~settled]
            width *= 4
        return answers

    def __len__(self) -> int:
        return self._id_map.ntotal

    def _update(self) -> None:
        """Views into FAISS's own memory, which an add may have moved; and a new copy on the GPU."""
        faiss, size = self._faiss, len(self)
        self.ids_N: np.ndarray = faiss.vector_to_array(self._id_map.id_map)
        values = faiss.rev_swig_ptr(self._flat.get_xb(), size * self._flat.d) if size else np.empty(0, "f4")
        self._vectors_ND = values.reshape(size, self._flat.d)
        self._gpu, self._gpu_resources = _gpu_copy(faiss, self._flat, self._device, self._float16)

    def _candidates(self, queries_QD: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(bounds_Q, positions_QK): no clip outside positions_QK[q] scores more than bounds_Q[q]."""
        if width == len(self):
            everything = np.broadcast_to(np.arange(width), (len(queries_QD), width))
            return np.full(len(queries_QD), -np.inf), everything
        # The rounding error of a float32 inner product is under D * 2**-24 * |q| * |v|; doubled to be safe.
        unit_error = self._flat.d * 2.0**-23
        searcher = self._flat
        if self._gpu is not None and width <= MAX_GPU_CANDIDATES:
            searcher, unit_error = self._gpu, unit_error + GPU_UNIT_ERROR
        scores_QK, positions_QK = searcher.search(queries_QD, width)
        norms_Q = np.linalg.norm(queries_QD.astype(np.float64), axis=1)
        bounds_Q = scores_QK[:, -1] + unit_error * norms_Q * self._largest_norm
        bounds_Q[positions_QK[:, -1] < 0] = np.inf  # FAISS found no more: scores beyond float32
        return bounds_Q, positions_QK

    def _rank(
        self, query_D: np.ndarray, positions_K: np.ndarray, k: int, groups_N: np.ndarray | None
    ) -> list[tuple[float, int]]:
        scores_K = _exact_scores(self._vectors_ND, positions_K, query_D)
        order = np.lexsort((positions_K, -scores_K))
        if groups_N is not None:
            _, first_of_group = np.unique(groups_N[positions_K[order]], return_index=True)
            order = order[np.sort(first_of_group)]
        top = order[:k]
        return list(zip(scores_K[top].tolist(), positions_K[top].tolist(), strict=True))

    def _write(self, file: BinaryIO, tag: bytes) -> None:
        checksum = 0

        def write(chunk: bytes) -> int:
            nonlocal checksum
            checksum = zlib.crc32(chunk, checksum)
            return file.write(chunk)

        self._faiss.write_index(self._id_map, self._faiss.PyCallbackIOWriter(write, IO_BYTES))
        write(_FACTS.pack(_MAGIC, tag, file.tell(), self._largest_norm))
        file.write(_CHECKSUM.pack(checksum))


@dataclass(frozen=True)
class _Trailer:
    tag: bytes
    payload_bytes: int
    largest_norm: float
    checksum: int


def saved_tag(path: Path) -> bytes | None:
    """The tag `path` was saved with, without reading the rest; None when it is missing or torn."""
    try:
        with open(path, "rb") as file:
            trailer = _read_trailer(file)
    except OSError:
        return None
    return trailer.tag if trailer else None


def _read_trailer(file: BinaryIO) -> _Trailer | None:
    """None when the file does not end in a trailer that fits its length."""
    payload_bytes = os.fstat(file.fileno()).st_size - _FACTS.size - _CHECKSUM.size
    if payload_bytes < 0:
        return None
    file.seek(payload_bytes)
    magic, tag, expected_bytes, largest_norm = _FACTS.unpack(file.read(_FACTS.size))
    (checksum,) = _CHECKSUM.unpack(file.read(_CHECKSUM.size))
    if (magic, expected_bytes) != (_MAGIC, payload_bytes):
        return None
    return _Trailer(tag, payload_bytes, largest_norm, checksum)


def _is_whole(file: BinaryIO, trailer: _Trailer) -> bool:
    file.seek(0)
    remaining, checksum = trailer.payload_bytes + _FACTS.size, 0
    buffer = memoryview(bytearray(IO_BYTES))
    while remaining and (size := file.readinto(buffer[:remaining])):  # type: ignore[attr-defined]
        checksum = zlib.crc32(buffer[:size], checksum)
        remaining -= size
    return remaining == 0 and checksum == trailer.checksum


def _add(id_map: Any, chunks: Chunks) -> float:
    """Add clips; the largest norm among them."""
    largest_norm = 0.0
    for ids_N, vectors_ND in chunks:
        id_map.add_with_ids(vectors_ND, ids_N)
        norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
        largest_norm = max(largest_norm, float(norms_N.max(initial=0.0)))
    return largest_norm


def _exact_scores(vectors_ND: np.ndarray, positions_K: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """float64 inner products. Products of float32 values are exact in float64, and numpy sums every row of a
    contiguous array in the same order: equal vectors get equal scores, which no matrix product promises."""
    query64_D = query_D.astype(np.float64)
    step = max(1, SCORES_PER_STEP // len(query64_D))
    parts = [
        (vectors_ND[positions_K[start : start + step]].astype(np.float64) * query64_D).sum(axis=1)
        for start in range(0, len(positions_K), step)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def _gpu_copy(faiss: Any, flat: Any, device: str, float16: bool) -> tuple[Any, Any]:
    """(`flat` on the GPU, the resources that must live as long), or (None, None) where it stays on the CPU:
    as asked, or because it is empty, or because this FAISS sees no GPU."""
    if device == "cpu":
        return None, None
    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0):
        _say_cpu_once()
        return None, None
    if not flat.ntotal:
        return None, None
    options = faiss.GpuClonerOptions()
    options.useFloat16 = float16
    ordinal = int(device.partition(":")[2] or 0)
    resources = faiss.StandardGpuResources()
    return faiss.index_cpu_to_gpu(resources, ordinal, flat, options), resources


@cache
def _say_cpu_once() -> None:
    logger.warning(
        "search runs on the CPU: this faiss sees no GPU (the extra rlt-retrieval[gpu] brings one that can)"
    )
