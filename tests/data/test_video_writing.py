"""Encoding frames and cutting spans: what is written decodes to what went in."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from made_videos import grey_frames, mux, numbers, windows

from rlt_retrieval.data.video import FrameTransform, cut_span, decode_clip, encode_mp4


def test_encoding_is_deterministic_with_the_index_in_front() -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    first, second = (encode_mp4(frames_THWC, fps=8) for _ in range(2))
    assert first == second
    assert 0 < first.find(b"moov") < first.find(b"mdat")


def test_the_bytes_do_not_depend_on_what_memory_held_before() -> None:
    """With x264's macroblock tree, two of five encodings of this size differ from the others."""
    y, x = np.mgrid[:48, :80]
    frames = [np.stack([y * 3 + i * 5, x * 2 + i * 9, x + y], -1) % 256 for i in range(12)]
    frames_THWC = np.array(frames, np.uint8)
    rng, encoded = np.random.default_rng(0), set()
    for _ in range(40):
        rubbish = [rng.integers(0, 255, rng.integers(1000, 300_000), dtype=np.uint8) for _ in range(20)]
        del rubbish
        encoded.add(encode_mp4(frames_THWC, fps=10))
    assert len(encoded) == 1


@pytest.mark.parametrize("fps", [8, 29.97, Fraction(30000, 1001), 12.5])
def test_encoded_frames_come_back(fps: float | Fraction) -> None:
    frames_THWC = grey_frames(12, 33, 47)  # odd sizes
    frames_THWC[..., 0] = 200
    clip = decode_clip(encode_mp4(frames_THWC, fps=fps), num_frames=12, transform=FrameTransform(34, 48))
    np.testing.assert_allclose(clip.pts_seconds, np.arange(12) / float(fps), atol=1e-6)
    assert clip.end_seconds == pytest.approx(12 / float(fps))
    back_THWC = clip.frames_TCHW.permute(0, 2, 3, 1).numpy()[:, :33, :47].astype(int)
    assert np.abs(back_THWC - frames_THWC).max() <= 4


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)]
)
def test_frames_that_cannot_be_encoded_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\]"):
        encode_mp4(frames, fps=5)


def test_a_cut_keeps_variable_timestamps_and_exact_ends() -> None:
    data = mux([0, 40, 200, 240, 900, 940], last_duration=60)
    cut = cut_span(data, start_seconds=0.1, end_seconds=0.95)
    clips, summary = windows(cut, num_frames=17)
    assert summary.duration_seconds == pytest.approx(0.85)
    shown = dict(zip(numbers(clips[0]), clips[0].pts_seconds, strict=True))
    assert shown == pytest.approx({1: 0.0, 2: 0.1, 3: 0.14, 4: 0.8})
    with av.open(io.BytesIO(cut)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (32, 48)
        assert len(container.streams) == 1
        assert [frame.time for frame in container.decode(stream)] == pytest.approx(
            [0.0, 0.1, 0.14, 0.8, 0.84]
        )


def test_a_cut_past_the_end_ends_with_the_video_and_shrinks() -> None:
    data = encode_mp4(grey_frames(10, 60, 100), fps=10)
    cut = cut_span(data, start_seconds=0.5, end_seconds=9, short_side=20)
    _, summary = windows(cut)
    assert summary.duration_seconds == pytest.approx(0.5)
    with av.open(io.BytesIO(cut)) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (20, 34)
    assert cut == cut_span(data, start_seconds=0.5, end_seconds=9, short_side=20)
    larger = cut_span(data, start_seconds=0, end_seconds=1, short_side=400)
    with av.open(io.BytesIO(larger)) as container:
        assert container.streams.video[0].height == 60
