"""Embeddings in a file, so that any model's can be scored: an .npz of ids and arrays, read without unpickling.

Keys: video_ids, video_embeddings, text_ids, text_embeddings, and maybe bank_embeddings (of further queries, for
QB-norm). Ids are text; a row of embeddings for each. Shapes: N rows, D embedding.
"""

import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.data.files import write_whole
from rlt_retrieval.errors import MetricsError

REQUIRED = ("video_ids", "video_embeddings", "text_ids", "text_embeddings")
BANK = "bank_embeddings"
# RuntimeError: an encrypted member or (NotImplementedError) an unknown compression. TokenError, SyntaxError: a torn
# header of an array, which numpy reads as a Python literal.
BROKEN = (
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    TokenError,
    SyntaxError,
)


@dataclass(frozen=True, eq=False)
class EmbeddingFile:
    """What a file holds, in its order; the embeddings are real, finite and of one D."""

    path: Path
    video_ids: list[str]
    z_video_ND: NDArray[Any]
    text_ids: list[str]
    z_text_ND: NDArray[Any]
    z_bank_ND: NDArray[Any] | None


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Read and check an embedding file.

    Raises:
        MetricsError: missing or no .npz, a key missing, ids that are not text or there twice, embeddings that are not
            [ids, D] of the same D, NaN or infinity; names the file and the id.
    """
    path = Path(path)
    arrays = _load(path)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise MetricsError(f"{path}: no key {missing[0]!r}; expected {', '.join(REQUIRED)}")
    video_ids, text_ids = _ids(path, arrays, "video"), _ids(path, arrays, "text")
    dimension = arrays["video_embeddings"].shape[-1] if arrays["video_embeddings"].ndim else 0
    _check_embeddings(path, arrays["video_embeddings"], "video_embeddings", video_ids, dimension)
    _check_embeddings(path, arrays["text_embeddings"], "text_embeddings", text_ids, dimension)
    bank = arrays.get(BANK)
    if bank is not None:
        rows = [f"row {row}" for row in range(len(bank) if bank.ndim else 0)]
        _check_embeddings(path, bank, BANK, rows, dimension)
    return EmbeddingFile(
        path, video_ids, arrays["video_embeddings"], text_ids, arrays["text_embeddings"], bank
    )


def write_embeddings(
    path: Path,
    video_ids: Sequence[str],
    z_video_ND: NDArray[Any],
    text_ids: Sequence[str],
    z_text_ND: NDArray[Any],
    z_bank_ND: NDArray[Any] | None = None,
) -> None:
    """Write what `read_embeddings` reads; the file appears under its name when it is whole.

    Raises:
        ShardError: disk full, folder not writable.
    """
    arrays: dict[str, Any] = dict(
        zip(REQUIRED, map(np.asarray, (video_ids, z_video_ND, text_ids, z_text_ND)), strict=True)
    )
    if z_bank_ND is not None:
        arrays[BANK] = np.asarray(z_bank_ND)
    write_whole(path, lambda file: np.savez(file, **arrays))


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        _check_is_zip(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in (*REQUIRED, BANK) if name in archive.files}
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except MemoryError as error:
        raise MetricsError(f"{path}: its arrays do not fit in memory; write fewer rows or float16") from error
    except BROKEN as error:
        raise MetricsError(_no_plain_arrays(path, error)) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives bytes for a member that is something else
            raise MetricsError(f"{path}: {name} is not an array; write the file with numpy.savez")
    return arrays


def _check_is_zip(path: Path) -> None:
    """Before numpy sees it: of other files numpy only says that they might be loaded by unpickling."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise MetricsError(
            f"{path}: not an .npz of plain arrays but a single array (.npy); write ids and embeddings with numpy.savez"
        )
    if magic[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
        raise MetricsError(f"{path}: not an .npz of plain arrays; write it with numpy.savez")


def _no_plain_arrays(path: Path, error: Exception) -> str:
    problem = (str(error) or type(error).__name__).splitlines()[0]
    if problem.startswith("Object arrays"):
        return (
            f"{path}: not an .npz of plain arrays but of Python objects; write ids as ids.astype(str), "
            "embeddings as floats"
        )
    return f"{path}: not an .npz of plain arrays ({problem}); write it with numpy.savez"


def _ids(path: Path, arrays: dict[str, NDArray[Any]], kind: str) -> list[str]:
    ids = arrays[f"{kind}_ids"]
    if ids.ndim != 1 or ids.dtype.kind != "U" or not len(ids):
        raise MetricsError(f"{path}: {kind}_ids are {ids.dtype} {ids.shape}, expected a list of texts")
    twice = [name for name, count in Counter(ids.tolist()).items() if count > 1]
    if twice:
        raise MetricsError(f"{path}: {kind} id {twice[0]!r} is there twice; give each once")
    return list(map(str, ids.tolist()))


def _check_embeddings(path: Path, z_ND: NDArray[Any], name: str, ids: Sequence[str], dimension: int) -> None:
    if z_ND.shape != (len(ids), dimension) or 0 in z_ND.shape or z_ND.dtype.kind != "f":
        raise MetricsError(
            f"{path}: {name} is {z_ND.dtype} {z_ND.shape}, expected floats of shape {(len(ids), dimension)}: a row for "
            "each id, all of one dimension"
        )
    bad = np.flatnonzero(~np.isfinite(z_ND).all(axis=1))
    if len(bad):
        raise MetricsError(
            f"{path}: {name} of {ids[bad[0]]} holds NaN or infinity; find what made it in that model"
        )
