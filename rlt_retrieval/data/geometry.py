"""Where the pixels of a picture go: display size, scaling, cropping and padding. Knows no FFmpeg.

Shapes: H height, W width, C = 3 channels. Sizes in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class FrameTransform:
    """How a decoded frame becomes the model's input; the names and meanings are open_clip's preprocess_cfg.

    height, width: the model's input size in pixels.
    resize_mode: "shortest" scales the short side to fit and crops the centre, "longest" scales the long side
        to fit and pads with `fill_color`, "squash" ignores the aspect ratio.
    crop_scale: None for the modes above. (low, high): where a random generator is given, one random resized
        crop per clip instead, its area share drawn from that range, its aspect from 3/4 to 4/3.
    """

    height: int
    width: int
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill_color: int = 0
    crop_scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class CropBox:
    """A crop in shares of the picture's height and width, so that it also fits frames of another size."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Geometry:
    """Scale the whole picture to height × width, then cut at (top, left); negative: padding. In pixels."""

    height: int
    width: int
    top: int
    left: int


def fit(height: int, width: int, transform: FrameTransform, box: CropBox | None = None) -> Geometry:
    """Geometry that brings a picture of height × width display pixels to the transform's size.

    Sizes are rounded as open_clip's `image_transform` rounds them (torchvision's Resize rounds the long side
    down, ResizeKeepRatio to the nearest, centre crops half to even): frames line up with its preprocessing.
    """
    out_height, out_width = transform.height, transform.width
    if box is not None:
        scaled_height = max(out_height, round(out_height / box.height))
        scaled_width = max(out_width, round(out_width / box.width))
        top = min(round(box.top * scaled_height), scaled_height - out_height)
        left = min(round(box.left * scaled_width), scaled_width - out_width)
        return Geometry(scaled_height, scaled_width, top, left)
    if transform.resize_mode == "squash":
        return Geometry(out_height, out_width, 0, 0)
    if transform.resize_mode == "shortest" and out_height == out_width:
        short = min(height, width)
        scaled_height, scaled_width = (out_height * side // short for side in (height, width))
    else:
        pick = max if transform.resize_mode == "longest" else min
        ratio = pick(height / out_height, width / out_width)
        scaled_height, scaled_width = (max(1, round(side / ratio)) for side in (height, width))
    return Geometry(
        scaled_height, scaled_width, _offset(scaled_height, out_height), _offset(scaled_width, out_width)
    )


def _offset(scaled: int, wanted: int) -> int:
    return round((scaled - wanted) / 2) if scaled >= wanted else -((wanted - scaled) // 2)


def random_box(rng: np.random.Generator, scale: tuple[float, float], height: int, width: int) -> CropBox:
    """A random resized crop: area share uniform in `scale`, aspect log-uniform in 3/4..4/3, any place.

    Ten draws are tried, then the largest centred box of an allowed aspect is taken (torchvision's
    RandomResizedCrop; Szegedy et al., arXiv 1409.4842, section 6).
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        top, left = rng.random(2)
        if box_width <= width and box_height <= height:
            share_y, share_x = box_height / height, box_width / width
            return CropBox(float(top) * (1 - share_y), float(left) * (1 - share_x), share_y, share_x)
    share_y, share_x = min(1.0, width / height / (3 / 4)), min(1.0, height / width * (4 / 3))
    return CropBox((1 - share_y) / 2, (1 - share_x) / 2, share_y, share_x)


def display_size(
    height: int, width: int, quarter_turns: int, pixel_aspect: Fraction | None
) -> tuple[int, int]:
    """(height, width) as shown: pixels made square (`pixel_aspect`: width by height), rotation applied."""
    if pixel_aspect:
        width = max(1, round(width * pixel_aspect))
    return (height, width) if quarter_turns % 2 == 0 else (width, height)


def shrunk(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with a short side of at most `short_side`, in proportion."""
    ratio = min(1.0, short_side / min(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def cut_out(planes: Sequence[np.ndarray], geometry: Geometry, transform: FrameTransform) -> np.ndarray:
    """The transform's part of a scaled picture, padded where it does not reach: C planes [H, W] to [C, H, W]."""
    out_CHW = np.full((len(planes), transform.height, transform.width), transform.fill_color, np.uint8)
    top, left = max(geometry.top, 0), max(geometry.left, 0)
    out_top, out_left = max(-geometry.top, 0), max(-geometry.left, 0)
    for plane_HW, out_HW in zip(planes, out_CHW, strict=True):
        part_HW = plane_HW[top : top + transform.height, left : left + transform.width]
        out_HW[out_top : out_top + part_HW.shape[0], out_left : out_left + part_HW.shape[1]] = part_HW
    return out_CHW
