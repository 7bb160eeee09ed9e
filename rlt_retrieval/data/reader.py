"""Frames of a video file with their seconds, as a decoder gives them: opening, seeking, leaving out, mending.

Knows FFmpeg (through PyAV), as `data.video` does; nothing else may.

Safety. The bytes are read by Python and handed to FFmpeg, so that neither a file's name nor a playlist inside
it can make FFmpeg open another file or URL. One thread: frame threads can deadlock when a broken file is
closed, give other pictures of a damaged one, and the workers already fill the cores.
"""

import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from rlt_retrieval.data.skipping import Astray, Ledger, Unseen, look_ahead
from rlt_retrieval.data.timeline import Clock, VideoSummary, missing_seconds, tagged_seconds
from rlt_retrieval.errors import VideoDecodeError

Source = str | Path | bytes

BAD_PACKETS_IN_A_ROW = 500  # then decoding gives up; a cut stream may lose a group of pictures
DEFAULT_FRAME_SECONDS = 0.04  # of a lone frame that says nothing about its duration or rate
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # FFmpeg's names; seeking is exact in these
WORTH_SEEKING_SECONDS = 1.0  # to skip fewer, decoding on is faster than a seek and what it decodes again


class Reader:
    """One decoding pass: iterate for (seconds, frame or None), from a key frame at or before `from_seconds`.

    Raises VideoDecodeError when the source cannot be opened or gives no frame. A decode error later on does
    not raise: what follows is still decoded, and `summary()` reports it.
    """

    def __init__(self, source: Source, from_seconds: float = 0.0) -> None:
        self._source = source
        self.name = "<bytes>" if isinstance(source, bytes) else str(source)
        self._has_sought = False
        self._wanted: Callable[[int, int], bool] | None = None
        self._open_at(from_seconds)

    def _open_at(self, from_seconds: float) -> None:
        self._open()
        try:
            self._frames = self._start()
            if from_seconds > 0 and (landed := self._land(from_seconds)) is not None:
                self._frames = landed
            elif from_seconds > 0:
                self.close()
                self._open()
                self._frames = self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame | None]]:
        """Seconds and frame; None for one that is left out."""
        while (frame := next(self._frames, None)) is not None:
            yield self._seconds(frame), None if isinstance(frame, Unseen) else frame

    def _seconds(self, frame: av.VideoFrame | Unseen) -> float:
        tick = frame.dts if self._by_dts and isinstance(frame, av.VideoFrame) else frame.pts
        return self.clock.read(tick, frame.duration)

    @property
    def pixel_aspect(self) -> Fraction | None:
        return self._stream.sample_aspect_ratio

    @property
    def rate(self) -> Fraction | None:
        return self._stream.guessed_rate or self._stream.average_rate

    def _open(self) -> None:
        self._first_error, self._num_errors = "", 0
        self._other_ends: dict[int, int] = {}  # in ticks: how far packets of audio and other streams reach
        try:
            if isinstance(self._source, bytes):
                self._file: io.BytesIO | _Unnamed = io.BytesIO(self._source)
            else:
                self._file = _Unnamed(open(self._source, "rb"))  # noqa: SIM115  (closed by close())
        except OSError as error:
            raise VideoDecodeError(
                f"{self.name}: cannot be opened ({error.strerror}); check the path"
            ) from error
        try:
            self._container = av.open(
                self._file, "r", metadata_errors="ignore", buffer_size=1 << 16, io_open=_refuse_other_files
            )
        except av.FFmpegError as error:
            self._file.close()
            raise VideoDecodeError(f"{self.name}: not a readable video file ({reason(error)})") from error
        try:
            self._stream = self._choose_stream()
        except VideoDecodeError:
            self.close()
            raise
        # AVI stores no presentation times: FFmpeg's guesses swap packed B-frames, the decode order is right.
        self._by_dts = self._container.format.name == "avi"

    def _choose_stream(self) -> Any:
        """FFmpeg's best video stream, an `av.VideoStream`."""
        stream: Any = self._container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            kinds = ", ".join(sorted({other.type for other in self._container.streams})) or "nothing"
            raise VideoDecodeError(f"{self.name}: no video stream (found {kinds}); pass files with a picture")
        if stream.codec_context is None:
            raise VideoDecodeError(
                f"{self.name}: this FFmpeg has no decoder for its video stream; re-encode it"
            )
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        return stream

    def _start(self) -> Iterator[av.VideoFrame | Unseen]:
        """Frames from the beginning; sets the clock's origin and what is promised."""
        stream = self._stream
        frame_seconds = float(1 / self.rate) if self.rate else DEFAULT_FRAME_SECONDS
        self.clock = Clock(stream.time_base, frame_seconds)
        frames = self._decode()
        first = next(frames, None)
        if first is None:
            why = self._first_error or "the stream is empty"
            raise VideoDecodeError(f"{self.name}: no decodable video frame ({why})")
        self._seconds(first)
        self.clock.rewind()
        self.promised_seconds, self._promise_is_own = self._promise()
        return chain([first], frames)

    def _promise(self) -> tuple[float | None, bool]:
        """Seconds from the first frame that headers claim; whether the claim is about this stream alone."""
        stream, container = self._stream, self._container
        if stream.start_time is None:  # a raw stream: FFmpeg only guesses a duration, from the bit rate
            return None, False
        if stream.duration:
            return float(stream.duration * stream.time_base), True
        # Matroska counts from its own zero, not from the first frame.
        assert self.clock.origin is not None
        lead_seconds = (
            float(self.clock.origin * stream.time_base) if "matroska" in container.format.name else 0.0
        )
        if (tagged := tagged_seconds(stream.metadata.get("DURATION"))) is not None:
            return tagged - lead_seconds, True
        if container.duration:
            alone = all(
                other is stream or other.type not in ("audio", "video") for other in container.streams
            )
            return container.duration / av.time_base - lead_seconds, alone
        return None, False

    def last_packet_end(self, from_seconds: float) -> float:
        """Seconds where the packets end, by a pass without decoding; then goes back to `from_seconds`."""
        assert self.clock.origin is not None
        pts_and_durations = ((packet.pts, packet.duration or 0) for packet in self._packets())
        end = max((pts + duration for pts, duration in pts_and_durations if pts is not None), default=0)
        end_seconds = float((end - self.clock.origin) * self._stream.time_base)
        self.close()
        self._open_at(from_seconds)
        return end_seconds

    def leave_out(self, wanted: Callable[[float, float], bool]) -> None:
        """From here on, do not decode frames that no other frame needs and that are not `wanted(shown, replaced)`.

        Raises Astray, while iterated, where frames do not come as their packets promise.
        """

        def wanted_ticks(shown: int, replaced: int) -> bool:
            return wanted(self.clock.seconds_of(shown), self.clock.seconds_of(replaced))

        if self._has_sound_index and self._marks_references():
            self._wanted = wanted_ticks

    def _marks_references(self) -> bool:
        """Whether a packet gives one frame, and its decoder can leave out the frames that no other refers to.

        HEVC's mark is about the frame's own temporal layer: true of all where there is one, as the file's hvcC record
        says (ISO/IEC 14496-15, 8.3.3.1). FFmpeg's "mpeg4" gives frames after those it left out wrong timestamps.
        """
        context = self._stream.codec_context
        if context.name == "hevc":
            record = context.extradata or b""
            return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
        return bool(context.name == "h264")

    @property
    def skips(self) -> bool:
        """Whether frames may have been left out."""
        return self._has_sought or self._wanted is not None

    def skip_to(self, seconds: float) -> bool:
        """Go on at a key frame at or before `seconds` where that skips frames; returns whether it did.

        Raises Astray where the seek went wrong: frames are lost then.
        """
        passed = self.clock.last_tick
        assert passed is not None
        if not self._may_skip(passed, self._tick(seconds)):
            return False
        self._has_sought = True
        landed = self._land(seconds)
        if landed is None:
            raise Astray
        first = next(landed)
        assert first.pts is not None  # or it would not have landed
        if first.pts > passed:
            self.clock.rewind()
            self._frames = chain([first], landed)
            return True
        self._frames = dropwhile(lambda frame: frame.pts is not None and frame.pts <= passed, landed)
        return False

    def _may_skip(self, passed: int, target: int) -> bool:
        """Whether a key frame up to `target` is well ahead of `passed`."""
        if not self._has_sound_index:
            return False
        if not self._has_sought and "matroska" in self._container.format.name:
            nearest = target  # the index is read by the first seek
        else:
            index = self._stream.index_entries
            found = index.search_timestamp(target)
            nearest = index[found].timestamp if found >= 0 else passed
        return (nearest - passed) * self._stream.time_base > WORTH_SEEKING_SECONDS

    def _tick(self, seconds: float) -> int:
        assert self.clock.origin is not None
        return self.clock.origin + math.floor(seconds / self._stream.time_base)

    def _land(self, from_seconds: float) -> Iterator[av.VideoFrame | Unseen] | None:
        """Frames from a key frame at or before `from_seconds`, or None where seeking cannot be trusted."""
        origin, target = self.clock.origin, self._tick(from_seconds)
        assert origin is not None
        if not self._has_sound_index:
            return None
        try:
            self._container.seek(target, stream=self._stream)
        except av.FFmpegError:
            return None
        frames = self._decode()
        for frame in frames:
            if frame.pts is None or not origin <= frame.pts <= target:
                return None
            # Frames before the key frame (open groups of pictures) refer to pictures that were skipped.
            if frame.key_frame:
                return chain([frame], frames)
        return None

    @cached_property
    def _has_sound_index(self) -> bool:
        return self._container.format.name in INDEXED_FORMATS and self.clock.is_sound(
            entry.timestamp for entry in self._stream.index_entries
        )

    def _decode(self) -> Iterator[av.VideoFrame | Unseen]:
        bad_packets = 0
        ledger = Ledger()
        for packet, left_out in look_ahead(self._packets(), lambda: self._wanted):
            self._stream.codec_context.skip_frame = "NONREF" if left_out else "DEFAULT"
            ledger.sent(packet, left_out)
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self._note(error)
                bad_packets += 1
                if bad_packets == BAD_PACKETS_IN_A_ROW:
                    return
                continue
            if frames:
                bad_packets = 0
            for frame in frames:
                yield from ledger.placed(frame, strict=self._wanted is not None)
        yield from ledger.rest(strict=self._wanted is not None)

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, the flushing one included. A container error ends the video there."""
        try:
            for packet in self._container.demux():
                index = packet.stream.index
                if index == self._stream.index:
                    yield packet
                elif packet.pts is not None:
                    end = packet.pts + (packet.duration or 0)
                    self._other_ends[index] = max(end, self._other_ends.get(index, end))
        except av.FFmpegError as error:
            self._note(error)
            flush = av.Packet()
            flush.stream = self._stream
            yield flush

    def _note(self, error: av.FFmpegError) -> None:
        self._num_errors += 1
        self._first_error = (
            self._first_error or f"{type(error).__name__} after {self.clock.end_seconds:.2f} s"
        )

    @property
    def lost(self) -> str | None:
        """How many packets could not be decoded so far, and why; None if all could."""
        if not self._num_errors:
            return None
        packets = "1 packet" if self._num_errors == 1 else f"{self._num_errors} packets"
        return f"{packets} lost ({self._first_error})"

    def summary(self) -> VideoSummary:
        """To be asked when the iteration has ended."""
        assert self.clock.origin is not None
        reached = decoded = self.clock.end_seconds
        if not self._promise_is_own:
            # The container's claim may be about its sound: then it is broken only if nothing reaches that far.
            origin_seconds = float(self.clock.origin * self._stream.time_base)
            streams: Any = self._container.streams
            ends = [float(end * streams[i].time_base) for i, end in self._other_ends.items()]
            reached = max([decoded, *(end - origin_seconds for end in ends)])
        missing = missing_seconds(decoded, self.promised_seconds, reached)
        problem = "; ".join(filter(None, (self.lost, missing))) or None
        return VideoSummary(decoded, self.promised_seconds, problem)


class _Unnamed:
    """A binary file without its name: the content alone decides what it is, as it does for bytes."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close


def _refuse_other_files(url: str, flags: int, options: dict) -> Any:
    raise PermissionError(f"a video may not open another file: {url}")


def reason(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__
