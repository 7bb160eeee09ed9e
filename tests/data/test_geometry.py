"""Scaling, cropping and padding as arithmetic; `test_video.py` looks at the pixels."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval.data.geometry import CropBox, FrameTransform, Geometry, fit, random_box


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(["shortest", "longest", "squash"]),
)
def test_geometry_covers_or_pads_to_the_exact_size(
    height: int, width: int, out_height: int, out_width: int, mode: str
) -> None:
    transform = FrameTransform(out_height, out_width, resize_mode=mode)  # type: ignore[arg-type]
    geometry = fit(height, width, transform)
    rows, columns = (geometry.height, out_height, geometry.top), (geometry.width, out_width, geometry.left)
    for scaled, wanted, offset in (rows, columns):
        assert scaled >= 1
        if mode == "shortest":
            assert 0 <= offset <= scaled - wanted
        if mode == "longest":
            assert scaled <= wanted
            assert 0 <= -offset <= wanted - scaled
    if mode == "squash":
        assert geometry == Geometry(out_height, out_width, 0, 0)


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1.0), st.integers(0, 1000))
def test_random_boxes_lie_in_the_picture(height: int, width: int, low: float, seed: int) -> None:
    box = random_box(np.random.default_rng(seed), (low, 1.0), height, width)
    assert box.top >= 0
    assert box.left >= 0
    assert box.top + box.height <= 1 + 1e-9
    assert box.left + box.width <= 1 + 1e-9
    aspect = box.width * width / (box.height * height)
    assert 3 / 4 - 1e-9 <= aspect <= 4 / 3 + 1e-9


def test_a_crop_box_is_scaled_to_the_whole_output() -> None:
    assert fit(100, 200, FrameTransform(50, 50), CropBox(0.5, 0.25, 0.5, 0.25)) == Geometry(100, 200, 50, 50)
