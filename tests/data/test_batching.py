"""Cutting by token budget keeps order, drops nothing and never passes the budget without need."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval.data.batching import batches_by_budget


@given(counts=st.lists(st.integers(0, 50)), budget=st.integers(1, 100))
def test_batches(counts: list[int], budget: int) -> None:
    elements = list(enumerate(counts))
    batches = list(batches_by_budget(elements, lambda element: element[1], budget))
    assert [element for batch in batches for element in batch] == elements
    for index, batch in enumerate(batches):
        total = sum(count for _, count in batch)
        assert batch
        assert total <= budget or len(batch) == 1
        if index + 1 < len(batches):
            assert total + batches[index + 1][0][1] > budget, "the next element would still have fitted"


def test_an_element_over_the_budget_is_a_batch_of_its_own() -> None:
    assert list(batches_by_budget([3, 99, 3, 4], lambda n: n, 10)) == [[3], [99], [3, 4]]


def test_batches_come_as_soon_as_they_are_full() -> None:
    """A stream is not read to its end first: memory holds one batch."""
    read = []

    def stream() -> Iterator[int]:
        for element in (4, 4, 4, 4):
            read.append(element)
            yield element

    batches = batches_by_budget(stream(), lambda n: n, 8)
    assert next(batches) == [4, 4]
    assert len(read) == 3


def test_each_element_is_counted_once() -> None:
    counted = []
    list(batches_by_budget("abc", lambda element: counted.append(element) or 1, 2))
    assert counted == ["a", "b", "c"]
