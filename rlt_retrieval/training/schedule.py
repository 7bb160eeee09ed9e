"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from rlt_retrieval.config import OptimRecipe


def learning_rate(step: int, optim: OptimRecipe) -> float:
    """Linear warm-up from `start_learning_rate`, then a cosine from `learning_rate` to `final_learning_rate`.

    The cosine is that of arXiv 1608.03983, eq. 5.

    Args:
        step: 1 for the first step, one step after the start; the peak is reached at `warmup_steps`, the end at
            `steps`.
    """
    if step <= optim.warmup_steps:
        climb = optim.learning_rate - optim.start_learning_rate
        return optim.start_learning_rate + climb * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    swing = optim.learning_rate - optim.final_learning_rate
    return optim.final_learning_rate + swing * (1 + math.cos(math.pi * min(1.0, progress))) / 2
