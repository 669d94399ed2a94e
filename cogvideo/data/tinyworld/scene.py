"""A scene: what moves, how and where, and the numbers that vary; which scenes exist; where the object is.

Coordinates are fractions of the frame, y down; times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from zlib import crc32

import numpy as np

from cogvideo.data.tinyworld.cast import LOOP, find, shape
from cogvideo.data.tinyworld.own import plain, world_of
from cogvideo.data.tinyworld.places import LOOKS, PLACES, is_land

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
_EXTENTS = {  # minimum and maximum; 0 for the motions that are not named
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
_TURNS = {"circles": (1.0, 1.2), "spins": (1.0, 1.4), "bounces": (2.9, 3.1)}  # minimum and maximum, a clip

# What a caption calls small, big, slow or fast lies outside the usual ranges above.
SMALL_SIZES = (0.28, 0.36)
BIG_SIZES = (0.62, 0.72)
SLOW_PACES = {  # extents, or turns in a clip
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
}
FAST_PACES = {
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
EXTREME_SHARE = 0.15  # of scenes that are small or big, and of those slow or fast, in a varied world


@dataclass(frozen=True)
class Scene:
    sprite: str
    motion: str
    place: str
    size: float = 0.48  # the longer side of the object, mean over the clip
    x: float = 0.5  # centre at time 0
    y: float = 0.5  # at time 0: the foot of an object that stands or floats on a surface, else the centre
    extent: float = 0.45  # distance, height of a hop, radius of a circle, or change of size
    speed: float = 1.0  # turns or hops in a clip
    phase: int = 0  # frame of the sprite's loop at time 0
    handed: int = 1  # 1: to the right (also: faces right, turns that way), -1: to the left
    rising: int = 1  # diagonal only. 1: upwards, -1: downwards
    look: int = 0  # seed of the place's variation, 0..LOOKS - 1

    @property
    def held_out(self) -> bool:
        """True for one in eight triples, which are left out of all training."""
        triple = f"{plain(self.sprite)}/{self.motion}/{plain(self.place)}"
        return crc32(triple.encode()) % 8 == 0

    @property
    def stands(self) -> bool:
        """Whether the object stays on a surface: the ground, or the water of the sea."""
        medium = find(self.sprite)["medium"]
        if is_land(self.place):
            on_surface = "ground" in medium
        else:
            on_surface = self.place == "sea" and "water" in medium
        return on_surface and self.motion in SURFACE_MOTIONS

    @property
    def bulk(self) -> str:
        """small, big, or "" for the usual sizes, and for objects that grow or shrink."""
        if self.motion in ("grows", "shrinks"):
            return ""
        if self.size < 0.37:
            return "small"
        return "big" if self.size > 0.60 else ""

    @property
    def pace(self) -> str:
        """slow, fast, or "" for the usual speeds, and for objects that stay."""
        if self.motion not in SLOW_PACES:
            return ""
        pace = self.speed if self.motion in _TURNS else self.extent
        usual = _TURNS.get(self.motion) or _EXTENTS[self.motion]
        if pace < (SLOW_PACES[self.motion][1] + usual[0]) / 2:
            return "slow"
        return "fast" if pace > (FAST_PACES[self.motion][0] + usual[1]) / 2 else ""


def allowed(sprite: str, motion: str, place: str) -> bool:
    """Whether a sprite can do this there: boats sail, fish swim, birds fly, the rest stays on the ground."""
    row = find(sprite)
    medium = row["medium"]
    kind = row["kind"]
    if sprite == "skier" and place != "snow":
        return False
    if place == "underwater":
        return kind == "sea animal"
    if place == "space":
        return "space" in medium or ("air" in medium and kind in ("face", "thing", "food", "plant"))
    if place != "sea" and not is_land(place):  # the night sky, or a background without ground
        return "air" in medium or "space" in medium
    surface = "water" if place == "sea" else "ground"
    return "air" in medium or (surface in medium and motion in SURFACE_MOTIONS)


def places_open_to(sprite: str) -> tuple[str, ...]:
    """The places of the sprite's world."""
    world = world_of(sprite)
    return PLACES if world is None else world.places


