"""Video files to uint8 frames and back. With `data.reader`, all that knows FFmpeg (through PyAV).

Which frame is on screen when, and which are taken, is said in `data.timeline`; where their pixels go, in
`data.geometry`.

Memory. Decoding streams: one full-size frame is held, and only the frames that a sampling plan wants are
scaled and kept (small), so a ten-hour file costs no more memory than a short one.

Shapes: T frames, C = 3 channels (RGB), H height, W width. Times in seconds, float64.
"""

import bisect
import io
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import av
import numpy as np
import torch
from av.codec.context import Flags
from av.video.reformatter import Interpolation, VideoReformatter

from rlt_retrieval.data.geometry import (
    CropBox,
    FrameTransform,
    cut_out,
    display_size,
    fit,
    random_box,
    shrunk,
)
from rlt_retrieval.data.reader import DEFAULT_FRAME_SECONDS, Reader, Source, reason
from rlt_retrieval.data.skipping import Astray
from rlt_retrieval.data.timeline import (
    CLAIM_SLACK_SECONDS,
    SAME_INSTANT_SECONDS,
    Strip,
    VideoSummary,
    any_on_screen,
    count_windows,
    segment_times,
    shown_until,
    window_plan,
    window_span,
)
from rlt_retrieval.errors import VideoDecodeError

CUT_TICKS_PER_SECOND = 240_000  # exact for 24, 25, 30, 50, 60, n·1000/1001 frames a second and milliseconds

# swscale's defaults skip chroma columns (two grey levels off on average); BITEXACT: the same on every CPU.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
# The vertical pass to planes is vectorised, the one to packed "rgb24" is not: a half to a fifth of the time, the
# same pixels (bilinear enlargement rounds otherwise: one grey level).
PLANAR_RGB = "gbrp"
_KERNELS = {"bicubic": Interpolation.BICUBIC | _EXACT, "bilinear": Interpolation.BILINEAR | _EXACT}


# ---------------------------------------------------------------------------------------- public types


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one span of a video.

    frames_TCHW: uint8, contiguous, [num_frames, 3, height, width].
    pts_seconds: float64 [T], the timestamp of each frame, from the first frame of the stream; not decreasing.
    start_seconds, end_seconds: the span the frames stand for.
    lost: what could not be decoded by the time that this clip was whole, in one line; None: nothing.
    """

    frames_TCHW: torch.Tensor
    pts_seconds: np.ndarray
    start_seconds: float
    end_seconds: float
    lost: str | None = None


# ---------------------------------------------------------------------------------- pictures to pixels


class _Scaler:
    """Frames to uint8 pictures of the transform's size: one swscale pass, then the cut."""

    def __init__(self, transform: FrameTransform, rng: np.random.Generator | None = None) -> None:
        self._transform = transform
        self._rng = rng if transform.crop_scale is not None else None
        self._box: CropBox | None = None  # drawn at the first picture, then the same for the whole clip
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> np.ndarray:
        """uint8 [3, height, width], RGB. Colour matrix and range are those the frame is tagged with."""
        transform = self._transform
        quarter_turns = _quarter_turns(frame)
        height, width = display_size(frame.height, frame.width, quarter_turns, pixel_aspect)
        if self._rng is not None and self._box is None:
            assert transform.crop_scale is not None
            self._box = random_box(self._rng, transform.crop_scale, height, width)
        geometry = fit(height, width, transform, self._box)
        size = (geometry.height, geometry.width)
        coded_height, coded_width = size if quarter_turns % 2 == 0 else size[::-1]
        scaled = self._reformatter.reformat(
            frame,
            coded_width,
            coded_height,
            PLANAR_RGB,
            interpolation=_KERNELS[transform.interpolation],
            threads=1,
        )
        green_HW, blue_HW, red_HW = (np.rot90(plane_HW, quarter_turns) for plane_HW in _planes(scaled))
        return cut_out((red_HW, green_HW, blue_HW), geometry, transform)


def _planes(frame: av.VideoFrame) -> Iterator[np.ndarray]:
    """Views of the planes of an 8-bit planar frame, uint8 [H, W] each; rows are padded in memory."""
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        yield rows[: frame.height, : frame.width]


def _quarter_turns(frame: av.VideoFrame) -> int:
    """0 to 3, counter-clockwise, as np.rot90 turns."""
    return round(frame.rotation / 90) % 4


