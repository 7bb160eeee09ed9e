"""The statistics of benchmarks/fidelity.py, and its table on a tiny model."""

import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import repeating_frames, small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fidelity


def test_a_paired_loss_counts_queries_that_were_lost_less_those_won() -> None:
    """Two seeds of four queries: losses 1/4 and 0; the interval is the bootstrap's."""
    full = [np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 0], bool)]
    pruned = [np.array([1, 0, 0, 1], bool), np.array([0, 1, 0, 0], bool)]
    mean, low, high = fidelity.paired_loss(full, pruned)
    assert mean == pytest.approx(1 / 8)
    assert low < mean < high
    draws = np.random.default_rng(1).choice([0, 1, 0, 0], (20000, 4)).mean(1)
    draws = (draws + np.random.default_rng(2).choice([1, -1, 0, 0], (20000, 4)).mean(1)) / 2
    assert (low, high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.03)


def test_a_loss_that_every_query_has_has_no_interval() -> None:
    full, pruned = [np.full(9, 0.75)], [np.full(9, 0.5)]
    assert fidelity.paired_loss(full, pruned) == pytest.approx((0.25, 0.25, 0.25))


def test_the_table_of_clips_that_repeat_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that stands still is lost: no pixel error; fewer frames and random tokens err more."""
    monkeypatch.setattr(fidelity, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(fidelity, "REFRESHES", ())
    model = small_model(layout="frame", num_frames=8)
    clips = [repeating_frames(8, 0.15, seed=seed) for seed in range(6)]
    rows = fidelity.joined([fidelity.table(fidelity.Case(model, clips))])
    assert [row["reference"] for row in rows] == ["anchor", "previous"]
    for row in rows:
        assert row["share"] < row["frames_share"] < 1
        assert row["pixel_error"] == pytest.approx(0, abs=1e-5)
        assert row["rlt_error"] == pytest.approx(row["context_error"], abs=1e-5)
        assert row["rlt_error"] < row["frames_error"]
        assert row["rlt_error"] < row["random_error"]
    assert fidelity.markdown(rows).count("\n") == 1 + len(rows)
