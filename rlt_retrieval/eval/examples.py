"""The best and the worst queries of an evaluation, with the first hits of each, as pieces of an HTML page.

Shapes: V clips, T texts, Q queries, G gallery items.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlt_retrieval.eval.metrics import query_scores
from rlt_retrieval.eval.report import HitCard, Html, heading, hit_grid, image_row, paragraph
from rlt_retrieval.eval.scored import Scored

NUM_QUERIES, NUM_HITS = 5, 4

Pictures = Callable[[Sequence[int]], Sequence[bytes | None]]  # rows of clips → PNGs, None where there is none


class Hit(NamedTuple):
    """An item found; `clip` is its row where it is a clip."""

    label: str
    score: float
    relevancy: float
    clip: int | None


@dataclass(frozen=True)
class Query:
    """A query with its first hits, best first; `clip` is its row where it is a clip."""

    label: str
    average_precision: float
    hits: list[Hit]
    clip: int | None

    @property
    def clips(self) -> list[int]:
        return [row for row in (self.clip, *(hit.clip for hit in self.hits)) if row is not None]


def example_queries(scored: Scored, pictures: Pictures | None) -> list[Html]:
    """Best and worst by average precision, both directions; without pictures, words alone."""
    sections: dict[str, list[Query]] = {}
    for kind, queries in (("texts", _text_queries(scored)), ("clips", _clip_queries(scored))):
        sections[f"Best {kind}, by average precision"] = queries[:NUM_QUERIES]
        sections[f"Worst {kind}, by average precision"] = queries[NUM_QUERIES:][::-1]
    rows = sorted({row for queries in sections.values() for query in queries for row in query.clips})
    picture_of = dict(zip(rows, pictures(rows), strict=True)) if pictures else {}
    parts = [
        paragraph(
            "“right” is relevancy 1, an exact match; AP reads precision at these alone. “wrong” is relevancy 0."
        )
    ]
    for title, queries in sections.items():
        if queries:
            parts += [heading(title), *(piece for query in queries for piece in _drawn(query, picture_of))]
    return parts


def extreme_queries(similarity_QG: NDArray[Any], relevancy_QG: NDArray[Any]) -> list[tuple[int, float]]:
    """(query, AP) of the NUM_QUERIES best and then as many worst, from best to worst; those left out never."""
    precision_Q = query_scores(similarity_QG, relevancy_QG).average_precision
    counted = np.flatnonzero(~np.isnan(precision_Q))
    order = counted[np.argsort(-precision_Q[counted], kind="stable")]
    num_worst = min(NUM_QUERIES, max(0, len(order) - NUM_QUERIES))
    chosen = [*order[:NUM_QUERIES], *order[len(order) - num_worst :]]
    return [(int(query), float(precision_Q[query])) for query in chosen]


def first_hits(similarity_G: NDArray[Any], relevancy_G: NDArray[Any]) -> list[int]:
    """The first NUM_HITS items by the rule of the metrics: among equal scores the less relevant first."""
    return [int(item) for item in np.lexsort((relevancy_G, -similarity_G))[:NUM_HITS]]


def _text_queries(scored: Scored) -> list[Query]:
    similarity_TV, relevancy_TV = scored.pairs.similarity.T, scored.pairs.relevancy.T
    return [
        Query(
            scored.texts[text],
            precision,
            [
                Hit(_name(scored, clip), similarity_TV[text, clip], relevancy_TV[text, clip], clip)
                for clip in first_hits(similarity_TV[text], relevancy_TV[text])
            ],
            clip=None,
        )
        for text, precision in extreme_queries(similarity_TV, relevancy_TV)
    ]


def _clip_queries(scored: Scored) -> list[Query]:
    similarity_VT, relevancy_VT = scored.pairs.similarity, scored.pairs.relevancy
    return [
        Query(
            _name(scored, clip),
            precision,
            [
                Hit(scored.texts[text], similarity_VT[clip, text], relevancy_VT[clip, text], None)
                for text in first_hits(similarity_VT[clip], relevancy_VT[clip])
            ],
            clip=clip,
        )
        for clip, precision in extreme_queries(similarity_VT, relevancy_VT)
    ]


def _name(scored: Scored, clip: int) -> str:
    return f"{scored.clip_ids[clip]}: {scored.clip_texts[clip]}"


def _drawn(query: Query, picture_of: Mapping[int, bytes | None]) -> Iterable[Html]:
    own = picture_of.get(query.clip) if query.clip is not None else None
    cards = [
        HitCard(
            None if hit.clip is None else picture_of.get(hit.clip),
            rank,
            float(hit.score),
            {0.0: False, 1.0: True}.get(float(hit.relevancy)),
            f"{hit.label} · relevancy {float(hit.relevancy):.2f}",
        )
        for rank, hit in enumerate(query.hits, 1)
    ]
    if own:
        yield image_row([(own, "the query")])
    yield hit_grid([(query.label, cards)])
    yield paragraph(f"AP {query.average_precision:.3f}")
