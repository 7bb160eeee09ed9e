"""Clips for the synthetic proof: still scenes in half of which something is there, or has another colour, for a while.

A caption says what is shown, never how it moves, and cannot be decided from too few frames: what is there for a while
may be missed. Beside what captions tell, most clips hold a motion that they do not (a sway, a passing speck, a slow
pan) and all hold sensor noise, below the usual RLT threshold, so that no patch repeats exactly.

Shapes: T frames, H x W pixels. Coordinates are pixel centres, x right, y down.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from rlt_retrieval.data.streams import sample_rng
from rlt_retrieval.data.synthetic import COLOURS, SHAPES, paint_shape, texture

# the two muted tones of each texture of the demo; here colour alone tells textures apart
TONES = {
    "stripes": ((150, 125, 95), (190, 170, 135)),
    "checks": ((100, 125, 80), (140, 165, 120)),
    "bricks": ((165, 110, 125), (205, 155, 170)),
    "waves": ((120, 132, 145), (160, 172, 185)),
}
GROUNDS = {
    "grass": (60, 145, 40),
    "sand": (235, 205, 120),
    "water": (40, 95, 185),
    "snow": (245, 248, 255),
    "soil": (95, 60, 35),
    "lava": (235, 75, 20),
}
COMPANION_COLOURS = {
    "orange": (255, 120, 0),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "pink": (255, 130, 200),
}
COMPANION_SHAPES = ("star", "bar")
COMPANIONS = tuple(f"{colour} {shape}" for colour, shape in product(COMPANION_COLOURS, COMPANION_SHAPES))
SPECK_COLOUR = (110, 100, 95)

KIND_SHARES = {"still": 0.5, "companion": 0.25, "colour": 0.25}
MOTION_SHARES = {"none": 0.3, "sway": 0.3, "speck": 0.25, "pan": 0.15}
WHERE = ("start", "middle", "end")


@dataclass(frozen=True)
class EventSpec:
    """Size of the clips and the ranges that appearances are drawn from; lengths in pixels."""

    side: int = 64
    num_frames: int = 16
    noise: float = 1.5  # standard deviation, of 255 grey levels
    ground_height: float = 12.0
    shape_size: tuple[float, float] = (20.0, 24.0)
    companion_size: tuple[float, float] = (18.0, 22.0)
    event_share: tuple[float, float] = (1 / 8, 5 / 8)  # of the clip's frames
    sway: tuple[float, float] = (1.0, 3.0)  # to either side
    sway_frames: tuple[float, float] = (8.0, 16.0)  # there and back
    speck_size: float = 6.0
    speck_speed: tuple[float, float] = (2.0, 3.5)  # a frame
    pan_speed: tuple[float, float] = (0.1, 0.5)  # a frame


SPEC = EventSpec()


@dataclass(frozen=True)
class Scene:
    """What one moment shows."""

    background: str
    ground: str
    shape: str
    colour: str
    companion: str | None

    def caption(self) -> str:
        return self._caption(f"a {self.colour} {self.shape}")

    def _caption(self, thing: str, when: str = "") -> str:
        beside = f", {when}beside {_with_article(self.companion)}" if self.companion else ""
        return f"{thing}{beside}, over {self.background} and {self.ground}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Story:
    """What a clip shows: a scene, and the scene that it is `during` its event (None: no event)."""

    scene: Scene
    during: Scene | None = None

    def caption(self) -> str:
        if self.during is None:
            return self.scene.caption()
        if self.during.colour == self.scene.colour:
            return self.during._caption(f"a {self.scene.colour} {self.scene.shape}", "for a while ")
        return self.scene._caption(
            f"a {self.scene.shape}, {self.scene.colour} and for a while {self.during.colour}"
        )

    def backdrop(self) -> tuple[str, ...]:
        """What is told apart by colour alone; shapes and companions take longer to learn."""
        return self.scene.background, self.scene.ground, self.scene.colour

    def contents(self) -> tuple[object, ...]:
        """All that is ever shown, whenever and however long: what a mean over frames is sure to tell apart."""
        last = self.during or self.scene
        colours = frozenset({self.scene.colour, last.colour})
        return last.background, last.ground, last.shape, last.companion, colours


@dataclass(frozen=True)
class EventClip:
    """A rendered story. frames_TCHW: uint8; the event is shown in frames start <= t < end (0, 0 without one)."""

    frames_TCHW: np.ndarray
    story: Story
    start: int
    end: int

    @property
    def inside_T(self) -> np.ndarray:
        """bool [T]: the frames that show the event."""
        times_T = np.arange(len(self.frames_TCHW))
        return (self.start <= times_T) & (times_T < self.end)


# --- stories ------------------------------------------------------------------------------------------------


@functools.cache
def all_stories(kind: str) -> tuple[Story, ...]:
    """Every story of a kind: "still" (no event), "companion" (there for a while) or "colour" (another for a while)."""
    scenes = [Scene(*v) for v in product(TONES, GROUNDS, SHAPES, COLOURS, (None, *COMPANIONS))]
    if kind == "still":
        return tuple(Story(scene) for scene in scenes)
    if kind == "companion":
        return tuple(Story(replace(scene, companion=None), scene) for scene in scenes if scene.companion)
    assert kind == "colour", kind
    return tuple(
        Story(scene, replace(scene, colour=other))
        for scene, other in product(scenes, COLOURS)
        if other != scene.colour
    )


def split(seed: int, num_test: int = 1024) -> tuple[dict[str, list[Story]], list[Story]]:
    """Stories to train on, by kind, and `num_test` to test on, half of them with an event.

    No two test stories have the same contents, and no story to train on has those of a test story.
    """
    rng = sample_rng(seed, 0, "event stories")
    test: dict[tuple[object, ...], Story] = {}
    for kind, share in KIND_SHARES.items():
        stories = all_stories(kind)
        wanted = len(test) + round(share * num_test)
        for i in rng.permutation(len(stories)):
            if len(test) < wanted:
                test.setdefault(stories[i].contents(), stories[i])
    train = {kind: [s for s in all_stories(kind) if s.contents() not in test] for kind in KIND_SHARES}
    return train, list(test.values())


def held_out_clips(seed: int, num_test: int = 1024, spec: EventSpec = SPEC) -> list[EventClip]:
    """The test set of a seed; the same one each time."""
    _, stories = split(seed, num_test)
    return [render(story, sample_rng(seed, 0, f"test-{i}"), spec) for i, story in enumerate(stories)]


def training_clips(
    seed: int, group_size: int, spec: EventSpec = SPEC, num_test: int = 1024
) -> Iterator[EventClip]:
    """Clips to train on, without end, in groups of different stories over one backdrop; kinds by their shares."""
    by_backdrop: dict[tuple[str, ...], dict[str, list[Story]]] = defaultdict(lambda: defaultdict(list))
    for kind, stories in split(seed, num_test)[0].items():
        for story in stories:
            by_backdrop[story.backdrop()][kind].append(story)
    rng = sample_rng(seed, 0, f"{group_size} training clips of {spec.num_frames} frames")
    backdrops = list(by_backdrop.values())
    while True:
        alike = backdrops[rng.integers(len(backdrops))]
        for kind, number in zip(
            KIND_SHARES, rng.multinomial(group_size, list(KIND_SHARES.values())), strict=True
        ):
            for i in rng.choice(len(alike[kind]), number, replace=False):
                yield render(alike[kind][i], rng, spec)


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """Everything random in a clip but its noise; pictures' places without motion."""

    phase: tuple[float, float]
    shade: float
    size: float
    companion_size: float
    shape_xy: tuple[float, float]
    companion_xy: tuple[float, float]


