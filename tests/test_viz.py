"""Overlays of kept and dropped patches, strips and thumbnails."""

import io

import numpy as np
import pytest
from PIL import Image

from rlt_retrieval import viz


def frames(rng, num_frames=3, height=16, width=24):
    return rng.integers(0, 256, (num_frames, 3, height, width), dtype=np.uint8)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def patch(image, y, x, side=8):
    return image[y * side : (y + 1) * side, x * side : (x + 1) * side]


def test_kept_patches_are_untouched_and_dropped_ones_are_not(rng):
    video = frames(rng)
    keep = rng.random((3, 2, 3)) < 0.5
    overlay = viz.token_overlay(video, keep, patch_size=8)
    for t, y, x in np.ndindex(keep.shape):
        same = np.array_equal(patch(overlay[t], y, x), patch(video[t].transpose(1, 2, 0), y, x))
        assert same == keep[t, y, x]


@pytest.mark.parametrize("grey", [0, 255])
def test_a_dropped_patch_is_dark_blue_and_hatched_whatever_is_under_it(grey):
    video = np.full((1, 3, 16, 16), grey, dtype=np.uint8)
    overlay = viz.token_overlay(video, np.zeros((1, 1, 1), bool), patch_size=16)[0]
    colours = np.unique(overlay.reshape(-1, 3), axis=0)
    assert len(colours) == 2  # the tinted picture and the lines
    red, _, blue = colours.T.astype(int)
    assert (blue > red).all()
    assert overlay.mean() < 128


def test_a_tubelet_covers_its_frames_and_the_last_may_be_short(rng):
    video = frames(rng, num_frames=3)
    keep = np.zeros((2, 2, 3), bool)
    keep[1] = True
    overlay = viz.token_overlay(video, keep, patch_size=8, tubelet_size=2)
    original = video.transpose(0, 2, 3, 1)
    assert [np.array_equal(a, b) for a, b in zip(overlay, original, strict=True)] == [False, False, True]


def test_scale_enlarges_pixels_before_the_lines_are_drawn(rng):
    video = frames(rng, num_frames=1)
    keep = np.ones((1, 2, 3), bool)
    keep[0, 1, 2] = False
    overlay = viz.token_overlay(video, keep, patch_size=8, scale=3)
    assert overlay.shape == (1, 48, 72, 3)
    np.testing.assert_array_equal(overlay[0, :24:3, :24:3], patch(video[0].transpose(1, 2, 0), 0, 0))


def test_the_frames_given_are_not_changed(rng):
    video = frames(rng)
    before = video.copy()
    viz.token_overlay(video, np.zeros((3, 2, 3), bool), patch_size=8)
    np.testing.assert_array_equal(video, before)


def test_a_torch_tensor_will_do(rng):
    torch = pytest.importorskip("torch")
    video, keep = frames(rng), rng.random((3, 2, 3)) < 0.5
    overlay = viz.token_overlay(torch.from_numpy(video), torch.from_numpy(keep), patch_size=8)
    np.testing.assert_array_equal(overlay, viz.token_overlay(video, keep, patch_size=8))


@pytest.mark.parametrize("grid", [(3, 3, 2), (2, 2, 3), (3, 1, 3)])
def test_a_mask_that_does_not_fit_is_refused(rng, grid):
    with pytest.raises(ValueError, match=r"expected \(3, 2, 3\) for 3 frames of 16×24 and patches of 8"):
        viz.token_overlay(frames(rng), np.ones(grid, bool), patch_size=8)


def test_film_strip_has_frames_above_overlays(rng):
    video = frames(rng)
    overlays = viz.token_overlay(video, np.zeros((3, 2, 3), bool), patch_size=8, scale=2)
    strip = pixels(viz.film_strip(video, overlays, scale=2))
    gap = viz.STRIP_GAP
    assert strip.shape == (2 * 32 + gap, 3 * 48 + 2 * gap, 3)
    np.testing.assert_array_equal(strip[:32:2, :48:2], video[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(strip[32 + gap :, -48:], overlays[2])
    assert (strip[32 : 32 + gap] == viz.STRIP_BACKGROUND).all()


def test_film_strip_refuses_overlays_of_another_scale(rng):
    video = frames(rng)
    overlays = viz.token_overlay(video, np.ones((3, 2, 3), bool), patch_size=8)
    with pytest.raises(ValueError, match="frames enlarged 2×"):
        viz.film_strip(video, overlays, scale=2)


def test_thumbnail_is_the_middle_frame_or_the_middles_of_parts(rng):
    video = frames(rng, num_frames=8)
    np.testing.assert_array_equal(
        pixels(viz.thumbnail_png(video, scale=2))[::2, ::2], video[4].transpose(1, 2, 0)
    )
    two = pixels(viz.thumbnail_png(video, num_frames=2))
    np.testing.assert_array_equal(two[:, :24], video[2].transpose(1, 2, 0))
    np.testing.assert_array_equal(two[:, -24:], video[6].transpose(1, 2, 0))


def test_png_bytes_round_trip_and_repeat(rng):
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(viz.png_bytes(image)), image)
    assert viz.png_bytes(image) == viz.png_bytes(image)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 3, 4, 4)), np.zeros((3, 4, 4), np.uint8), np.zeros((0, 3, 4, 4), np.uint8)]
)
def test_other_pixels_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        viz.thumbnail_png(bad)
