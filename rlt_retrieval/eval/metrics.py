"""Retrieval metrics on plain arrays, computed in float64.

mAP and nDCG are the multi-instance retrieval quantities of EPIC-KITCHENS-100 (Damen et al., "Rescaling
Egocentric Vision", IJCV 2022, section on multi-instance retrieval): relevancies are soft, a number in [0, 1]
for every (video, text) pair. Recall and ranks take a yes/no mask.

Ties always count against the query: among equal scores the less relevant item comes first. So the numbers do
not depend on the order of the items, and a model that gives every pair the same score has recall 0.

Shapes: V videos, T texts; where rows are the queries of one direction, Q queries and N ranked items.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlt_retrieval.errors import MetricsError

FloatArray = NDArray[np.floating[Any]]

# Pairs ranked at a time: bounds the working memory (some 100 MB) whatever the size of the matrix.
PAIRS_PER_CHUNK = 1_000_000


@dataclass(frozen=True)
class DirectionScores:
    """One metric in both directions and their plain mean; how many queries had nothing to find, or a tie.

    tied: queries, of those counted, where items of equal score have different relevancies, so that the rule for ties
    decides their order.
    """

    video_to_text: float
    text_to_video: float
    mean: float
    video_to_text_left_out: int
    text_to_video_left_out: int
    video_to_text_tied: int
    text_to_video_tied: int


@dataclass(frozen=True)
class Evaluation:
    """mAP and nDCG of one similarity matrix."""

    mean_average_precision: DirectionScores
    ndcg: DirectionScores

    def to_dict(self) -> dict[str, Any]:
        """For JSON: both directions with mAP, nDCG, their left_out counts and "tied", and their "mean".

        "tied" counts queries with anything to find, that is, those that nDCG counts.
        """
        result: dict[str, Any] = {}
        for direction in ("text_to_video", "video_to_text", "mean"):
            named = {"mAP": self.mean_average_precision, "nDCG": self.ndcg}
            result[direction] = {name: getattr(scores, direction) for name, scores in named.items()}
            if direction != "mean":
                left_out = {
                    f"{name}_left_out": getattr(s, f"{direction}_left_out") for name, s in named.items()
                }
                result[direction] |= {**left_out, "tied": getattr(self.ndcg, f"{direction}_tied")}
        return result


class QueryScores(NamedTuple):
    """Scores of every query of one direction, [Q] each: float64, NaN where the query is left out; bool."""

    average_precision: NDArray[np.float64]
    ndcg: NDArray[np.float64]
    tied: NDArray[np.bool_]


@dataclass(frozen=True)
class RankScores:
    """Recall and ranks of one direction, over the queries that have a right item."""

    recall: dict[int, float]  # k → share of queries whose best right item is among the first k
    median_rank: float  # ranks count from 1
    mean_rank: float
    num_queries: int  # queries counted
    left_out: int  # queries without a right item
    tied: int  # queries where a wrong item has exactly the score of the best right one


@dataclass(frozen=True)
class RecallScores:
    """`RankScores` of both directions."""

    video_to_text: RankScores
    text_to_video: RankScores


def mean_average_precision(similarity_VT: ArrayLike, relevancy_VT: ArrayLike) -> DirectionScores:
    """Mean average precision with soft relevancies, both directions.

    For a query with ranked relevancies r_1 … r_n, AP is the mean over the ranks k with r_k = 1 of
    (r_1 + … + r_k) / k: precision is read at exact matches only and accumulates every relevancy.
    A query with no item of relevancy 1 is left out and counted.

    similarity_VT: [videos, texts], any real dtype, higher is nearer. relevancy_VT: the same shape, in [0, 1].
    Raises MetricsError: other shapes, NaN (naming the row), a relevancy outside [0, 1],
    no pair of relevancy 1.
    """
    similarity, relevancy = _checked(similarity_VT, relevancy_VT)
    return _average(query_scores(similarity, relevancy), query_scores(similarity.T, relevancy.T), "mAP")


def ndcg(similarity_VT: ArrayLike, relevancy_VT: ArrayLike) -> DirectionScores:
    """Normalised discounted cumulative gain with soft relevancies, both directions.

    nDCG = DCG / IDCG, gain r at rank k discounted by log2(k + 1), both sums over the first K ranks, K being
    the number of items of relevancy > 0 for that query; IDCG is the DCG of the best possible order.
    A query with no item of relevancy > 0 is left out and counted.

    Arguments and errors as `mean_average_precision`; there must be a pair of relevancy > 0.
    """
    similarity, relevancy = _checked(similarity_VT, relevancy_VT)
    return _average(query_scores(similarity, relevancy), query_scores(similarity.T, relevancy.T), "nDCG")


def evaluate(similarity_VT: ArrayLike, relevancy_VT: ArrayLike) -> Evaluation:
    """`mean_average_precision` and `ndcg` from one ranking a direction. Arguments and errors as those."""
    return average(*evaluate_queries(similarity_VT, relevancy_VT))


def evaluate_queries(similarity_VT: ArrayLike, relevancy_VT: ArrayLike) -> tuple[QueryScores, QueryScores]:
    """What `evaluate` averages: the scores of every video as a query, and of every text. Arguments as there."""
    similarity, relevancy = _checked(similarity_VT, relevancy_VT)
    return query_scores(similarity, relevancy), query_scores(similarity.T, relevancy.T)


def average(video_queries: QueryScores, text_queries: QueryScores) -> Evaluation:
    """The means over the queries of each direction that have something to find, and the mean of these two.

    Raises MetricsError: no query has.
    """
    return Evaluation(*(_average(video_queries, text_queries, name) for name in ("mAP", "nDCG")))


def recall_at_k(
    similarity_VT: ArrayLike, positive_VT: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> RecallScores:
    """Recall at each k, median and mean rank, both directions.

    The rank of a query is 1 + the number of wrong items that score at least as high as its best right item.
    A query without a right item is left out and counted.

    positive_VT: bool [videos, texts], True where the pair belongs together.
    Raises MetricsError: other shapes, a mask that is not bool, NaN (naming the row), no True pair, k < 1.
    """
    similarity, positive = _checked(similarity_VT, positive_VT)
    if positive.dtype != bool:
        raise MetricsError(f"right pairs: {positive.dtype}, expected bool; pass e.g. relevancy == 1")
    if not positive.any():
        raise MetricsError("right pairs: none is True, so there is nothing to find; check the pairing")
    if min(ks) < 1:
        raise MetricsError(f"recall at k = {min(ks)}: k counts from 1")
    return RecallScores(_rank_scores(similarity, positive, ks), _rank_scores(similarity.T, positive.T, ks))


def query_scores(similarity_QN: FloatArray, relevancy_QN: NDArray[Any]) -> QueryScores:
    """AP, nDCG and ties of every row as a query.

    Ranks once, a chunk of rows at a time. Arguments are not checked.
    """
    num_queries = len(similarity_QN)
    scores = QueryScores(np.empty(num_queries), np.empty(num_queries), np.zeros(num_queries, dtype=bool))
    for rows, scores_QN, relevant_QN in _chunks(similarity_QN, relevancy_QN):
        ranked_QN, scores.tied[rows] = _ranked_relevancies(
            scores_QN, relevant_QN.astype(np.float64, copy=False)
        )
        scores.average_precision[rows], scores.ndcg[rows] = _average_precision(ranked_QN), _ndcg(ranked_QN)
    return scores


def _chunks(
    similarity_QN: FloatArray, relevant_QN: NDArray[Any]
) -> Iterator[tuple[slice, FloatArray, NDArray[Any]]]:
    """Rows a few at a time, contiguous (a transposed view would be sorted with strides)."""
    step = max(1, PAIRS_PER_CHUNK // similarity_QN.shape[1])
    for start in range(0, len(similarity_QN), step):
        rows = slice(start, start + step)
        yield rows, _contiguous(similarity_QN[rows]), _contiguous(relevant_QN[rows])


def _contiguous(part_QN: NDArray[Any]) -> NDArray[Any]:
    """In C order. A part of a transposed view is copied as it lies, then turned: a third of the time."""
    return np.ascontiguousarray(part_QN if part_QN.flags.c_contiguous else part_QN.copy(order="K"))


def _ranked_relevancies(
    scores_QN: FloatArray, relevancy_QN: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Relevancies in rank order, ties against the query; for every query whether a tie decided anything."""
    falling_QN = -scores_QN
    order_QN = np.argsort(falling_QN, axis=1)
    order_QN += np.arange(0, relevancy_QN.size, relevancy_QN.shape[1])[:, None]
    ranked_QN = relevancy_QN.take(order_QN)
    falling_QN.sort(axis=1)  # faster than to take them in their order
    same_as_before = falling_QN[:, 1:] == falling_QN[:, :-1]
    if not same_as_before.any():
        return ranked_QN, np.zeros(len(ranked_QN), dtype=bool)
    _sort_within_ties(ranked_QN, same_as_before)
    return ranked_QN, (same_as_before & (ranked_QN[:, 1:] != ranked_QN[:, :-1])).any(axis=1)


