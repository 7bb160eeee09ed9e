"""A model's embeddings of one set, scored by one protocol: the numbers, and what a report needs to show them.

Shapes: V clips, C captions, T texts that are ranked, B bank queries, D embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.annotations import (
    NUM_OFFICIAL_CLIPS,
    Classes,
    Ek100Dataset,
    Split,
    ek100_files,
    read_dataset,
    read_ek100_clips,
    read_ek100_sentences,
)
from rlt_retrieval.errors import MetricsError, SourceError
from rlt_retrieval.eval.ek100 import Ek100Result, compare, ek100_pairs, score_pairs
from rlt_retrieval.eval.embedding_file import read_embeddings
from rlt_retrieval.eval.metrics import evaluate
from rlt_retrieval.eval.protocols import Pairs, ProtocolResult, caption_pairs, similarity_protocol
from rlt_retrieval.eval.rescoring import NEED_UNIT_NORM, are_unit_norm, extra_rows

Protocol = Literal["ek100", "msrvtt", "captions"]
NUM_MSRVTT_1KA = 1000


@dataclass(frozen=True, eq=False)
class Scored:
    """Numbers of a protocol and what they were computed from.

    note: what must be said beside the numbers (None: nothing). z_bank_BD: further text queries, for QB-norm.
    extra_rows: see `with_extra_rows`; extra_rows_note says why there are none.
    """

    protocol: Protocol
    result: Ek100Result | ProtocolResult
    pairs: Pairs
    clip_ids: Sequence[str]
    clip_texts: Sequence[str]  # what each clip is said to show, for the reader
    z_video_VD: NDArray[Any]
    text_ids: Sequence[str]
    texts: Sequence[str]
    z_text_TD: NDArray[Any]
    note: str | None = None
    z_bank_BD: NDArray[Any] | None = None
    extra_rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    extra_rows_note: str | None = None

    @property
    def is_partial(self) -> bool:
        return isinstance(self.result, Ek100Result) and self.result.is_partial

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the result's own keys, "protocol", "note", and "extra_rows" or "extra_rows_note", where given."""
        values = {"protocol": self.protocol, **self.result.to_dict(), "note": self.note}
        extra = {"extra_rows": dict(self.extra_rows), "extra_rows_note": self.extra_rows_note}
        return values | {name: value for name, value in extra.items() if value}


def score_ek100(
    z_video_VD: NDArray[Any],
    clip_ids: Sequence[str],
    clip_classes: Sequence[Classes],
    clip_texts: Sequence[str],
    z_text_TD: NDArray[Any],
    dataset: Ek100Dataset,
) -> Scored:
    """`ek100_protocol`; arguments and errors as there. clip_texts: the narrations."""
    pairs = ek100_pairs(z_video_VD, clip_classes, z_text_TD, dataset)
    result = score_pairs(pairs, clip_ids, dataset)
    text_ids = [sentence.narration_id for sentence in dataset.sentences]
    texts = [sentence.text for sentence in dataset.sentences]
    return Scored(
        "ek100", result, pairs, clip_ids, clip_texts, z_video_VD, text_ids, texts, z_text_TD, result.note
    )


def score_captions(
    protocol: Literal["msrvtt", "captions"],
    z_video_VD: NDArray[Any],
    clip_ids: Sequence[str],
    captions: Sequence[tuple[str, ...]],
    z_caption_CD: NDArray[Any],
) -> Scored:
    """`captions_protocol` for clips with their captions, in order; arguments and errors as there.

    "captions" merges equal captions. "msrvtt" does not, as the published numbers of the 1k-A set do not.
    """
    texts = [text for clip in captions for text in clip]
    text_ids = [
        f"{name}#{n}" for name, clip in zip(clip_ids, captions, strict=True) for n in range(len(clip))
    ]
    video_of_caption_C = np.repeat(np.arange(len(captions)), [len(clip) for clip in captions])
    pairs, first = caption_pairs(
        z_video_VD, z_caption_CD, video_of_caption_C, texts if protocol == "captions" else None
    )
    result = similarity_protocol(pairs.similarity, pairs.relevancy, num_merged_texts=len(texts) - len(first))
    return Scored(
        protocol,
        result,
        pairs,
        clip_ids,
        [clip[0] for clip in captions],
        z_video_VD,
        [text_ids[row] for row in first],
        [texts[row] for row in first],
        z_caption_CD[first],
        _msrvtt_note(result) if protocol == "msrvtt" else None,
    )