def resize_frames(frames_TCHW: torch.Tensor, transform: FrameTransform) -> torch.Tensor:
    """Frames in memory brought to the model's size by the same resampling as decoded ones.

    frames_TCHW: uint8 [T, 3, H, W], RGB. Returns uint8 [T, 3, height, width] on the CPU; frames that already
    have the size are returned as they are. No random crop: there is no generator to draw it from.
    """
    if frames_TCHW.dtype != torch.uint8 or frames_TCHW.dim() != 4 or frames_TCHW.shape[1] != 3:
        raise ValueError(
            f"frames: expected uint8 [T, 3, H, W], got {frames_TCHW.dtype} {list(frames_TCHW.shape)}"
        )
    if frames_TCHW.shape[2:] == (transform.height, transform.width):
        return frames_TCHW
    scaler = _Scaler(transform)
    frames_THWC = frames_TCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return _to_tensor([scaler(av.VideoFrame.from_ndarray(frame_HWC, "rgb24")) for frame_HWC in frames_THWC])


def _to_tensor(pictures_CHW: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures_CHW))


# -------------------------------------------------------------------------------------------- sampling


def decode_clip(
    source: Source,
    *,
    num_frames: int,
    transform: FrameTransform,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    rng: np.random.Generator | None = None,
) -> Clip:
    """Sample a whole video or the span [start_seconds, end_seconds) of it.

    A span that reaches past the last frame ends there. Without `rng`: segment middles and the transform's
    own fitting; with it: a uniform draw in each segment and, if there is a `crop_scale`, one random crop.
    A still picture (JPEG, PNG, whatever its file is called) is a video of one frame.
    Raises VideoDecodeError when nothing decodes or the span starts after the end.
    """
    if num_frames < 1 or start_seconds < 0 or (end_seconds is not None and end_seconds <= start_seconds):
        raise ValueError(f"num_frames {num_frames}, span [{start_seconds}, {end_seconds}): nothing to sample")
    draws = np.full(num_frames, 0.5) if rng is None else rng.random(num_frames)
    scaler = _Scaler(transform, rng)

    try:
        taken, true_end = _sample(source, scaler, draws, start_seconds, end_seconds, skipping=True)
    except Astray:
        taken, true_end = _sample(source, scaler, draws, start_seconds, end_seconds)
    if taken is None:  # the header's claim was wrong enough to change the choice of frames
        taken, true_end = _sample(source, scaler, draws, start_seconds, true_end, trust_end=True)
    assert taken is not None, f"{source!r:.200}: two passes gave different frames"
    pictures_CHW, pts_seconds = taken
    return Clip(_to_tensor(pictures_CHW), pts_seconds, start_seconds, true_end)


def _sample(
    source: Source,
    scaler: _Scaler,
    draws: np.ndarray,
    start_seconds: float,
    end_seconds: float | None,
    trust_end: bool = False,
    skipping: bool = False,
) -> tuple[tuple[list[np.ndarray], np.ndarray] | None, float]:
    """One pass over a span: (pictures_CHW, pts_seconds), and its true end.

    Pictures are kept for the end that the headers let expect (`trust_end`: for `end_seconds`); None in place
    of them when the true end asks for others. `skipping` seeks past groups of pictures that are not wanted, and
    raises Astray whenever that could give another result than decoding everything.
    """
    with Reader(source, start_seconds) as reader:
        if trust_end and end_seconds is not None:
            expected_end = end_seconds
        else:
            promised = reader.promised_seconds
            claim = reader.last_packet_end(start_seconds) if promised is None else promised
            expected_end = claim if end_seconds is None else min(end_seconds, claim)
        expected = segment_times(start_seconds, max(expected_end, start_seconds), draws)
        wanted = partial(any_on_screen, expected)
        strip = Strip(partial(_scaled, scaler, reader), wanted)
        if skipping:
            reader.leave_out(wanted)
        stops = [*expected, expected_end] if skipping and expected_end > start_seconds else []
        true_end = _play(reader, strip, end_seconds, stops)
        if reader.skips and (reader.lost or reader.clock.end_is_guessed):
            raise Astray
        if true_end <= start_seconds:
            raise _starts_too_late(reader, start_seconds)
    taken = strip.take(segment_times(start_seconds, true_end, draws))
    if taken is None and reader.skips:
        raise Astray
    return taken, true_end


