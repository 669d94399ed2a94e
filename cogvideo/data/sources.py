"""Where captioned videos come from: the tiny world, a folder of videos, a table, YouCook2, shards.

A source is listed here, not opened. Entries that are visibly unusable (a missing video, an empty caption) are
skipped and reported in `skipped`; it is an error if nothing is left, or if a list cannot be understood.
"""

import csv
import glob
import math
import os
import re
import reprlib
import tarfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from cogvideo.data import tinyworld
from cogvideo.data.coded import is_coded, open_coded
from cogvideo.data.cut import Source
from cogvideo.data.tinyworld.gallery import scenes
from cogvideo.data.tinyworld.own import is_world, open_world
from cogvideo.data.videos import Entry, Videos
from cogvideo.files import TAR_ERRORS, check_file, parse_json, read_json, read_text
from cogvideo.video import VIDEOS

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
COLUMNS = "file_name (or path) and text (or caption), and start and end if only a part is meant"
CHOICES = (
    "give tinyworld; a folder that cogvideo data world or data tokenize wrote; a folder of videos "
    f"({', '.join(VIDEOS)}) with captions in <name>.txt next to them or in {', '.join(TABLES)}; a .csv or "
    f".jsonl with {COLUMNS}; the annotations of YouCook2 (.json) with the videos in its folder or below; or "
    "local shards: a folder of .tar, one .tar, or a pattern such as x-{000..099}.tar"
)
YOUCOOK = "youcook*trainval*.json"  # the file with its captions
SUBSETS = ("training", "validation")  # of YouCook2; its test videos have no captions
MOST_SHARDS = 100_000  # of a pattern
MOST_CAPTIONS = 2**20  # bytes of a file with the captions of a video

Segment = tuple[Path, float, float | None]  # a video, and the seconds where a part of it begins and ends
Skipped = dict[str, str]  # name of an entry -> why it is not usable
T = TypeVar("T")


def open_source(
    where: str | Path, seed: int = 0, sprites: int | None = 32, subset: str | None = None
) -> Source:
    """Videos to train on: "tinyworld", a user's world, a folder of videos, a table, YouCook2, or webdataset
    shards.

    `seed` applies to worlds, the number of `sprites` (None: all) to the tiny world, `subset` (None: training)
    to YouCook2. Raise ValueError if there are no usable videos, or a table or shard is broken.
    """
    path = Path(where)
    annotations = _find_annotations(path)
    if subset is not None and annotations is None:
        raise ValueError(f"{where} has no subset {subset}; leave it out for all but YouCook2")
    if str(where) == "tinyworld":
        return tinyworld.TinyWorld(tinyworld.sprites(sprites), seed, even=True, varied=True)
    if is_world(path):
        return scenes(open_world(path), seed)
    if is_coded(path):
        return open_coded(path)

    skipped: Skipped = {}
    entries: list[Entry] = []
    if annotations is not None:
        entries = _read_youcook(annotations, subset or SUBSETS[0], skipped)
    elif path.is_dir():
        entries = _read_folder(path, skipped) or _read_shards(sorted(path.glob("*.tar")), skipped)
    elif path.suffix in (".csv", ".jsonl"):
        entries = _read_table(path, skipped)
    elif path.suffix == ".tar":
        entries = _read_shards(_expand(str(where)), skipped)

    if not entries:
        reasons = [f"{name}: {why}" for name, why in skipped.items()]
        more = f" ({len(reasons)} not usable: {'; '.join(reasons[:3])})" if reasons else ""
        raise ValueError(f"no captioned videos at {where}{more}; {CHOICES}")
    return Videos(tuple(entries), skipped)


def _find_annotations(path: Path) -> Path | None:
    """The annotations of YouCook2 at a path: a .json, or a file in the folder."""
    if path.suffix == ".json":
        return path
    if not path.is_dir():
        return None
    files = [*path.glob(YOUCOOK), *path.glob(f"annotations/{YOUCOOK}")]
    return files[0] if files else None


# -- folders and tables --


def _read_folder(folder: Path, skipped: Skipped) -> list[Entry]:
    """The videos in a folder and its subfolders, sorted by name."""
    paths = [Path(os.path.normpath(path)) for path in videos_below(folder)]
    table = next((folder / name for name in TABLES if (folder / name).exists()), None)
    if table:
        entries = _read_table(table, skipped)
        known = {entry.path for entry in entries}
        skipped.update({str(path): f"no caption in {table}" for path in paths if path not in known})
        return entries

    entries = []
    for path in paths:
        text = path.with_suffix(".txt")
        captions = _texts(read_text(text).splitlines()) if text.exists() else ()
        if captions:
            entries.append(Entry(path, captions))
        else:
            skipped[str(path)] = f"no caption in {text}"
    return entries


