"""A scene: what moves, how and where, and the numbers that vary; which scenes there are; where the object is.

Coordinates are fractions of the frame, y down; times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from zlib import crc32

import numpy as np

from cogvideo.data.tinyworld.cast import LOOP, shape, table
from cogvideo.data.tinyworld.places import LAND, LOOKS, PLACES

SECONDS = 4.0
MOTIONS = (
    "right",
    "left",
    "up",
    "down",
    "diagonal",
    "grows",
    "shrinks",
    "stays",
    "circles",
    "bounces",
    "spins",
    "zigzags",
)
CROSSING = ("right", "left", "diagonal", "zigzags")  # motions from one side towards the other
SURFACE_MOTIONS = ("right", "left", "grows", "shrinks", "stays", "bounces", "spins", "zigzags")
_EXTENTS = {  # least and most; 0 for the motions that are not named
    "right": (0.41, 0.52),
    "left": (0.41, 0.52),
    "up": (0.36, 0.46),
    "down": (0.36, 0.46),
    "diagonal": (0.30, 0.40),
    "zigzags": (0.41, 0.5),
    "grows": (0.30, 0.36),
    "shrinks": (0.30, 0.36),
    "circles": (0.17, 0.21),
    "bounces": (0.20, 0.25),
}
_TURNS = {"circles": (1.0, 1.2), "spins": (1.0, 1.4), "bounces": (2.9, 3.1)}  # least and most in a clip

# What a caption calls small, big, slow or fast lies outside the usual ranges above.
SMALL, BIG = (0.28, 0.36), (0.62, 0.72)
SLOW = {
    "right": (0.20, 0.27),
    "left": (0.20, 0.27),
    "up": (0.17, 0.23),
    "down": (0.17, 0.23),
    "diagonal": (0.15, 0.20),
    "zigzags": (0.22, 0.28),
    "grows": (0.14, 0.19),
    "shrinks": (0.14, 0.19),
    "circles": (0.5, 0.7),
    "spins": (0.4, 0.6),
    "bounces": (1.4, 1.6),
}  # extents, or turns
FAST = {
    "right": (0.62, 0.70),
    "left": (0.62, 0.70),
    "up": (0.56, 0.64),
    "down": (0.56, 0.64),
    "diagonal": (0.50, 0.56),
    "zigzags": (0.60, 0.66),
    "grows": (0.44, 0.48),
    "shrinks": (0.44, 0.48),
    "circles": (1.8, 2.2),
    "spins": (2.2, 2.8),
    "bounces": (4.6, 5.2),
}
VARIED = 0.15  # share of the scenes that are small or big, and as many slow or fast, in a varied world


@dataclass(frozen=True)
class Scene:
    sprite: str
    motion: str
    place: str
    size: float = 0.48  # the longer side of the object, mean over the clip
    x: float = 0.5  # centre at time 0
    y: float = 0.5  # at time 0: the foot of what stands or floats on a surface, the centre of everything else
    extent: float = 0.45  # how far: way, height of a hop, radius of a circle, change of size
    speed: float = 1.0  # how often in a clip: turns, hops
    phase: int = 0  # frame of the sprite's loop at time 0
    handed: int = 1  # 1: to the right (also: faces right, turns that way), -1: to the left
    rising: int = 1  # diagonal only. 1: upwards, -1: downwards
    look: int = 0  # seed of the place's variation, 0..LOOKS - 1

    @property
    def held_out(self) -> bool:
        """True for one in eight triples, which no training sees."""
        return crc32(f"{self.sprite}/{self.motion}/{self.place}".encode()) % 8 == 0

    @property
    def stands(self) -> bool:
        """Whether the object keeps to a surface: the ground, or the water of the sea."""
        medium = table()[self.sprite]["medium"]
        on = "ground" in medium if self.place in LAND else self.place == "sea" and "water" in medium
        return on and self.motion in SURFACE_MOTIONS

    @property
    def bulk(self) -> str:
        """small, big, or "" for the usual sizes, and for what grows or shrinks."""
        if self.motion in ("grows", "shrinks"):
            return ""
        return "small" if self.size < 0.37 else "big" if self.size > 0.60 else ""

    @property
    def pace(self) -> str:
        """slow, fast, or "" for the usual speeds, and for what stays."""
        if self.motion not in SLOW:
            return ""
        how_much = self.speed if self.motion in _TURNS else self.extent
        usual = _TURNS.get(self.motion) or _EXTENTS[self.motion]
        slow, fast = (SLOW[self.motion][1] + usual[0]) / 2, (FAST[self.motion][0] + usual[1]) / 2
        return "slow" if how_much < slow else "fast" if how_much > fast else ""


def allowed(sprite: str, motion: str, place: str) -> bool:
    """Whether a sprite can do this there: boats sail, fish swim, birds fly, the rest keeps to the ground."""
    row = table()[sprite]
    medium, kind = row["medium"], row["kind"]
    if sprite == "skier" and place != "snow":
        return False
    if place == "underwater":
        return kind == "sea animal"
    if place == "space":
        return "space" in medium or ("air" in medium and kind in ("face", "thing", "food", "plant"))
    if place == "night sky":
        return "air" in medium or "space" in medium
    surface = "water" if place == "sea" else "ground"
    return "air" in medium or (surface in medium and motion in SURFACE_MOTIONS)


@lru_cache(1024)
def _choices(
    sprite: str, held_out: bool | None, motion: str | None, place: str | None
) -> dict[str, tuple[str, ...]]:
    """Motions, each with its places, that are open to a sprite."""
    found: dict[str, tuple[str, ...]] = {}
    for m in (m for m in MOTIONS if motion in (None, m)):
        there = tuple(
            p
            for p in PLACES
            if place in (None, p)
            and allowed(sprite, m, p)
            and held_out in (None, Scene(sprite, m, p).held_out)
        )
        if there:
            found[m] = there
    return found


def sample_scene(
    rng: np.random.Generator,
    names: Sequence[str],
    held_out: bool | None = False,
    *,
    sprite: str | None = None,
    motion: str | None = None,
    place: str | None = None,
    varied: bool = False,
) -> Scene:
    """A random scene: uniform over the sprites `names`, then over its motions, then over the places for both.

    `held_out`: False never draws a held-out triple, True draws only those, None either. `sprite`, `motion`,
    `place` fix a part. `varied`: a share `VARIED` of the scenes is small or big, and a share slow or fast;
    the others are the same scenes as without it. Raises ValueError if nothing is left.
    """
    names = [n for n in (names if sprite is None else (sprite,)) if n in table()]
    names = [n for n in names if _choices(n, held_out, motion, place)]
    if not names:
        raise ValueError(
            f"no scene with sprite={sprite}, motion={motion}, place={place}, "
            f"held_out={held_out}; motions are {MOTIONS}, places are {PLACES}"
        )
    sprite = names[rng.integers(len(names))]
    choices = _choices(sprite, held_out, motion, place)
    motion = tuple(choices)[rng.integers(len(choices))]
    place = choices[motion][rng.integers(len(choices[motion]))]
    scene = _place_object(rng, Scene(sprite, motion, place))
    bulk, pace = _draw_extremes(rng, motion) if varied else ("", "")
    return _place_object(rng, scene, bulk, pace) if bulk or pace else scene


def _draw_extremes(rng: np.random.Generator, motion: str) -> tuple[str, str]:
    """small, big or "", and slow, fast or ""; what is big has no room to be fast."""
    bulk = ("small", "big")[rng.integers(2)] if rng.random() < VARIED else ""
    pace = ("slow", "fast")[rng.integers(2)] if rng.random() < VARIED else ""
    if motion in ("grows", "shrinks"):
        bulk = ""
    if motion == "stays" or (bulk == "big" and motion not in _TURNS):
        pace = ""
    return bulk, pace


def _place_object(rng: np.random.Generator, scene: Scene, bulk: str = "", pace: str = "") -> Scene:
    """Draw the numbers of a scene, so that the whole way of the object lies inside the frame."""
    motion, (width, height) = scene.motion, shape(scene.sprite)
    grows = motion in ("grows", "shrinks")
    size = rng.uniform(0.50, 0.58) if width > 1.3 * height else rng.uniform(0.40, 0.56)
    size = rng.uniform(0.41, 0.45) if grows else size
    extent = rng.uniform(*_EXTENTS.get(motion, (0, 0)))
    turns = {name: rng.uniform(*usual) for name, usual in _TURNS.items()}
    speed = turns.get(motion, 1.0)
    if bulk or pace:
        size, extent, speed = _extreme(rng, scene, bulk, pace, size, extent, speed)
    handed = {"right": 1, "left": -1}.get(motion, int(rng.choice((-1, 1))))
    rising = int(rng.choice((-1, 1)))
    dx = handed * extent if motion in CROSSING else 0.0
    dy = {
        "up": -extent,
        "down": extent,
        "diagonal": -rising * extent,
        "circles": -2 * extent,
        "bounces": -extent,
        "zigzags": -0.45 * extent,
    }.get(motion, 0.0)
    largest = size + (extent / 2 if grows else 0)
    side = (extent if motion == "circles" else 0) + largest * width / 2

    def start(middle: float, way: float, half: float, jitter: float) -> float:
        first, last = sorted((half - 0.03 - min(way, 0), 1 - half + 0.03 - max(way, 0)))
        return float(np.clip(middle - way / 2 + rng.uniform(-jitter, jitter), first, last))

    x = start(0.5, dx, side, 0.08)
    if scene.stands:
        low = motion == "zigzags" or bulk == "big"
        y = rng.uniform(0.91, 0.95) if low else rng.uniform(0.83, 0.90)
    else:
        level = 0.5 if abs(dy) > 0.15 or scene.place in ("underwater", "space", "night sky") else 0.43
        y = start(level, dy, largest * height / 2, 0.05)
    return replace(
        scene,
        size=size,
        x=x,
        y=float(y),
        extent=extent,
        speed=speed,
        handed=handed,
        rising=rising,
        phase=int(rng.integers(LOOP)),
        look=int(rng.integers(LOOKS)),
    )


def _extreme(
    rng: np.random.Generator, scene: Scene, bulk: str, pace: str, size: float, extent: float, speed: float
) -> tuple[float, float, float]:
    """Size, extent and speed of what is small or big, slow or fast; the usual ones give way to fit."""
    motion, (width, height) = scene.motion, shape(scene.sprite)
    if bulk:
        size = rng.uniform(*(SMALL if bulk == "small" else BIG))
    if pace:
        how_much = rng.uniform(*(SLOW if pace == "slow" else FAST)[motion])
        extent, speed = (extent, how_much) if motion in _TURNS else (how_much, speed)
    longer = max(width, height)
    along = {"up": height, "down": height, "bounces": height, "diagonal": longer, "circles": longer}
    side = along.get(motion, width)  # that has to fit in the frame, next to the way
    if bulk == "big" and motion in _EXTENTS:  # the way is shorter, but not slow
        least = _EXTENTS[motion][0] * (0.8 if motion == "circles" else 0.9)
        reach = 2 if motion == "circles" else 1
        size = max(min(size, (1.06 - reach * least) / side), BIG[0])
        extent = max(min(extent, (1.06 - size * side) / reach), least)
    elif pace == "fast" and motion in (*CROSSING, "up", "down"):  # the object is smaller, but not small
        size = min(size, max((1.06 - extent) / side, 0.38))
    return size, extent, speed


def path(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where the object is at `times` [F] (seconds): centre x, y, size, turn (degrees), foot line; each [F].

    The foot line is where the shadow lies: the surface under a thing that stands, also while it hops.
    """
    p = np.asarray(times, np.float64) / SECONDS
    x, y, size, turn, lift = scene.x + 0 * p, scene.y + 0 * p, scene.size + 0 * p, 0 * p, 0 * p
    motion, extent = scene.motion, scene.extent
    if motion in CROSSING:
        x = x + scene.handed * extent * p
    if motion in ("up", "down", "diagonal"):
        y = y + {"up": -1, "down": 1}.get(motion, -scene.rising) * extent * p
    elif motion == "zigzags":  # two sharp strokes up, two down
        y = y - 0.45 * extent * (1 - np.abs(1 - 2 * (2 * p % 1)))
    elif motion in ("grows", "shrinks"):
        size = size + {"grows": 1, "shrinks": -1}[motion] * extent * (p - 0.5)
    elif motion == "circles":  # starts at the lowest point
        angle = 2 * np.pi * scene.speed * p
        x, y = x + scene.handed * extent * np.sin(angle), y + extent * (np.cos(angle) - 1)
    elif motion == "bounces":
        hop = scene.speed * p % 1
        lift = extent * 4 * hop * (1 - hop)
    elif motion == "spins":
        turn, lift = 360 * scene.handed * scene.speed * p, lift + 0.06 * scene.stands
    half = size * shape(scene.sprite)[1] / 2 if scene.stands else 0
    return x, y - half - lift, size, turn, y
