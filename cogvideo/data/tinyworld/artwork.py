"""Pictures with transparency become a world (`own.py`): `cogvideo data world my_art/ -o my_world/`.

    my_art/
      hedgehog.png          a sprite: png, gif, webp or apng, still or animated, transparent around it
      backgrounds/          pictures of places, if there are any
      world.toml            what they are called and do, if the names of the files do not suffice

Each animation becomes a loop of 24 frames at 8 fps, in which it repeats a whole number of times. A file that
cannot be used is left out and named with the reason.
"""

import hashlib
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from cogvideo.data.tinyworld.cast import FPS, LOOP
from cogvideo.data.tinyworld.own import TABLE, Language, OwnPlace, OwnSprite, OwnTable, is_world, open_world
from cogvideo.data.tinyworld.places import PLACES
from cogvideo.data.tinyworld.words import article_of, known_verbs
from cogvideo.files import atomic_path, read_text, write_json
from cogvideo.model.config import read_table
from cogvideo.video import Frames, open_image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PICTURES = (".png", ".gif", ".webp", ".apng")
BACKGROUNDS = (".png", ".webp", ".jpg", ".jpeg")
SETTINGS = "world.toml"
SIDE = 96  # pixels of a sprite's frame
MARGIN = 3  # pixels around what is visible
MOST_BYTES = 50 * 2**20  # of a file
MOST_PIXELS = 64 * 2**20  # of all frames together
LEAST_PIXELS = 8  # of the visible part's longer side
VISIBLE = 13  # alpha from which a pixel counts
BACKGROUND_SIDE = 512

Kind = Literal[
    "land animal",
    "sea animal",
    "bird",
    "insect",
    "person",
    "vehicle",
    "aircraft",
    "boat",
    "plant",
    "food",
    "thing",
    "weather",
    "face",
]
T = TypeVar("T")


@dataclass(frozen=True)
class SpriteEntry:
    """A table [sprites.FILE] of world.toml."""

    name: str = ""  # default: that of the file
    zh: str = ""
    article: str = ""  # default: a or an
    measure: str = "个"  # Chinese measure word
    synonyms: tuple[str, ...] = ()
    synonyms_zh: tuple[str, ...] = ()
    kind: Kind = "thing"
    lives: tuple[Literal["ground", "water", "air", "space"], ...] = ("ground", "air")
    facing: Literal["left", "right", "front"] = "front"
    moves: tuple[str, ...] = ("slide", "float")


@dataclass(frozen=True)
class BackgroundEntry:
    """A table [backgrounds.FILE] of world.toml."""

    name: str = ""
    zh: str = ""
    said: tuple[str, ...] = ()  # default: in the NAME
    said_zh: tuple[str, ...] = ()
    ground: bool = True


