"""Commands called as a user calls them, in this process."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from rlt_retrieval.cli import main


class Ran(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that a mistake may cost."""
        (line,) = self._error_lines()
        return line

    @property
    def last_error(self) -> str:
        """The last line of a mistake; wrong usage shows the usage before it."""
        return self._error_lines()[-1]

    def _error_lines(self) -> list[str]:
        assert self.out == ""
        assert "Traceback" not in self.err
        return self.err.splitlines()


def runner(capfd: pytest.CaptureFixture[str], *first: str) -> Iterator[Callable[..., Ran]]:
    """For a fixture: calls `main` with `first` and more arguments; the package's logger is put back afterwards."""
    logger = logging.getLogger("rlt_retrieval")
    before = (logger.handlers, logger.level, logger.propagate)

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*first, *map(str, arguments)])
        return Ran(stop.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    yield call
    logger.handlers, logger.level, logger.propagate = before