def _sort_within_ties(ranked_QN: NDArray[np.float64], same_as_before: NDArray[np.bool_]) -> None:
    """Put the less relevant first inside every run of equal scores, in place.

    One sort of integers (run number, then level of relevancy) does all runs of all rows: much faster than
    sorting by two keys from the start, and float32 and float16 scores nearly always tie somewhere.
    """
    starts_run = np.ones(ranked_QN.shape, dtype=bool)
    starts_run[:, 1:] = ~same_as_before
    in_run = ~starts_run
    in_run[:, :-1] |= same_as_before
    run_of = np.cumsum(starts_run)[in_run.ravel()]
    values = ranked_QN[in_run]
    levels = np.unique(values)
    keys = np.sort(run_of * len(levels) + np.searchsorted(levels, values))
    ranked_QN[in_run] = levels[keys % len(levels)]


def _average_precision(ranked_QN: NDArray[np.float64]) -> NDArray[np.float64]:
    num_queries = len(ranked_QN)
    query, position = np.nonzero(ranked_QN == 1.0)
    precision = np.cumsum(ranked_QN, axis=1)[query, position] / (position + 1)
    total_Q = np.bincount(query, weights=precision, minlength=num_queries)
    return _divide(total_Q, np.bincount(query, minlength=num_queries))


