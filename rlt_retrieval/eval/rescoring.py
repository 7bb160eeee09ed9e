"""Scores that look at more than one query: dual softmax and QB-norm. Rows for a table of their own.

A retrieval system answers one query at a time. Dual softmax needs all test queries at once, QB-norm a bank of other
queries; so their numbers are labelled and never stand for the plain ones.

Shapes: V videos, T texts, Q queries, G gallery items, B bank queries, D embedding.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.eval.protocols import norms

Array = NDArray[np.floating[Any]]

DUAL_SOFTMAX_SCALE = 100.0  # CLIP's largest logit scale (arXiv 2103.00020, section 2.5)
QB_NORM_SCALE = 20.0  # β of the published code, github.com/ioanacroi/qb-norm
BANK_ROWS_PER_PRODUCT = 1024
NORM_TOLERANCE = 1e-3

DUAL_SOFTMAX = "dual softmax (uses all test queries)"
QB_NORM = "QB-norm (uses a query bank; text to video only)"
NEED_UNIT_NORM = "extra rows need unit-norm embeddings; left out"


def extra_rows(
    similarity_VT: Array,
    z_video_VD: Array,
    z_bank_BD: Array | None,
    score: Callable[[Array], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Label → direction → numbers, of dual softmax and, where there is a bank of text embeddings, of QB-norm.

    score: what gives the plain row from a similarity matrix [videos, texts]. Each direction of dual softmax takes its
    prior over its own queries. QB-norm's bank holds texts, so it changes the direction text to video alone.
    """
    by_text = score(dual_softmax(similarity_VT.T).T)["text_to_video"]
    by_video = score(dual_softmax(similarity_VT))["video_to_text"]
    rows = {DUAL_SOFTMAX: {"text_to_video": by_text, "video_to_text": by_video}}
    if z_bank_BD is not None:
        normed_TV = qb_norm(similarity_VT.T, z_video_VD, z_bank_BD)
        rows[QB_NORM] = {"text_to_video": score(normed_TV.T)["text_to_video"]}
    return rows


def are_unit_norm(*embeddings_of: Array) -> bool:
    """Whether every row's norm is about 1: the fixed scales above are meant for cosine similarities."""
    return all((np.abs(norms(z_ND) - 1) <= NORM_TOLERANCE).all() for z_ND in embeddings_of)


def dual_softmax(similarity_QG: Array, scale: float = DUAL_SOFTMAX_SCALE) -> NDArray[np.float64]:
    """s'(q, g) = s(q, g) · exp(t·s(q, g)) / Σ_q' exp(t·s(q', g)): a prior of the gallery item over all queries.

    An item that fits every query alike is worth little to each. Cheng et al. (CAMoE), arXiv 2109.04290, equations of
    the dual softmax loss, applied to the test similarities; t = 100 here, the scale that CLIP's logits have. As there,
    the prior is a factor, so negative similarities with a small prior move up.
    """
    exponent_QG = scale * similarity_QG.astype(np.float64)
    exponent_QG -= _log_sum_exp(exponent_QG, axis=0)
    np.exp(exponent_QG, out=exponent_QG)
    exponent_QG *= similarity_QG
    return exponent_QG


def qb_norm(
    similarity_QG: Array, z_gallery_GD: Array, z_bank_BD: Array, scale: float = QB_NORM_SCALE
) -> NDArray[np.float64]:
    """QB-norm by the dynamic inverted softmax, Bogolin et al., arXiv 2112.12777, section 3.

    With Z(g) = Σ_b exp(β·s(b, g)) over the bank, and A the gallery items that some bank query finds first (k = 1):
    s'(q, g) = exp(β·s(q, g)) / Z(g) if q's first item is in A, else s(q, g). β = 20 as in the published code. Given
    here as s(q, g) − log Z(g) / β, which ranks the same.
    """
    log_total_G, is_found_first_G = _probe(z_gallery_GD, z_bank_BD, scale)
    rescored_QG = similarity_QG.astype(np.float64)
    hubs_first_Q = is_found_first_G[similarity_QG.argmax(axis=1)]
    rescored_QG[hubs_first_Q] -= log_total_G / scale
    return rescored_QG


def _probe(
    z_gallery_GD: Array, z_bank_BD: Array, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """log Z(g), and whether g is in A, for every gallery item; a few bank queries at a time."""
    gallery_DG = z_gallery_GD.astype(np.float64).T
    log_total_G = np.full(len(z_gallery_GD), -np.inf)
    is_found_first_G = np.zeros(len(z_gallery_GD), dtype=bool)
    for start in range(0, len(z_bank_BD), BANK_ROWS_PER_PRODUCT):
        similarity_BG = z_bank_BD[start : start + BANK_ROWS_PER_PRODUCT].astype(np.float64) @ gallery_DG
        is_found_first_G[similarity_BG.argmax(axis=1)] = True
        log_total_G = np.logaddexp(log_total_G, _log_sum_exp(scale * similarity_BG, axis=0))
    return log_total_G, is_found_first_G


def _log_sum_exp(exponent: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    highest = exponent.max(axis=axis, keepdims=True)
    total = np.exp(exponent - highest).sum(axis=axis)
    return np.log(total) + highest.squeeze(axis)
