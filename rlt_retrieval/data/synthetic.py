"""The embedded data set of the demo: captioned shapes that move over still textured backgrounds.

Everything but the moving shape is still, so run-length tokens save much, and the direction can only be told
from the order of the frames: the clip of a composition is exactly the reversed clip of the composition that
moves the other way (same appearance). Arrays: H, W pixels; T frames; coordinates are pixel centres, x right,
y down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from rlt_retrieval.data.shards import ShardSample, sanitize_key, write_shards
from rlt_retrieval.data.streams import sample_rng
from rlt_retrieval.data.video import encode_mp4

COLOURS = {
    "red": (215, 25, 25),
    "green": (20, 160, 40),
    "blue": (30, 50, 225),
    "yellow": (250, 230, 20),
    "purple": (160, 30, 190),
    "cyan": (30, 225, 235),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
# the two muted tones of each texture
BACKGROUNDS = {
    "stripes": ((150, 125, 110), (185, 165, 150)),
    "checks": ((120, 138, 120), (165, 183, 165)),
    "bricks": ((160, 125, 115), (190, 180, 170)),
    "waves": ((120, 145, 155), (165, 185, 190)),
}
DISTRACTORS = {
    "orange star": (255, 120, 0),
    "white bar": (250, 250, 250),
    "black moon": (10, 10, 10),
}
CAPTION = "a {colour} {shape} moves {direction} over {background} beside a still {distractor}"
GROUP_SIZE = len(DIRECTIONS)


@dataclass(frozen=True)
class SyntheticSpec:
    """Size of the clips and the ranges that appearances are drawn from; lengths in pixels."""

    side: int = 64
    num_frames: int = 8
    fps: int = 8
    crf: int = 14  # of the H.264 encoding: no still patch then differs by the RLT threshold (at 18 a few do)
    shape_size: tuple[float, float] = (16.0, 20.0)
    speed: tuple[float, float] = (4.0, 5.5)  # pixels a frame
    distractor_size: float = 16.0
    distractor_margin: tuple[float, float] = (1.5, 3.5)  # from the two edges of its corner


SPEC = SyntheticSpec()


@dataclass(frozen=True)
class Composition:
    """What a clip shows and its caption says."""

    colour: str
    shape: str
    direction: str
    background: str
    distractor: str

    def caption(self) -> str:
        """No two compositions have the same."""
        return CAPTION.format(**vars(self))

    def with_direction(self, direction: str) -> Composition:
        return replace(self, direction=direction)

    def reversed(self) -> Composition:
        """What the same clip shows when played backwards."""
        return self.with_direction(OPPOSITE[self.direction])


def split(seed: int, num_test: int = 256) -> tuple[list[Composition], list[Composition]]:
    """All compositions, shuffled, as (train, test): no test composition is in train.

    Raises:
        ValueError: so many test compositions that training would lack a value or hard-negative groups.
    """
    everything = [
        Composition(*values) for values in product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS, DISTRACTORS)
    ]
    if not 0 < num_test <= len(everything) // 4:
        raise ValueError(f"num_test must be in 1..{len(everything) // 4}, got {num_test}")
    order = sample_rng(seed, 0, "split").permutation(len(everything))
    shuffled = [everything[i] for i in order]
    return shuffled[num_test:], shuffled[:num_test]


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Appearance:
    """Everything random in a clip. None of it depends on the composition, so that a group can share it."""

    phase: tuple[float, float]
    shade: float
    size: float
    path_length: float
    corner: tuple[int, int]
    distractor_xy: tuple[float, float]
    middle: tuple[float, float]
    lane: tuple[float, float]


def _draw_appearance(rng: np.random.Generator, spec: SyntheticSpec) -> _Appearance:
    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    size, speed = uniform(*spec.shape_size), uniform(*spec.speed)
    path_length = speed * (spec.num_frames - 1)
    corner = (int(rng.integers(2)), int(rng.integers(2)))
    inset = [uniform(*spec.distractor_margin) + spec.distractor_size / 2 for _ in range(2)]
    # The shape's lane keeps clear of the band of the distractor, whichever way the shape moves.
    clear = spec.distractor_margin[1] + spec.distractor_size + size / 2
    lanes = [uniform(clear, spec.side - 1 - size / 2) for _ in range(2)]
    reach = (path_length + size) / 2
    return _Appearance(
        phase=(uniform(0, 1), uniform(0, 1)),
        shade=uniform(-8, 8),
        size=size,
        path_length=path_length,
        corner=corner,
        distractor_xy=_from_corner(inset, corner, spec),
        middle=(uniform(reach, spec.side - 1 - reach), uniform(reach, spec.side - 1 - reach)),
        lane=_from_corner(lanes, corner, spec),
    )


def _from_corner(distances: list[float], corner: tuple[int, int], spec: SyntheticSpec) -> tuple[float, float]:
    x, y = (spec.side - 1 - d if far else d for d, far in zip(distances, corner, strict=True))
    return x, y


def render(composition: Composition, rng: np.random.Generator, spec: SyntheticSpec = SPEC) -> np.ndarray:
    """The clip of a composition: uint8 [num_frames, side, side, 3].

    Equal generators give equal appearances (background phase, size, places, speed) whatever the composition,
    so `render(c.reversed(), rng) == render(c, same rng)[::-1]`.
    """
    look = _draw_appearance(rng, spec)
    still_HWC = _background(composition.background, look, spec)
    paint_shape(still_HWC, composition.distractor.split()[1], spec.distractor_size, look.distractor_xy,
           DISTRACTORS[composition.distractor])  # fmt: skip
    frames_THWC = np.repeat(still_HWC[None], spec.num_frames, axis=0)
    for frame_HWC, centre in zip(frames_THWC, _centres(composition.direction, look, spec), strict=True):
        paint_shape(frame_HWC, composition.shape, look.size, centre, COLOURS[composition.colour])
    return np.rint(frames_THWC).astype(np.uint8)


def _centres(direction: str, look: _Appearance, spec: SyntheticSpec) -> list[tuple[float, float]]:
    """Centre of the moving shape in every frame; opposite directions take the very same places backwards."""
    offsets = np.linspace(-look.path_length / 2, look.path_length / 2, spec.num_frames)
    horizontal = DIRECTIONS[direction][0] != 0
    x, y = (look.middle[0], look.lane[1]) if horizontal else (look.lane[0], look.middle[1])
    places = [(x + float(d), y) if horizontal else (x, y + float(d)) for d in offsets]
    return places[:: sum(DIRECTIONS[direction])]


def _background(name: str, look: _Appearance, spec: SyntheticSpec) -> np.ndarray:
    """Float32 [side, side, 3]: a mix of the texture's two tones."""
    y_HW, x_HW = np.mgrid[: spec.side, : spec.side].astype(np.float32)
    dark, light = (np.array(tone, np.float32) + look.shade for tone in BACKGROUNDS[name])
    mix_HW = texture(name, x_HW, y_HW, *look.phase)
    return dark + (light - dark) * mix_HW[..., None]


