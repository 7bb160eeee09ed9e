"""What is on screen when: segments, windows, timestamps that must be mended. Knows no FFmpeg.

Seconds count from the first frame of the chosen stream. The frame on screen at time t is the last
whose timestamp is ≤ t (one microsecond of tolerance against rounding). A span [start, end) is cut into T
equal segments and the frame on screen in the middle of each (training: at a uniform draw in it) is taken; a
frame repeats when there are too few. The end of a video is the end of its last decoded frame, never what a
header claims.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

SAME_INSTANT_SECONDS = 1e-6  # sampling times are sums of rounded floats
CLAIM_SLACK_SECONDS = 0.002  # containers round the end to milliseconds: keep every frame that it may choose
LONGEST_GAP_SECONDS = 3600.0  # a longer step forward is a broken timestamp, not a still picture
LONGEST_STEP_BACK_SECONDS = 1.0  # a longer step back is a clock that restarts, not a frame out of order
MISSING_SECONDS = 0.5  # a video is partial when more than this ...
MISSING_SHARE = 0.05  # ... and more than this share of the promised time is missing

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class VideoSummary:
    """What a pass over a video found.

    duration_seconds: end of the last decoded frame. promised_seconds: what container or stream claimed, None
    if nothing did. problem: None, or one line that says why the video counts as partial.
    """

    duration_seconds: float
    promised_seconds: float | None
    problem: str | None


def segment_times(start_seconds: float, end_seconds: float, draws: np.ndarray) -> list[float]:
    """One time in each of T = len(draws) equal segments, at share `draws[i]` of it (0.5: the middle)."""
    segment_seconds = (end_seconds - start_seconds) / len(draws)
    return [start_seconds + (i + float(draw)) * segment_seconds for i, draw in enumerate(draws)]


def count_windows(duration_seconds: float, window_seconds: float) -> int:
    """Windows of a video: a remainder under half a window joins the one before."""
    return max(1, math.floor(duration_seconds / window_seconds + 0.5))


def window_span(index: int, duration_seconds: float, window_seconds: float) -> tuple[float, float]:
    """[start, end) of window `index`, in seconds; only the last one is not exactly `window_seconds` long."""
    is_last = index == count_windows(duration_seconds, window_seconds) - 1
    return index * window_seconds, duration_seconds if is_last else (index + 1) * window_seconds


def any_on_screen(sample_seconds: list[float], shown: float, replaced: float) -> bool:
    """Whether one of the (rising) times falls where a frame is on screen, give or take the slack."""
    i = bisect.bisect_left(sample_seconds, shown - CLAIM_SLACK_SECONDS)
    return i < len(sample_seconds) and sample_seconds[i] < replaced + CLAIM_SLACK_SECONDS


def window_plan(
    promised_seconds: float | None, window_seconds: float, middles: np.ndarray
) -> Callable[[float, float], bool]:
    """Whether a regular window, or the last one as claimed, wants a frame on screen in [shown, replaced)."""
    last_times: list[float] = []
    if promised_seconds is not None and promised_seconds > 0:
        last = count_windows(promised_seconds, window_seconds) - 1
        last_times = segment_times(*window_span(last, promised_seconds, window_seconds), middles)
    segment_seconds = window_seconds / len(middles)

    def wanted(shown: float, replaced: float) -> bool:
        # All regular windows together are one endless row of equal segments.
        segment = max(0, math.ceil((shown - SAME_INSTANT_SECONDS) / segment_seconds - 0.5))
        regular = (segment + 0.5) * segment_seconds < replaced - SAME_INSTANT_SECONDS
        return regular or any_on_screen(last_times, shown, replaced)

    return wanted


class Clock:
    """Turns raw timestamps into strictly rising seconds from the first frame.

    A timestamp that is missing, equal to or slightly before the last one is replaced by "one frame duration
    after the last". One that leaps (back by more than a second, ahead by more than an hour) restarts the
    clock there: what follows keeps its own spacing.
    """

    def __init__(self, time_base: Fraction, frame_seconds: float) -> None:
        self._time_base = time_base
        self._default_step = max(1, round(frame_seconds / time_base))
        self._gap, self._back = (int(s / time_base) for s in (LONGEST_GAP_SECONDS, LONGEST_STEP_BACK_SECONDS))
        self.origin: int | None = None
        self._last: int | None = None
        self._last_step = self._last_duration = 0

    def read(self, raw: int | None, duration: int) -> float:
        """Seconds of the frame with this timestamp and duration, both in ticks of the time base (0: unknown)."""
        duration = duration if 0 < duration <= self._gap else 0
        if self.origin is None:
            self.origin = raw or 0
        if self._last is None:
            tick = self.origin if raw is None else raw
        else:
            tick = self._next(raw, self._last, self._last_duration or self._default_step)
            self._last_step = tick - self._last
        self._last, self._last_duration = tick, duration
        return self.seconds_of(tick)

    def seconds_of(self, tick: int) -> float:
        """Seconds from the first frame, after which the clock has an origin."""
        assert self.origin is not None
        return (tick - self.origin) * self._time_base.numerator / self._time_base.denominator

    def _next(self, raw: int | None, last: int, step: int) -> int:
        if raw is not None and not last - self._back <= raw <= last + self._gap:
            assert self.origin is not None
            # Moving origin and last together keeps the seconds already given out and lets the new run go on.
            shift = raw - (last + step)
            self.origin += shift
            last += shift
            self._last = last
        return raw if raw is not None and raw > last else last + step

    def is_sound(self, ticks: Iterable[int]) -> bool:
        """Whether these timestamps rise as they should: `read` would have to mend none of them."""
        return all(last < tick <= last + self._gap for last, tick in pairwise(ticks))

    @property
    def last_tick(self) -> int | None:
        """Timestamp of the last frame, mended; None before the first and after `rewind`."""
        return self._last

    def rewind(self) -> None:
        """Forget the last frame, keep the origin: decoding goes on elsewhere."""
        self._last, self._last_step, self._last_duration = None, 0, 0

    @property
    def end_seconds(self) -> float:
        """End of the last frame: its duration, else the spacing before it, else one frame at the rate."""
        if self._last is None or self.origin is None:
            return 0.0
        return self.seconds_of(self._last + (self._last_duration or self._last_step or self._default_step))

    @property
    def end_is_guessed(self) -> bool:
        """Whether `end_seconds` rests on the rate alone: with the frames before it, it could be another."""
        return not (self._last_duration or self._last_step)


class Strip(Generic[Frame]):
    """The times of the frames that went by, and the pictures of those that a plan wants.

    A frame is scaled when the next one shows how long it stays on screen, so one full-size frame is held.
    """

    def __init__(self, scale: Callable[[Frame], np.ndarray], wanted: Callable[[float, float], bool]) -> None:
        self._scale, self._wanted = scale, wanted
        self._times: list[float] = []
        self._pictures: dict[float, np.ndarray] = {}
        self._held: Frame | None = None

    def push(self, seconds: float, frame: Frame | None) -> None:
        """The next frame; None: one that was not decoded because nothing wants it."""
        if self._held is not None and self._wanted(self._times[-1], seconds):
            self._keep()
        self._times.append(seconds)
        self._held = frame

    def leave_gap(self) -> None:
        """Frames after the last one are skipped: how long it stays on screen is not known."""
        self._held = None

    def finish(self) -> None:
        if self._held is not None and self._wanted(self._times[-1], math.inf):
            self._keep()

    def _keep(self) -> None:
        assert self._held is not None
        self._pictures[self._times[-1]] = self._scale(self._held)

    def take(self, sample_seconds: list[float]) -> tuple[list[np.ndarray], np.ndarray] | None:
        """(pictures, pts_seconds) on screen at these times, or None when one of them was not kept."""
        indices = [bisect.bisect_right(self._times, t + SAME_INSTANT_SECONDS) - 1 for t in sample_seconds]
        times = [self._times[max(i, 0)] for i in indices]
        if not all(t in self._pictures for t in times):
            return None
        return [self._pictures[t] for t in times], np.array(times)

    def forget_before(self, seconds: float) -> None:
        """Drop frames that are no longer on screen at `seconds`."""
        first = max(0, bisect.bisect_right(self._times, seconds + SAME_INSTANT_SECONDS) - 1)
        for t in self._times[:first]:
            self._pictures.pop(t, None)
        del self._times[:first]


def shown_until(frames: Iterable[tuple[float, Frame]], clock: Clock) -> Iterator[tuple[float, float, Frame]]:
    """(shown, replaced, frame): each frame with the time the next one, or the end, takes its place."""
    held: tuple[float, Frame] | None = None
    for seconds, frame in frames:
        if held is not None:
            yield held[0], seconds, held[1]
        held = seconds, frame
    if held is not None:
        yield held[0], clock.end_seconds, held[1]


def tagged_seconds(tag: str | None) -> float | None:
    """Matroska writers' per-stream DURATION tag, "HH:MM:SS.nnnnnnnnn"."""
    try:
        hours, minutes, seconds = (tag or "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def missing_seconds(
    decoded_seconds: float, promised_seconds: float | None, reached_seconds: float
) -> str | None:
    """What is missing of the promised time, in words, if it is enough to call the video partial.

    reached_seconds: how far the file goes, `decoded_seconds` or later when other streams go on.
    """
    if promised_seconds is None:
        return None
    if promised_seconds - reached_seconds <= max(MISSING_SECONDS, MISSING_SHARE * promised_seconds):
        return None
    return f"{decoded_seconds:.2f} of {promised_seconds:.2f} s decoded"
