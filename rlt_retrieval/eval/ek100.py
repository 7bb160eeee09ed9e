"""EPIC-KITCHENS-100 multi-instance retrieval: from embeddings and class ids to the protocol's numbers.

Shapes: V clips (videos), S sentences (texts), D embedding size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlt_retrieval.annotations import NUM_OFFICIAL_CLIPS, Classes, Ek100Dataset, relevancy
from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval.bootstrap import ResampledMeans, resampled_means
from rlt_retrieval.eval.metrics import Evaluation, QueryScores, average, evaluate_queries
from rlt_retrieval.eval.protocols import Pairs, check_embeddings, fine_inner_products

NUM_OFFICIAL_SENTENCES = 3842  # of the test split, beside its official clips


@dataclass(frozen=True, eq=False)
class Ek100Result:
    """The protocol's numbers, the scores of every query, and how much of the official set was there."""

    scores: Evaluation
    clip_queries: QueryScores
    sentence_queries: QueryScores
    clip_ids: Sequence[str]
    dataset: Ek100Dataset

    @property
    def is_partial(self) -> bool:
        return len(self.clip_ids) < self.dataset.num_official_clips or self._lacks_sentences

    @property
    def _lacks_sentences(self) -> bool:
        official, split = self.dataset.num_official_clips, self.dataset.split
        is_official_test = split == "test" and official == NUM_OFFICIAL_CLIPS["test"]
        return is_official_test and len(self.dataset.sentences) != NUM_OFFICIAL_SENTENCES

    @property
    def note(self) -> str | None:
        """What must be said beside the numbers; None where they are comparable with published ones."""
        sentences = f"{len(self.dataset.sentences):,} of {NUM_OFFICIAL_SENTENCES:,} sentences"
        if len(self.clip_ids) < self.dataset.num_official_clips:
            clips = f"{len(self.clip_ids):,} of {self.dataset.num_official_clips:,}"
            return f"partial, {clips}, not comparable" + (f"; {sentences}" if self._lacks_sentences else "")
        if self._lacks_sentences:
            return f"partial, {sentences}, not comparable"
        return None if self.dataset.split == "test" else "the train split, not comparable"

    def resampled(self) -> dict[str, ResampledMeans]:
        """mAP and nDCG of the same seeded resamples of videos, for intervals and paired differences."""
        clips, sentences = self._videos()
        mine, theirs = self.clip_queries, self.sentence_queries
        return {
            "mAP": resampled_means(mine.average_precision, clips, theirs.average_precision, sentences),
            "nDCG": resampled_means(mine.ndcg, clips, theirs.ndcg, sentences),
        }

    def _videos(self) -> tuple[list[str], list[str]]:
        """The video of every clip and of every sentence."""
        sentence_ids = (sentence.narration_id for sentence in self.dataset.sentences)
        return list(map(video_of, self.clip_ids)), list(map(video_of, sentence_ids))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `Evaluation.to_dict`, counts, the note, 95 % intervals by metric and direction."""
        return {
            **self.scores.to_dict(),
            "split": self.dataset.split,
            "num_videos": len(self.clip_ids),
            "num_texts": len(self.dataset.sentences),
            "num_official_clips": self.dataset.num_official_clips,
            "partial": self.is_partial,
            "num_source_videos": len(set().union(*self._videos())),  # what the intervals resample
            "intervals": {name: means.intervals() for name, means in self.resampled().items()},
        }


def ek100_protocol(
    z_video_VD: ArrayLike,
    clip_ids: Sequence[str],
    clip_classes: Sequence[Classes],
    z_text_SD: ArrayLike,
    dataset: Ek100Dataset,
) -> Ek100Result:
    """mAP and nDCG of clips against all sentences of a split, by inner products.

    Relevancies come from class ids (Damen et al., IJCV 2022; see `annotations.relevancy`), so any part of the clips can
    be scored: the sub-matrix of these clips and all sentences. A query with nothing relevant there is left out and
    counted. Sentences of equal text stay apart: their classes differ.

    clip_ids: narration ids, each once, and clip_classes in the same order. z_text_SD: a row for each of
    `dataset.sentences`.
    Raises MetricsError: shapes that do not fit, an id twice, NaN, nothing relevant at all.
    """
    pairs = ek100_pairs(np.asarray(z_video_VD), clip_classes, np.asarray(z_text_SD), dataset)
    return score_pairs(pairs, clip_ids, dataset)


def ek100_pairs(
    z_video_VD: NDArray[Any], clip_classes: Sequence[Classes], z_text_SD: NDArray[Any], dataset: Ek100Dataset
) -> Pairs:
    """What `ek100_protocol` ranks: all inner products, float64, and all relevancies."""
    check_embeddings(z_video_VD, z_text_SD)
    if len(z_video_VD) != len(clip_classes) or len(z_text_SD) != len(dataset.sentences):
        raise MetricsError(
            f"{len(z_video_VD)} video and {len(z_text_SD)} text embeddings: expected a row for each of "
            f"{len(clip_classes)} clips and {len(dataset.sentences)} sentences"
        )
    sentence_classes = [sentence.classes for sentence in dataset.sentences]
    return Pairs(fine_inner_products(z_video_VD, z_text_SD), relevancy(clip_classes, sentence_classes))


def score_pairs(pairs: Pairs, clip_ids: Sequence[str], dataset: Ek100Dataset) -> Ek100Result:
    """`ek100_protocol` from what it ranks."""
    twice = [narration_id for narration_id, count in Counter(clip_ids).items() if count > 1]
    if twice:
        raise MetricsError(f"clip {twice[0]} is there twice; give every clip once")
    clip_queries, sentence_queries = evaluate_queries(pairs.similarity, pairs.relevancy)
    return Ek100Result(
        average(clip_queries, sentence_queries), clip_queries, sentence_queries, clip_ids, dataset
    )


def compare(first: Ek100Result, second: Ek100Result) -> dict[str, dict[str, dict[str, Any]]]:
    """Metric → direction → "difference", first minus second, and its 95 % "interval" (None with a single video).

    Paired: both are averaged over the same resamples of videos.
    Raises MetricsError: the two do not hold the same clips.
    """
    if list(first.clip_ids) != list(second.clip_ids) or first.dataset != second.dataset:
        raise MetricsError(
            f"{len(first.clip_ids)} and {len(second.clip_ids)} clips that are not the same: a paired difference needs "
            "the same clips and sentences; embed the same set with both models"
        )
    mine, theirs = first.resampled(), second.resampled()
    means = {
        "mAP": (first.scores.mean_average_precision, second.scores.mean_average_precision),
        "nDCG": (first.scores.ndcg, second.scores.ndcg),
    }
    return {
        name: {
            direction: {"difference": getattr(a, direction) - getattr(b, direction), "interval": interval}
            for direction, interval in mine[name].minus(theirs[name]).intervals().items()
        }
        for name, (a, b) in means.items()
    }


def video_of(narration_id: str) -> str:
    """P01_11 of P01_11_103, as the official files build their ids."""
    return narration_id.rpartition("_")[0]