def videos_below(folder: Path, suffixes: tuple[str, ...] = VIDEOS) -> list[Path]:
    """The videos in a folder and its subfolders, sorted by name."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file for file in files if not file.name.startswith(".") and os.path.isfile(file))


def _read_table(path: Path, skipped: Skipped) -> list[Entry]:
    """The videos of a .csv or .jsonl; rows with the same segment of a video are its captions."""
    captions: dict[Segment, tuple[str, ...]] = {}
    try:
        check_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = (parse_json(line) for line in file if line.strip())
            rows = csv.DictReader(file, skipinitialspace=True) if path.suffix == ".csv" else lines
            for number, row in enumerate(rows, 1):
                segment, texts = _read_row(row, path.parent, number)
                captions[segment] = captions.get(segment, ()) + texts
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; {CHOICES}") from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is not text in UTF-8; each row needs {COLUMNS}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}; each row needs {COLUMNS}") from error

    entries = [Entry(video, texts, start=start, end=end) for (video, start, end), texts in captions.items()]
    return _usable(sorted(entries, key=lambda entry: (entry.path, entry.start)), skipped)


def _read_row(row: Any, folder: Path, number: int) -> tuple[Segment, tuple[str, ...]]:
    """The segment of a video, and its captions."""
    try:
        if not isinstance(row, dict):
            raise ValueError(f"it must be a table; got {reprlib.repr(row)}")
        if None in row:
            raise ValueError("it has more fields than there are columns; quote captions that contain commas")
        name = _column(row, "path", "file_name")
        if not isinstance(name, str):
            raise ValueError(f"path or file_name must be a text; got {reprlib.repr(name)}")
        start = _seconds(row, "start")
        end = _seconds(row, "end")
        video = Path(os.path.normpath(folder / name))
        return (video, start or 0.0, end), _texts(_column(row, "caption", "text"))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def _column(row: dict[str, Any], *names: str) -> Any:
    """The first value that is not empty of the columns with these names; ValueError if there are none."""
    present = [name for name in names if name in row]
    if not present:
        raise ValueError(f"there is no {' or '.join(names)}")
    return next((row[name] for name in present if row[name]), "")


def _seconds(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        return float("" if isinstance(value, bool) else value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} must be a number of seconds; got {reprlib.repr(value)}") from None


def _usable(entries: Iterable[Entry], skipped: Skipped) -> list[Entry]:
    """The entries whose file exists, that have a caption, and that end after their start."""
    usable = []
    exists: dict[Path, bool] = {}
    for entry in entries:
        if entry.path not in exists:
            exists[entry.path] = os.path.isfile(entry.path)
        if not exists[entry.path]:
            skipped[str(entry.path)] = "the file does not exist"
        elif not entry.captions:
            skipped[entry.name] = "its caption is empty"
        elif not 0 <= entry.start < (math.inf if entry.end is None else entry.end):
            skipped[entry.name] = "its start must be 0 s or later, and before its end"
        else:
            usable.append(entry)
    return usable


def _texts(value: str | list[str] | None) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption is a text or a list of texts, not {reprlib.repr(value)}")
    return tuple(text.strip() for text in texts if text.strip())


# -- YouCook2 --


def _read_youcook(path: Path, subset: str, skipped: Skipped) -> list[Entry]:
    """The segments of a subset, of the videos in the folder of the annotations or below it; if that folder is
    called annotations, next to it.

    Layout: {"database": {id: {"subset", "annotations": [{"segment": [start, end], "sentence"}], ...}}}; a
    video is named by its id.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}; choose one of {', '.join(SUBSETS)}")
    try:
        table = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"there are no annotations at {path}") from None

    try:
        segments = _read_database(table, subset)
    except ValueError as error:
        raise ValueError(f"{path} is not laid out like the annotations of YouCook2: {error}") from None

    below = path.parent.parent if path.parent.name == "annotations" else path.parent
    videos = {video.stem: video for video in reversed(videos_below(below))}
    entries = []
    for name, rows in segments.items():
        file = videos.get(name, below / f"{name}.mp4")
        entries += [Entry(file, captions, start=start, end=end) for start, end, captions in rows]
    usable = _usable(entries, skipped)

    if not entries:
        raise ValueError(f"{path} has no segments of the subset {subset}")
    if not any(name in videos for name in segments):
        raise ValueError(
            f"none of the {len(segments)} videos of the subset {subset} is in {below} or "
            f"below; looked for {', '.join(list(segments)[:3])} ... with {', '.join(VIDEOS)}"
        )
    return usable


