"""Settings with which every reducer makes the encoder compute as much as RLT does.

Shapes: T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlt_retrieval.bench.costs import MeanCost, mean_cost
from rlt_retrieval.config import Reducer
from rlt_retrieval.model import VideoTextModel

MAX_STEPS = 7  # of the search, after its two ends: a step may tokenize every clip
NEAR = 0.005  # of the target; the search ends there
LEAST_DIAL = 0.01

Dial = Callable[[float], dict[str, float]]


@dataclass(frozen=True)
class Matched:
    """A reducer with the settings found for it. changes: those that are not the model's own."""

    model: VideoTextModel
    changes: dict[str, float]
    cost: MeanCost


def match(
    model: VideoTextModel, reducer: Reducer, clips: Sequence[Tensor], target_flops: float | None
) -> Matched:
    """The reducer at `target_flops` of the encoder, on the mean over clips, or as near as it gets.

    frames, resolution, tome, vid_tldr and centerclip take the keep_ratio, gated and motion the threshold, "rlt+random"
    and "rlt+tome" half the model's threshold and the keep_ratio that comes nearest. None as target, and the reducers
    that have nothing to set (none; rlt, whose settings are the model's; random, which copies its counts), take the
    model's own settings.

    Args:
        clips: uint8 [T, 3, H, W] each, at the model's size.
    Raises:
        ModelError: settings that the layout refuses.
        ValueError: a tower that the reducer cannot work in.
    """

    def at(changes: dict[str, Any]) -> Matched:
        twin = model.with_settings(reducer=reducer, **changes)
        return Matched(twin, changes, mean_cost(twin, clips))

    dial = _dial(reducer, model.config.video.threshold)
    if dial is None or target_flops is None:
        return at({})
    return _search(lambda value: at(dial(value)), target_flops)


def _dial(reducer: Reducer, threshold: float) -> Dial | None:
    """Settings by one number in (0, 1], more of which computes more; None where there is nothing to set."""
    match reducer:
        case "none" | "rlt" | "random":
            return None
        case "gated":  # 1 - SSIM lies in 0..2; most of what matters is near 0
            return lambda value: {"threshold": round(2 * (1 - value) ** 2, 5)}
        case "motion":
            return lambda value: {"threshold": round((1 - value) ** 2, 5)}
        case "rlt+random" | "rlt+tome":
            return lambda value: {"threshold": threshold / 2, "keep_ratio": round(value, 4)}
    return lambda value: {"keep_ratio": round(value, 4)}


def _search(at: Callable[[float], Matched], target_flops: float) -> Matched:
    """The try that comes nearest, by false position with the Illinois rule: an end that stays twice counts half."""
    low, high = LEAST_DIAL, 1.0
    tries = [at(low), at(high)]
    low_gap, high_gap = (tried.cost.flops - target_flops for tried in tries)
    was_below = None
    while len(tries) < 2 + MAX_STEPS and low_gap < 0 < high_gap:
        value = low + (high - low) * min(max(low_gap / (low_gap - high_gap), 0.05), 0.95)
        tries.append(at(value))
        gap = tries[-1].cost.flops - target_flops
        is_below = gap < 0
        if abs(gap) < NEAR * target_flops:
            break
        stays = 0.5 if is_below == was_below else 1
        if is_below:
            low, low_gap, high_gap = value, gap, stays * high_gap
        else:
            high, high_gap, low_gap = value, gap, stays * low_gap
        was_below = is_below
    return min(tries, key=lambda tried: abs(tried.cost.flops - target_flops))
