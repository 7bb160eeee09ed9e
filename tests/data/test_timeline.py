"""Segments, windows and clocks as arithmetic; `test_video.py` looks at the frames."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval.data.timeline import Clock, count_windows, missing_seconds, segment_times, window_span


@given(
    duration=st.floats(0.01, 1e5),
    window=st.floats(0.05, 1e4),
    num_frames=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_windows_tile_the_video(duration: float, window: float, num_frames: int, seed: int) -> None:
    number = min(count_windows(duration, window), 10_000)
    last = count_windows(duration, window) - 1
    spans = [window_span(i, duration, window) for i in [*range(min(number, 5)), last]]
    assert spans[0][0] == 0
    assert spans[-1][1] == duration
    for (_, end), (start, _) in pairwise(spans[:-1]):
        assert end == start
    length = spans[-1][1] - spans[-1][0]
    assert length < 1.5 * window * (1 + 1e-9)
    assert last == 0 or length >= 0.5 * window * (1 - 1e-9)
    start, end = spans[-1]
    for draws in (np.full(num_frames, 0.5), np.random.default_rng(seed).random(num_frames)):
        times = segment_times(start, end, draws)
        edges = np.linspace(start, end, num_frames + 1)
        slack = 1e-9 * end
        assert (edges[:-1] - slack <= times).all()
        assert (times <= edges[1:] + slack).all()


@pytest.mark.parametrize(
    ("pts", "seconds", "end"),
    [
        ([0, 10, 20], [0, 0.1, 0.2], 0.3),
        ([500, 510, 530], [0, 0.1, 0.3], 0.5),  # no duration: the spacing before
        ([0, 0, 0], [0, 0.04, 0.08], 0.12),  # all equal: the rate
        ([None, None, None], [0, 0.04, 0.08], 0.12),
        ([0, None, 20], [0, 0.04, 0.2], 0.36),
        ([0, 20, 10, 30], [0, 0.2, 0.24, 0.3], 0.36),  # out of order: no going back
        ([0, 10, 500_000, 500_010], [0, 0.1, 0.14, 0.24], 0.34),  # leaps ahead by more than an hour
        ([1000, 1010, 0, 10], [0, 0.1, 0.14, 0.24], 0.34),  # the clock restarts
        ([5], [0], 0.04),
    ],
)
def test_broken_timestamps_are_mended(pts: list[int | None], seconds: list[float], end: float) -> None:
    clock = Clock(Fraction(1, 100), 0.04)
    assert [clock.read(tick, 0) for tick in pts] == pytest.approx(seconds)
    assert clock.end_seconds == pytest.approx(end)


@given(st.lists(st.one_of(st.none(), st.integers(-(10**9), 10**9)), min_size=1, max_size=50))
def test_whatever_the_timestamps_seconds_rise_strictly(pts: list[int | None]) -> None:
    clock = Clock(Fraction(1, 1000), 0.04)
    seconds = [clock.read(tick, 7) for tick in pts]
    assert seconds[0] == 0
    assert all(a < b <= a + 3601 for a, b in pairwise(seconds))
    assert clock.end_seconds > seconds[-1]


@given(st.lists(st.integers(0, 4_000_000), min_size=1, max_size=6, unique=True), st.booleans())
def test_an_index_is_sound_if_the_clock_leaves_it_as_it_is(ticks: list[int], in_order: bool) -> None:
    """Seeking by times that `read` would mend lands on other seconds than decoding from the start."""
    ticks = sorted(ticks) if in_order else ticks
    clock = Clock(Fraction(1, 1000), 0.04)
    as_written = [(tick - ticks[0]) / 1000 for tick in ticks]
    assert clock.is_sound(ticks) == ([clock.read(tick, 40) for tick in ticks] == as_written)


@pytest.mark.parametrize(
    ("decoded", "promised", "reached", "missing"),
    [
        (9.4, 10.0, 9.4, "9.40 of 10.00 s decoded"),
        (9.5, 10.0, 9.5, None),  # half a second is forgiven
        (95.0, 100.0, 95.0, None),  # and so are five percent
        (94.0, 100.0, 94.0, "94.00 of 100.00 s decoded"),
        (94.0, 100.0, 99.0, None),  # the promise is about the sound, and that is there
        (12.0, 10.0, 12.0, None),
        (3.0, None, 3.0, None),
    ],
)
def test_how_much_may_be_missing(
    decoded: float, promised: float | None, reached: float, missing: str | None
) -> None:
    assert missing_seconds(decoded, promised, reached) == missing
