"""Where captioned videos come from: the tiny world, a folder of videos, or webdataset shards.

Notable:
- Videos are listed once and read one by one, when asked for. A shard is a plain tar, so its list says where
  each video begins and how long it is: any of them, in any order, without unpacking.
- A video may have several captions: one of them is drawn each time.
- What is missing is found when the list is made, before any training; only the videos are not opened then.
"""

import csv
import glob
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from cogvideo.data import tinyworld
from cogvideo.data.clips import Source
from cogvideo.video import VIDEOS, VideoFile

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
CHOICES = (f"give tinyworld; a folder of videos ({', '.join(VIDEOS)}) with captions in <name>.txt beside "
           f"them or in {', '.join(TABLES)} with columns file_name and text; or local shards: a folder of "
           ".tar, one .tar, or a pattern as x-{000..099}.tar")


def open_source(where: str | Path, seed: int = 0, sprites: int | None = 32) -> Source:
    """Recordings to train on, from "tinyworld", a folder of videos, or webdataset shards.

    `seed` and how many `sprites` (None: all) are for the tiny world. Raises ValueError if nothing is there, a
    caption is missing, or a table or shard is broken.
    """
    path = Path(where)
    if str(where) == "tinyworld":
        return tinyworld.TinyWorld(tinyworld.sprites(sprites), seed, even=True)
    if path.is_dir():
        videos = _read_folder(path) or _read_shards(sorted(path.glob("*.tar")))
    else:
        videos = _read_shards(_unfold(str(where))) if path.suffix == ".tar" else []
    if not videos:
        raise ValueError(f"no captioned videos at {where}; {CHOICES}")
    return Videos(tuple(videos))


@dataclass(frozen=True)
class Captioned:
    """A `Recording`: a video and what can be said of it."""

    video: VideoFile
    captions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.video.seconds

    def caption(self, rng: np.random.Generator) -> str:
        return _one(self.captions, rng)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        return self.video.frames(times, size)


@dataclass(frozen=True)
class Listed:
    """A video that was found, not yet opened."""

    path: Path  # of the video, or of the shard that holds it
    captions: tuple[str, ...]
    member: str = ""  # of a shard
    first: int = 0  # byte
    size: int = 0  # bytes


@dataclass(frozen=True)
class Videos:
    """A `Source` of the videos of a folder or of shards."""

    listed: tuple[Listed, ...]

    @property
    def count(self) -> int:
        return len(self.listed)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return _one(self.listed[index].captions, rng)

    def __getitem__(self, index: int) -> Captioned:
        """Raises ValueError, with the name of the video, if it cannot be read."""
        one = self.listed[index]
        if not one.member:
            return Captioned(VideoFile.open(one.path), one.captions)
        with open(one.path, "rb") as shard:
            shard.seek(one.first)
            return Captioned(VideoFile.open(shard.read(one.size), f"{one.path}: {one.member}"), one.captions)


def _one(captions: tuple[str, ...], rng: np.random.Generator) -> str:
    return captions[rng.integers(len(captions))]


# -- a folder --


def _read_folder(folder: Path) -> list[Listed]:
    """The videos in a folder and in the folders within it, by name."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and not p.name.startswith("."))
    table = next((folder / name for name in TABLES if (folder / name).exists()), None)
    rows = _read_table(table) if table and paths else {}
    if not rows.keys() <= set(paths):
        raise ValueError(f"{table} names {min(rows.keys() - set(paths))}, which is not there")
    listed = []
    for path in paths:
        text = path.with_suffix(".txt")
        captions = rows.get(path, ()) if table else _lines(text.read_bytes(), text) if text.exists() else ()
        if not captions:
            raise ValueError(f"no caption for {path} in {table or text}; {CHOICES}")
        listed.append(Listed(path, captions))
    return listed


def _read_table(path: Path) -> dict[Path, tuple[str, ...]]:
    """Captions by video; a video may stand in several rows."""
    captions: dict[Path, tuple[str, ...]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = (json.loads(line) for line in file if line.strip())
        try:
            for row in csv.DictReader(file) if path.suffix == ".csv" else lines:
                video = path.parent / row["file_name"]
                captions[video] = captions.get(video, ()) + _texts(row["text"])
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"cannot read {path}: each row needs file_name and text ({error!r})") from error
    return captions


def _lines(text: bytes, where: object) -> tuple[str, ...]:
    """A caption a line."""
    try:
        return _texts(text.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {where}: it is not text in UTF-8") from error


def _texts(value: str | list[str] | None) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption is a text or a list of texts, not {value!r}")
    return tuple(text.strip() for text in texts if text.strip())


# -- shards --


def _unfold(pattern: str) -> list[Path]:
    """Paths for a pattern with {000..099}, {a,b}, * and ?."""
    choices = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):  # every second one stood in braces
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if i % 2 and span:
            low, high = span.groups()
            choices.append([f"{k:0{len(low)}d}" for k in range(int(low), int(high) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    names = ("".join(parts) for parts in product(*choices))
    return [Path(p) for name in names for p in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def _read_shards(paths: list[Path]) -> list[Listed]:
    """The videos of webdataset shards. Files of one name up to its first dot belong together: a video and
    its captions in .txt (one a line) or in .json (under "caption" or "text")."""
    listed = []
    for path in paths:
        videos: dict[str, tarfile.TarInfo] = {}
        captions: dict[str, tuple[str, ...]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.isfile() else None
                    name = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
                    if file is None or name is None:
                        continue
                    key, kind = name[1], "." + name[2].lower().split(".")[-1]
                    if kind in VIDEOS:
                        videos[key] = member
                    elif kind in (".txt", ".json"):
                        texts = _captions(kind, file.read(), f"{path}: {member.name}")
                        captions[key] = captions.get(key, ()) + texts
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"cannot read the shard {path}: {error}; shards are plain .tar files") from error
        for key, member in videos.items():
            if not captions.get(key):
                raise ValueError(f"no caption for {member.name} in {path}: no {key}.txt, nor caption "
                                 f"or text in {key}.json")
            listed.append(Listed(path, captions[key], member.name, member.offset_data, member.size))
    return listed


def _captions(kind: str, data: bytes, where: str) -> tuple[str, ...]:
    if kind == ".txt":
        return _lines(data, where)
    try:
        row = json.loads(data)
        return _texts(row.get("caption") or row.get("text")) if isinstance(row, dict) else ()
    except ValueError as error:
        raise ValueError(f"cannot read {where}: {error}") from error
