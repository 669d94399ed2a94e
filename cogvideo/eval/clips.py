"""The clips of one side of an evaluation: listed, chosen by a seed, and read one by one.

Videos come from a folder, a list of paths (.txt), a table with captions (.csv, .jsonl), or webdataset shards.
They are decoded once, at the times that the protocol names, and never kept: 10,000 clips take the memory
of one.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideo.data.sources import TABLES, open_source, videos_below
from cogvideo.data.videos import Entry, Videos
from cogvideo.eval.protocol import Protocol
from cogvideo.files import read_text
from cogvideo.video import VIDEOS, Clip, Frames, TooFewFrames, crop_centre

ANIMATIONS = (".webp",)  # read as a whole
WHERE = (
    f"give a folder of videos ({', '.join(VIDEOS)}, .webp), a .txt with a path on each line, a .csv or "
    ".jsonl with file_name and text, or webdataset shards (.tar)"
)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Item:
    """One video: where it is stored, and its caption if it has one."""

    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def stem(self) -> str:
        """The file's name without folder and extension, by which two sides are paired."""
        return Path(self.entry.member or self.entry.path).stem

    @cached_property
    def caption(self) -> str:
        """From the table or the text next to the video, else the title that the video stores."""
        if self.entry.captions:
            return self.entry.captions[0]
        if not self.entry.member and self.entry.path.suffix.lower() in ANIMATIONS:
            return ""
        return Videos((self.entry,))[0].video.title

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored bytes, and the segment."""
        data = self.entry.read() if self.entry.member else self.entry.path.read_bytes()
        sha = hashlib.sha256(data)
        sha.update(repr((self.entry.start, self.entry.end)).encode())
        return sha.hexdigest()

    def frames(self, protocol: Protocol) -> Frames:
        """uint8 [F, size, size, 3]. ValueError if the video cannot be read; TooFewFrames if it is too
        short."""
        if not self.entry.member and self.entry.path.suffix.lower() in ANIMATIONS:
            clip = Clip.load(self.entry.path)
            seconds = (len(clip.frames) - 1) / clip.fps
            times = self._times(protocol, seconds, clip.fps)
            numbers = np.clip(np.round(times * clip.fps).astype(int), 0, len(clip.frames) - 1)
            return _fit(clip.frames[numbers], protocol)

        video = Videos((self.entry,))[0]
        times = self._times(protocol, video.seconds, video.fps)
        return _fit(video.video.frames(times + self.entry.start), protocol)

    def _times(self, protocol: Protocol, seconds: float, fps: float) -> np.ndarray:
        """When the frames are taken, in seconds after the first one of the video."""
        slack = 0.5 / fps
        spare = seconds - protocol.seconds
        if spare < -slack and protocol.short != "repeat":
            raise TooFewFrames(
                f"{self.name} lasts {seconds:.2f} s, and {protocol.frames} frames at {protocol.fps:g} fps "
                f"take {protocol.seconds:.2f} s; choose fewer frames, a higher fps, or short skip or repeat"
            )
        start = 0.0
        if protocol.start == "middle":
            start = max(spare, 0.0) / 2
        elif protocol.start == "random":
            digest = hashlib.sha256(f"{protocol.seed} {self.stem}".encode()).digest()
            start = max(spare, 0.0) * int.from_bytes(digest[:6], "big") / 2**48
        return np.minimum(start + np.arange(protocol.frames) / protocol.fps, seconds)


def _fit(frames: Frames, protocol: Protocol) -> Frames:
    """Crop and resize frames to size x size."""
    return np.stack([np.asarray(_fit_image(Image.fromarray(frame), protocol)) for frame in frames])


def _fit_image(image: Image.Image, protocol: Protocol) -> Image.Image:
    size = protocol.size
    method = _RESAMPLING[protocol.filter]
    if protocol.crop == "centre" and protocol.order == "crop-resize":
        image = crop_centre(image, min(image.size))
    elif protocol.crop == "centre":
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), method)
        image = crop_centre(image, size)
    return image if image.size == (size, size) else image.resize((size, size), method)


def find_items(where: str | Path) -> list[Item]:
    """The videos at a place, sorted by name in the order of people (2 before 10); ValueError if there are
    none."""
    path = Path(where)
    if path.suffix == ".txt" and path.is_file():
        entries = _read_list(path)
    elif path.is_dir() and not any((path / table).exists() for table in TABLES) and not [*path.glob("*.tar")]:
        entries = _read_folder(path)
    elif path.exists() or path.suffix == ".tar":
        source = open_source(where)
        assert isinstance(source, Videos)
        if source.skipped:
            name, why = next(iter(source.skipped.items()))
            raise ValueError(f"{where}: {len(source.skipped)} videos cannot be used, such as {name}: {why}")
        entries = list(source.entries)
    else:
        raise ValueError(f"there is no {where}; {WHERE}")
    if not entries:
        raise ValueError(f"no videos at {where}; {WHERE}")
    return [Item(entry) for entry in sorted(entries, key=lambda entry: _natural(entry.name))]


def _read_folder(folder: Path) -> list[Entry]:
    """The videos in a folder and its subfolders, each with the text next to it as its caption."""
    entries = []
    for file in videos_below(folder, (*VIDEOS, *ANIMATIONS)):
        text = file.with_suffix(".txt")
        caption = read_text(text).strip() if text.exists() else ""
        entries.append(Entry(file, (caption,) if caption else ()))
    return entries


def _read_list(file: Path) -> list[Entry]:
    entries = []
    for line in read_text(file).splitlines():
        if not line.strip():
            continue
        path = file.parent / line.strip()
        if not os.path.isfile(path):
            raise ValueError(f"{file} names {path}, which does not exist")
        entries.append(Entry(path, ()))
    return entries


def _natural(name: str) -> list[int | str]:
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else part) for part in parts]


def choose(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """`count` of the items, by the seed, in their order; all if None. ValueError if there are fewer."""
    if count is None:
        return list(items)
    if count > len(items):
        raise ValueError(f"count is {count}, but there are {len(items)} clips; choose at most {len(items)}")
    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in sorted(chosen)]


def pair(generated: Sequence[Item], reference: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Items of the same stem; ValueError names those without a partner."""
    by_stem = {item.stem: item for item in reference}
    missing = [item.stem for item in generated if item.stem not in by_stem]
    if missing:
        raise ValueError(
            f"{len(missing)} generated videos have no reference of the same name, such as {missing[0]}"
        )
    return [(item, by_stem[item.stem]) for item in generated]
