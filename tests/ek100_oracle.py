"""A small EPIC-KITCHENS-like set of clips and sentences, and embeddings whose products are their relevancies."""

import numpy as np

from rlt_retrieval.annotations import Classes, Ek100Dataset, Ek100Sentence, relevancy

SENTENCE_CLASSES = (
    Classes(0, (1,)),
    Classes(0, (1, 2)),
    Classes(1, (2,)),
    Classes(1, (3,)),
    Classes(2, (1, 2, 3)),
)


def sentence_set(num_official_clips: int, split: str = "test") -> Ek100Dataset:
    """One sentence for each of SENTENCE_CLASSES, of two videos."""
    sentences = tuple(
        Ek100Sentence(f"P0{1 + n % 2}_01_{n}", f"sentence {n}", classes)
        for n, classes in enumerate(SENTENCE_CLASSES)
    )
    return Ek100Dataset(split, num_official_clips, sentences)  # type: ignore[arg-type]


def clip_ids(num_clips: int) -> list[str]:
    """Narration ids of three videos."""
    return [f"P0{1 + n % 3}_01_{n}" for n in range(num_clips)]


def clip_classes(num_clips: int) -> list[Classes]:
    return [SENTENCE_CLASSES[n % len(SENTENCE_CLASSES)] for n in range(num_clips)]


def oracle_embeddings(classes: list[Classes]) -> np.ndarray:
    """Unit vectors [N, D] whose inner products are the relevancies: the kernel is positive semidefinite.

    [same verb] is a kernel of one-hot vectors, and intersection over union is one too (Jaccard; Gower 1971). Equal
    classes give equal vectors.
    """
    distinct = list(dict.fromkeys(classes))
    kernel = relevancy(distinct, distinct)
    values, vectors = np.linalg.eigh(kernel)
    assert values.min() > -1e-9
    z = vectors * np.sqrt(values.clip(min=0))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z[[distinct.index(one) for one in classes]]
