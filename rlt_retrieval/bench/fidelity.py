"""How near the embeddings of a pruned model are to those of the full one, and pictures of what pruning leaves.

Shapes: N clips, D embedding; T' tubelets of t frames, grid T' x H' x W', P patch side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlt_retrieval.encoders.packing import VideoTokens, covering_tokens, pack
from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval.protocols import fine_inner_products

SAME = 1e-6  # 1 - cosine of equal embeddings, with the rounding of float32


def relative_errors(z_full_ND: NDArray[Any], z_ND: NDArray[Any]) -> NDArray[np.float64]:
    """1 - cosine of each clip's two embeddings, divided by the median 1 - cosine of two clips of the full model.

    So 1 is as far as one clip is from another. N >= 2; gives float64 [N].

    Raises:
        MetricsError: the full model's clips are the same, or half of the pairs are.
    """
    unit_ND = _unit(z_full_ND)
    scale = np.median(1 - fine_inner_products(unit_ND, unit_ND)[np.triu_indices(len(unit_ND), 1)])
    if not scale > SAME:
        raise MetricsError(
            "most clips have the same embedding, so errors cannot be measured by their distance; give clips that differ"
        )
    return (1 - cosines(z_full_ND, z_ND)) / scale


def cosines(z_full_ND: NDArray[Any], z_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row with the other's same row: float64 [N]."""
    return np.minimum((_unit(z_full_ND) * _unit(z_ND)).sum(1), 1)


def neighbour_overlap(z_full_ND: NDArray[Any], z_ND: NDArray[Any], k: int) -> float:
    """Share of a clip's k nearest other clips that stay its k nearest, on the mean over clips.

    Neighbours by cosine, each kind of embedding among its own; ties go to the earlier clip. 1 <= k < N, and with
    k = N - 1 the overlap is 1 whatever the embeddings are.
    """
    both_NN = _near(_unit(z_full_ND), k) & _near(_unit(z_ND), k)
    return float(both_NN.sum() / (k * len(z_ND)))


def _near(unit_ND: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """bool [N, N]: whether the clip of a column is one of the k nearest of the row's."""
    similarity_NN = fine_inner_products(unit_ND, unit_ND)
    np.fill_diagonal(similarity_NN, -np.inf)
    near_NN = np.zeros(similarity_NN.shape, bool)
    np.put_along_axis(near_NN, np.argsort(-similarity_NN, axis=1, kind="stable")[:, :k], True, axis=1)
    return near_NN


def _unit(z_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Unit norm to float64's precision: float32's errors would show in 1 - cosine."""
    z_ND = z_ND.astype(np.float64)
    return z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)


def copied_forward(tokens: VideoTokens) -> Tensor:
    """The frames that the kept tokens tell of: each cell shows the patch of the token that stands for it.

    Returns:
        uint8 [T' t, 3, H' P, W' P], where the tokens are. What was a whole frame stays bit by bit.
    """
    t, height, width = tokens.grid
    cells_thwucpp = tokens.patches[covering_tokens(pack([tokens]))[0]]
    _, _, _, u, c, p, _ = cells_thwucpp.shape
    return cells_thwucpp.permute(0, 3, 4, 1, 5, 2, 6).reshape(t * u, c, height * p, width * p)