def texture(name: str, x: np.ndarray, y: np.ndarray, phase_x: float, phase_y: float) -> np.ndarray:
    """How much of the light tone every pixel has, 0..1; `x`, `y` in pixels, phases in periods."""
    if name == "stripes":
        return _edge(_triangle_wave((x + y) / 11 + phase_x) * 5.5)
    if name == "checks":
        return _edge(_triangle_wave(x / 16 + phase_x) * _triangle_wave(y / 16 + phase_y) * 16)
    if name == "bricks":
        row = np.floor(y / 8 + phase_y)
        u, v = (x / 16 + phase_x + row / 2) % 1 * 16, (y / 8 + phase_y) % 1 * 8
        return 1 - _edge(np.minimum(u, v) - 1.5)
    assert name == "waves", name
    return _edge(_triangle_wave(y / 13 + phase_y + 0.22 * np.sin(2 * np.pi * (x / 26 + phase_x))) * 6.5)


def _triangle_wave(t: np.ndarray) -> np.ndarray:
    """-0.5 … 0.5 with period 1."""
    return np.abs((t % 1) * 2 - 1) - 0.5


def _edge(distance: np.ndarray) -> np.ndarray:
    """Anti-aliased inside: 0 where `distance` (pixels, positive inside) ≤ −½, 1 where ≥ ½."""
    return np.clip(distance + 0.5, 0, 1)


