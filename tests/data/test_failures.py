"""The list of bad samples: each once, restarts included, and a stop when there are too many."""

import json

import pytest

from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.errors import ShardError


def test_failures_are_listed_once_even_after_a_restart(tmp_path):
    path = tmp_path / "run" / "failures.jsonl"
    log = FailureLog(path, 0.9)
    for _ in range(2):  # two epochs
        log.good(3)
        log.bad("k", "s.tar", "torn")
        log.bad("k", "t.tar", "torn")
    log.finish()
    with path.open("a") as file:
        file.write('{"key": "half')  # a run killed while writing
    again = FailureLog(path, 0.9)
    again.bad("k", "s.tar", "torn")
    again.bad("l", "s.tar", "no media")
    lines = path.read_text().splitlines()
    assert lines.pop(2) == '{"key": "half'
    assert [json.loads(line) for line in lines] == [
        {"key": "k", "shard": "s.tar", "reason": "torn"},
        {"key": "k", "shard": "t.tar", "reason": "torn"},
        {"key": "l", "shard": "s.tar", "reason": "no media"},
    ]


def test_too_many_bad_samples_stop_the_job_once_enough_were_seen(tmp_path):
    log = FailureLog(tmp_path / "failures.jsonl", 0.1)
    for i in range(50):
        log.bad(f"k{i}", "s.tar", "torn")
    log.good(49)
    with pytest.raises(
        ShardError, match=r"50 of 100 samples bad, more than max_bad_fraction = 0.1 \(first: k0 of s"
    ):
        log.good()
    few = FailureLog(None, 0.1)
    few.good(8)
    few.bad("k", "s.tar", "torn")
    with pytest.raises(ShardError, match=r"1 of 9 samples bad.*mend the shards or raise"):
        few.finish()
    few.good()
    few.finish()
    FailureLog(None, 0.0).finish()
    with pytest.raises(ShardError, match="cannot write"):
        FailureLog(tmp_path / "failures.jsonl" / "x", 1.0).bad("k", "s", "r")
