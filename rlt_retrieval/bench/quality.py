"""What embeddings of the bench's clips are worth: fidelity to the full model, and retrieval by the clips' captions.

Shapes: N clips, Q captions, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.bench.clips import BenchClip
from rlt_retrieval.bench.fidelity import cosines, neighbour_overlap, relative_errors
from rlt_retrieval.embed import embed_texts
from rlt_retrieval.eval.protocols import captions_protocol
from rlt_retrieval.model import VideoTextModel

NEIGHBOURS = 10


class Judge:
    """Scores of embeddings of the clips: beside those of the full model, and with the captions where all have one."""

    def __init__(
        self, model: VideoTextModel, clips: Sequence[BenchClip], z_full_ND: NDArray[np.float32]
    ) -> None:
        self._z_full_ND = z_full_ND
        self._texts = [text for clip in clips for text in clip.captions]
        self._video_of_text_Q = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
        self._z_text_QD = embed_texts(model, self._texts) if all(clip.captions for clip in clips) else None

    def scores(self, z_ND: NDArray[np.float32]) -> dict[str, Any]:
        """Means over clips, under the names of the fields of `bench.reducers.ReducerRow`; z_ND: float32, unit norm."""
        return {
            "error": self.error(z_ND),
            "cosine": float(cosines(self._z_full_ND, z_ND).mean()),
            "overlap": self._overlap(z_ND),
            **self._retrieval(z_ND),
        }

    def error(self, z_ND: NDArray[np.float32]) -> float:
        """Mean of `relative_errors`."""
        return float(relative_errors(self._z_full_ND, z_ND).mean())

    def _overlap(self, z_ND: NDArray[np.float32]) -> float | None:
        """None where every other clip is a neighbour."""
        return neighbour_overlap(self._z_full_ND, z_ND, NEIGHBOURS) if len(z_ND) > NEIGHBOURS + 1 else None

    def _retrieval(self, z_ND: NDArray[np.float32]) -> dict[str, float]:
        if self._z_text_QD is None:
            return {}
        found = captions_protocol(z_ND, self._z_text_QD, self._video_of_text_Q, self._texts)
        return {
            "text_to_video": found.text_to_video.ranks.recall[1],
            "video_to_text": found.video_to_text.ranks.recall[1],
        }