def render(story: Story, rng: np.random.Generator, spec: EventSpec = SPEC) -> EventClip:
    """A clip of a story; all else (places, sizes, moment of the event, motion, noise) is drawn from `rng`."""
    look = _draw_look(rng, spec)
    start, end = _draw_span(rng, spec) if story.during else (0, 0)
    motion = rng.choice(list(MOTION_SHARES), p=list(MOTION_SHARES.values()))
    sway_T2, speck_T2, pan_T2 = _draw_motion(rng, spec, str(motion))
    pictures: dict[tuple[object, ...], np.ndarray] = {}
    frames = []
    for t in range(spec.num_frames):
        scene = story.during if story.during and start <= t < end else story.scene
        state = (scene, tuple(sway_T2[t]), tuple(speck_T2[t]), tuple(pan_T2[t]))
        if state not in pictures:
            pictures[state] = _picture(scene, look, sway_T2[t], speck_T2[t], pan_T2[t], spec)
        frames.append(pictures[state])
    clean_THWC = np.stack(frames)
    noise_THWC = rng.normal(0, spec.noise, clean_THWC.shape).astype(np.float32)
    frames_THWC = np.rint(clean_THWC + noise_THWC).clip(0, 255).astype(np.uint8)
    return EventClip(np.ascontiguousarray(frames_THWC.transpose(0, 3, 1, 2)), story, start, end)


