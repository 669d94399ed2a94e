"""Who is in the world: the table of 96 animated sprites, and the pictures of their loops.

A row of `sprites/sprites.json` has names, kind, media, facing, verbs and the box of what is visible in its
96 x 96 pixels. The artwork is Microsoft's, under the MIT licence: `sprites/LICENSES/NOTICE.md`.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

LOOP, FPS = 24, 8  # frames of a sprite's loop; frames a second
_HERE = Path(__file__).parent


@lru_cache(1)
def table() -> dict[str, dict]:
    """The rows by name, in the order of rank."""
    rows = json.loads((_HERE / "sprites" / "sprites.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["rank"])}


def sprites(count: int | None = None) -> tuple[str, ...]:
    """Names of the first `count` sprites (None: all 96) in the order of rank; the first 32 are tier 1."""
    return tuple(table())[:count]


def shape(sprite: str) -> tuple[float, float]:
    """Width and height of a sprite's visible part, the longer one 1."""
    left, top, right, bottom = table()[sprite]["bbox"]
    longer = max(right - left, bottom - top)
    return (right - left) / longer, (bottom - top) / longer


@lru_cache(128)
def loop_of(sprite: str) -> np.ndarray:
    """The loop of a sprite, premultiplied RGBA, uint8 [24, 96, 96, 4]."""
    with Image.open(_HERE / table()[sprite]["file"]) as image:
        frames = []
        for frame in range(LOOP):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGBA").convert("RGBa")))
    return np.stack(frames)