def _read_database(table: Any, subset: str) -> dict[str, list[tuple[float, float, tuple[str, ...]]]]:
    """Start, end and captions of the segments of each video of a subset. Raise ValueError, with the key, if
    something is missing or of another type."""
    segments: dict[str, list[tuple[float, float, tuple[str, ...]]]] = {}
    for name, video in _value("", table, "database", dict).items():
        where = f"database.{name}."
        if _value(where, video, "subset", str) != subset:
            continue
        segments[name] = []
        for number, row in enumerate(_value(where, video, "annotations", list)):
            inside = f"{where}annotations[{number}]."
            segment = _value(inside, row, "segment", list)
            if len(segment) != 2 or not all(isinstance(second, (int, float)) for second in segment):
                raise ValueError(f"{inside}segment is {reprlib.repr(segment)}, not [start, end]")
            captions = _texts(_value(inside, row, "sentence", str))
            segments[name].append((float(segment[0]), float(segment[1]), captions))
    return segments


def _value(where: str, table: Any, key: str, kind: type[T]) -> T:
    """The value of a key, which must be of this type."""
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, kind):
        actual = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}{key} is {actual}")
    return value


# -- shards --


def _expand(pattern: str) -> list[Path]:
    """The paths of a pattern with {000..099}, {a,b}, * and ?. ValueError if there are too many."""
    spans: list[tuple[Sequence[int | str], str]] = []  # what a part may be, and its format
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):  # every second part was in braces
        span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part, re.ASCII)
        if i % 2 and span:
            spans.append((range(int(span[1]), int(span[2]) + 1), f"0{len(span[1])}d"))
        else:
            spans.append((part.split(",") if i % 2 else [part], ""))
    count = math.prod(len(values) for values, _ in spans)
    if count > MOST_SHARDS:
        raise ValueError(f"{pattern} names {count} shards; at most {MOST_SHARDS} are possible")
    choices = []
    for values, form in spans:
        choices.append([format(value, form) for value in values])

    paths = []
    for parts in product(*choices):
        name = "".join(parts)
        paths += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    return [Path(path) for path in paths]


def _read_shards(paths: list[Path], skipped: Skipped) -> list[Entry]:
    """The videos of webdataset shards."""
    entries = []
    for path in paths:
        try:
            videos, captions = _read_shard(path)
        except FileNotFoundError:
            raise ValueError(f"cannot read the shard {path}: there is no such file") from None
        except TAR_ERRORS as error:
            why = str(error) or "a header is damaged"
            raise ValueError(f"cannot read the shard {path}: {why}; shards are plain .tar files") from error
        for key, member in videos.items():
            entry = Entry(path, captions.get(key, ()), member.name, member.offset_data, member.size)
            if entry.captions:
                entries.append(entry)
            else:
                skipped[entry.name] = f"no caption in {key}.txt, and no caption or text in {key}.json"
    return entries


def _read_shard(path: Path) -> tuple[dict[str, tarfile.TarInfo], dict[str, tuple[str, ...]]]:
    """The videos of a shard and their captions, by key.

    Files with the same name up to the first dot, the key, belong together: a video and its captions in .txt
    (one per line) or in .json (under "caption" or "text").
    """
    videos: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tuple[str, ...]] = {}
    check_file(path)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
            if name is None or not member.isfile():
                continue
            key = name[1]
            suffix = "." + name[2].lower().split(".")[-1]
            if suffix in VIDEOS and not member.issparse():  # whose bytes would not lie in one piece
                videos[key] = member
            elif suffix in (".txt", ".json"):
                captions[key] = captions.get(key, ()) + _read_captions(tar, member, suffix)
    return videos, captions


def _read_captions(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[str, ...]:
    """The captions that a member of a shard holds; ValueError names it."""
    try:
        if member.size > MOST_CAPTIONS:
            raise ValueError(f"it has {member.size} bytes; captions have at most {MOST_CAPTIONS}")
        file = tar.extractfile(member)
        data = b"" if file is None else file.read()
        if suffix == ".txt":
            return _texts(data.decode("utf-8-sig").splitlines())
        row = parse_json(data)
        return _texts(row.get("caption") or row.get("text")) if isinstance(row, dict) else ()
    except UnicodeDecodeError:
        raise ValueError(f"{member.name!r}: it is not text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{member.name!r}: {error}") from None
