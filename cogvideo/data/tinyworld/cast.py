"""Who is in the world: the table of 96 animated sprites, and the frames of their loops.

The table is `sprites/sprites.json`. The artwork is Microsoft's, under the MIT licence:
`sprites/LICENSES/NOTICE.md`.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from cogvideo.data.tinyworld.own import Sprite, world_of
from cogvideo.video import Frames, open_image

LOOP = 24  # frames of a sprite's loop
FPS = 8  # of a sprite's loop
_HERE = Path(__file__).parent


@lru_cache(1)
def table() -> dict[str, Sprite]:
    """The sprites by name, in the order of rank."""
    rows: list[Sprite] = json.loads((_HERE / "sprites" / "sprites.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["rank"])}


def find(sprite: str) -> Sprite:
    """The row of a sprite of the tiny world or of a user's. ValueError if there is none."""
    world = world_of(sprite)
    rows = table() if world is None else world.sprites
    if sprite not in rows:
        raise ValueError(f"there is no sprite {sprite!r}; choose one of {', '.join(rows)}")
    return rows[sprite]


def sprites(count: int | None = None) -> tuple[str, ...]:
    """Names of the first `count` sprites (None: all 96), in the order of rank; the first 32 are tier 1."""
    return tuple(table())[:count]


def shape(sprite: str) -> tuple[float, float]:
    """Width and height of a sprite's visible part; the longer of the two is 1."""
    left, top, right, bottom = find(sprite)["bbox"]
    longer = max(right - left, bottom - top)
    return (right - left) / longer, (bottom - top) / longer


@lru_cache(128)
def loop_of(sprite: str) -> Frames:
    """The loop of a sprite, premultiplied RGBA, uint8 [24, 96, 96, 4]."""
    with open_image(_HERE / find(sprite)["file"]) as image:
        if world_of(sprite) is not None:
            pixels = np.asarray(image.convert("RGBA").convert("RGBa"))
            loop = pixels.reshape(-1, image.width, image.width, 4)
            return np.broadcast_to(loop, (LOOP, *loop.shape[1:]))
        frames = []
        for frame in range(LOOP):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGBA").convert("RGBa")))
    return np.stack(frames)
