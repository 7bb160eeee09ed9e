"""The baselines everybody has: fewer frames, a smaller picture, tokens drawn at random. They choose before the encoder.

Shapes: T frames, T' tubelets (T' = T without tubelets), H x W pixels, grid T' x H' x W', P patch side, F kept frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.encoders.tokenizer import (
    RunLengthTokenizer,
    check_patch_size,
    cut_tubelets,
    tokens_from_mask,
)


@dataclass(frozen=True)
class _ByRatio:
    """What keeps a share of a clip whatever it shows.

    Attributes:
        patch_size: P, pixels.
        keep_ratio: the share, in (0, 1].
    Raises:
        ValueError: an impossible size or share.
    """

    patch_size: int
    keep_ratio: float

    def __post_init__(self) -> None:
        check_patch_size(self.patch_size)
        _check_ratio(self.keep_ratio)


class FrameTokenizer(_ByRatio):
    """A uniform subset of the frames, each kept whole.

    F = max(1, round(keep_ratio T)), Python's rounding; segment i = [floor(i T / F), floor((i + 1) T / F)). Its tokens
    carry the time of its first frame, run for its length, and show its middle frame (of two: the earlier).
    """

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: uint8 [T, 3, H, W] on any device. Raises ValueError for frames of another kind."""
        frames_tuCHW = cut_tubelets(frames_TCHW, self.patch_size)
        num_frames, _, _, height, width = frames_tuCHW.shape
        num_kept = max(1, round(self.keep_ratio * num_frames))
        starts = [i * num_frames // num_kept for i in range(num_kept)]
        middles = [
            (start + end - 1) // 2 for start, end in zip(starts, [*starts[1:], num_frames], strict=True)
        ]
        grid = (num_frames, height // self.patch_size, width // self.patch_size)
        mask_thw = torch.zeros(grid, dtype=torch.bool, device=frames_TCHW.device)
        mask_thw[starts] = True
        shown_tuCHW = frames_tuCHW.clone()
        shown_tuCHW[starts] = frames_tuCHW[middles]
        return tokens_from_mask(shown_tuCHW, mask_thw, self.patch_size)


class SmallPictureTokenizer(_ByRatio):
    """All tokens of all frames at a smaller input size; the patch size stays.

    The grid is that of `reduced_grid`; frames are resized to it (bicubic, antialiased, rounded to uint8).
    """

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: uint8 [T, 3, H, W] at the model's size, on any device.

        The grid of the result is the smaller one. Raises ValueError for frames of another kind.
        """
        num_frames, _, _, height, width = cut_tubelets(frames_TCHW, self.patch_size).shape
        grid = reduced_grid((height // self.patch_size, width // self.patch_size), self.keep_ratio)
        small_TCHW = _resized(frames_TCHW, (grid[0] * self.patch_size, grid[1] * self.patch_size))
        mask_thw = torch.ones(num_frames, *grid, dtype=torch.bool, device=frames_TCHW.device)
        return tokens_from_mask(small_TCHW[:, None], mask_thw, self.patch_size)


def reduced_grid(grid_size: tuple[int, int], keep_ratio: float) -> tuple[int, int]:
    """(H'', W''), each side max(1, round(side sqrt(keep_ratio))): the grid of `SmallPictureTokenizer`."""
    height, width = (max(1, round(side * sqrt(keep_ratio))) for side in grid_size)
    return height, width


@dataclass(frozen=True)
class RandomTokenizer:
    """As many tokens as RLT keeps of the clip, but which ones is left to chance: the control of RLT's choice.

    The whole first tubelet is kept, and of all other cells a uniform draw without replacement, RLT's count in all; a
    dropped cell continues the run before it. The draw is seeded by the sum of the clip's pixels, so it depends on
    neither batch nor device.

    Attributes:
        rlt: whose count (and patch and tubelet size) is taken.
    """

    rlt: RunLengthTokenizer

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: see `RunLengthTokenizer`."""
        rlt_mask_thw = self.rlt.keep_mask(frames_TCHW)
        mask_thw = _draw(torch.ones_like(rlt_mask_thw), int(rlt_mask_thw.sum()), frames_TCHW)
        return tokens_from_mask(_tubelets_of(self.rlt, frames_TCHW), mask_thw, self.rlt.patch_size)


@dataclass(frozen=True)
class RltRandomTokenizer:
    """A random share of the tokens that RLT keeps: what RLT gives, thinned to a budget.

    Of RLT's N tokens max(H' W', round(keep_ratio N)) stay (Python's rounding): the whole first tubelet and a uniform
    draw of the others, seeded as in `RandomTokenizer`; a dropped cell continues the run before it.

    Attributes:
        rlt: whose tokens are drawn from.
        keep_ratio: share of them that stays, in (0, 1].
    Raises:
        ValueError: an impossible share.
    """

    rlt: RunLengthTokenizer
    keep_ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self.keep_ratio)

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: see `RunLengthTokenizer`."""
        rlt_mask_thw = self.rlt.keep_mask(frames_TCHW)
        num_wanted = round(self.keep_ratio * int(rlt_mask_thw.sum()))
        mask_thw = _draw(rlt_mask_thw, num_wanted, frames_TCHW)
        return tokens_from_mask(_tubelets_of(self.rlt, frames_TCHW), mask_thw, self.rlt.patch_size)


def _draw(candidates_thw: Tensor, num_wanted: int, frames_TCHW: Tensor) -> Tensor:
    """Mask [T', H', W'] of `num_wanted` candidates or more: the whole first tubelet, and others drawn uniformly.

    Drawn on the host, where the same seed gives the same draw whatever device the frames are on.
    """
    generator = torch.Generator().manual_seed(int(frames_TCHW.sum(dtype=torch.int64)))
    cells = candidates_thw.flatten().nonzero()[:, 0]
    num_first = candidates_thw[0].numel()
    chosen = torch.randperm(len(cells) - num_first, generator=generator)[: max(0, num_wanted - num_first)]
    mask_thw = torch.zeros_like(candidates_thw)
    mask_thw[0] = True
    mask_thw.view(-1)[cells[num_first:][chosen.to(cells.device)]] = True
    return mask_thw


def _tubelets_of(rlt: RunLengthTokenizer, frames_TCHW: Tensor) -> Tensor:
    return cut_tubelets(frames_TCHW, rlt.patch_size, rlt.tubelet_size)


def _resized(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, in float32: there is no uint8 kernel on GPUs."""
    if frames_TCHW.shape[2:] == size:
        return frames_TCHW
    resized_TCHW = F.interpolate(frames_TCHW.float(), size=size, mode="bicubic", antialias=True)
    return resized_TCHW.round().clamp(0, 255).to(torch.uint8)


def _check_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; it must be above 0 and at most 1")
