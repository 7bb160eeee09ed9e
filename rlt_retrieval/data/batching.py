"""Cutting batches by token budget: a batch closes when the next clip would pass it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Element = TypeVar("Element")


def batches_by_budget(
    elements: Iterable[Element], count: Callable[[Element], int], budget: int
) -> Iterator[list[Element]]:
    """Neighbouring elements in lists whose counts sum to at most `budget`.

    An element that passes the budget alone is a batch of its own. Order is kept and nothing is dropped.

    Args:
        count: tokens of an element.
        budget: tokens, at least 1.
    """
    batch: list[Element] = []
    total = 0
    for element in elements:
        tokens = count(element)
        if batch and total + tokens > budget:
            yield batch
            batch, total = [], 0
        batch.append(element)
        total += tokens
    if batch:
        yield batch
