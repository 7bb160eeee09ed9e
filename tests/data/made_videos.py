"""Videos made on the spot that carry their frame number as grey level, so a test sees which frame it got."""

import io
import math
from fractions import Fraction

import av
import numpy as np
import torch

from rlt_retrieval.data.video import Clip, FrameTransform, Source, VideoSummary, iter_windows

SMALL = FrameTransform(16, 16)
LEVEL = 4  # grey levels between neighbouring frames


def grey_frames(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    levels = 8 + LEVEL * np.arange(number, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (number, height, width, 3)).copy()


def numbers(clip: Clip) -> list[int]:
    """Which frames of `grey_frames` a clip holds."""
    return [round((float(frame.float().mean()) - 8) / LEVEL) for frame in clip.frames_TCHW]


def mux(
    pts: list[int | None],
    *,
    time_base: Fraction = Fraction(1, 1000),
    container: str = "mp4",
    codec: str = "libx264",
    frames: np.ndarray | None = None,
    rotation: float = 0,
    aspect: Fraction | None = None,
    gop: int = 250,
    b_frames: int = 0,
    with_sound_seconds: float = 0.0,
    last_duration: int = 40,
) -> bytes:
    """A video with exactly these timestamps, straight through PyAV, not through the code under test."""
    frames = grey_frames(len(pts)) if frames is None else frames
    buffer = io.BytesIO()
    options = {"crf": "10", "bf": str(b_frames), "g": str(gop)}
    if b_frames:  # x264 would use none between frames as unlike each other as these
        options |= {"b_strategy": "0", "sc_threshold": "0", "x265-params": "log-level=none"}
    with av.open(buffer, "w", container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.time_base = time_base
        stream.codec_context.flags |= av.codec.context.Flags.frame_duration
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=8000, layout="mono") if with_sound_seconds else None
        packets = []
        for i, (frame_HWC, tick) in enumerate(zip(frames, pts, strict=True)):
            frame = av.VideoFrame.from_ndarray(frame_HWC, "rgb24")
            frame.pts, frame.time_base = tick, time_base
            following = pts[i + 1] if i + 1 < len(pts) else None
            frame.duration = last_duration if following is None or tick is None else following - tick
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if sound is not None:
            for block in range(math.ceil(with_sound_seconds * 8000 / 1024)):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                samples.rate, samples.pts = 8000, block * 1024
                packets += sound.encode(samples)
            packets += sound.encode(None)
        out.mux(sorted(packets, key=lambda p: p.dts * p.time_base))
    return buffer.getvalue()


def windows(source: Source, **options: object) -> tuple[list[Clip], VideoSummary]:
    options = {"num_frames": 4, "transform": SMALL, "window_seconds": 1.0} | options
    passing = iter_windows(source, **options)  # type: ignore[arg-type]
    clips = []
    while True:
        try:
            clips.append(next(passing))
        except StopIteration as stop:
            return clips, stop.value


def same(ours: Clip, theirs: Clip) -> bool:
    return (
        torch.equal(ours.frames_TCHW, theirs.frames_TCHW)
        and np.array_equal(ours.pts_seconds, theirs.pts_seconds)
        and (ours.start_seconds, ours.end_seconds) == (theirs.start_seconds, theirs.end_seconds)
    )
