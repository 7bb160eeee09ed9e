"""EPIC-KITCHENS-like training shards from any small shards: every clip gets classes, dataset.json gets sentences."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlt_retrieval.annotations import Classes, Ek100Dataset, Ek100Sentence
from rlt_retrieval.data.shards import ShardSample, expand_shards, read_shard, write_shards


def made_classes(number: int) -> Classes:
    """Three verbs, five nouns, one or two of them: some pairs share all, some a part, some nothing."""
    return Classes.of(number % 3, {number % 5, number // 2 % 5})


def sentence(classes: Classes) -> Ek100Sentence:
    """Its text says its classes, so that a text with another row's classes shows."""
    name = f"{classes.verb} {' '.join(map(str, classes.nouns))}"
    return Ek100Sentence(f"P01_{name}", f"do {name}", classes)


def write_dataset(folder: Path, classes: Sequence[Classes]) -> None:
    values = Ek100Dataset("train", len(classes), tuple(map(sentence, classes))).to_dict()
    (folder / "dataset.json").write_text(json.dumps(values))


def write_ek100_copy(shards: Path, folder: Path) -> Path:
    """Shards of the same sizes with clip number n of `made_classes(n)`; one sentence for each of these."""
    number = 0
    for shard in expand_shards([shards]):
        samples = [sample for sample in read_shard(shard) if isinstance(sample, ShardSample)]
        marked = [replace(sample, classes=made_classes(number + n)) for n, sample in enumerate(samples)]
        number += len(samples)
        write_shards(marked, folder / "part", samples_per_shard=len(marked))
        (folder / "part" / "clips-000000.tar").rename(folder / shard.name)
    (folder / "part").rmdir()
    write_dataset(folder, sorted({made_classes(n) for n in range(30)}))
    return folder