def with_extra_rows(scored: Scored) -> Scored:
    """The same with dual softmax and, where there is a bank, QB-norm; see `eval.rescoring`.

    Embeddings that are not of about unit norm get no such rows, and a note.
    """
    bank = () if scored.z_bank_BD is None else (scored.z_bank_BD,)
    if not are_unit_norm(scored.z_video_VD, scored.z_text_TD, *bank):
        return replace(scored, extra_rows_note=NEED_UNIT_NORM)
    relevancy = scored.pairs.relevancy

    def score(similarity_VT: NDArray[Any]) -> dict[str, Any]:
        if isinstance(scored.result, Ek100Result):
            return evaluate(similarity_VT, relevancy).to_dict()
        return similarity_protocol(similarity_VT, relevancy).to_dict()

    rows = extra_rows(scored.pairs.similarity, scored.z_video_VD, scored.z_bank_BD, score)
    return replace(scored, extra_rows=rows)


def comparison(first: Scored, name: str, second: Scored) -> dict[str, Any]:
    """For JSON: "with" (the second's name), its "values", and "difference" as `eval.ek100.compare` gives it.

    Both must be of the EPIC-KITCHENS-100 protocol. Raises MetricsError as `compare`.
    """
    assert isinstance(first.result, Ek100Result)
    assert isinstance(second.result, Ek100Result)
    difference = compare(first.result, second.result)
    return {"with": name, "values": second.to_dict(), "difference": difference}


def score_embedding_file(path: str | Path, annotations: str | Path, split: Split) -> Scored:
    """The EPIC-KITCHENS-100 protocol for embeddings in a file; ids are narration ids, in any order.

    Raises:
        MetricsError: as `read_embeddings`; an id that the split does not have, a sentence without embedding.
        AnnotationError: the split's CSVs are not there, or not as they should be.
    """
    file = read_embeddings(path)
    clips_csv, sentences_csv = ek100_files(annotations, split)
    clips = {clip.narration_id: clip for clip in read_ek100_clips(clips_csv)}
    sentences = read_ek100_sentences(sentences_csv, clips.values())
    dataset = Ek100Dataset(split, NUM_OFFICIAL_CLIPS[split], tuple(sentences))
    row_of_clip = _rows(file.path, "video", file.video_ids, clips, clips_csv)
    row_of_text = _rows(file.path, "text", file.text_ids, [s.narration_id for s in sentences], sentences_csv)
    absent = [s.narration_id for s in sentences if s.narration_id not in row_of_text]
    if absent:
        raise MetricsError(
            f"{file.path}: {len(absent)} of {len(sentences)} sentences have no embedding (first {absent[0]}); "
            "embed every sentence of the split"
        )
    present = [name for name in clips if name in row_of_clip]
    scored = score_ek100(
        file.z_video_ND[[row_of_clip[name] for name in present]],
        present,
        [clips[name].classes for name in present],
        [clips[name].narration for name in present],
        file.z_text_ND[[row_of_text[s.narration_id] for s in sentences]],
        dataset,
    )
    return replace(scored, z_bank_BD=file.z_bank_ND)


def read_query_bank(path: str | Path) -> list[str]:
    """Queries for QB-norm, each once: lines of a text file, or the sentences of a folder of training shards.

    Raises:
        SourceError: missing, not UTF-8, no query in it, the test split.
        AnnotationError: a damaged dataset.json.
    """
    path = Path(path)
    described = path / "dataset.json" if path.is_dir() else path
    if described.name == "dataset.json":
        dataset = read_dataset([described])
        if dataset is None:
            raise SourceError(
                f"{described}: no EPIC-KITCHENS-100 sentences in it; give a text file, one query a line"
            )
        if dataset.split == "test":
            raise SourceError(
                f"{described}: sentences of the test split; a query bank must not be what is evaluated, give the "
                "train split's"
            )
        return list(dict.fromkeys(sentence.text for sentence in dataset.sentences))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read ({error.strerror or error}); give one query a line"
        ) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error}); give a text file, one query a line") from error
    queries = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not queries:
        raise SourceError(f"{path}: no query in it; write one a line")
    return queries


def _rows(path: Path, kind: str, ids: Sequence[str], known: Any, source: Path) -> dict[str, int]:
    known = set(known)
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise MetricsError(
            f"{path}: {kind} id {unknown[0]!r} ({len(unknown)} such) is not in {source}; ids are the narration_id of "
            "that file; is it the other split?"
        )
    return {name: row for row, name in enumerate(ids)}


def _msrvtt_note(result: ProtocolResult) -> str | None:
    if result.num_videos == result.num_texts == NUM_MSRVTT_1KA:
        return None
    return (
        f"{result.num_videos:,} videos and {result.num_texts:,} texts, not the 1,000 of each that 1k-A has: "
        "not comparable with published rows"
    )
