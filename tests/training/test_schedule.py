"""Learning rate, value by value."""

import pytest

from rlt_retrieval.config import OptimRecipe
from rlt_retrieval.training.schedule import learning_rate


def optim(**changes: object) -> OptimRecipe:
    values = {"steps": 12, "warmup_steps": 4, "learning_rate": 1.0, "final_learning_rate": 0.1}
    return OptimRecipe.model_validate({"batch_size": 2, **values, **changes})


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.25),  # not 0: a first step at rate 0 would be wasted
        (3, 0.75),
        (4, 1.0),  # the peak is reached, not passed over
        (6, 0.1 + 0.9 * (1 + 2**-0.5) / 2),  # a quarter of the way: cos 45°
        (8, 0.55),  # half-way
        (10, 0.1 + 0.9 * (1 - 2**-0.5) / 2),
        (12, 0.1),  # the last step has the final rate
    ],
)
def test_warm_up_then_cosine(step: int, rate: float) -> None:
    assert learning_rate(step, optim()) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(("step", "rate"), [(1, 0.4), (2, 0.6), (4, 1.0), (8, 0.55)])
def test_warm_up_leaves_from_the_start_rate(step: int, rate: float) -> None:
    """0.2 at step 0, then 0.2 more a step; nothing after the peak changes."""
    assert learning_rate(step, optim(start_learning_rate=0.2)) == pytest.approx(rate, abs=1e-12)


def test_no_warm_up_starts_on_the_cosine() -> None:
    assert learning_rate(6, optim(warmup_steps=0, final_learning_rate=0.0)) == pytest.approx(0.5)


def test_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    """Catches a division by the zero steps that are left."""
    assert learning_rate(12, optim(warmup_steps=12)) == 1.0
