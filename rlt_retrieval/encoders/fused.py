"""Run-length tokens of frames that are already on a GPU: Triton kernels, one wait for the device. Bit-equal to
`RunLengthTokenizer`.

Import it only where Triton is there. Shapes: B clips, T frames, T' tubelets, H x W pixels, grid T' x h x w, P patch
side, N kept tokens, M = B * T' * h * w cells.
"""

# Triton reads annotations of kernels as they are: no `from __future__ import annotations` here.
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders.packing import PackedTokens
from rlt_retrieval.encoders.tokenizer import CHANNEL_WEIGHTS, RunLengthTokenizer, difference_limit

# A program reads one patch at a time, less than 1 KB: many small programs hide the memory's latency.
_WARPS = 1


def tokenize_on_device(frames_BTCHW: Tensor, tokenizer: RunLengthTokenizer) -> PackedTokens:
    """Tokenize a batch of clips where it lies; waits for the device once, for the number of tokens of each clip.

    A first kernel walks through time at each place and holds the reference patch in registers, so that frames are read
    once; after each `refresh_every` tubelets it stops, because what is kept whole depends on the whole clip. A second
    one copies the kept patches.

    Args:
        frames_BTCHW: uint8 [B, T, 3, H, W], contiguous, on the device; H and W multiples of the patch size.
    Returns:
        what `pack([tokenizer(clip) for clip in frames_BTCHW])` gives, on the device.
    Raises:
        ValueError: other dtype or shape.
    """
    patch, tubelet = tokenizer.patch_size, tokenizer.tubelet_size
    num_clips, num_frames, _, height, width = _checked(frames_BTCHW, patch).shape
    grid = -(-num_frames // tubelet), height // patch, width // patch
    kept_Bthw, runs_Bthw = _mark(frames_BTCHW, grid, tokenizer)
    ends_M = kept_Bthw.flatten().cumsum(0)
    cu_seqlens = F.pad(ends_M.unflatten(0, (num_clips, -1))[:, -1], (1, 0)).int()
    offsets = cu_seqlens.tolist()  # the one wait
    device = frames_BTCHW.device
    packed = PackedTokens(
        patches=torch.empty(offsets[-1], tubelet, 3, patch, patch, dtype=torch.uint8, device=device),
        positions=torch.empty(offsets[-1], 3, dtype=torch.int32, device=device),
        run_lengths=torch.empty(offsets[-1], dtype=torch.int32, device=device),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(end - start for start, end in itertools.pairwise(offsets)),
        grids=(grid,) * num_clips,
        coverings=(None,) * num_clips,
    )
    _gather_kernel[(ends_M.numel(),)](
        frames_BTCHW,
        kept_Bthw,
        runs_Bthw,
        ends_M,
        packed.patches,
        packed.positions,
        packed.run_lengths,
        num_frames,
        *grid,
        TUBELET=tubelet,
        PATCH=patch,
        BLOCK=triton.next_power_of_2(tubelet * 3 * patch**2),
        num_warps=_WARPS,
    )
    return packed


def _checked(frames_BTCHW: Tensor, patch: int) -> Tensor:
    shape = frames_BTCHW.shape
    is_whole = len(shape) == 5 and shape[2] == 3 and not (shape[3] % patch or shape[4] % patch)
    if frames_BTCHW.dtype != torch.uint8 or not is_whole or not frames_BTCHW.numel():
        raise ValueError(
            f"frames are {frames_BTCHW.dtype} {tuple(shape)}; expected uint8 [B, T, 3, H, W], B and T >= 1 and sides "
            f"that are multiples of the patch size {patch}"
        )
    if not frames_BTCHW.is_contiguous():
        raise ValueError("frames are not contiguous; call .contiguous() first")
    return frames_BTCHW


def _mark(
    frames_BTCHW: Tensor, grid: tuple[int, int, int], tokenizer: RunLengthTokenizer
) -> tuple[Tensor, Tensor]:
    """(uint8 [B, T', h, w]: 1 where kept; int32 [B, T', h, w]: run lengths of kept ones)."""
    num_clips, num_tubelets = len(frames_BTCHW), grid[0]
    kept_Bthw = torch.zeros(num_clips, *grid, dtype=torch.uint8, device=frames_BTCHW.device)
    runs_Bthw = torch.empty_like(kept_Bthw, dtype=torch.int32)
    starts_Bhw = torch.zeros_like(runs_Bthw[:, 0])  # tubelet of the latest token at each place
    refreshes = range(0, num_tubelets, tokenizer.refresh_every or num_tubelets)
    # Whether anything was kept between refreshes; row s ends with refresh s.
    changed_SB = torch.zeros(len(refreshes) + 1, num_clips, dtype=torch.int32, device=frames_BTCHW.device)
    patch, is_anchor = tokenizer.patch_size, tokenizer.reference == "anchor"
    frames_compared = tokenizer.tubelet_size if is_anchor else 1
    for segment, first in enumerate(refreshes):
        _mark_kernel[(starts_Bhw.numel(),)](
            frames_BTCHW,
            kept_Bthw,
            runs_Bthw,
            starts_Bhw,
            changed_SB[segment],
            changed_SB[segment + 1],
            frames_BTCHW.shape[1],
            *grid,
            first,
            min(first + refreshes.step, num_tubelets - 1),
            difference_limit(tokenizer.threshold, patch),
            *CHANNEL_WEIGHTS,
            IS_ANCHOR=is_anchor,
            TUBELET=tokenizer.tubelet_size,
            COMPARED=frames_compared,
            PATCH=patch,
            BLOCK=triton.next_power_of_2(frames_compared * 3 * patch**2),
            num_warps=_WARPS,
        )
    return kept_Bthw, runs_Bthw


@triton.jit
def _patch_pixels(frames, clip, first_frame, y, x, num_frames, height, width, PATCH: tl.constexpr, element):
    """Where the pixels of a patch lie, from `first_frame` on (the last frame repeats): one pointer an element."""
    column = element % PATCH
    row = element // PATCH % PATCH
    channel = element // (PATCH * PATCH) % 3
    frame = tl.minimum(first_frame + element // (PATCH * PATCH * 3), num_frames - 1)
    line = ((clip.to(tl.int64) * num_frames + frame) * 3 + channel) * (height * PATCH) + y * PATCH + row
    return frames + line * (width * PATCH) + x * PATCH + column


@triton.jit
def _weighted_sum(difference, counted, channel, weight_0, weight_1, weight_2):
    """Sum over what is counted, each channel by its weight: a channel's sum fits 32 bits, the weighted one does not."""
    sum_0 = tl.sum(tl.where(counted & (channel == 0), difference, 0)).to(tl.int64)
    sum_1 = tl.sum(tl.where(counted & (channel == 1), difference, 0)).to(tl.int64)
    sum_2 = tl.sum(tl.where(counted & (channel == 2), difference, 0)).to(tl.int64)
    return sum_0 * weight_0 + sum_1 * weight_1 + sum_2 * weight_2


@triton.jit
def _mark_kernel(
    frames,
    kept,
    runs,
    starts,
    changed_before,
    changed_now,
    num_frames,
    num_tubelets,
    height,
    width,
    first,
    last,
    limit,
    weight_0,
    weight_1,
    weight_2,
    IS_ANCHOR: tl.constexpr,
    TUBELET: tl.constexpr,
    COMPARED: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tubelets first + 1 ... last of one place, after the refresh at `first`; a program a place of a clip."""
    place = tl.program_id(0)
    cells = height * width
    clip, y, x = place // cells, place // width % height, place % width
    mine = clip.to(tl.int64) * num_tubelets * cells + place % cells
    element = tl.arange(0, BLOCK)
    inside = element < COMPARED * 3 * PATCH * PATCH
    channel = element // (PATCH * PATCH) % 3
    frame = element // (PATCH * PATCH * 3)

    start = tl.load(starts + place)
    refreshed = (first > start) & (tl.load(changed_before + clip) > 0)
    tl.store(runs + mine + start * cells, first - start, mask=refreshed)
    start = tl.where(refreshed, first, start)
    tl.store(kept + mine + first * cells, 1, mask=refreshed | (first == 0))

    held_tubelet = first
    if IS_ANCHOR:
        held_tubelet = start
    pointers = _patch_pixels(
        frames, clip, held_tubelet * TUBELET, y, x, num_frames, height, width, PATCH, element
    )
    held = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    for t in range(first + 1, last + 1):
        later_frame = t * TUBELET + TUBELET - COMPARED
        pointers = _patch_pixels(frames, clip, later_frame, y, x, num_frames, height, width, PATCH, element)
        later = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        difference = tl.abs(later - held)
        largest = _weighted_sum(difference, frame == 0, channel, weight_0, weight_1, weight_2)
        if COMPARED == 2:
            second = _weighted_sum(difference, frame == 1, channel, weight_0, weight_1, weight_2)
            largest = tl.maximum(largest, second)
        is_kept = largest > limit
        tl.store(runs + mine + start * cells, t - start, mask=is_kept)
        tl.store(kept + mine + t * cells, 1, mask=is_kept)
        tl.store(changed_now + clip, 1, mask=is_kept)
        start = tl.where(is_kept, t, start)
        if IS_ANCHOR:
            held = tl.where(is_kept, later, held)
        elif TUBELET == 1:
            held = later
        else:
            pointers = _patch_pixels(
                frames, clip, t * TUBELET, y, x, num_frames, height, width, PATCH, element
            )
            held = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    tl.store(starts + place, start)
    tl.store(runs + mine + start * cells, num_tubelets - start)  # a later segment may shorten it


@triton.jit
def _gather_kernel(
    frames,
    kept,
    runs,
    ends,
    patches,
    positions,
    run_lengths,
    num_frames,
    num_tubelets,
    height,
    width,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a kept tubelet and its numbers to its place among the tokens; a program a cell."""
    cell = tl.program_id(0)
    if tl.load(kept + cell) != 0:
        token = tl.load(ends + cell) - 1
        x, y = cell % width, cell // width % height
        t, clip = cell // (width * height) % num_tubelets, cell // (width * height * num_tubelets)
        tl.store(positions + token * 3, t)
        tl.store(positions + token * 3 + 1, y)
        tl.store(positions + token * 3 + 2, x)
        tl.store(run_lengths + token, tl.load(runs + cell))
        element = tl.arange(0, BLOCK)
        inside = element < TUBELET * 3 * PATCH * PATCH
        pointers = _patch_pixels(frames, clip, t * TUBELET, y, x, num_frames, height, width, PATCH, element)
        pixels = tl.load(pointers, mask=inside, other=0)
        tl.store(patches + token * (TUBELET * 3 * PATCH * PATCH) + element, pixels, mask=inside)
