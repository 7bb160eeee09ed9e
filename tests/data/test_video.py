"""Video decoding: exact frames, honest ends, awkward files."""

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import SMALL, grey_frames, mux, numbers, same, windows
from PIL import Image

from rlt_retrieval.data import video
from rlt_retrieval.data.reader import Reader
from rlt_retrieval.data.timeline import Strip, count_windows, segment_times
from rlt_retrieval.data.video import (
    Clip,
    FrameTransform,
    VideoSummary,
    cut_span,
    decode_clip,
    encode_mp4,
    resize_frames,
)
from rlt_retrieval.errors import VideoDecodeError


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the frames that were converted to RGB."""
    count = 0
    real = video._scaled

    def counting(*arguments: object) -> np.ndarray:
        nonlocal count
        count += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(video, "_scaled", counting)
    return lambda: count


# ------------------------------------------------------------------------------------------- which frames


def test_segment_middles_of_a_constant_rate_video() -> None:
    data = encode_mp4(grey_frames(20), fps=10)
    clip = decode_clip(data, num_frames=4, transform=SMALL)
    assert numbers(clip) == [2, 7, 12, 17]  # middles 0.25, 0.75, 1.25, 1.75 s
    np.testing.assert_allclose(clip.pts_seconds, [0.2, 0.7, 1.2, 1.7])
    assert (clip.start_seconds, clip.end_seconds) == (0.0, 2.0)
    assert clip.frames_TCHW.shape == (4, 3, 16, 16)
    assert clip.frames_TCHW.dtype == torch.uint8
    assert clip.frames_TCHW.is_contiguous()


def test_the_frame_on_screen_is_the_last_one_shown_not_the_nearest() -> None:
    clip = decode_clip(mux([0, 100, 1900], last_duration=100), num_frames=4, transform=SMALL)
    assert numbers(clip) == [1, 1, 1, 1]  # the third frame is nearer to 1.75 s, but not yet there


def test_a_middle_that_falls_on_a_timestamp_takes_that_frame() -> None:
    """0.1 * 3 > 0.3 in floating point must not cost a frame."""
    data = encode_mp4(grey_frames(30), fps=10)
    clip = decode_clip(data, num_frames=15, transform=SMALL)
    assert numbers(clip) == list(range(1, 30, 2))


def test_frames_repeat_when_there_are_too_few() -> None:
    clip = decode_clip(encode_mp4(grey_frames(2), fps=2), num_frames=6, transform=SMALL)
    assert numbers(clip) == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(clip.pts_seconds, [0, 0, 0, 0.5, 0.5, 0.5])


def test_random_draws_stay_in_their_segments_and_repeat_with_the_seed() -> None:
    data = encode_mp4(grey_frames(40), fps=20)
    seen = set()
    for seed in range(20):
        first, again = (
            decode_clip(data, num_frames=4, transform=SMALL, rng=np.random.default_rng(seed))
            for _ in range(2)
        )
        assert same(first, again)
        picks = numbers(first)
        assert [pick // 10 for pick in picks] == [0, 1, 2, 3]
        seen |= set(picks)
    assert len(seen) > 25


@pytest.mark.parametrize("gop", [1, 5, 250])
def test_a_span_gives_the_frames_of_that_span(gop: int) -> None:
    data = mux([40 * i for i in range(50)], gop=gop)
    clip = decode_clip(data, num_frames=4, transform=SMALL, start_seconds=1.0, end_seconds=1.8)
    assert numbers(clip) == [27, 32, 37, 42]  # 1.1, 1.3, 1.5, 1.7 s
    assert (clip.start_seconds, clip.end_seconds) == (1.0, 1.8)


def test_a_span_past_the_end_stops_at_the_end() -> None:
    data = encode_mp4(grey_frames(20), fps=10)
    clip = decode_clip(data, num_frames=2, transform=SMALL, start_seconds=1.0, end_seconds=99.0)
    assert numbers(clip) == [12, 17]
    assert clip.end_seconds == 2.0


def test_a_span_after_the_end_is_an_error() -> None:
    data = encode_mp4(grey_frames(5), fps=10)
    with pytest.raises(
        VideoDecodeError, match=r"<bytes>: the span starts at 0\.5 s but the video ends at 0\.50 s"
    ):
        decode_clip(data, num_frames=2, transform=SMALL, start_seconds=0.5)
    with pytest.raises(VideoDecodeError, match="the span starts at 7 s"):
        cut_span(data, start_seconds=7, end_seconds=8)


@pytest.mark.parametrize(("num_frames", "start", "end"), [(0, 0, 1), (1, -1, 1), (1, 2, 2), (1, 3, 2)])
def test_impossible_spans_are_refused(num_frames: int, start: float, end: float) -> None:
    with pytest.raises(ValueError, match="nothing to sample"):
        decode_clip(b"", num_frames=num_frames, transform=SMALL, start_seconds=start, end_seconds=end)


def test_path_string_and_bytes_are_the_same_video(tmp_path: Path) -> None:
    data = encode_mp4(grey_frames(10), fps=10)
    path = tmp_path / "12:30 %d [a].jpg"  # neither a protocol, nor a pattern, nor an image
    path.write_bytes(data)
    clips = [decode_clip(source, num_frames=3, transform=SMALL) for source in (data, path, str(path))]
    assert same(clips[0], clips[1])
    assert same(clips[0], clips[2])


# ---------------------------------------------------------------------------------------------- windows


def test_windows_have_exact_spans_and_a_short_remainder_joins() -> None:
    clips, summary = windows(encode_mp4(grey_frames(34), fps=10))
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [(0, 1), (1, 2), (2, 3.4)]
    assert [numbers(clip) for clip in clips] == [[1, 3, 6, 8], [11, 13, 16, 18], [21, 25, 28, 32]]
    assert summary == VideoSummary(3.4, 3.4, None)


def test_half_a_window_is_a_window() -> None:
    clips, _ = windows(encode_mp4(grey_frames(25), fps=10))
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [(0, 1), (1, 2), (2, 2.5)]


def test_a_short_file_is_one_window() -> None:
    clips, _ = windows(encode_mp4(grey_frames(3), fps=10))
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [(0, 0.3)]


def test_windows_take_one_pass_and_scale_only_what_they_show(
    opened: Callable[[], int], scaled: Callable[[], int]
) -> None:
    clips, _ = windows(encode_mp4(grey_frames(60), fps=10), num_frames=2)
    assert len(clips) == 6
    assert opened() == 1
    assert scaled() <= 2 * 6 + 2


@given(
    gaps=st.lists(st.integers(1, 900), min_size=9, max_size=40),
    last=st.integers(1, 500),
    window=st.sampled_from([0.3, 1.0, 2.5]),
    num_frames=st.integers(1, 5),
    gop=st.sampled_from([1, 4, 250]),
    container=st.sampled_from(["mp4", "matroska", "mpegts"]),
)
@settings(max_examples=25, deadline=None)
def test_windows_match_single_clips_and_resume_anywhere(
    gaps: list[int], last: int, window: float, num_frames: int, gop: int, container: str
) -> None:
    """Any variable frame rate: streaming, decoding span by span and resuming give the same frames."""
    pts = [int(t) for t in np.cumsum([0, *gaps])]
    data = mux(pts, gop=gop, container=container, last_duration=last)
    options = {"num_frames": num_frames, "window_seconds": window}
    clips, summary = windows(data, **options)
    assert len(clips) == count_windows(summary.duration_seconds, window)
    for clip in clips:
        times = segment_times(clip.start_seconds, clip.end_seconds, np.full(num_frames, 0.5))
        seconds = np.array(pts) / 1000
        expected = [max(0, int(np.searchsorted(seconds, t + 1e-6, "right")) - 1) for t in times]
        if container != "mpegts":  # its clock ticks at 90 kHz and its last frame has no duration
            assert numbers(clip) == expected
        span = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
        assert same(clip, decode_clip(data, num_frames=num_frames, transform=SMALL, **span))
    for k in {1, len(clips) // 2, len(clips) - 1, len(clips), len(clips) + 3}:
        resumed, again = windows(data, first_window=k, **options)
        assert len(resumed) == max(0, len(clips) - k)
        assert all(map(same, resumed, clips[k:]))
        assert again.duration_seconds == summary.duration_seconds


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"window_seconds": 0.0}, {"first_window": -1}])
def test_impossible_windows_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="window"):
        windows(b"", **options)


def test_memory_holds_the_windows_in_flight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    real = Strip.push

    def watching(strip: Strip, *arguments: object) -> None:
        nonlocal most
        real(strip, *arguments)  # type: ignore[arg-type]
        most = max(most, len(strip._times))

    monkeypatch.setattr(Strip, "push", watching)
    clips, _ = windows(
        mux([10 * i for i in range(200)], frames=np.zeros((200, 32, 32, 3), np.uint8)), window_seconds=0.1
    )
    assert len(clips) == 20
    assert most <= 16 + 2  # one window and a half


# --------------------------------------------------------------------------------------------------- seeking


def without_skipping(data: bytes, **options: object) -> Clip:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "_may_skip", lambda *_: False)
        patch.setattr(Reader, "leave_out", lambda *_: None)
        return decode_clip(data, transform=SMALL, **options)  # type: ignore[arg-type]


@given(
    gaps=st.lists(st.integers(1, 2000), min_size=12, max_size=40),
    last=st.integers(1, 500),
    num_frames=st.integers(1, 4),
    gop=st.sampled_from([1, 3, 7, 50]),
    b_frames=st.sampled_from([0, 2, 3]),
    codec=st.sampled_from(["libx264", "libx264", "mpeg4"]),
    container=st.sampled_from(["mp4", "matroska", "mpegts"]),
    start=st.sampled_from([0.0, 2.5]),
    end=st.sampled_from([None, 7.0, 99.0]),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
@settings(max_examples=40, deadline=None)
def test_skipping_changes_nothing(
    gaps: list[int],
    last: int,
    num_frames: int,
    gop: int,
    b_frames: int,
    codec: str,
    container: str,
    start: float,
    end: float | None,
    seed: int | None,
) -> None:
    """Any variable frame rate and span, decoded whole, and by seeking to what is wanted and leaving frames out."""
    data = mux(
        [int(t) for t in np.cumsum([0, 2600, *gaps])],
        gop=gop,
        b_frames=b_frames,
        codec=codec,
        container=container,
        last_duration=last,
    )
    options = {"num_frames": num_frames, "start_seconds": start, "end_seconds": end}
    clips = [
        decode(data, **options, rng=None if seed is None else np.random.default_rng(seed))
        for decode in (partial(decode_clip, transform=SMALL), without_skipping)
    ]
    assert same(*clips)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_few_frames_of_a_long_file_cost_their_groups_of_pictures(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.zeros((460, 32, 32, 3), np.uint8)
    data = mux([100 * i for i in range(460)], frames=frames, gop=10, container=container)
    whole = without_skipping(data, num_frames=3)
    decoded = 0
    real = Reader._decode

    def counting(reader: Reader) -> Iterator[av.VideoFrame]:
        nonlocal decoded
        for frame in real(reader):
            decoded += 1
            yield frame

    monkeypatch.setattr(Reader, "_decode", counting)
    assert same(whole, decode_clip(data, num_frames=3, transform=SMALL))
    assert decoded <= 4 * (10 + 2) + 2


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_no_other_needs_are_decoded_only_if_wanted(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 64, 64, 3), np.uint8)
    data = mux([100 * i for i in range(120)], frames=noise, codec=codec, b_frames=2)
    whole = without_skipping(data, num_frames=3)
    whole_windows = windows_without_skipping(data, window_seconds=5.0)
    left_out = 0

    def counting(strip: Strip, seconds: float, frame: av.VideoFrame | None) -> None:
        nonlocal left_out
        left_out += frame is None
        push(strip, seconds, frame)

    push = Strip.push
    monkeypatch.setattr(Strip, "push", counting)
    assert same(whole, decode_clip(data, num_frames=3, transform=SMALL))
    assert left_out > 30
    left_out = 0
    clips, summary = windows(data, window_seconds=5.0, num_frames=2)
    assert left_out > 30
    assert summary == whole_windows[1]
    assert all(same(*pair) for pair in zip(clips, whole_windows[0], strict=True))


def test_hevc_in_several_temporal_layers_is_decoded_whole() -> None:
    """A frame marked as no reference may be one for a higher layer; hvcC says how many there are (byte 21)."""
    data = mux([100 * i for i in range(60)], codec="libx265", b_frames=2)
    with av.open(io.BytesIO(data)) as container:
        record = container.streams.video[0].codec_context.extradata
    assert record is not None
    assert data.count(record) == 1
    layers = {}
    for number in (1, 2):
        changed = bytearray(record)
        changed[21] = changed[21] & ~(7 << 3) | number << 3
        with Reader(data.replace(record, bytes(changed))) as reader:
            reader.leave_out(lambda *_: False)
            layers[number] = reader.skips
    assert layers == {1: True, 2: False}


def windows_without_skipping(data: bytes, window_seconds: float) -> tuple[list[Clip], VideoSummary]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "leave_out", lambda *_: None)
        return windows(data, window_seconds=window_seconds, num_frames=2)


def test_a_packet_that_breaks_while_frames_are_left_out_changes_nothing() -> None:
    """An error that shows has everything after it decoded again: the windows before it are kept."""
    noise = np.random.default_rng(0).integers(0, 255, (120, 64, 64, 3), np.uint8)
    data = bytearray(
        mux([100 * i for i in range(120)], frames=noise, b_frames=2, container="matroska", gop=20)
    )
    middle = len(data) * 2 // 3
    data[middle : middle + 3000] = bytes(3000)
    expected, whole_summary = windows_without_skipping(bytes(data), window_seconds=2.0)
    clips, summary = windows(bytes(data), window_seconds=2.0, num_frames=2)
    assert summary.duration_seconds == whole_summary.duration_seconds
    assert all(same(*pair) for pair in zip(clips, expected, strict=True))
    assert same(
        *(f(bytes(data), num_frames=4) for f in (partial(decode_clip, transform=SMALL), without_skipping))
    )


def test_a_seek_that_fails_costs_a_pass_but_changes_nothing(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mux([100 * i for i in range(60)], gop=5)
    whole = without_skipping(data, num_frames=2)
    before = opened()
    monkeypatch.setattr(Reader, "_land", lambda *_: None)
    assert same(whole, decode_clip(data, num_frames=2, transform=SMALL))
    assert opened() == before + 2


def test_a_claim_that_is_wrong_after_seeking_is_repaired() -> None:
    """The index of a truncated file promises groups of pictures that are not there."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 64, 64, 3), np.uint8)
    data = mux([100 * i for i in range(80)], frames=noise, gop=5, container="matroska")
    data = data[: len(data) // 2]
    clip = decode_clip(data, num_frames=3, transform=SMALL)
    assert same(clip, without_skipping(data, num_frames=3))
    assert 2 < clip.end_seconds < 6


def test_a_video_without_a_promise_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As browsers record: no duration anywhere. Its packets say where it ends before any is decoded."""
    data = mux([40 * i for i in range(50)], container="matroska").replace(b"DURATION", b"DURATIOX")
    monkeypatch.setattr(Reader, "_promise", lambda *_: (None, False))
    passes = 0
    real = video._play

    def counting(*arguments: object) -> float:
        nonlocal passes
        passes += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(video, "_play", counting)
    clip = decode_clip(data, num_frames=5, transform=SMALL)
    assert numbers(clip) == [5, 15, 25, 35, 45]
    assert passes == 1


# ------------------------------------------------------------------------------------------ ends and clocks


def test_the_end_is_the_last_frame_s_end_in_a_variable_rate_file() -> None:
    clips, summary = windows(mux([0, 40, 500, 520], last_duration=280))
    assert summary.duration_seconds == pytest.approx(0.8)
    assert numbers(clips[0]) == [1, 1, 2, 3]


def test_seconds_count_from_the_first_frame() -> None:
    data = mux([7000, 7100, 7200, 7300], container="mpegts")
    clip = decode_clip(data, num_frames=4, transform=SMALL)
    assert numbers(clip) == [0, 1, 2, 3]
    np.testing.assert_allclose(clip.pts_seconds, [0, 0.1, 0.2, 0.3])


def test_a_truncated_file_is_partial_and_sampled_to_its_true_end() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    data = encode_mp4(noise, fps=10)
    clips, summary = windows(data[: len(data) // 2])
    assert summary.promised_seconds == 4.0
    assert 1.0 < summary.duration_seconds < 3.0
    assert summary.problem is not None
    assert "of 4.00 s decoded" in summary.problem
    assert clips[-1].end_seconds == summary.duration_seconds
    assert clips[-1].pts_seconds[-1] > clips[-1].end_seconds - 0.5


def test_one_lost_packet_is_a_problem_but_not_the_end() -> None:
    data = bytearray(mux([40 * i for i in range(50)], gop=10))
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = next(p for p in container.demux() if p.pts == 21 * 40 * p.time_base.denominator // 1000)
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    _, summary = windows(bytes(data))
    assert summary.duration_seconds == pytest.approx(2.0)
    assert summary.problem is not None
    assert summary.problem.startswith("1 packet lost (InvalidDataError after 0.8")


def test_an_error_of_the_container_ends_the_video_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the decoder still holds must come out."""

    class Breaking:
        def __init__(self, container: av.container.InputContainer) -> None:
            self.container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self.container, name)

        def demux(self) -> Iterator[av.Packet]:
            for packet, _ in zip(self.container.demux(), range(10), strict=False):
                yield packet
            raise av.InvalidDataError(1, "broken")

    real = av.open
    data = encode_mp4(grey_frames(20), fps=10)
    monkeypatch.setattr(video.av, "open", lambda *a, **k: Breaking(real(*a, **k)))
    clips, summary = windows(data)
    assert summary == VideoSummary(1.0, 2.0, summary.problem)
    assert str(summary.problem).endswith("1.00 of 2.00 s decoded")
    assert numbers(clips[0]) == [1, 3, 6, 8]


