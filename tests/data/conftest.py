"""Fixtures for the tests of video decoding."""

from collections.abc import Callable

import pytest

from rlt_retrieval.data.reader import Reader


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts how often a source is opened, i.e. decoding passes (and rewinds)."""
    count = 0
    real = Reader._open

    def counting(reader: Reader) -> None:
        nonlocal count
        count += 1
        real(reader)

    monkeypatch.setattr(Reader, "_open", counting)
    return lambda: count
