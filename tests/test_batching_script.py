"""benchmarks/batching.py on a tiny model: the ways of cutting, and that all do the same work."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import small_config

from rlt_retrieval.config import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import batching
from train_step import Trainer


def tiny_trainer() -> Trainer:
    recipe = Recipe.model_validate(
        {
            "run_dir": "nowhere",
            "model": {"backbone_config": small_config(), "pretrained": "none"},
            "video": {"layout": "joint", "num_frames": 4},
            "data": {"train": ["none"], "num_streams": 1},
            "optim": {"steps": 2, "batch_size": 12, "learning_rate": 1e-6, "precision": "fp32"},
        }
    )
    return Trainer(recipe, torch.device("cpu"))


def test_the_ways_cut_the_same_clips_by_tokens_or_by_number() -> None:
    """A batch closes when the next clip would pass 10; the same mean is two clips a batch."""
    rows = [4, 6, 9, 1, 1, 1]
    ways = batching.cuts(rows, 10, 1)
    batches = {name: list(cut(iter(rows), int, 10)) for name, cut in ways.items()}
    assert batches == {
        "budget": [[4, 6], [9, 1], [1, 1]],
        "same memory": [[4], [6], [9], [1], [1], [1]],
        "same mean": [[4, 6], [9, 1], [1, 1]],
    }


def test_every_clip_goes_through_every_way() -> None:
    """Joint layout: a whole clip has 4 x 16 rows, so a budget of two of them is 128."""
    results = batching.measure(tiny_trainer(), whole_clips=2, repeats=1)
    assert list(results) == ["embed", "train"]
    for budget, same_memory, same_mean in results.values():
        assert sum(budget.batch_rows) == sum(same_memory.batch_rows) == sum(same_mean.batch_rows)
        assert max(budget.batch_rows) <= 128
        assert max(same_memory.batch_rows) <= 128
        assert len(same_memory.batch_rows) == 6
        assert len(budget.batch_rows) < 6
        assert abs(len(same_mean.batch_rows) - len(budget.batch_rows)) <= 1


def test_the_page_judges_the_budget_against_both() -> None:
    ways = [
        batching.Way("budget", [8, 8], 1.0, 50),
        batching.Way("same memory", [4, 4, 8], 2.0, 50),
        batching.Way("same mean", [2, 14], 1.0, 100),
    ]
    page = batching.page({"embed": ways}, 4)
    assert "embed, time / same memory: 0.500, bar ≤ 1.030: reached" in page
    assert "embed, peak / same mean: 0.500, bar ≤ 1.000: reached" in page
    assert page.count("reached") == 4


def test_motion_differs_from_film_to_film() -> None:
    trainer, count = tiny_trainer(), batching.WINDOWS * len(batching.SHARES)
    kept = [len(tokens) for tokens in batching.mixed_clips(trainer.model, count)]
    assert kept[:: batching.WINDOWS] == kept[batching.WINDOWS - 1 :: batching.WINDOWS]
    assert min(kept) < 0.4 * max(kept)
    assert max(kept) == pytest.approx(64)
