"""Captioned-video retrieval: from embeddings and captions to the numbers a table shows.

Shapes: N videos, Q texts, C choices, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval.metrics import RankScores, evaluate, recall_at_k

ROWS_PER_PRODUCT = 1024
DECIMALS = (
    12  # of products of unit vectors; what a matrix product's order of summation changes lies far below
)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is ranked, both [videos, texts]. similarity: float32 or float64; relevancy: float64 in [0, 1], or bool."""

    similarity: NDArray[np.floating[Any]]
    relevancy: NDArray[Any]


@dataclass(frozen=True)
class DirectionResult:
    """All numbers of one direction; `ranks` also counts its queries, those left out and those tied."""

    ranks: RankScores
    mean_average_precision: float
    ndcg: float

    def to_dict(self) -> dict[str, float]:
        """For JSON: recall@k for each k, median_rank, mean_rank, mAP, nDCG, num_queries, left_out, tied."""
        return {
            **{f"recall@{k}": share for k, share in self.ranks.recall.items()},
            "median_rank": self.ranks.median_rank,
            "mean_rank": self.ranks.mean_rank,
            "mAP": self.mean_average_precision,
            "nDCG": self.ndcg,
            "num_queries": self.ranks.num_queries,
            "left_out": self.ranks.left_out,
            "tied": self.ranks.tied,
        }