def _play(reader: Reader, strip: Strip, end_seconds: float | None, stops: list[float]) -> float:
    """Frames into the strip until past `end_seconds`; the true end. Skips what lies between (rising) `stops`."""
    tried = -1
    for seconds, frame in reader:
        strip.push(seconds, frame)
        if end_seconds is not None and seconds > end_seconds + SAME_INSTANT_SECONDS:
            return end_seconds
        stop = bisect.bisect_left(stops, seconds - CLAIM_SLACK_SECONDS)
        if tried < stop < len(stops):
            tried = stop
            if reader.skip_to(stops[stop]):
                strip.leave_gap()
    strip.finish()
    last_end = reader.clock.end_seconds
    return last_end if end_seconds is None else min(end_seconds, last_end)


def _starts_too_late(reader: Reader, start_seconds: float) -> VideoDecodeError:
    ends = f"the video ends at {reader.clock.end_seconds:.2f} s"
    return VideoDecodeError(
        f"{reader.name}: the span starts at {start_seconds:g} s but {ends}; check the span"
    )


def _scaled(scaler: _Scaler, reader: Reader, frame: av.VideoFrame) -> np.ndarray:
    try:
        return scaler(frame, reader.pixel_aspect)
    except av.FFmpegError as error:
        what = f"{frame.width}x{frame.height} {frame.format.name}"
        raise VideoDecodeError(
            f"{reader.name}: cannot convert {what} frames to RGB ({reason(error)})"
        ) from error


def iter_windows(
    source: Source,
    *,
    num_frames: int,
    transform: FrameTransform,
    window_seconds: float,
    first_window: int = 0,
) -> Generator[Clip, None, VideoSummary]:
    """Cut a video into windows and sample each, in one decoding pass (a second one from where skipping went astray).

    Yields the clips of window `first_window` and all after it (none if there are fewer); the return value
    (`StopIteration.value`) is the VideoSummary. A pass that starts late gives the clips of an uninterrupted
    one; its summary knows nothing of decode errors before it (each clip's `lost` says what was lost by then),
    nor of errors in frames that nobody wanted and that were left out. How long the last window is shows only at
    the end of the file: frames are kept for the claimed end; a wrong claim costs a second decode of that window.
    Raises VideoDecodeError when nothing decodes.
    """
    if num_frames < 1 or window_seconds <= 0 or first_window < 0:
        raise ValueError(
            f"num_frames {num_frames}, window_seconds {window_seconds}, first_window {first_window}"
        )
    index = first_window
    windows = _windows(source, num_frames, transform, window_seconds, index, skipping=True)
    try:
        while True:
            clip = next(windows)
            index += 1
            yield clip
    except StopIteration as end:
        return end.value
    except Astray:
        return (yield from _windows(source, num_frames, transform, window_seconds, index, skipping=False))


def _windows(
    source: Source,
    num_frames: int,
    transform: FrameTransform,
    window_seconds: float,
    first_window: int,
    skipping: bool,
) -> Generator[Clip, None, VideoSummary]:
    """One pass of `iter_windows`; `skipping` leaves frames out, and raises Astray where that could change a clip."""
    middles = np.full(num_frames, 0.5)
    scaler = _Scaler(transform)
    index = first_window
    with Reader(source, first_window * window_seconds) as reader:
        wanted = window_plan(reader.promised_seconds, window_seconds, middles)
        strip = Strip(partial(_scaled, scaler, reader), wanted)
        if skipping:
            reader.leave_out(wanted)

        def clip(start_seconds: float, end_seconds: float) -> Clip:
            if reader.skips and reader.lost:
                raise Astray
            taken = strip.take(segment_times(start_seconds, end_seconds, middles))
            strip.forget_before(end_seconds)
            if taken is None:
                taken, _ = _sample(source, scaler, middles, start_seconds, end_seconds, trust_end=True)
            assert taken is not None, f"{reader.name}: two passes gave different frames"
            pictures_CHW, pts_seconds = taken
            return Clip(_to_tensor(pictures_CHW), pts_seconds, start_seconds, end_seconds, reader.lost)

        for seconds, frame in reader:
            strip.push(seconds, frame)
            # Half a window later it is sure that no remainder joins this one.
            while seconds >= (index + 1.5) * window_seconds:
                yield clip(index * window_seconds, (index + 1) * window_seconds)
                index += 1
        strip.finish()
        if reader.skips and reader.clock.end_is_guessed:
            raise Astray
        duration_seconds = reader.clock.end_seconds
        for last in range(index, count_windows(duration_seconds, window_seconds)):
            yield clip(*window_span(last, duration_seconds, window_seconds))
        return reader.summary()


# -------------------------------------------------------------------------------------- writing videos


