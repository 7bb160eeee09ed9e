"""What is left out of decoding is what nobody wants, and its place among the frames is kept."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval.data.skipping import LOOKAHEAD_PACKETS, Astray, Ledger, Unseen, look_ahead


class Packet(NamedTuple):
    pts: int | None
    duration: int | None = 1


class Frame(NamedTuple):
    pts: int | None


def no_frame(shown: int, replaced: int) -> bool:
    return False


def any_frame(shown: int, replaced: int) -> bool:
    return True


def test_packets_pass_at_once_while_nothing_is_said_to_be_wanted():
    read = []

    def packets():
        for tick in range(5):
            read.append(tick)
            yield Packet(tick)

    passed = look_ahead(packets(), lambda: None)
    assert next(passed) == (Packet(0), False)
    assert read == [0]
    assert [left_out for _, left_out in passed] == [False] * 4


def test_the_last_frame_and_packets_without_a_timestamp_are_never_left_out():
    packets = [Packet(0), Packet(3), Packet(1), Packet(None), Packet(2), Packet(None)]
    judged = list(look_ahead(packets, lambda: no_frame))
    assert [packet for packet, _ in judged] == packets
    assert [left_out for _, left_out in judged] == [True, False, True, False, True, False]


def test_a_timestamp_that_comes_twice_is_not_left_out():
    judged = look_ahead(map(Packet, (0, 1, 2, 2, 3, 4)), lambda: no_frame)
    assert [packet.pts for packet, left_out in judged if not left_out] == [2, 2, 4]


def test_what_is_wanted_is_decoded():
    assert not any(left_out for _, left_out in look_ahead(map(Packet, range(50)), lambda: any_frame))


@given(
    st.lists(st.integers(0, 400), min_size=2, max_size=120, unique=True),
    st.lists(st.integers(0, 400), max_size=8),
    st.randoms(use_true_random=False),
    st.integers(1, 60),
)
def test_no_frame_on_screen_at_a_wanted_time_is_left_out(ticks, times, random, disorder):
    """Whatever the order of the packets, those that reach beyond the look-ahead included."""
    in_file = sorted(ticks, key=lambda tick: tick + random.uniform(0, disorder))

    def wanted(shown: int, replaced: int) -> bool:
        return any(shown <= time < replaced for time in times)

    rising = [*sorted(ticks), math.inf]
    successor = dict(pairwise(rising))
    for packet, left_out in look_ahead(map(Packet, in_file), lambda: wanted):
        assert not (left_out and wanted(packet.pts, successor[packet.pts]))


def test_unwanted_frames_of_an_orderly_file_are_left_out():
    packets = [Packet(tick) for tick in range(3 * LOOKAHEAD_PACKETS)]
    judged = list(look_ahead(packets, lambda: lambda shown, replaced: shown <= 40 < replaced))
    assert [packet.pts for packet, left_out in judged if not left_out] == [40, packets[-1].pts]


@given(st.integers(1, 60), st.sets(st.integers(1, 59)), st.sets(st.integers(1, 59)), st.integers(0, 5))
def test_left_out_frames_stand_in_their_place(count, asked, needed, delay):
    """`needed` frames come out although they were asked to be left out: others refer to them."""
    ledger, placed, in_decoder = Ledger(), [], []
    for tick in range(count):
        ledger.sent(Packet(tick), tick in asked)
        if tick not in asked - needed:
            in_decoder.append(Frame(tick))
        while len(in_decoder) > delay:
            placed += ledger.placed(in_decoder.pop(0), strict=True)
    for frame in in_decoder:
        placed += ledger.placed(frame, strict=True)
    placed += ledger.rest(strict=True)
    assert [item.pts for item in placed] == list(range(count))
    assert {item.pts for item in placed if isinstance(item, Unseen)} == {
        t for t in asked - needed if t < count
    }


def ledger_with(*ticks: int) -> Ledger:
    ledger = Ledger()
    for tick in ticks:
        ledger.sent(Packet(tick), False)
    return ledger


def test_a_missing_frame_is_noticed_only_where_frames_are_left_out():
    for strict in (False, True):
        ledger = ledger_with(0, 1, 2)
        assert list(ledger.placed(Frame(0), strict)) == [Frame(0)]
        if strict:
            with pytest.raises(Astray):
                list(ledger.placed(Frame(2), strict))
        else:
            assert list(ledger.placed(Frame(2), strict)) == [Frame(2)]


@pytest.mark.parametrize("tick", [None, 0, 1])
def test_frames_that_do_not_rise_are_noticed(tick):
    ledger = ledger_with(1)
    list(ledger.placed(Frame(1), strict=True))
    with pytest.raises(Astray):
        list(ledger.placed(Frame(tick), strict=True))


def test_leaving_out_what_should_have_come_before_is_noticed():
    """Decoding everything would mend such a timestamp, and with it those of the frames after."""
    ledger = ledger_with(0, 40, 120)
    for tick in (0, 40, 120):
        list(ledger.placed(Frame(tick), strict=True))
    with pytest.raises(Astray):
        ledger.sent(Packet(80), True)


def test_a_frame_missing_at_the_end_is_noticed():
    ledger = ledger_with(0, 1)
    list(ledger.placed(Frame(0), strict=True))
    with pytest.raises(Astray):
        list(ledger.rest(strict=True))
    assert list(ledger.rest(strict=False)) == []


def test_what_lies_before_the_frame_where_decoding_began_is_forgotten():
    """Frames before a key frame refer to what was skipped by a seek: decoders give none of them."""
    ledger = Ledger()
    ledger.sent(Packet(10), False)
    ledger.sent(Packet(8), False)
    ledger.sent(Packet(9), True)
    assert list(ledger.placed(Frame(10), strict=True)) == [Frame(10)]
    ledger.sent(Packet(7), False)
    ledger.sent(Packet(11), False)
    assert list(ledger.placed(Frame(11), strict=True)) == [Frame(11)]
    assert list(ledger.rest(strict=True)) == []
