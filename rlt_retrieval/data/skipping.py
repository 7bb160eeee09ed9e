"""Frames that no other frame needs and nobody wants: told from the packets, before decoding. Knows no FFmpeg.

Decoders can leave out frames that no other frame refers to. Whether a frame is wanted shows when its packet and the
packet of the frame after it are known, so packets are looked at some time before they are decoded.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

LOOKAHEAD_PACKETS = 32  # more than the frames that codecs put out of order; fewer would only skip less

Wanted = Callable[[int, int], bool]  # (shown, replaced), in ticks


class Unseen(NamedTuple):
    """Stands for a frame that was not decoded."""

    pts: int
    duration: int
    key_frame: bool = False


class Astray(Exception):
    """Skipping did not lead where the packets or the index said: decode everything."""


def look_ahead(packets: Iterable[Any], wanted: Callable[[], Wanted | None]) -> Iterator[tuple[Any, bool]]:
    """(packet, whether its frame may be left out), in order. While `wanted()` is None, each is passed on at once.

    A packet without a timestamp or with that of another one, and one after which no later one is known, is never left
    out: the last frame of a video tells where it ends.
    """
    ahead: deque[Any] = deque()
    known_ticks: list[int] = []
    for packet in packets:
        ahead.append(packet)
        if packet.pts is not None and wanted() is not None:
            bisect.insort(known_ticks, packet.pts)
        while ahead and (len(ahead) > LOOKAHEAD_PACKETS or wanted() is None):
            yield _judged(ahead.popleft(), known_ticks, wanted())
    for packet in ahead:
        yield _judged(packet, known_ticks, wanted())


def _judged(packet: Any, known_ticks: list[int], wanted: Wanted | None) -> tuple[Any, bool]:
    if wanted is None or packet.pts is None:
        return packet, False
    following = bisect.bisect_right(known_ticks, packet.pts)
    is_repeated = known_ticks[max(0, following - 2) : following].count(packet.pts) > 1
    if following == len(known_ticks) or is_repeated:
        return packet, False
    # The true successor may come later in the file: then it is nearer than the known one, which errs to "wanted".
    unwanted = not wanted(packet.pts, known_ticks[following])
    del known_ticks[: max(0, following - 4 * LOOKAHEAD_PACKETS)]
    return packet, unwanted


class Ledger:
    """Puts what was left out back in its place among the frames that come out of a decoder."""

    def __init__(self) -> None:
        self._unseen: list[Unseen] = []
        self._due_ticks: list[int] = []  # of frames that must come out
        self._first: int | None = None  # of the frames that came out
        self._last: int | None = None

    def sent(self, packet: Any, left_out: bool) -> None:
        """Note a packet before it is decoded.

        Raises Astray where one is left out whose place among the frames has gone by.
        """
        if packet.pts is None or (self._first is not None and packet.pts < self._first):
            return  # the flushing one, or of a frame before the key frame where decoding began
        if left_out and self._last is not None and packet.pts <= self._last:
            raise Astray
        if left_out:
            heapq.heappush(self._unseen, Unseen(packet.pts, packet.duration or 0))
        else:
            heapq.heappush(self._due_ticks, packet.pts)

    def placed(self, frame: Any, strict: bool) -> Iterator[Any]:
        """What was left out before a frame, then the frame.

        Raises Astray, if `strict`, where frames do not rise or one between the last one and this one is missing.
        """
        if frame.pts is None or (self._last is not None and frame.pts <= self._last):
            if strict:
                raise Astray
            yield frame
            return
        missing = self._pop_due(frame.pts)
        is_first, self._last = self._last is None, frame.pts
        if is_first:
            self._first = frame.pts
        if strict and missing and not is_first:
            raise Astray
        while self._unseen and self._unseen[0].pts <= frame.pts:
            unseen = heapq.heappop(self._unseen)
            if unseen.pts < frame.pts and not is_first:
                yield unseen
        yield frame

    def _pop_due(self, tick: int) -> bool:
        """Forget what was due up to a tick; whether anything was due before it."""
        missing = False
        while self._due_ticks and self._due_ticks[0] <= tick:
            missing |= heapq.heappop(self._due_ticks) < tick
        return missing

    def rest(self, strict: bool) -> Iterator[Unseen]:
        """What was left out after the last frame."""
        if strict and self._due_ticks:
            raise Astray
        yield from sorted(self._unseen)