def encode_mp4(frames_THWC: np.ndarray, *, fps: float | Fraction, crf: int = 18) -> bytes:
    """H.264 (yuv420p, BT.709) in MP4 with the index in front; the same frames always give the same bytes.

    frames_THWC: uint8 [T, H, W, 3], RGB; odd sizes are padded to even ones by repeating the edge.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or not len(frames_THWC):
        raise ValueError(
            f"frames: expected uint8 [T, H, W, 3], got {frames_THWC.dtype} {list(frames_THWC.shape)}"
        )
    rate = Fraction(fps).limit_denominator(1001)
    return _encode(((i, 1, frame_HWC) for i, frame_HWC in enumerate(frames_THWC)), 1 / rate, rate, crf)


def cut_span(
    source: Source, *, start_seconds: float, end_seconds: float, short_side: int | None = None
) -> bytes:
    """Re-encode what is on screen in [start_seconds, end_seconds) as H.264 MP4 without sound.

    Timestamps keep their spacing (variable frame rate included) and count from 0; pixels come out square and
    upright, the short side no larger than `short_side`. Raises VideoDecodeError as `decode_clip` does.
    """
    if not 0 <= start_seconds < end_seconds:
        raise ValueError(f"span [{start_seconds}, {end_seconds}): expected 0 <= start < end")
    with Reader(source, start_seconds) as reader:
        rate = reader.rate or Fraction(1 / DEFAULT_FRAME_SECONDS).limit_denominator(1001)
        pictures = _span_pictures(reader, start_seconds, end_seconds, short_side)
        return _encode(pictures, Fraction(1, CUT_TICKS_PER_SECOND), rate, crf=18)


def _span_pictures(
    reader: Reader, start_seconds: float, end_seconds: float, short_side: int | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(tick, duration in ticks, uint8 picture_HWC) of every frame on screen in the span, all of one size."""

    def ticks(seconds: float) -> int:
        return round((seconds - start_seconds) * CUT_TICKS_PER_SECOND)

    scaler: _Scaler | None = None
    for shown, replaced, frame in shown_until(reader, reader.clock):
        if shown >= end_seconds:
            break
        first, after = ticks(max(shown, start_seconds)), ticks(min(replaced, end_seconds))
        if after <= first:
            continue
        assert frame is not None  # nothing is left out here
        if scaler is None:
            height, width = display_size(
                frame.height, frame.width, _quarter_turns(frame), reader.pixel_aspect
            )
            size = shrunk(height, width, short_side) if short_side else (height, width)
            scaler = _Scaler(FrameTransform(*size, resize_mode="squash"))
        yield first, after - first, _scaled(scaler, reader, frame).transpose(1, 2, 0)
    if scaler is None:
        raise _starts_too_late(reader, start_seconds)


def _encode(
    pictures: Iterable[tuple[int, int, np.ndarray]], time_base: Fraction, rate: Fraction, crf: int
) -> bytes:
    """(tick, duration in ticks, picture_HWC) to MP4 bytes. No B-frames, so that every duration survives."""
    buffer = io.BytesIO()
    container_options = {"movflags": "faststart", "fflags": "+bitexact"}
    # Moving the index to the front makes the muxer read what it has written.
    with av.open(
        buffer, "w", "mp4", options=container_options, io_open=lambda *_: io.BytesIO(buffer.getvalue())
    ) as out:
        # With x264's macroblock tree the same pictures give other bytes from run to run (seen with its SIMD code).
        steady = {"mbtree": "0", "threads": "1"}
        options = {"crf": str(crf), "preset": "veryfast", "bf": "0", **steady}
        stream = out.add_stream("libx264", rate=rate, options=options)
        context = stream.codec_context
        context.time_base = time_base
        context.flags |= Flags.bitexact | Flags.frame_duration
        context.pix_fmt, context.colorspace, context.color_range = "yuv420p", 1, 1  # BT.709, limited
        context.color_primaries = context.color_trc = 1  # BT.709
        reformatter = VideoReformatter()
        for tick, duration, picture_HWC in pictures:
            picture_HWC = np.pad(picture_HWC, [(0, n % 2) for n in picture_HWC.shape[:2]] + [(0, 0)], "edge")
            if not context.is_open:
                context.height, context.width = picture_HWC.shape[:2]
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), "rgb24"),
                format="yuv420p",
                interpolation=_KERNELS["bicubic"],
                dst_colorspace=1,
                dst_color_range=1,
                threads=1,
            )
            frame.pts, frame.duration, frame.time_base = tick, duration, time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()
