"""Who is in the world: the table of 96 animated sprites, and the frames of their loops.

The table is `sprites/sprites.json`. The artwork is Microsoft's, under the MIT licence:
`sprites/LICENSES/NOTICE.md`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from cogvideo.video import Frames

LOOP = 24  # frames of a sprite's loop
FPS = 8  # of a sprite's loop
_HERE = Path(__file__).parent


class Sprite(TypedDict):
    """A row of the table: the keys that are used."""

    name: str
    zh: str  # its Chinese name
    article: str
    zh_measure: str  # its Chinese measure word
    synonyms_en: list[str]
    synonyms_zh: list[str]
    kind: str  # land animal, vehicle ...
    medium: list[str]  # where it can be: ground, water, air, space
    facing: str  # left, right or front
    moves: list[str]  # verbs
    rank: int
    bbox: tuple[int, int, int, int]  # of its visible part in 96 x 96 pixels: left, top, right, bottom
    file: str


@lru_cache(1)
def table() -> dict[str, Sprite]:
    """The sprites by name, in the order of rank."""
    rows: list[Sprite] = json.loads((_HERE / "sprites" / "sprites.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["rank"])}


def sprites(count: int | None = None) -> tuple[str, ...]:
    """Names of the first `count` sprites (None: all 96), in the order of rank; the first 32 are tier 1."""
    return tuple(table())[:count]


def shape(sprite: str) -> tuple[float, float]:
    """Width and height of a sprite's visible part; the longer of the two is 1."""
    left, top, right, bottom = table()[sprite]["bbox"]
    longer = max(right - left, bottom - top)
    return (right - left) / longer, (bottom - top) / longer


@lru_cache(128)
def loop_of(sprite: str) -> Frames:
    """The loop of a sprite, premultiplied RGBA, uint8 [24, 96, 96, 4]."""
    with Image.open(_HERE / table()[sprite]["file"]) as image:
        frames = []
        for frame in range(LOOP):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGBA").convert("RGBa")))
    return np.stack(frames)
