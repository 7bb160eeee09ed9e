"""Fixtures of the encoder tests; small models and clips are in tests/small_models.py."""

from collections.abc import Callable

import pytest


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """Log lines that hold a text."""
    caplog.set_level("INFO")
    return lambda text: [record.getMessage() for record in caplog.records if text in record.getMessage()]
