"""Run-length tokenization (RLT, arXiv 2411.05222): drop patches that repeat, keep how long they last.

Shapes: T frames, T' tubelets, H x W pixels, grid T' x H' x W', P patch side, N kept tokens, C = 3 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite
from typing import Literal

import torch
from torch import Tensor

from rlt_retrieval.encoders.packing import VideoTokens

Reference = Literal["previous", "anchor"]

# The paper's unit: |a - b| / (255 * std_c) with ImageNet's std = (0.229, 0.224, 0.225), whatever the
# backbone's own normaliser. 1 / std_c as integers over a common denominator, so that sums stay exact.
_STD_THOUSANDTHS = (229, 224, 225)
_COMMON = 229 * 224 * 225
_CHANNEL_WEIGHTS = tuple(_COMMON // std for std in _STD_THOUSANDTHS)

KEEP_ALL = -1.0  # no difference is below zero, so this threshold drops nothing


@dataclass(frozen=True)
class RunLengthTokenizer:
    """Cut frames into tubelets and drop those that repeat the one that stands for their place.

    The difference of two tubelets is the mean over pixels and channels of |a - b| / (255 * std_c) (RLT,
    section 3.1); a tubelet is dropped when it is <= `threshold`; the first one is always kept.

    `reference="previous"` compares the last frame of a tubelet with the first frame of the tubelet before it
    (the paper's rule). `reference="anchor"` compares with the last *kept* tubelet at that place, taking the
    largest difference over corresponding frames, so that every dropped patch is within the threshold of the
    token that stands for it, however slowly the picture drifts.

    Attributes:
        patch_size: P, pixels.
        tubelet_size: frames a token, 1 or 2.
        threshold: in units of normalised intensity (0.1 is about 5.7 of 255 grey levels); negative keeps all.
        reference: see above.
    Raises:
        ValueError: impossible sizes, a threshold that is no number, or an unknown reference.
    """

    patch_size: int = 16
    tubelet_size: int = 1
    threshold: float = 0.1
    reference: Reference = "previous"

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise ValueError(f"patch_size is {self.patch_size}; it must be at least 1 pixel")
        if self.tubelet_size not in (1, 2):
            raise ValueError(f"tubelet_size is {self.tubelet_size}; it must be 1 or 2 frames")
        if not isfinite(self.threshold):
            raise ValueError(
                f"threshold is {self.threshold}; it must be a finite number (negative keeps all)"
            )
        if self.reference not in ("previous", "anchor"):
            raise ValueError(f"reference is {self.reference!r}; it must be 'previous' or 'anchor'")

    def keep_mask(self, frames_TCHW: Tensor) -> Tensor:
        """Which tubelets are kept.

        Args:
            frames_TCHW: uint8 [T, 3, H, W], T >= 1, H and W multiples of `patch_size`; any device.
        Returns:
            bool [T', H', W'] on the same device; bit-equal on every device.
        Raises:
            ValueError: other dtype or shape.
        """
        return self._keep_mask(self._tubelets(frames_TCHW))

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: see `keep_mask` for the argument, `VideoTokens` for the result."""
        frames_tuCHW = self._tubelets(frames_TCHW)
        mask_thw = self._keep_mask(frames_tuCHW)
        t, u, c, height, width = frames_tuCHW.shape
        p = self.patch_size
        patches_thwucpp = frames_tuCHW.reshape(t, u, c, height // p, p, width // p, p).permute(
            0, 3, 5, 1, 2, 4, 6
        )
        run_lengths_thw = _run_lengths(mask_thw)
        return VideoTokens(
            patches=patches_thwucpp[mask_thw],
            positions=mask_thw.nonzero().to(torch.int32),
            run_lengths=run_lengths_thw[mask_thw].to(torch.int32),
            grid=(t, height // p, width // p),
        )

    def _tubelets(self, frames_TCHW: Tensor) -> Tensor:
        """uint8 [T', tubelet, 3, H, W]; T is padded by repeating the last frame."""
        if frames_TCHW.dtype != torch.uint8 or frames_TCHW.ndim != 4 or frames_TCHW.shape[1] != 3:
            raise ValueError(
                f"frames are {frames_TCHW.dtype} {tuple(frames_TCHW.shape)}; expected uint8 [T, 3, H, W]"
            )
        num_frames, _, height, width = frames_TCHW.shape
        if num_frames < 1 or height % self.patch_size or width % self.patch_size or not height * width:
            raise ValueError(
                f"frames are {tuple(frames_TCHW.shape)}; expected T >= 1 and sides that are multiples of the "
                f"patch size {self.patch_size}"
            )
        padding = -num_frames % self.tubelet_size
        if padding:
            frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(padding, -1, -1, -1)])
        return frames_TCHW.reshape(-1, self.tubelet_size, 3, height, width)

    def _keep_mask(self, frames_tuCHW: Tensor) -> Tensor:
        limit = _integer_limit(self.threshold, self.patch_size)
        num_tubelets = frames_tuCHW.shape[0]
        height, width = (side // self.patch_size for side in frames_tuCHW.shape[-2:])
        mask_thw = torch.ones(num_tubelets, height, width, dtype=torch.bool, device=frames_tuCHW.device)
        if num_tubelets == 1 or limit < 0:
            return mask_thw
        if self.reference == "previous":
            later_tCHW, earlier_tCHW = frames_tuCHW[1:, -1], frames_tuCHW[:-1, 0]
            mask_thw[1:] = _patch_differences(later_tCHW, earlier_tCHW, self.patch_size) > limit
            return mask_thw
        anchor_uCHW = frames_tuCHW[0].clone()
        for t in range(1, num_tubelets):
            differences_uhw = _patch_differences(frames_tuCHW[t], anchor_uCHW, self.patch_size)
            mask_thw[t] = differences_uhw.amax(0) > limit
            pixels_HW = (
                mask_thw[t].repeat_interleave(self.patch_size, 0).repeat_interleave(self.patch_size, 1)
            )
            anchor_uCHW = torch.where(pixels_HW, frames_tuCHW[t], anchor_uCHW)
        return mask_thw


def _integer_limit(threshold: float, patch_size: int) -> int:
    """Largest weighted integer sum of a patch that still counts as a repetition (see `_patch_differences`)."""
    return floor(Fraction(threshold) * _COMMON * 255 * 3 * patch_size**2 / 1000)


def _patch_differences(a_fCHW: Tensor, b_fCHW: Tensor, patch_size: int) -> Tensor:
    """Weighted sums of |a - b| a patch: int64 [f, H', W'], exact on every device."""
    f, _, height, width = a_fCHW.shape
    difference_fCHW = (a_fCHW.to(torch.int16) - b_fCHW.to(torch.int16)).abs_()
    blocks = difference_fCHW.reshape(f, 3, height // patch_size, patch_size, width // patch_size, patch_size)
    sums_fchw = blocks.sum(dim=5, dtype=torch.int32).sum(dim=3, dtype=torch.int64)
    weights_c = torch.tensor(_CHANNEL_WEIGHTS, dtype=torch.int64, device=a_fCHW.device)
    return (sums_fchw * weights_c[:, None, None]).sum(1)


def _run_lengths(mask_thw: Tensor) -> Tensor:
    """int64 [T', H', W']: at kept places, tubelets until the next kept one there (or the end)."""
    num_tubelets = mask_thw.shape[0]
    time_t11 = torch.arange(num_tubelets, device=mask_thw.device)[:, None, None]
    kept_time_thw = torch.where(mask_thw, time_t11, num_tubelets)
    next_kept_thw = kept_time_thw.flip(0).cummin(0).values.flip(0)
    end_1hw = torch.full_like(next_kept_thw[:1], num_tubelets)
    return torch.cat([next_kept_thw[1:], end_1hw]) - time_t11