def test_a_claim_about_longer_sound_is_not_a_partial_video() -> None:
    data = mux([40 * i for i in range(25)], container="matroska", with_sound_seconds=5.0)
    data = data.replace(b"DURATION", b"DURATIOX")  # as from writers without per-stream tags
    _, summary = windows(data)
    assert summary.duration_seconds == pytest.approx(1.0)
    assert summary.promised_seconds == pytest.approx(5.0, abs=0.3)
    assert summary.problem is None


def test_a_truncated_file_with_sound_is_partial() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (50, 32, 48, 3), np.uint8)
    data = mux([40 * i for i in range(50)], frames=noise, container="matroska", with_sound_seconds=2.0)
    data = data.replace(b"DURATION", b"DURATIOX")
    _, summary = windows(data[: len(data) // 2])
    assert summary.problem is not None
    assert "s decoded" in summary.problem


# --------------------------------------------------------------------------------------------- awkward files


def test_a_file_of_zero_bytes_noise_or_text_is_a_one_line_error(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 5000, b"hello\n" * 100, bytes(range(256)) * 20):
        path = tmp_path / "file.mp4"
        path.write_bytes(content)
        for source, name in ((content, "<bytes>"), (path, "file.mp4")):
            with pytest.raises(VideoDecodeError, match=name) as raised:
                windows(source)
            assert "\n" not in str(raised.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(VideoDecodeError, match=r"none\.mp4: cannot be opened \(No such file"):
        decode_clip(tmp_path / "none.mp4", num_frames=1, transform=SMALL)


def test_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", "mp4") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate = 8000
        out.mux(sound.encode(samples))
        out.mux(sound.encode(None))
    with pytest.raises(VideoDecodeError, match=r"no video stream \(found audio\)"):
        windows(buffer.getvalue())


def test_a_cover_picture_is_no_video() -> None:
    buffer, cover = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32)).save(cover, "JPEG")
    with av.open(buffer, "w", "mp4") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        picture = out.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        out.start_encoding()
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        out.mux(packet)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate = 8000
        out.mux(sound.encode(samples))
        out.mux(sound.encode(None))
    with pytest.raises(VideoDecodeError, match="no video stream"):
        windows(buffer.getvalue())


def test_an_unknown_codec_is_an_error_that_says_so() -> None:
    data = encode_mp4(grey_frames(3), fps=10)
    with pytest.raises(VideoDecodeError, match="no decoder"):
        windows(data.replace(b"avc1", b"zzzz"))


def test_the_best_of_several_streams_is_taken() -> None:
    """FFmpeg's ranking begins with what the file marks as its default; here that is the second stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", "mp4") as out:
        streams = [out.add_stream("libx264", rate=10) for _ in range(2)]
        for stream, size in zip(streams, (16, 64), strict=True):
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
        streams[1].disposition = av.stream.Disposition.default
        for stream, level in zip(streams, (20, 200), strict=True):
            for _ in range(8):
                picture = np.full((stream.height, stream.width, 3), level, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            out.mux(stream.encode(None))
    clip = decode_clip(buffer.getvalue(), num_frames=2, transform=SMALL)
    assert abs(float(clip.frames_TCHW.float().mean()) - 200) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_picture_is_a_clip_of_one_frame(kind: str, as_file: bool, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 100, 50)).save(buffer, kind)
    source: video.Source = buffer.getvalue()
    if as_file:
        source = tmp_path / "really_a_picture.mp4"
        source.write_bytes(buffer.getvalue())
    clips, summary = windows(source)
    assert len(clips) == 1
    assert summary.problem is None
    pixels = clips[0].frames_TCHW.float().mean((0, 2, 3))
    np.testing.assert_allclose(pixels, [200, 100, 50], atol=6)
    assert same(clips[0], decode_clip(source, num_frames=4, transform=SMALL))


def test_a_playlist_may_not_open_other_files(tmp_path: Path) -> None:
    """A shard member from a stranger must not make us fetch URLs or read our disk."""
    (tmp_path / "a.ts").write_bytes(mux([0, 40, 80], container="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/a.ts\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{tmp_path}/a.ts'\n"
    for text in (playlist, concat):
        with pytest.raises(VideoDecodeError):
            windows(text.encode())
        path = tmp_path / "list.m3u8"
        path.write_text(text)
        with pytest.raises(VideoDecodeError):
            windows(path)


# -------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(30, 47), (101, 40), (224, 224), (33, 34), (17, 160)])
@pytest.mark.parametrize("out", [(32, 32), (24, 40)])
def test_pictures_line_up_with_open_clip_s_preprocessing(
    mode: str, size: tuple[int, int], out: tuple[int, int]
) -> None:
    """Same rounding and same crop: on a smooth picture the two agree to a grey level or two."""
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    picture_HWC = (np.stack([y, x, (x + y) / 2], -1) * 250).astype(np.uint8)
    preprocess = open_clip.transform.image_transform(
        out, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, fill_color=9
    )
    theirs = preprocess(Image.fromarray(picture_HWC)) * 255
    transform = FrameTransform(*out, resize_mode=mode, fill_color=9)  # type: ignore[arg-type]
    frames_TCHW = torch.from_numpy(picture_HWC).permute(2, 0, 1)[None]
    ours = resize_frames(frames_TCHW, transform)[0]
    assert float((ours.float() - theirs).abs().mean()) < 1.5
    assert float((ours.float() - theirs).abs().max()) < 16  # the kernels differ at the border


def test_frames_of_the_right_size_are_used_as_they_are() -> None:
    frames_TCHW = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    assert resize_frames(frames_TCHW, SMALL) is frames_TCHW


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 16, 3)])
def test_frames_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T, 3, H, W\]"):
        resize_frames(torch.zeros(shape, dtype=torch.uint8), SMALL)


def test_decoded_and_in_memory_frames_are_scaled_alike() -> None:
    y, x = np.mgrid[:48, :80]
    frames_THWC = np.stack([np.stack([y * 5, x * 3, x + y], -1)] * 3).astype(np.uint8)
    decoded = decode_clip(encode_mp4(frames_THWC, fps=5, crf=1), num_frames=3, transform=SMALL).frames_TCHW
    in_memory = resize_frames(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2), SMALL)
    assert float((decoded.float() - in_memory.float()).abs().mean()) < 2


def quadrants(height: int, width: int) -> np.ndarray:
    """One picture [1, height, width, 3]: red, green / blue, white."""
    picture = np.zeros((1, height, width, 3), np.uint8)
    picture[:, : height // 2, : width // 2] = (240, 16, 16)
    picture[:, : height // 2, width // 2 :] = (16, 240, 16)
    picture[:, height // 2 :, : width // 2] = (16, 16, 240)
    picture[:, height // 2 :, width // 2 :] = (240, 240, 240)
    return picture


def corners(clip: Clip) -> str:
    """Names of the corner colours: top left, top right, bottom left, bottom right."""
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    frame_CHW = clip.frames_TCHW[0] > 128
    h, w = frame_CHW.shape[1:]
    places = [(y, x) for y in (h // 5, h - h // 5) for x in (w // 5, w - w // 5)]
    return "".join(names[tuple(int(v) for v in frame_CHW[:, y, x])] for y, x in places)


@pytest.mark.parametrize(("rotation", "expected"), [(0, "RGBW"), (90, "GWRB"), (180, "WBGR"), (-90, "BRWG")])
def test_rotation_metadata_is_applied(rotation: float, expected: str) -> None:
    """Degrees are counter-clockwise, as FFmpeg stores them."""
    data = mux([0], frames=quadrants(32, 64), rotation=rotation)
    size = (16, 32) if rotation % 180 == 0 else (32, 16)
    clip = decode_clip(data, num_frames=1, transform=FrameTransform(*size, resize_mode="longest"))
    assert corners(clip) == expected
    upright = cut_span(data, start_seconds=0, end_seconds=1)
    assert corners(decode_clip(upright, num_frames=1, transform=FrameTransform(*size))) == expected


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_shown_in_proportion(aspect: Fraction) -> None:
    data = mux([0], frames=quadrants(32, 32) // 2 + 100, aspect=aspect)
    clip = decode_clip(data, num_frames=1, transform=FrameTransform(32, 32, resize_mode="longest"))
    shown = (clip.frames_TCHW[0] > 50).all(0)
    wide = [int(n) for n in (shown.any(1).sum(), shown.any(0).sum())]
    assert wide == ([16, 32] if aspect == 2 else [32, 16])


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (2, 0.299, 0.114)])
def test_colours_follow_the_frame_s_own_tags(full_range: bool, matrix: int, kr: float, kb: float) -> None:
    """ITU-R BT.601 / BT.709 equations; an untagged frame (2) is read as BT.601, as FFmpeg does."""
    frame = av.VideoFrame(16, 16, "yuv420p")
    for plane, value in zip(frame.planes, (120, 90, 170), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
    luma, chroma, shift = (255, 255, 0) if full_range else (219, 224, 16)
    y, u, v = (120 - shift) / luma, (90 - 128) / chroma, (170 - 128) / chroma
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    pixel = video._Scaler(FrameTransform(8, 8))(frame)[:, 4, 4]
    np.testing.assert_allclose(pixel, np.array([red, green, blue]) * 255, atol=1)


# ---------------------------------------------------------------------------------------------- random crops


def test_one_random_crop_a_clip_and_only_with_a_generator() -> None:
    y, x = np.mgrid[:64, :64] * 4
    frames_THWC = np.stack([np.stack([y, x, y], -1)] * 6).astype(np.uint8)
    data = encode_mp4(frames_THWC, fps=6, crf=1)
    transform = FrameTransform(16, 16, crop_scale=(0.1, 0.3))
    centred = decode_clip(data, num_frames=6, transform=transform)
    assert same(centred, decode_clip(data, num_frames=6, transform=SMALL))
    crops = [
        decode_clip(
            data, num_frames=6, transform=transform, rng=np.random.default_rng(seed)
        ).frames_TCHW.float()
        for seed in range(6)
    ]
    assert all(float((crop - crop[:1]).abs().mean()) < 3 for crop in crops)
    assert len({tuple(crop.mean((0, 2, 3)).int().tolist()) for crop in crops}) == 6
