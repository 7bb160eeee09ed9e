"""Run-length tokenization (RLT, arXiv 2411.05222): drop patches that repeat, keep how long they last.

Shapes: T frames, T' tubelets of u frames, H x W pixels, grid T' x H' x W', n = H' W' cells of a tubelet, P patch side,
p = P² pixels of a patch, N kept tokens (or rows, T' n), C = 3 channels.
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
CHANNEL_WEIGHTS = tuple(_COMMON // std for std in _STD_THOUSANDTHS)

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

    `refresh_every=k` also keeps tubelets k, 2k, … whole (with `reference="anchor"` they are the new anchors): in a
    clip that changes no token is then older than k tubelets. Where nothing was kept since the last such tubelet, that
    one included, there is nothing new to see the others beside, and the tubelet is not refreshed.

    Attributes:
        patch_size: P, pixels.
        tubelet_size: frames a token, 1 or 2.
        threshold: in units of normalised intensity (0.1 is about 5.7 of 255 grey levels); negative keeps all.
        reference: see above.
        refresh_every: tubelets; 0: never.
    Raises:
        ValueError: impossible sizes, a threshold that is no number, or an unknown reference.
    """

    patch_size: int = 16
    tubelet_size: int = 1
    threshold: float = 0.1
    reference: Reference = "previous"
    refresh_every: int = 0

    def __post_init__(self) -> None:
        check_patch_size(self.patch_size)
        if self.tubelet_size not in (1, 2):
            raise ValueError(f"tubelet_size is {self.tubelet_size}; it must be 1 or 2 frames")
        check_threshold(self.threshold)
        if self.reference not in ("previous", "anchor"):
            raise ValueError(f"reference is {self.reference!r}; it must be 'previous' or 'anchor'")
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every is {self.refresh_every}; it must be 0 (never) or more tubelets")

    def keep_mask(self, frames_TCHW: Tensor) -> Tensor:
        """Which tubelets are kept.

        Args:
            frames_TCHW: uint8 [T, 3, H, W], T >= 1, H and W multiples of `patch_size`; any device.
        Returns:
            bool [T', H', W'] on the same device; bit-equal on every device.
        Raises:
            ValueError: other dtype or shape.
        """
        return self.keep_mask_of(self.cut(frames_TCHW))

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: see `keep_mask` for the argument, `VideoTokens` for the result."""
        patches_thwucpp = self.cut(frames_TCHW)
        return tokens_of_patches(patches_thwucpp, self.keep_mask_of(patches_thwucpp))

    def cut(self, frames_TCHW: Tensor) -> Tensor:
        """All tubelets' patches, kept or not: `cut_patches`. See `keep_mask` for the argument and what raises."""
        return cut_patches(cut_tubelets(frames_TCHW, self.patch_size, self.tubelet_size), self.patch_size)

    def keep_mask_of(self, patches_thwucpp: Tensor) -> Tensor:
        """`keep_mask` of frames that are already cut."""
        rows_tnucp = patches_thwucpp.flatten(1, 2).flatten(-2)
        mask_tn = torch.ones(rows_tnucp.shape[:2], dtype=torch.bool, device=rows_tnucp.device)
        limit = difference_limit(self.threshold, self.patch_size)
        if limit >= 0:
            compare = self._beside_previous if self.reference == "previous" else self._beside_anchors
            compare(rows_tnucp, mask_tn, limit)
        return mask_tn.view(patches_thwucpp.shape[:3])

    def _beside_previous(self, rows_tnucp: Tensor, mask_tn: Tensor, limit: int) -> None:
        mask_tn[1:] = _row_differences(rows_tnucp[1:, :, -1], rows_tnucp[:-1, :, 0]) > limit
        for t in range(1, len(mask_tn)):
            self._refresh(mask_tn, t)

    def _beside_anchors(self, rows_tnucp: Tensor, mask_tn: Tensor, limit: int) -> None:
        num_tubelets, num_cells = mask_tn.shape
        rows_Nucp = rows_tnucp.flatten(0, 1)
        own_tn = torch.arange(num_tubelets * num_cells, device=mask_tn.device).view(mask_tn.shape)
        anchor_n = own_tn[0]  # as a row of rows_Nucp
        for t in range(1, num_tubelets):
            differences_nu = _row_differences(rows_tnucp[t], rows_Nucp.index_select(0, anchor_n))
            mask_tn[t] = differences_nu.amax(1) > limit
            self._refresh(mask_tn, t)
            anchor_n = torch.where(mask_tn[t], own_tn[t], anchor_n)

    def _refresh(self, mask_tn: Tensor, t: int) -> None:
        """Keep tubelet t whole, in place, if it is due and anything was kept since the last one that was due."""
        if self.refresh_every and t % self.refresh_every == 0:
            mask_tn[t] |= mask_tn[t - self.refresh_every + 1 : t + 1].any()


# ------------------------------------------------------------------- pieces that other tokenizers are built on


def cut_tubelets(frames_TCHW: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """uint8 [T', tubelet, 3, H, W]; T is padded by repeating the last frame.

    Raises:
        ValueError: no uint8 [T, 3, H, W] with T >= 1 and sides that are multiples of `patch_size`.
    """
    if frames_TCHW.dtype != torch.uint8 or frames_TCHW.ndim != 4 or frames_TCHW.shape[1] != 3:
        raise ValueError(
            f"frames are {frames_TCHW.dtype} {tuple(frames_TCHW.shape)}; expected uint8 [T, 3, H, W]"
        )
    num_frames, _, height, width = frames_TCHW.shape
    if num_frames < 1 or height % patch_size or width % patch_size or not height * width:
        raise ValueError(
            f"frames are {tuple(frames_TCHW.shape)}; expected T >= 1 and sides that are multiples of the "
            f"patch size {patch_size}"
        )
    padding = -num_frames % tubelet_size
    if padding:
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(padding, -1, -1, -1)])
    return frames_TCHW.reshape(-1, tubelet_size, 3, height, width)