def _draw_look(rng: np.random.Generator, spec: EventSpec) -> _Look:
    size, companion_size = rng.uniform(*spec.shape_size), rng.uniform(*spec.companion_size)
    shape_is_left = rng.random() < 0.5

    def place(width: float, left: bool) -> tuple[float, float]:
        x = rng.uniform(width / 2 + 1, spec.side / 2 - width / 2)
        y = rng.uniform(width / 2 + 1, spec.side - spec.ground_height - width / 2)
        return (x if left else spec.side - 1 - x), y

    return _Look(
        phase=(rng.uniform(), rng.uniform()),
        shade=rng.uniform(-8, 8),
        size=size,
        companion_size=companion_size,
        shape_xy=place(size, shape_is_left),
        companion_xy=place(companion_size, not shape_is_left),
    )


def _draw_span(rng: np.random.Generator, spec: EventSpec) -> tuple[int, int]:
    """First frame of the event and the first after it: at the clip's start, in its middle or at its end."""
    shortest, longest = (max(1, round(share * spec.num_frames)) for share in spec.event_share)
    length = int(rng.integers(shortest, longest + 1))
    last = spec.num_frames - length
    where = WHERE[rng.integers(len(WHERE))]
    start = {"start": 0, "middle": int(rng.integers(1, max(2, last))), "end": last}[where]
    return start, start + length


def _draw_motion(
    rng: np.random.Generator, spec: EventSpec, motion: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each float64 [T, 2] (x, y): how far the shape is from its place, the speck's centre (NaN: no speck), the pan."""
    times_T1 = np.arange(spec.num_frames)[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    direction_2 = np.array([np.cos(angle), np.sin(angle)])
    sway_T2 = pan_T2 = np.zeros((spec.num_frames, 2))
    speck_T2 = np.full((spec.num_frames, 2), np.nan)
    if motion == "sway":
        turns_T1 = times_T1 / rng.uniform(*spec.sway_frames) + rng.uniform()
        sway_T2 = rng.uniform(*spec.sway) * np.sin(2 * np.pi * turns_T1) * direction_2
    if motion == "speck":
        middle_2 = rng.uniform(0.3, 0.7, 2) * spec.side
        speed = rng.uniform(*spec.speck_speed)
        speck_T2 = middle_2 + (times_T1 - spec.num_frames / 2) * speed * direction_2
    if motion == "pan":
        pan_T2 = times_T1 * rng.uniform(*spec.pan_speed) * direction_2
    return sway_T2, speck_T2, pan_T2


def _picture(
    scene: Scene, look: _Look, sway_2: np.ndarray, speck_2: np.ndarray, pan_2: np.ndarray, spec: EventSpec
) -> np.ndarray:
    """Float32 [H, W, 3]: the scene without noise, all of it moved by the pan."""
    picture_HWC = _background(scene, look, pan_2, spec)
    if scene.companion:
        colour, shape = scene.companion.split()
        x, y = look.companion_xy + pan_2
        paint_shape(picture_HWC, shape, look.companion_size, (x, y), COMPANION_COLOURS[colour])
    x, y = look.shape_xy + sway_2 + pan_2
    paint_shape(picture_HWC, scene.shape, look.size, (x, y), COLOURS[scene.colour])
    if (abs(speck_2 - spec.side / 2) < spec.side / 2).all():  # in the picture; never where it is NaN
        paint_shape(picture_HWC, "circle", spec.speck_size, (speck_2[0], speck_2[1]), SPECK_COLOUR)
    return picture_HWC


def _background(scene: Scene, look: _Look, pan_2: np.ndarray, spec: EventSpec) -> np.ndarray:
    y_HW, x_HW = np.mgrid[: spec.side, : spec.side].astype(np.float32)
    dark, light = (np.array(tone, np.float32) + look.shade for tone in TONES[scene.background])
    mix_HW = texture(scene.background, x_HW - pan_2[0], y_HW - pan_2[1], *look.phase).astype(np.float32)
    wall_HWC = dark + (light - dark) * mix_HW[..., None]
    is_ground_HW1 = (y_HW - pan_2[1] >= spec.side - spec.ground_height)[..., None]
    return np.where(is_ground_HW1, np.array(GROUNDS[scene.ground], np.float32) + look.shade, wall_HWC)