@dataclass(frozen=True)
class ProtocolResult:
    """Both directions of captioned-video retrieval, and what was searched."""

    text_to_video: DirectionResult
    video_to_text: DirectionResult
    num_videos: int
    num_texts: int  # texts ranked, after merging
    num_merged_texts: int  # captions that were the same text as an earlier one

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the two directions as in `DirectionResult.to_dict`, and the three counts."""
        return {
            "text_to_video": self.text_to_video.to_dict(),
            "video_to_text": self.video_to_text.to_dict(),
            "num_videos": self.num_videos,
            "num_texts": self.num_texts,
            "num_merged_texts": self.num_merged_texts,
        }


def captions_protocol(
    video_embeddings_ND: ArrayLike,
    text_embeddings_QD: ArrayLike,
    video_of_text_Q: ArrayLike,
    texts: Sequence[str] | None = None,
) -> ProtocolResult:
    """Retrieval numbers of captioned videos, by the inner product of their embeddings.

    A video may have any number of captions. A text→video query is one caption; a video→text query succeeds
    at the best of its video's captions, while its mAP and nDCG count all of them. Videos without a caption
    are no queries, but are searched with the others.

    Give `texts` so that identical captions count as one text: captions that are the same string (compared as
    given) become one query whose right videos are all the videos that carry it, with the embedding of its
    first occurrence. Without `texts` every caption stands alone, and the twin of a right video is wrong.

    video_embeddings_ND, text_embeddings_QD: real, unit norm, as the model gives them. video_of_text_Q:
    integers, the row in video_embeddings_ND that each text describes. texts: Q strings.
    Raises MetricsError: shapes or rows that do not fit, nothing to rank, NaN (naming the row).
    """
    videos, queries = np.asarray(video_embeddings_ND), np.asarray(text_embeddings_QD)
    pairs, first_Q = caption_pairs(videos, queries, np.asarray(video_of_text_Q), texts)
    return similarity_protocol(
        pairs.similarity, pairs.relevancy, num_merged_texts=len(queries) - len(first_Q)
    )


def caption_pairs(
    videos_ND: NDArray[Any],
    captions_QD: NDArray[Any],
    video_of_caption_Q: NDArray[Any],
    texts: Sequence[str] | None = None,
) -> tuple[Pairs, list[int]]:
    """What `captions_protocol` ranks, right pairs True; and for each text ranked the caption where it first occurs."""
    check_embeddings(videos_ND, captions_QD)
    _check_pairing(video_of_caption_Q, len(videos_ND), len(captions_QD), texts)
    first, text_of_caption = _merged(texts, len(captions_QD))
    positive_NT = np.zeros((len(videos_ND), len(first)), dtype=bool)
    positive_NT[video_of_caption_Q, text_of_caption] = True
    return Pairs(inner_products(videos_ND, captions_QD[first]), positive_NT), first


def similarity_protocol(
    similarity_NQ: ArrayLike, positive_NQ: NDArray[np.bool_], *, num_merged_texts: int = 0
) -> ProtocolResult:
    """The numbers of `captions_protocol` from a similarity matrix [videos, texts].

    positive_NQ: bool [videos, texts], the right pairs.
    mAP and nDCG take a right pair as relevancy 1 and any other as 0. Raises MetricsError as `recall_at_k`.
    """
    ranks = recall_at_k(similarity_NQ, positive_NQ)
    scores = evaluate(similarity_NQ, positive_NQ)
    average_precision, gain = scores.mean_average_precision, scores.ndcg
    num_videos, num_texts = positive_NQ.shape
    return ProtocolResult(
        text_to_video=DirectionResult(
            ranks.text_to_video, average_precision.text_to_video, gain.text_to_video
        ),
        video_to_text=DirectionResult(
            ranks.video_to_text, average_precision.video_to_text, gain.video_to_text
        ),
        num_videos=num_videos,
        num_texts=num_texts,
        num_merged_texts=num_merged_texts,
    )


def choice_accuracy(z_ND: ArrayLike, choices_NCD: ArrayLike, right_N: ArrayLike) -> float:
    """Share of items whose right choice has a strictly higher inner product than each of their other choices.

    A tie counts as wrong; products are summed in float64 and compared in float32, so equal choices do tie.

    z_ND: one embedding an item. choices_NCD: its C >= 2 choices. right_N: integers, the place of the right one.
    Raises MetricsError: shapes or places that do not fit, NaN (naming the item).
    """
    z, choices, right = np.asarray(z_ND), np.asarray(choices_NCD), np.asarray(right_N)
    _check_choices(z, choices, right)
    scores_NC = (choices.astype(np.float64) @ z.astype(np.float64)[:, :, None])[:, :, 0].astype(np.float32)
    bad = np.flatnonzero(np.isnan(scores_NC).any(axis=1))
    if len(bad):
        raise MetricsError(f"item {bad[0]}: NaN cannot be compared; look at its embeddings and the weights")
    right_N1 = right[:, None]
    right_scores_N = np.take_along_axis(scores_NC, right_N1, axis=1)[:, 0]
    np.put_along_axis(scores_NC, right_N1, -np.inf, axis=1)  # leaves each item's best wrong choice on top
    return float((right_scores_N > scores_NC.max(axis=1)).mean())


def inner_products(videos_ND: NDArray[Any], texts_QD: NDArray[Any]) -> NDArray[np.float32]:
    """Inner products summed in float64, given in float32 as the index gives them.

    A float32 matrix product may round equal inner products differently from block to block; summed in float64
    and then rounded, equal pairs tie, so a collapsed model cannot look better than it is.

    Raises MetricsError: embeddings so large that a product may not fit float32.
    """
    _largest_product(videos_ND, texts_QD, float(np.finfo(np.float32).max))
    texts_DQ = texts_QD.astype(np.float64).T
    similarity_NQ = np.empty((len(videos_ND), len(texts_QD)), dtype=np.float32)
    for rows in _row_chunks(len(videos_ND)):
        similarity_NQ[rows] = videos_ND[rows].astype(np.float64) @ texts_DQ
    return similarity_NQ


def fine_inner_products(videos_ND: NDArray[Any], texts_QD: NDArray[Any]) -> NDArray[np.float64]:
    """Inner products in float64, rounded to 12 decimals so that equal pairs tie, as in `inner_products`.

    Decimals are those of unit vectors: others are rounded at 1e-12 of the largest norms, to a power of two.
    Raises MetricsError: embeddings so large that a product may not fit float64.
    """
    largest = _largest_product(videos_ND, texts_QD, float(np.finfo(np.float64).max))
    scale = 2.0 ** round(np.log2(largest)) if largest else 1.0  # a power of two: dividing by it is exact
    texts_DQ = texts_QD.astype(np.float64).T
    similarity_NQ = np.empty((len(videos_ND), len(texts_QD)))
    for rows in _row_chunks(len(videos_ND)):
        products_RQ = similarity_NQ[rows]
        np.matmul(videos_ND[rows].astype(np.float64) / scale, texts_DQ, out=products_RQ)
        np.round(products_RQ, DECIMALS, out=products_RQ)
        products_RQ *= scale
    return similarity_NQ


def _row_chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + ROWS_PER_PRODUCT) for start in range(0, num_rows, ROWS_PER_PRODUCT)]


def _largest_product(videos_ND: NDArray[Any], texts_QD: NDArray[Any], limit: float) -> float:
    """The largest norms multiplied: no inner product, nor any part of its sum, is beyond that (Cauchy-Schwarz)."""
    norms_N, norms_Q = norms(videos_ND), norms(texts_QD)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(norms_N.max() * norms_Q.max())
    if not largest <= limit / 2:  # half: norms round too; and infinity times 0 is NaN
        raise MetricsError(
            f"video embedding {norms_N.argmax()} (norm {norms_N.max():.3g}) and text embedding {norms_Q.argmax()} "
            f"(norm {norms_Q.max():.3g}): their inner product overflows; normalise the embeddings"
        )
    return largest


def norms(z_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Norms of the rows; infinite where the square overflows."""
    with np.errstate(over="ignore"):
        return np.concatenate(
            [np.linalg.norm(z_ND[rows].astype(np.float64), axis=1) for rows in _row_chunks(len(z_ND))]
        )


