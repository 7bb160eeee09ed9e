"""What relevancy-aware training needs beside clips: the sentences of their data set, and the relevancies of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlt_retrieval.annotations import Classes, Ek100Dataset, read_dataset, relevancy
from rlt_retrieval.config import LossName
from rlt_retrieval.data.loading import TrainClip
from rlt_retrieval.errors import TrainingError
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.losses import NEED_RELEVANCY


def read_training_dataset(shards: Sequence[Path], loss: LossName) -> Ek100Dataset | None:
    """The data set beside the shards, if there is one: its sentences are then what clips are trained with.

    Raises:
        TrainingError: there is none and the loss needs it.
        AnnotationError: it is damaged, or the shards are of several.
    """
    dataset = read_dataset(shards)
    if dataset is None and loss in NEED_RELEVANCY:
        raise TrainingError(
            f"loss {loss!r} needs relevancies, but {shards[0].parent} has no EK-100 dataset.json; make the shards with "
            "`rlt-retrieval shards make … --format ek100`, or use loss clip, siglip or mi_mm"
        )
    return dataset


def batch_relevancy(clips: Sequence[TrainClip], ranks: Ranks) -> Tensor:
    """float64 [G, G] on the CPU: every clip of all ranks (rows) to the sentence drawn for every clip (columns).

    In rank order, as embeddings are gathered. Class ids travel, not rows of a matrix.
    """
    mine = [(clip.classes, clip.sentence_classes) for clip in clips]
    pairs: list[tuple[Classes, Classes]] = list(itertools.chain(*ranks.gather(mine)))
    return torch.from_numpy(relevancy([clip for clip, _ in pairs], [sentence for _, sentence in pairs]))
