"""The list of bad samples of a job, and the judge that stops a job with too many of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rlt_retrieval.data.files import write_error
from rlt_retrieval.data.shards import BadSample
from rlt_retrieval.errors import ShardError

MIN_SAMPLES_TO_JUDGE = 100  # before that many, a fraction of bad samples says little


class FailureLog:
    """Counts good and bad samples, lists each bad one once in a file of JSON lines, and stops a bad job.

    `path` None keeps no file. A file from an earlier run is continued. `failures` holds what the file lists.

    Raises (from good, bad and finish):
        ShardError: more than `max_bad_fraction` of the samples are bad; good and bad wait for 100 samples.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.num_good = self.num_bad = 0
        self.failures: list[BadSample] = _read_failures(path) if path else []
        self._listed = {(failure.key, failure.shard) for failure in self.failures}

    def good(self, n: int = 1) -> None:
        self.num_good += n
        self._judge(MIN_SAMPLES_TO_JUDGE)

    def bad(self, key: str, shard: str, reason: str) -> None:
        self.num_bad += 1
        if (key, shard) not in self._listed:
            self._listed.add((key, shard))
            self.failures.append(BadSample(key, shard, reason))
            self._append(self.failures[-1])
        self._judge(MIN_SAMPLES_TO_JUDGE)

    def finish(self) -> None:
        self._judge(1)

    def _append(self, failure: BadSample) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(failure)) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error

    def _judge(self, min_seen: int) -> None:
        seen = self.num_good + self.num_bad
        if seen < min_seen or self.num_bad <= self.max_bad_fraction * seen:
            return
        first = self.failures[0]
        where = f"see {self.path}, then " if self.path else ""
        raise ShardError(
            f"{self.num_bad} of {seen} samples bad, more than max_bad_fraction = {self.max_bad_fraction:g} "
            f"(first: {first.key} of {first.shard}: {first.reason}); {where}mend the shards or raise "
            "max_bad_fraction"
        )


def _read_failures(path: Path) -> list[BadSample]:
    """Failures that a file lists; ends a last line that a killed run left unfinished."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    failures = []
    for line in text.splitlines():
        try:
            failures.append(BadSample(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return failures
