"""A user's world to look at: a sheet of its sprites and scenes, and clips that training leaves out."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cogvideo.data.tinyworld.cast import loop_of
from cogvideo.data.tinyworld.own import OwnWorld
from cogvideo.data.tinyworld.scene import SECONDS
from cogvideo.data.tinyworld.world import TinyWorld
from cogvideo.files import atomic_path
from cogvideo.progress import Progress
from cogvideo.video import Clip

TILE = 96
COLUMNS = 10  # of the sheet
SCENES = 12  # on the sheet
SEED = 777  # of held-out clips; no training has it
FRAMES = 33  # of a held-out clip
FPS = 8
SIZE = 192


def scenes(world: OwnWorld, seed: int, held_out: bool | None = False) -> TinyWorld:
    """Endless scenes of a world, with captions as people write them in its languages."""
    language = world.languages[0] if len(world.languages) == 1 else None
    return TinyWorld(tuple(world.sprites), seed, held_out, language, even=True, varied=True)


def sheet(world: OwnWorld) -> Image.Image:
    """Every sprite, three frames of its loop each, then some scenes with their captions."""
    tiles = [tile for key in world.sprites for tile in _sprite_tiles(key)]
    across = COLUMNS // 3 * 3
    rows = -(-len(tiles) // across)
    page = Image.new("RGB", (TILE * across, TILE * (rows + SCENES) + 16 * SCENES), "white")
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % across * TILE, i // across * TILE))

    top = rows * TILE
    source = TinyWorld(tuple(world.sprites), 0, language=world.languages[0], even=True, varied=True)
    times = np.linspace(0, SECONDS, across)
    for i in range(SCENES):
        video = source[i]
        for column, frame in enumerate(video.frames(times, TILE)):
            page.paste(Image.fromarray(frame), (column * TILE, top))
        caption = video.caption(np.random.default_rng(i))
        ImageDraw.Draw(page).text((2, top + TILE + 2), caption, fill="black")
        top += TILE + 16
    return page


def _sprite_tiles(key: str) -> list[Image.Image]:
    """Three frames of a sprite's loop, on grey."""
    tiles = []
    for frame in loop_of(key)[::8]:
        grey = Image.new("RGBA", (TILE, TILE), (210, 210, 214, 255))
        sprite = Image.fromarray(np.ascontiguousarray(frame), "RGBa").convert("RGBA")
        tiles.append(Image.alpha_composite(grey, sprite).convert("RGB"))
    return tiles


def write_held_out(world: OwnWorld, count: int, progress: Progress | None = None) -> Path:
    """Write `count` held-out clips that are not there yet, and their captions as `prompts.txt`; return the
    folder of the clips."""
    folder = world.folder / "held_out"
    folder.mkdir(exist_ok=True)
    source = scenes(world, SEED, held_out=True)
    times = np.arange(FRAMES) / FPS
    captions = []
    for i in range(count):
        video = source[i]
        captions.append(video.caption(np.random.default_rng((SEED, i))))
        file = folder / f"{i:04d}.mp4"
        if not file.exists():
            Clip(video.frames(times, SIZE), FPS, captions[-1]).save(file)
        if progress is not None:
            progress("held-out clips", i + 1, count)
    with atomic_path(world.folder / "prompts.txt") as part:
        part.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    return folder
