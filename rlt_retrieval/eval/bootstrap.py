"""How sure a mean over queries is: a bootstrap over videos, because clips of one video are not independent.

The cluster bootstrap (Davison & Hinkley, "Bootstrap Methods and their Application", 1997, on hierarchical data): videos
are drawn with replacement, as many as there are, and a video brings all its queries along, clips and sentences. The
gallery that was ranked stays as it is: this is the spread over queries, not over training runs or other galleries.

Shapes: V clips, T texts, C videos, R resamples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """Where the middle 95 % of the resampled means lie."""

    low: float
    high: float


class ResampledMeans(NamedTuple):
    """Means of every resample, float64 [R]; NaN where a resample has no query of that direction.

    All NaN where the counted queries of a direction come from fewer than two videos; the mean's then too.
    """

    text_to_video: NDArray[np.float64]
    video_to_text: NDArray[np.float64]
    mean: NDArray[np.float64]

    def minus(self, other: "ResampledMeans") -> "ResampledMeans":
        """Paired differences: right for two models with the same queries, videos and seed, so the same resamples."""
        return ResampledMeans(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    def intervals(self) -> dict[str, Interval | None]:
        """By direction; None where one video holds all its queries, so that nothing is known of the spread."""
        return {name: _interval(means) for name, means in self._asdict().items()}


def resampled_means(
    video_queries_V: NDArray[np.float64],
    video_of_clip_V: Sequence[str],
    text_queries_T: NDArray[np.float64],
    video_of_text_T: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> ResampledMeans:
    """Means of both directions, and their mean, from the same resamples of videos.

    video_queries_V, text_queries_T: one score a query, NaN where it is left out.
    """
    videos, number_of = np.unique([*video_of_clip_V, *video_of_text_T], return_inverse=True)
    num_videos, num_clips = len(videos), len(video_of_clip_V)
    rng = np.random.default_rng(seed)
    weights_RC = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), num_resamples)
    v2t_R = _means(weights_RC, video_queries_V, number_of[:num_clips])
    t2v_R = _means(weights_RC, text_queries_T, number_of[num_clips:])
    return ResampledMeans(text_to_video=t2v_R, video_to_text=v2t_R, mean=(v2t_R + t2v_R) / 2)


def _means(
    weights_RC: NDArray[np.int64], scores_Q: NDArray[np.float64], video_of_Q: NDArray[Any]
) -> NDArray[np.float64]:
    counted = ~np.isnan(scores_Q)
    num_videos = weights_RC.shape[1]
    count_C = np.bincount(video_of_Q[counted], minlength=num_videos)
    means_R = np.full(len(weights_RC), np.nan)
    if np.count_nonzero(count_C) < 2:
        return means_R
    total_C = np.bincount(video_of_Q[counted], weights=scores_Q[counted], minlength=num_videos)
    count_R = weights_RC @ count_C
    return np.divide(weights_RC @ total_C, count_R, out=means_R, where=count_R > 0)


def _interval(means_R: NDArray[np.float64]) -> Interval | None:
    known = means_R[~np.isnan(means_R)]
    if not len(known):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(float(low), float(high))
