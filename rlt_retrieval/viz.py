"""Pictures of videos: which tokens a tokenizer kept, film strips, thumbnails. numpy and Pillow only.

Shapes: T frames, C = 3 channels (RGB), H×W pixels; grid T'×H'×W' of tokens.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

DROPPED_TINT = np.array(
    [38.0, 54.0, 92.0]
)  # dark blue: rare in real pictures, visible on light and dark pages
DROPPED_TINT_SHARE = 0.72
HATCH_RGB = np.array([112, 138, 200], dtype=np.uint8)
STRIP_GAP = 4
STRIP_BACKGROUND = 255


def token_overlay(
    frames_TCHW: ArrayLike, keep_mask: ArrayLike, patch_size: int, tubelet_size: int = 1, scale: int = 1
) -> Pixels:
    """Frames where kept patches are as they are and dropped ones are grey, darkened and hatched.

    frames_TCHW: uint8 RGB. keep_mask: bool [T', H', W'], T' = ceil(T / tubelet_size), H' = H / patch_size.
    scale: whole-number enlargement (nearest); the hatching is drawn afterwards, so it stays fine.
    Returns uint8 [T, scale·H, scale·W, 3]. Raises ValueError when mask and frames do not fit.
    """
    images_THWC = _enlarged(_channels_last(frames_TCHW), scale)
    keep = np.asarray(keep_mask, dtype=bool)
    num_frames, height, width, _ = images_THWC.shape
    side = patch_size * scale
    grid = (-(-num_frames // tubelet_size), height // side, width // side)
    if keep.shape != grid or height % side or width % side:
        raise ValueError(
            f"keep_mask {keep.shape}: expected {grid} for {num_frames} frames of "
            f"{height // scale}×{width // scale} and patches of {patch_size}"
        )
    dropped_THW = ~keep.repeat(tubelet_size, 0)[:num_frames].repeat(side, 1).repeat(side, 2)
    drawn = _dimmed(images_THWC)
    drawn[:, _hatching(height, width, side)] = HATCH_RGB
    return np.where(dropped_THW[..., None], drawn, images_THWC)


def film_strip(frames_TCHW: ArrayLike, overlays_THWC: Pixels, scale: int = 1) -> bytes:
    """PNG: the frames side by side in time order, and below each its overlay.

    frames_TCHW: uint8 RGB. overlays_THWC: what `token_overlay` gave for the same frames and the same `scale`.
    """
    rows = [_enlarged(_channels_last(frames_TCHW), scale), overlays_THWC]
    if rows[0].shape != rows[1].shape:
        raise ValueError(f"overlays {rows[1].shape}: expected {rows[0].shape}, frames enlarged {scale}×")
    return png_bytes(_contact_sheet(np.stack(rows)))


def thumbnail_png(frames_TCHW: ArrayLike, scale: int = 1, num_frames: int = 1) -> bytes:
    """PNG of a clip: the middles of `num_frames` equal parts, side by side (one: the middle frame)."""
    images_THWC = _channels_last(frames_TCHW)
    middles = (np.arange(num_frames) * 2 + 1) * len(images_THWC) // (2 * num_frames)
    return png_bytes(_contact_sheet(_enlarged(images_THWC[middles], scale)[None]))


def png_bytes(image_HWC: ArrayLike) -> bytes:
    """A uint8 RGB image as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(_uint8(image_HWC)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _channels_last(frames_TCHW: ArrayLike) -> Pixels:
    frames = _uint8(frames_TCHW)
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"frames {frames.shape}: expected [T, 3, H, W] with T ≥ 1")
    return frames.transpose(0, 2, 3, 1)


def _uint8(pixels: ArrayLike) -> Pixels:
    array: NDArray[Any] = np.asarray(pixels)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels are {array.dtype}, expected uint8")
    return array


def _enlarged(images_THWC: Pixels, scale: int) -> Pixels:
    return images_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def _dimmed(images_THWC: Pixels) -> Pixels:
    """Grey, pulled most of the way to the tint: what was dropped can still be made out."""
    grey_THW1 = images_THWC.mean(axis=-1, keepdims=True)
    mixed = grey_THW1 * (1 - DROPPED_TINT_SHARE) + DROPPED_TINT * DROPPED_TINT_SHARE
    return mixed.astype(np.uint8)


def _hatching(height: int, width: int, side: int) -> NDArray[np.bool_]:
    """Diagonal lines [H, W], two a patch, so that they meet from patch to patch."""
    period = max(4, side // 2)
    thickness = max(1, period // 10)
    diagonal = np.arange(height)[:, None] + np.arange(width)[None, :]
    return diagonal % period < thickness


def _contact_sheet(images_RTHWC: Pixels) -> Pixels:
    """Rows of images on one white sheet with gaps between them."""
    rows, columns, height, width, channels = images_RTHWC.shape
    step_y, step_x = height + STRIP_GAP, width + STRIP_GAP
    sheet = np.full(
        (rows * step_y - STRIP_GAP, columns * step_x - STRIP_GAP, channels), STRIP_BACKGROUND, np.uint8
    )
    for row in range(rows):
        for column in range(columns):
            y, x = row * step_y, column * step_x
            sheet[y : y + height, x : x + width] = images_RTHWC[row, column]
    return sheet