@lru_cache(1024)
def _choices(
    sprite: str, held_out: bool | None, motion: str | None, place: str | None
) -> dict[str, tuple[str, ...]]:
    """The motions that are open to a sprite, each with its places."""
    places_by_motion: dict[str, tuple[str, ...]] = {}
    places = [choice for choice in places_open_to(sprite) if place in (None, choice)]
    for scene_motion in MOTIONS:
        if motion not in (None, scene_motion):
            continue
        possible = [choice for choice in places if allowed(sprite, scene_motion, choice)]
        if held_out is not None:
            scenes = [Scene(sprite, scene_motion, choice) for choice in possible]
            possible = [scene.place for scene in scenes if scene.held_out == held_out]
        if possible:
            places_by_motion[scene_motion] = tuple(possible)
    return places_by_motion


@lru_cache(64)
def possible_motions(names: tuple[str, ...], held_out: bool | None) -> tuple[str, ...]:
    """The motions that at least one of the sprites can do somewhere. ValueError if there are none."""
    open_to_all = [_choices(name, held_out, None, None) for name in names]
    motions = tuple(motion for motion in MOTIONS if any(motion in choices for choices in open_to_all))
    if not motions:
        raise ValueError(f"no scene of these sprites is possible with held_out={held_out}")
    return motions


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

    `held_out`: False excludes held-out triples, True allows only those, None allows all. `sprite`, `motion`,
    `place` fix a part. `varied`: a share of `EXTREME_SHARE` of the scenes is small or big, and as many are
    slow or fast; the others are the same scenes as without it. Raise ValueError if no scene is possible.
    """
    candidates = names if sprite is None else (sprite,)
    names = [name for name in candidates if _choices(name, held_out, motion, place)]
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
    if varied:
        bulk, pace = _choose_extremes(rng, motion)
        if bulk or pace:
            return _place_object(rng, scene, bulk, pace)
    return scene


def _choose_extremes(rng: np.random.Generator, motion: str) -> tuple[str, str]:
    """small, big or "", and slow, fast or "". A big object has no room to be fast."""
    bulk = ("small", "big")[rng.integers(2)] if rng.random() < EXTREME_SHARE else ""
    pace = ("slow", "fast")[rng.integers(2)] if rng.random() < EXTREME_SHARE else ""
    if motion in ("grows", "shrinks"):
        bulk = ""
    if motion == "stays" or (bulk == "big" and motion not in _TURNS):
        pace = ""
    return bulk, pace


# -- the numbers of a scene; the order of the random numbers decides the scenes --


def _place_object(rng: np.random.Generator, scene: Scene, bulk: str = "", pace: str = "") -> Scene:
    """Choose the numbers of a scene at random, so that the object stays inside the frame."""
    motion = scene.motion
    size, extent, speed = _choose_measures(rng, scene, bulk, pace)
    handed = {"right": 1, "left": -1}.get(motion, int(rng.choice((-1, 1))))
    rising = int(rng.choice((-1, 1)))
    scene = replace(scene, size=size, extent=extent, speed=speed, handed=handed, rising=rising)

    dx, dy = _distance(scene)
    width, height = shape(scene.sprite)
    largest = size + (extent / 2 if motion in ("grows", "shrinks") else 0)
    side = (extent if motion == "circles" else 0) + largest * width / 2
    x = _choose_start(rng, 0.5, dx, side, 0.08)
    if scene.stands:
        low = motion == "zigzags" or bulk == "big"
        y = rng.uniform(0.91, 0.95) if low else rng.uniform(0.83, 0.90)
    else:
        middle = 0.5 if abs(dy) > 0.15 or scene.place in ("underwater", "space", "night sky") else 0.43
        y = _choose_start(rng, middle, dy, largest * height / 2, 0.05)

    phase = int(rng.integers(LOOP))
    look = int(rng.integers(LOOKS))
    return replace(scene, x=x, y=float(y), phase=phase, look=look)


def _choose_measures(
    rng: np.random.Generator, scene: Scene, bulk: str, pace: str
) -> tuple[float, float, float]:
    """Size, extent and speed at random."""
    motion = scene.motion
    width, height = shape(scene.sprite)
    size = rng.uniform(0.50, 0.58) if width > 1.3 * height else rng.uniform(0.40, 0.56)
    if motion in ("grows", "shrinks"):
        size = rng.uniform(0.41, 0.45)
    extent = rng.uniform(*_EXTENTS.get(motion, (0, 0)))
    turns = {name: rng.uniform(*usual) for name, usual in _TURNS.items()}
    speed = turns.get(motion, 1.0)
    if bulk or pace:
        return _choose_extreme_measures(rng, scene, bulk, pace, (size, extent, speed))
    return size, extent, speed


def _choose_extreme_measures(
    rng: np.random.Generator, scene: Scene, bulk: str, pace: str, usual: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Size, extent and speed of a small, big, slow or fast object; the `usual` ones give way to fit."""
    motion = scene.motion
    width, height = shape(scene.sprite)
    size, extent, speed = usual
    if bulk:
        size = rng.uniform(*(SMALL_SIZES if bulk == "small" else BIG_SIZES))
    if pace:
        chosen = rng.uniform(*(SLOW_PACES if pace == "slow" else FAST_PACES)[motion])
        if motion in _TURNS:
            speed = chosen
        else:
            extent = chosen

    longer = max(width, height)
    along = {"up": height, "down": height, "bounces": height, "diagonal": longer, "circles": longer}
    side = along.get(motion, width)  # the side that has to fit in the frame, with the distance
    if bulk == "big" and motion in _EXTENTS:  # the distance is shorter, but not slow
        least = _EXTENTS[motion][0] * (0.8 if motion == "circles" else 0.9)
        reach = 2 if motion == "circles" else 1
        size = max(min(size, (1.06 - reach * least) / side), BIG_SIZES[0])
        extent = max(min(extent, (1.06 - size * side) / reach), least)
    elif pace == "fast" and motion in (*CROSSING, "up", "down"):  # the object is smaller, but not small
        size = min(size, max((1.06 - extent) / side, 0.38))
    return size, extent, speed


