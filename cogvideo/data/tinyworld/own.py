"""Worlds of a user's own artwork, as folders that `cogvideo data world` writes (`artwork.py`).

    world.json             what the sprites and backgrounds are called, where they live, how they move
    sprites/               for each sprite a column of 24 frames of 96 x 96 pixels, or one if it is still
    places/                the backgrounds
    sheet.png              all of it, to look at
    judge.safetensors      a classifier of this world's clips
    held_out/              clips of scenes that training leaves out, to judge a model by
    prompts.txt            their captions

In a `Scene`, a sprite or place of such a world is called NAME@FOLDER, so that a scene still determines every
frame. What captions say and what is held out depends on NAME alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypedDict

from cogvideo.files import expand_user, read_json
from cogvideo.model.config import ConfigError, read_table

TABLE = "world.json"
JUDGE = "judge.safetensors"
_BEFORE_FOLDER = "@"

Language = Literal["en", "zh"]


class Sprite(TypedDict):
    """A row of the table of sprites: the keys that are used."""

    name: str
    zh: str  # its Chinese name; "" in worlds without Chinese captions
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


@dataclass(frozen=True)
class OwnSprite:
    """A row of `world.json`: a sprite."""

    name: str
    file: str
    bbox: tuple[int, int, int, int]
    zh: str
    article: str
    measure: str
    synonyms: tuple[str, ...]
    synonyms_zh: tuple[str, ...]
    kind: str
    lives: tuple[str, ...]
    facing: str
    moves: tuple[str, ...]


@dataclass(frozen=True)
class OwnPlace:
    """A row of `world.json`: a background."""

    name: str
    file: str
    zh: str
    said: tuple[str, ...]  # in captions, as in "in the kitchen"
    said_zh: tuple[str, ...]
    ground: bool  # things stand in its lower part; else they float


@dataclass(frozen=True)
class OwnTable:
    """The content of `world.json`."""

    languages: tuple[Language, ...]
    places: tuple[str, ...]  # of the tiny world's
    sprites: tuple[OwnSprite, ...]
    backgrounds: tuple[OwnPlace, ...]
    made_from: str  # digest of the artwork


@dataclass(frozen=True)
class OwnWorld:
    """A user's world: its sprites and places by their names in scenes."""

    folder: Path
    languages: tuple[Language, ...]
    sprites: Mapping[str, Sprite]
    places: tuple[str, ...]  # those of the tiny world that it uses, then its own
    backgrounds: Mapping[str, OwnPlace]
    made_from: str


def make_key(name: str, folder: Path) -> str:
    """What a sprite or place of a user's world is called in a scene."""
    return f"{name}{_BEFORE_FOLDER}{folder}"


def is_world(folder: str | Path) -> bool:
    return (Path(folder) / TABLE).is_file()


def plain(key: str) -> str:
    """The name of a sprite or place without its world."""
    return key.partition(_BEFORE_FOLDER)[0]


def world_of(key: str) -> OwnWorld | None:
    """The user's world that a sprite or place belongs to; None for those of the tiny world."""
    folder = key.partition(_BEFORE_FOLDER)[2]
    return open_world(folder) if folder else None


@lru_cache(16)
def open_world(folder: str | Path) -> OwnWorld:
    """Read a folder that `cogvideo data world` wrote. ValueError, with file and key, if it is another."""
    folder = expand_user(folder).absolute()
    file = folder / TABLE
    try:
        table = read_table(OwnTable, read_json(file))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {TABLE}; cogvideo data world writes one") from None
    except ConfigError as error:
        raise ValueError(f"cannot read {file}: {error}") from None

    sprites = {}
    for rank, row in enumerate(table.sprites):
        sprites[make_key(row.name, folder)] = _as_sprite(row, rank, folder)
    backgrounds = {make_key(row.name, folder): row for row in table.backgrounds}
    places = (*table.places, *backgrounds)
    return OwnWorld(folder, table.languages, sprites, places, backgrounds, table.made_from)


def _as_sprite(row: OwnSprite, rank: int, folder: Path) -> Sprite:
    return Sprite(
        name=row.name,
        zh=row.zh,
        article=row.article,
        zh_measure=row.measure,
        synonyms_en=list(row.synonyms),
        synonyms_zh=list(row.synonyms_zh),
        kind=row.kind,
        medium=list(row.lives),
        facing=row.facing,
        moves=list(row.moves),
        rank=rank,
        bbox=row.bbox,
        file=str(folder / row.file),
    )