def cut_patches(frames_tuCHW: Tensor, patch_size: int) -> Tensor:
    """uint8 [T', H', W', tubelet, 3, P, P], contiguous: one copy, after which each patch is one piece of memory."""
    t, u, c, height, width = frames_tuCHW.shape
    p = patch_size
    blocks = frames_tuCHW.reshape(t, u, c, height // p, p, width // p, p)
    return blocks.permute(0, 3, 5, 1, 2, 4, 6).contiguous()


def tokens_from_mask(
    frames_tuCHW: Tensor, mask_thw: Tensor, patch_size: int, covering_thw: Tensor | None = None
) -> VideoTokens:
    """Tokens of the kept cells of a clip, given as uint8 [T', tubelet, 3, H, W] (what `cut_tubelets` gives).

    The other arguments and the result: `tokens_of_patches`.
    """
    return tokens_of_patches(cut_patches(frames_tuCHW, patch_size), mask_thw, covering_thw)


def tokens_of_patches(
    patches_thwucpp: Tensor, mask_thw: Tensor, covering_thw: Tensor | None = None
) -> VideoTokens:
    """Tokens of the kept cells of a clip.

    Args:
        patches_thwucpp: uint8 [T', H', W', tubelet, 3, P, P]; what `cut_patches` gives.
        mask_thw: bool [T', H', W'], True: kept; the first tubelet is kept whole.
        covering_thw: int [T', H', W'], the token (in (t, y, x) order) that stands for each cell, kept ones for
            themselves; None: the latest one at the same place.
    """
    num_tubelets, height, width = mask_thw.shape
    positions_N3 = mask_thw.nonzero()  # the only step whose size the device alone knows
    t_N, y_N, x_N = positions_N3.unbind(1)
    kept_N = (t_N * height + y_N) * width + x_N
    if covering_thw is None:
        run_lengths_N = run_lengths(mask_thw).flatten().index_select(0, kept_N)
    else:
        run_lengths_N = torch.bincount(covering_thw.flatten(), minlength=len(kept_N))
    return VideoTokens(
        patches=patches_thwucpp.flatten(0, 2).index_select(0, kept_N),
        positions=positions_N3.to(torch.int32),
        run_lengths=run_lengths_N.to(torch.int32),
        grid=(num_tubelets, height, width),
        covering=None if covering_thw is None else covering_thw.to(torch.int32),
    )


def pixels_of_cells(cells_hw: Tensor, patch_size: int) -> Tensor:
    """[H, W]: each pixel takes what its cell of [H', W'] holds."""
    return cells_hw.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)


def difference_limit(threshold: float, patch_size: int) -> int:
    """Largest weighted integer sum of a patch that still counts as a repetition (see `patch_differences`)."""
    return floor(Fraction(threshold) * _COMMON * 255 * 3 * patch_size**2 / 1000)


def patch_differences(a_fCHW: Tensor, b_fCHW: Tensor, patch_size: int) -> Tensor:
    """Weighted sums of |a - b| a patch: int64 [f, H', W'], exact on every device."""
    f, _, height, width = a_fCHW.shape
    difference_fCHW = (a_fCHW.to(torch.int16) - b_fCHW.to(torch.int16)).abs_()
    blocks = difference_fCHW.reshape(f, 3, height // patch_size, patch_size, width // patch_size, patch_size)
    sums_fchw = blocks.sum(dim=3, dtype=torch.int32).sum(dim=4, dtype=torch.int64)
    return _weighted(sums_fchw.movedim(1, -1))


def _row_differences(a_ncp: Tensor, b_ncp: Tensor) -> Tensor:
    """The same of patches that lie in one piece: uint8 [..., 3, P²] each to int64 [...].

    On the CPU differences in uint8 and sums in int32 are the fastest.
    """
    difference_ncp = torch.maximum(a_ncp, b_ncp).sub_(torch.minimum(a_ncp, b_ncp))
    return _weighted(difference_ncp.sum(-1, dtype=torch.int32).long())


def _weighted(sums_nc: Tensor) -> Tensor:
    """int64 [..., 3] to [...]. Weights are numbers, not a tensor, which a GPU would have to be sent."""
    red, green, blue = CHANNEL_WEIGHTS
    red_n, green_n, blue_n = sums_nc.unbind(-1)
    return (red_n * red).add_(green_n, alpha=green).add_(blue_n, alpha=blue)


def check_patch_size(patch_size: int) -> None:
    """ValueError for a patch of no pixel."""
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; it must be at least 1 pixel")


def check_threshold(threshold: float) -> None:
    """ValueError for a threshold that is no number."""
    if not isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; it must be a finite number (negative keeps all)")


def run_lengths(mask_thw: Tensor) -> Tensor:
    """int64 [T', H', W']: at kept places, tubelets until the next kept one there (or the end)."""
    num_tubelets = mask_thw.shape[0]
    time_t11 = torch.arange(num_tubelets, device=mask_thw.device)[:, None, None]
    kept_time_thw = torch.where(mask_thw, time_t11, num_tubelets)
    next_kept_thw = kept_time_thw.flip(0).cummin(0).values.flip(0)
    end_1hw = torch.full_like(next_kept_thw[:1], num_tubelets)
    return torch.cat([next_kept_thw[1:], end_1hw]) - time_t11