def _distance(scene: Scene) -> tuple[float, float]:
    """How far the object moves from where it starts, x and y: at the end, or at the farthest point."""
    extent = scene.extent
    dx = scene.handed * extent if scene.motion in CROSSING else 0.0
    dy = {
        "up": -extent,
        "down": extent,
        "diagonal": -scene.rising * extent,
        "circles": -2 * extent,
        "bounces": -extent,
        "zigzags": -0.45 * extent,
    }.get(scene.motion, 0.0)
    return dx, dy


def _choose_start(
    rng: np.random.Generator, middle: float, distance: float, half: float, jitter: float
) -> float:
    """Where a movement over `distance` with its centre near `middle` starts; the object reaches `half` of its
    size beyond its own centre."""
    first, last = sorted((half - 0.03 - min(distance, 0), 1 - half + 0.03 - max(distance, 0)))
    return float(np.clip(middle - distance / 2 + rng.uniform(-jitter, jitter), first, last))


# -- where the object is --


def path(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where the object is at `times` [F] (seconds): centre x, y, size, turn (degrees), foot line; each [F].

    The foot line is where the shadow lies: the surface under an object that stands, also while it hops.
    """
    p = np.asarray(times, np.float64) / SECONDS
    x = scene.x + 0 * p
    y = scene.y + 0 * p
    size = scene.size + 0 * p
    turn = 0 * p
    lift = 0 * p

    motion = scene.motion
    extent = scene.extent
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
        x = x + scene.handed * extent * np.sin(angle)
        y = y + extent * (np.cos(angle) - 1)
    elif motion == "bounces":
        hop = scene.speed * p % 1
        lift = extent * 4 * hop * (1 - hop)
    elif motion == "spins":
        turn = 360 * scene.handed * scene.speed * p
        lift = lift + 0.06 * scene.stands

    half = size * shape(scene.sprite)[1] / 2 if scene.stands else 0
    return x, y - half - lift, size, turn, y
