"""Where captioned videos come from: the tiny world, a folder of videos, a table, YouCook2, shards.

Here they are listed. What the list shows to be unusable (a video that is not there, an empty caption) is left
out and told of in `skipped`; an error is only what leaves nothing, or what is not understood.
"""

import csv
import glob
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from cogvideo.data import tinyworld
from cogvideo.data.cut import Source
from cogvideo.data.videos import Listed, Videos
from cogvideo.video import VIDEOS

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
COLUMNS = "file_name (or path) and text (or caption), and start and end if only a part is meant"
CHOICES = (
    f"give tinyworld; a folder of videos ({', '.join(VIDEOS)}) with captions in <name>.txt beside "
    f"them or in {', '.join(TABLES)}; a .csv or .jsonl with {COLUMNS}; the annotations of YouCook2 "
    "(.json) with the videos in its folder or below; or local shards: a folder of .tar, one .tar, or "
    "a pattern as x-{000..099}.tar"
)
YOUCOOK = "youcook*trainval*.json"  # what its captions are in
SUBSETS = ("training", "validation")  # of YouCook2; what it has for testing is not captioned

Place = tuple[Path, float, float | None]  # a video, and the seconds where a part of it begins and ends


def open_source(
    where: str | Path, seed: int = 0, sprites: int | None = 32, subset: str | None = None
) -> Source:
    """Recordings to train on: "tinyworld", a folder of videos, a table, YouCook2, or webdataset shards.

    `seed` and how many `sprites` (None: all) are for the tiny world, `subset` (None: training) for YouCook2.
    Raises ValueError if nothing is there, or a table or shard is broken.
    """
    path = Path(where)
    annotations = [*path.glob(YOUCOOK), *path.glob(f"annotations/{YOUCOOK}")] if path.is_dir() else []
    if path.suffix == ".json":
        annotations = [path]
    if subset is not None and not annotations:
        raise ValueError(f"{where} has no subset {subset}; leave it out for all but YouCook2")
    if str(where) == "tinyworld":
        return tinyworld.TinyWorld(tinyworld.sprites(sprites), seed, even=True, varied=True)
    skipped: dict[str, str] = {}
    if annotations:
        videos = _read_youcook(annotations[0], subset or SUBSETS[0], skipped)
    elif path.is_dir():
        videos = _read_folder(path, skipped) or _read_shards(sorted(path.glob("*.tar")), skipped)
    elif path.suffix in (".csv", ".jsonl"):
        videos = _read_table(path, skipped)
    else:
        videos = _read_shards(_unfold(str(where)), skipped) if path.suffix == ".tar" else []
    if not videos:
        found = [f"{name}: {why}" for name, why in skipped.items()]
        more = f" ({len(found)} without use: {'; '.join(found[:3])})" if found else ""
        raise ValueError(f"no captioned videos at {where}{more}; {CHOICES}")
    return Videos(tuple(videos), skipped)


# -- folders and tables --


def _read_folder(folder: Path, skipped: dict[str, str]) -> list[Listed]:
    """The videos in a folder and in the folders within it, by name."""
    table = next((folder / name for name in TABLES if (folder / name).exists()), None)
    paths = [Path(os.path.normpath(path)) for path in _videos_below(folder)]
    if table:
        listed = _read_table(table, skipped)
        known = {one.path for one in listed}
        skipped.update({str(path): f"no caption in {table}" for path in paths if path not in known})
        return listed
    listed = []
    for path in paths:
        text = path.with_suffix(".txt")
        if captions := _lines(text.read_bytes(), text) if text.exists() else ():
            listed.append(Listed(path, captions))
        else:
            skipped[str(path)] = f"no caption in {text}"
    return listed


def _videos_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and not p.name.startswith("."))


def _read_table(path: Path, skipped: dict[str, str]) -> list[Listed]:
    """Recordings of a .csv or .jsonl; rows of the same part of a video are its captions."""
    found: dict[Place, tuple[str, ...]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = (json.loads(line) for line in file if line.strip())
            table = csv.DictReader(file, skipinitialspace=True) if path.suffix == ".csv" else lines
            for number, row in enumerate(table, 1):
                place, texts = _read_row(row, path.parent, number)
                found[place] = found.get(place, ()) + texts
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; {CHOICES}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}; each row needs {COLUMNS}") from error
    listed = [Listed(video, texts, start=start, end=end) for (video, start, end), texts in found.items()]
    return _usable(sorted(listed, key=lambda one: (one.path, one.start)), skipped)