def _merged(texts: Sequence[str] | None, num_captions: int) -> tuple[list[int], list[int]]:
    """The caption where each distinct text first occurs, and for every caption the number of its text."""
    if texts is None:
        return list(range(num_captions)), list(range(num_captions))
    number_of: dict[str, int] = {}
    first: list[int] = []
    for caption, text in enumerate(texts):
        if text not in number_of:
            number_of[text] = len(first)
            first.append(caption)
    return first, [number_of[text] for text in texts]


def check_embeddings(videos: NDArray[Any], texts: NDArray[Any]) -> None:
    if (
        videos.ndim != 2
        or texts.ndim != 2
        or videos.shape[1:] != texts.shape[1:]
        or 0 in videos.shape + texts.shape
    ):
        raise MetricsError(
            f"video embeddings {videos.shape} and text embeddings {texts.shape}: expected non-empty "
            "[videos, D] and [texts, D] of the same D"
        )
    for name, embeddings in (("video", videos), ("text", texts)):
        bad = np.flatnonzero(np.isnan(embeddings).any(axis=1))
        if len(bad):
            raise MetricsError(
                f"{name} embedding {bad[0]}: NaN cannot be ranked; look at that {name} and the weights"
            )


def _check_choices(z: NDArray[Any], choices: NDArray[Any], right: NDArray[Any]) -> None:
    if (
        z.ndim != 2
        or choices.ndim != 3
        or z.shape != choices.shape[::2]
        or choices.shape[1] < 2
        or 0 in z.shape
    ):
        raise MetricsError(
            f"embeddings {z.shape} and choices {choices.shape}: expected non-empty [items, D] and "
            "[items, at least 2 choices, D] of the same items and D"
        )
    if right.shape != z.shape[:1] or not np.issubdtype(right.dtype, np.integer):
        raise MetricsError(
            f"right: {right.dtype} {right.shape}, expected one integer for each of {len(z)} items"
        )
    if right.min() < 0 or right.max() >= choices.shape[1]:
        raise MetricsError(
            f"right: places {right.min()} to {right.max()}, expected places of {choices.shape[1]} choices"
        )


def _check_pairing(
    video_of_text: NDArray[Any], num_videos: int, num_captions: int, texts: Sequence[str] | None
) -> None:
    if video_of_text.shape != (num_captions,) or not np.issubdtype(video_of_text.dtype, np.integer):
        raise MetricsError(
            f"video_of_text: {video_of_text.dtype} {video_of_text.shape}, "
            f"expected one integer for each of {num_captions} texts"
        )
    if video_of_text.min() < 0 or video_of_text.max() >= num_videos:
        raise MetricsError(
            f"video_of_text: rows {video_of_text.min()} to {video_of_text.max()}, "
            f"expected rows of {num_videos} videos"
        )
    if texts is not None and len(texts) != num_captions:
        raise MetricsError(
            f"texts: {len(texts)} strings for {num_captions} text embeddings; give one for each"
        )