@dataclass(frozen=True)
class Settings:
    """The content of world.toml."""

    languages: tuple[Language, ...] = ()  # of captions; default: English, and Chinese if a sprite has it
    places: tuple[str, ...] = PLACES  # of the tiny world
    sprites: dict[str, SpriteEntry] = field(default_factory=dict)
    backgrounds: dict[str, BackgroundEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in self.places:
            if place not in PLACES:
                raise ValueError(f"places: there is no {place!r}; choose from {', '.join(PLACES)}")
        for stem, row in self.sprites.items():
            unknown = [verb for verb in row.moves if verb not in known_verbs()]
            if unknown:
                choices = ", ".join(sorted(known_verbs()))
                raise ValueError(f"sprites.{stem}.moves: unknown verb {unknown[0]!r}; choose from {choices}")
            if not row.lives or not row.moves:
                raise ValueError(f"sprites.{stem}: lives and moves must name something")


@dataclass
class Made:
    """What became of the artwork."""

    sprites: list[str]
    backgrounds: list[str]
    languages: tuple[Language, ...]
    skipped: dict[str, str]  # files that are not used, and why

    def text(self) -> str:
        lines = [f"{len(self.sprites)} sprites: {', '.join(self.sprites)}"]
        if self.backgrounds:
            lines.append(f"{len(self.backgrounds)} backgrounds: {', '.join(self.backgrounds)}")
        lines.append(f"captions in {' and '.join(self.languages)}")
        lines += [f"not used: {file}: {why}" for file, why in self.skipped.items()]
        return "\n".join(lines)


def make_world(art: Path, out: Path) -> Made:
    """Write the world of a folder of artwork. An unchanged one that exists is kept.

    ValueError if no picture can be used, if world.toml is wrong, or if `out` holds something else.
    """
    if not art.is_dir():
        raise ValueError(f"{art} is no folder; give a folder of pictures ({', '.join(PICTURES)})")
    settings = read_settings(art)
    skipped: dict[str, str] = {}
    digest = hashlib.sha256(repr(settings).encode())
    sprites = dict(_read_files(_pictures(art, PICTURES), art, skipped, digest, _read_loop))
    backgrounds = dict(
        _read_files(_pictures(art / "backgrounds", BACKGROUNDS), art, skipped, digest, _read_background)
    )
    if not sprites:
        reasons = "".join(f"; {file}: {why}" for file, why in [*skipped.items()][:5])
        raise ValueError(f"{art} has no picture that can be used ({', '.join(PICTURES)}){reasons}")
    _check_stems(settings, art, sprites, backgrounds, skipped)

    try:
        table = _table(settings, sprites, backgrounds, digest.hexdigest())
    except ValueError as error:
        raise ValueError(f"{art}: {error}") from None
    made = Made(
        [row.name for row in table.sprites],
        [row.name for row in table.backgrounds],
        table.languages,
        skipped,
    )
    if out.exists() and any(out.iterdir()):
        if is_world(out) and open_world(out).made_from == table.made_from:
            return made
        raise ValueError(f"{out} holds something else already; delete it, or choose another -o")
    with atomic_path(out) as part:
        _write(part, table, sprites, backgrounds)
        if out.exists():
            out.rmdir()
    open_world.cache_clear()
    return made


def _write(
    folder: Path, table: OwnTable, sprites: dict[str, np.ndarray], backgrounds: dict[str, Image.Image]
) -> None:
    (folder / "sprites").mkdir(parents=True)
    (folder / "places").mkdir()
    for row, loop in zip(table.sprites, sprites.values(), strict=True):
        still = (loop == loop[0]).all()
        frames = loop[:1] if still else loop
        image = Image.fromarray(np.concatenate(list(frames)), "RGBa")
        image.convert("RGBA").save(folder / row.file)
    for place, image in zip(table.backgrounds, backgrounds.values(), strict=True):
        image.save(folder / place.file)
    write_json(folder / TABLE, asdict(table))


def read_settings(art: Path) -> Settings:
    """The world.toml of a folder of artwork, or the defaults. ValueError, with the key, if it is wrong."""
    file = art / SETTINGS
    if not file.exists():
        return Settings()
    try:
        text = read_text(file)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    try:
        return read_table(Settings, tomllib.loads(text))
    except RecursionError:
        raise ValueError(f"cannot read {file}: it is nested too deeply") from None
    except ValueError as error:  # of TOML and of the table
        raise ValueError(f"cannot read {file}: {error}") from None


# -- files


def _pictures(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder that may be pictures, sorted by name."""
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in suffixes)


def _read_files(
    files: list[Path], art: Path, skipped: dict[str, str], digest: Any, read: Callable[[Path], T]
) -> Iterator[tuple[str, T]]:
    """The content of each file by its stem; those that cannot be used go to `skipped`."""
    seen: set[str] = set()
    for file in files:
        name = str(file.relative_to(art))
        try:
            if file.stem in seen:
                raise ValueError(f"another file is called {file.stem} too")
            if file.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES // 2**20} MB")
            content = read(file)
        except (ValueError, OSError) as error:
            skipped[name] = str(error)
            continue
        seen.add(file.stem)
        digest.update(name.encode())
        digest.update(np.asarray(content).tobytes())
        yield file.stem, content


def _read_loop(file: Path) -> np.ndarray:
    """A picture or animation as premultiplied RGBA, uint8 [24, 96, 96, 4]. ValueError if it is not usable."""
    with open_image(file) as image:
        count = getattr(image, "n_frames", 1)
        if image.width * image.height * count > MOST_PIXELS:
            raise ValueError(f"{count} frames of {image.width} x {image.height} pixels are too many")
        frames = []
        durations = []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGBA").convert("RGBa")))
            durations.append(max(1.0, float(frame.info.get("duration") or 100)))
    pixels = np.stack(frames)
    visible = _visible(pixels)
    if not visible.any():
        raise ValueError("nothing in it is visible")
    if (pixels[..., 3] >= 255 - VISIBLE).all():
        raise ValueError("nothing in it is transparent; cut out what should move")
    box = _box(visible)
    if max(box[2] - box[0], box[3] - box[1]) < LEAST_PIXELS:
        raise ValueError(f"what is visible has fewer than {LEAST_PIXELS} pixels a side")
    fitted = np.stack([_fit(frame, box) for frame in pixels])
    loop: Frames = fitted[_loop_frames(np.array(durations))]
    return loop


def _visible(loop: Frames) -> npt.NDArray[np.bool_]:
    """Where anything is visible in RGBA [F, H, W, 4]: [H, W]."""
    return np.asarray(loop[..., 3].max(0) >= VISIBLE)


def _box(visible: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is True in [H, W]."""
    rows = np.flatnonzero(visible.any(1))
    columns = np.flatnonzero(visible.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _fit(frame: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of a premultiplied frame in the middle of 96 x 96 pixels. Pixel art keeps its squares."""
    left, top, right, bottom = box
    room = SIDE - 2 * MARGIN
    scale = room / max(right - left, bottom - top)
    width = max(1, round((right - left) * scale))
    height = max(1, round((bottom - top) * scale))
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    channels = []
    for channel in range(4):
        plane = Image.fromarray(np.ascontiguousarray(frame[top:bottom, left:right, channel]))
        channels.append(np.asarray(plane.resize((width, height), method)))
    x = (SIDE - width) // 2
    y = (SIDE - height) // 2
    fitted = np.zeros((SIDE, SIDE, 4), np.uint8)
    fitted[y : y + height, x : x + width] = np.stack(channels, -1)
    np.minimum(fitted[..., :3], fitted[..., 3:], out=fitted[..., :3])  # Lanczos may overshoot
    return fitted


def _loop_frames(durations: np.ndarray) -> np.ndarray:
    """The frames [24] of an animation that a loop shows, of durations in milliseconds [F]."""
    ends = durations.cumsum()
    seconds = LOOP / FPS
    repeats = max(1, round(seconds * 1000 / ends[-1]))
    times = (np.arange(LOOP) + 0.5) / LOOP * repeats % 1 * ends[-1]
    numbers: np.ndarray = np.searchsorted(ends, times, side="right")
    return numbers


def _read_background(file: Path) -> Image.Image:
    with open_image(file) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        opaque = image.convert("RGB")
    if min(opaque.size) < SIDE:
        raise ValueError(f"a background needs {SIDE} pixels a side; it has {opaque.width} x {opaque.height}")
    scale = BACKGROUND_SIDE / min(opaque.size)
    if scale < 1:
        opaque = opaque.resize((round(opaque.width * scale), round(opaque.height * scale)))
    return opaque


# -- names


def _check_stems(
    settings: Settings,
    art: Path,
    sprites: dict[str, np.ndarray],
    backgrounds: dict[str, Image.Image],
    skipped: dict[str, str],
) -> None:
    """Raise ValueError if world.toml names a file that is not there."""
    bad = {Path(name).stem for name in skipped}
    for table, named, there in (
        ("sprites", settings.sprites, sprites),
        ("backgrounds", settings.backgrounds, backgrounds),
    ):
        for stem in named:
            if stem not in there and stem not in bad:
                files = ", ".join(there) or "none"
                raise ValueError(f"{art / SETTINGS}: {table}.{stem} names no file; the files are {files}")


def _table(
    settings: Settings,
    sprites: dict[str, np.ndarray],
    backgrounds: dict[str, Image.Image],
    made_from: str,
) -> OwnTable:
    """What `world.json` says. ValueError if a name cannot be used."""
    rows = [_sprite(stem, settings.sprites.get(stem, SpriteEntry()), loop) for stem, loop in sprites.items()]
    places = [_place(stem, settings.backgrounds.get(stem, BackgroundEntry())) for stem in backgrounds]
    languages = settings.languages
    if not languages:
        languages = ("en", "zh") if any(row.zh for row in rows) else ("en",)
    if languages == ("zh",):
        for kind, named in (("sprites", rows), ("backgrounds", places)):
            missing = [row.name for row in named if not row.zh]
            if missing:
                raise ValueError(f"{kind}.{missing[0]} needs zh, as all captions are Chinese")
    _check_names({row.file: (row.name, row.zh, *row.synonyms, *row.synonyms_zh) for row in rows})
    _check_names({row.file: (row.name, row.zh) for row in places})
    for place in places:
        if place.name in PLACES:
            raise ValueError(f"the background {place.name!r} is called like a place of the tiny world")
    return OwnTable(languages, settings.places, tuple(rows), tuple(places), made_from)


def _sprite(stem: str, entry: SpriteEntry, loop: np.ndarray) -> OwnSprite:
    name = _named(entry.name, stem)
    for other in entry.synonyms:
        _check_words("synonym", other, 3)
    for other in (entry.zh, *entry.synonyms_zh):
        _check_words("Chinese name", other, 6, by=len)
    return OwnSprite(
        name=name,
        file=f"sprites/{stem}.png",
        bbox=_box(_visible(loop)),
        zh=entry.zh,
        article=entry.article or article_of(name),
        measure=entry.measure,
        synonyms=entry.synonyms,
        synonyms_zh=entry.synonyms_zh,
        kind=entry.kind,
        lives=tuple(entry.lives),
        facing=entry.facing,
        moves=entry.moves,
    )


def _place(stem: str, entry: BackgroundEntry) -> OwnPlace:
    name = _named(entry.name, stem)
    said = entry.said or (f"in the {name}",)
    said_zh = entry.said_zh
    if entry.zh and not said_zh:
        said_zh = (f"在{entry.zh}里",)
    for phrase in said:
        _check_words("phrase", phrase, 5)
    for phrase in said_zh:
        _check_words("Chinese phrase", phrase, 9, by=len)
    return OwnPlace(name, f"places/{stem}.png", entry.zh, said, said_zh, entry.ground)


def _named(name: str, stem: str) -> str:
    """The name that captions use: the given one, else the words of the file's name."""
    name = name or " ".join(re.sub(r"[-_.\d]+", " ", stem).split())
    if not name or "@" in name or not name.isprintable():
        raise ValueError(f"{stem} has no name that captions can use; give one in {SETTINGS}")
    _check_words("name", name, 3)
    return name


def _check_words(kind: str, text: str, most: int, by: Callable[[str], int] | None = None) -> None:
    """Raise ValueError if a text is too long for a caption."""
    count = by(text) if by is not None else len(text.split())
    if count > most:
        unit = "characters" if by is not None else "words"
        raise ValueError(f"the {kind} {reprlib.repr(text)} has {count} {unit}; captions have room for {most}")


def _check_names(names_by_file: dict[str, tuple[str, ...]]) -> None:
    """Raise ValueError if two things share a name."""
    owners: dict[str, str] = {}
    for file, names in names_by_file.items():
        for name in filter(None, names):
            owner = owners.setdefault(name.lower(), file)
            if owner != file:
                raise ValueError(f"both {Path(owner).stem} and {Path(file).stem} are called {name!r}")