def paint_shape(
    picture_HWC: np.ndarray,
    shape: str,
    size: float,
    centre: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    """Lay an anti-aliased shape over the picture, in place."""
    reach = int(size / 2) + 2
    left, top = max(int(centre[0]) - reach, 0), max(int(centre[1]) - reach, 0)
    window = picture_HWC[top : int(centre[1]) + reach + 2, left : int(centre[0]) + reach + 2]
    y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]].astype(np.float32)
    cover = _edge(_inside(shape, x - centre[0], y - centre[1], size / 2))[..., None]
    window += (np.array(colour, np.float32) - window) * cover


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline of a shape in a box of half side `radius`, about; positive inside."""
    r, far = radius, np.hypot(x, y)
    if shape == "circle":
        return r - far
    if shape == "square":
        return 0.88 * r - np.maximum(abs(x), abs(y))
    if shape == "triangle":
        return np.minimum(0.85 * r - y, (y + r - 1.9 * abs(x)) / 2.15)
    if shape == "star":
        turn = np.abs((np.arctan2(x, -y) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2
        return r * (1.05 - 0.65 * turn) - far
    if shape == "ring":
        return 0.17 * r + 0.3 - abs(far - 0.78 * r)
    if shape == "cross":
        return 0.24 * r - np.minimum(abs(x + y), abs(x - y)) / np.sqrt(2) + np.minimum(0, r - far)
    if shape == "bar":
        return np.minimum(0.3 * r - abs(y), r - abs(x))
    assert shape == "moon", shape
    return np.minimum(r - far, np.hypot(x - 0.55 * r, y) - 0.85 * r)


# --- shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticShards:
    """Paths of the written shards; `test_compositions` are those of the test samples, in order."""

    train: list[Path]
    test: list[Path]
    reversed_test: list[Path]
    test_compositions: list[Composition]


def write_synthetic_shards(
    out_dir: str | Path,
    *,
    num_train: int,
    num_test: int = 256,
    seed: int,
    num_streams: int = 2,
    spec: SyntheticSpec = SPEC,
) -> SyntheticShards:
    """Write `train/` (one shard a stream), `test/` and `reversed/` (one shard each).

    Training shards with even numbers hold groups of four clips that differ in direction only, those with odd
    numbers hold single clips; dealt as `paths[s::n]` to any even number n of streams, half of every batch
    that takes equal slices of the streams is groups.
    `reversed/` holds the test clips played backwards under the same keys; their captions say the opposite
    direction.

    Raises:
        ValueError: `num_streams` is not even, or `num_train` is no multiple of 4 · num_streams.
        ShardError: the folder cannot be written or holds shards.
    """
    if num_streams < 2 or num_streams % 2 or num_train < 1 or num_train % (GROUP_SIZE * num_streams):
        raise ValueError(
            f"num_streams must be even and num_train a multiple of {GROUP_SIZE} * num_streams, "
            f"got {num_streams} and {num_train}"
        )
    train, test = split(seed, num_test)
    per_shard = num_train // num_streams
    out = Path(out_dir)
    train_samples = _train_samples(train, num_streams, per_shard, seed, spec)
    backwards = [composition.reversed() for composition in test]
    return SyntheticShards(
        train=write_shards(train_samples, out / "train", samples_per_shard=per_shard),
        test=write_shards(_test_samples(test, seed, spec), out / "test", samples_per_shard=num_test),
        reversed_test=write_shards(
            _test_samples(backwards, seed, spec), out / "reversed", samples_per_shard=num_test
        ),
        test_compositions=test,
    )


def _train_samples(
    train: list[Composition], num_shards: int, per_shard: int, seed: int, spec: SyntheticSpec
) -> Iterator[ShardSample]:
    """All training samples in shard order; groups and singles each go round their compositions."""
    known = set(train)
    wholes = [
        c for c in train if c.direction == "left" and all(c.with_direction(d) in known for d in DIRECTIONS)
    ]
    singles = ((f"single-{i:06d}", train[i % len(train)]) for i in range(num_shards // 2 * per_shard))
    groups = (
        (f"group-{i:06d}", wholes[i % len(wholes)]) for i in range(num_shards // 2 * per_shard // GROUP_SIZE)
    )
    for shard in range(num_shards):
        if shard % 2:
            for _ in range(per_shard):
                name, composition = next(singles)
                yield _sample(composition, name, seed, spec)
        else:
            for _ in range(per_shard // GROUP_SIZE):
                name, composition = next(groups)
                for direction in DIRECTIONS:
                    yield _sample(composition.with_direction(direction), name, seed, spec, group=name)


def _test_samples(compositions: list[Composition], seed: int, spec: SyntheticSpec) -> Iterator[ShardSample]:
    """Names and so appearances go by place: the opposite compositions give the same clips backwards."""
    for i, composition in enumerate(compositions):
        yield _sample(composition, f"test-{i:06d}", seed, spec)


def _sample(
    composition: Composition,
    name: str,
    seed: int,
    spec: SyntheticSpec,
    group: str | None = None,
) -> ShardSample:
    """A sample whose appearance comes from (seed, name); members of a group share the name."""
    frames_THWC = render(composition, sample_rng(seed, 0, name), spec)
    key = sanitize_key(name if group is None else f"{name}-{composition.direction}")
    media = encode_mp4(frames_THWC, fps=spec.fps, crf=spec.crf)
    return ShardSample(key, media, (composition.caption(),), key, 0.0, spec.num_frames / spec.fps, group)