def _ndcg(ranked_QN: NDArray[np.float64]) -> NDArray[np.float64]:
    num_relevant_Q = np.count_nonzero(ranked_QN > 0, axis=1)
    cut = int(num_relevant_Q.max())
    discount = 1 / np.log2(np.arange(2, cut + 2))
    inside = np.arange(cut) < num_relevant_Q[:, None]
    dcg_Q = np.where(inside, ranked_QN[:, :cut], 0.0) @ discount
    ideal_QN = np.sort(ranked_QN, axis=1)[:, ::-1]  # beyond K it is 0: no cut needed
    return _divide(dcg_Q, ideal_QN[:, :cut] @ discount)


def _divide(numerator_Q: NDArray[Any], denominator_Q: NDArray[Any]) -> NDArray[np.float64]:
    """The quotient, NaN where the denominator is 0."""
    return np.divide(
        numerator_Q, denominator_Q, out=np.full(len(numerator_Q), np.nan), where=denominator_Q > 0
    )


def _average(
    video_queries: QueryScores, text_queries: QueryScores, name: Literal["mAP", "nDCG"]
) -> DirectionScores:
    v2t_V, t2v_T = (q.average_precision if name == "mAP" else q.ndcg for q in (video_queries, text_queries))
    counted_V, counted_T = ~np.isnan(v2t_V), ~np.isnan(t2v_T)
    if not counted_V.any():
        needed = "1" if name == "mAP" else "> 0"
        raise MetricsError(
            f"{name}: no pair has relevancy {needed}, so there is nothing to find; check the relevancies"
        )
    v2t, t2v = float(v2t_V[counted_V].mean()), float(t2v_T[counted_T].mean())
    return DirectionScores(
        video_to_text=v2t,
        text_to_video=t2v,
        mean=(v2t + t2v) / 2,
        video_to_text_left_out=int((~counted_V).sum()),
        text_to_video_left_out=int((~counted_T).sum()),
        video_to_text_tied=int((video_queries.tied & counted_V).sum()),
        text_to_video_tied=int((text_queries.tied & counted_T).sum()),
    )


def _rank_scores(similarity_QN: FloatArray, positive_QN: NDArray[np.bool_], ks: Sequence[int]) -> RankScores:
    rank_Q = np.empty(len(similarity_QN), dtype=np.int64)
    tied_Q, has_right_Q = np.empty(len(rank_Q), dtype=bool), np.empty(len(rank_Q), dtype=bool)
    for rows, scores_QN, right_QN in _chunks(similarity_QN, positive_QN):
        best_Q1 = np.where(right_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
        rank_Q[rows] = 1 + np.count_nonzero(~right_QN & (scores_QN >= best_Q1), axis=1)
        tied_Q[rows] = (~right_QN & (scores_QN == best_Q1)).any(axis=1)
        has_right_Q[rows] = right_QN.any(axis=1)
    ranks = rank_Q[has_right_Q]
    return RankScores(
        recall={k: float(np.mean(ranks <= k)) for k in ks},
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
        num_queries=len(ranks),
        left_out=len(rank_Q) - len(ranks),
        tied=int(tied_Q[has_right_Q].sum()),
    )


def _checked(similarity_VT: ArrayLike, relevant_VT: ArrayLike) -> tuple[FloatArray, NDArray[Any]]:
    """Both as arrays: similarity float32 or float64, relevancies bool or float, shapes and values checked."""
    similarity, relevant = np.asarray(similarity_VT), np.asarray(relevant_VT)
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != relevant.shape:
        raise MetricsError(
            f"similarity {similarity.shape} and relevancy {relevant.shape}: expected the same non-empty "
            "shape [videos, texts]"
        )
    if similarity.dtype not in (np.float32, np.float64):
        # Exact for float16 and for integers below 2^53; the wider types are what numpy sorts fast.
        similarity = similarity.astype(np.float32 if similarity.dtype == np.float16 else np.float64)
    for rows, scores_QN, relevant_QN in _chunks(similarity, relevant):
        _refuse_nan(scores_QN, rows.start)
        if relevant.dtype != bool:
            _refuse_outside_unit(relevant_QN, rows.start)
    return similarity, relevant


def _refuse_nan(scores_QN: FloatArray, first_row: int) -> None:
    missing = np.isnan(scores_QN)
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise MetricsError(
            f"similarity row {first_row + row}, column {column}: NaN cannot be ranked; "
            "find what made that embedding NaN"
        )


def _refuse_outside_unit(relevancy_QN: NDArray[Any], first_row: int) -> None:
    fits = (relevancy_QN >= 0) & (relevancy_QN <= 1)
    if not fits.all():
        row, column = np.argwhere(~fits)[0]
        raise MetricsError(
            f"relevancy row {first_row + row}, column {column}: {relevancy_QN[row, column]}, "
            "expected a number in [0, 1]"
        )