def _read_row(row: Any, folder: Path, number: int) -> tuple[Place, tuple[str, ...]]:
    """The part of a video, and its captions."""

    def column(*names: str) -> Any:
        if not (there := [name for name in names if name in row]):
            raise ValueError(f"there is no {' or '.join(names)}")
        return next((row[name] for name in there if row[name]), "")

    try:
        if None in row:
            raise ValueError("it has more fields than there are columns; put captions with commas in quotes")
        video = Path(os.path.normpath(folder / column("path", "file_name")))
        start, end = (None if row.get(k) in (None, "") else float(row[k]) for k in ("start", "end"))
        return (video, start or 0.0, end), _texts(column("caption", "text"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"row {number}: {error}") from None


def _usable(listed: Iterable[Listed], skipped: dict[str, str]) -> list[Listed]:
    """Those that are there, have a caption and an end after their start."""
    found, there = [], {}
    for one in listed:
        if one.path not in there:
            there[one.path] = one.path.is_file()
        if not there[one.path]:
            skipped[str(one.path)] = "it is not there"
        elif not one.captions:
            skipped[one.name] = "its caption is empty"
        elif not 0 <= one.start < (math.inf if one.end is None else one.end):
            skipped[one.name] = "its start must be 0 s or later, and before its end"
        else:
            found.append(one)
    return found


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


# -- YouCook2 --


def _read_youcook(path: Path, subset: str, skipped: dict[str, str]) -> list[Listed]:
    """The segments of a subset, of the videos that are in the folder of the annotations or below it, or, if
    that is called annotations, beside it.

    Layout: {"database": {id: {"subset", "annotations": [{"segment": [start, end], "sentence"}], ...}}}; a
    video's name is its id.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}; choose one of {', '.join(SUBSETS)}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there are no annotations at {path}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: it is not JSON ({error})") from None
    below = path.parent.parent if path.parent.name == "annotations" else path.parent
    videos = {video.stem: video for video in reversed(_videos_below(below))}
    listed, asked = [], []

    def take(place: str, values: Any, key: str | int, kind: Any) -> Any:
        value = values.get(key) if isinstance(values, dict) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"{path} is not laid out like the annotations of YouCook2: {place}{key} is "
                f"{'missing' if value is None else f'a {type(value).__name__}'}"
            )
        return value

    for name, video in take("", table, "database", dict).items():
        place = f"database.{name}."
        if take(place, video, "subset", str) != subset:
            continue
        asked.append(name)
        for number, row in enumerate(take(place, video, "annotations", list)):
            inside = f"{place}annotations[{number}]."
            segment = take(inside, row, "segment", list)
            if len(segment) != 2 or not all(isinstance(second, (int, float)) for second in segment):
                raise ValueError(
                    f"{path} is not laid out like the annotations of YouCook2: "
                    f"{inside}segment is {segment}, not [start, end]"
                )
            file, captions = videos.get(name, below / f"{name}.mp4"), take(inside, row, "sentence", str)
            listed.append(Listed(file, _texts(captions), start=float(segment[0]), end=float(segment[1])))
    usable = _usable(listed, skipped)
    if not listed:
        raise ValueError(f"{path} has no segments of the subset {subset}")
    if not any(name in videos for name in asked):
        raise ValueError(
            f"none of the {len(asked)} videos of the subset {subset} is in {below} or "
            f"below; looked for {', '.join(asked[:3])} ... with {', '.join(VIDEOS)}"
        )
    return usable


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


def _read_shards(paths: list[Path], skipped: dict[str, str]) -> list[Listed]:
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
            one = Listed(path, captions.get(key, ()), member.name, member.offset_data, member.size)
            if one.captions:
                listed.append(one)
            else:
                skipped[one.name] = f"no caption in {key}.txt, nor caption or text in {key}.json"
    return listed


def _captions(kind: str, data: bytes, where: str) -> tuple[str, ...]:
    if kind == ".txt":
        return _lines(data, where)
    try:
        row = json.loads(data)
        return _texts(row.get("caption") or row.get("text")) if isinstance(row, dict) else ()
    except ValueError as error:
        raise ValueError(f"cannot read {where}: {error}") from error
