"""Captioned videos as a source: listed once, opened one by one when they are asked for.

A recording may be a part of a video, from `start` to `end`, which is cut out when it is decoded; a video may
lie in a shard, a plain tar, whose list says where it begins and how long it is. A recording may have several
captions: one of them is drawn each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cogvideo.video import VideoFile


@dataclass(frozen=True)
class Captioned:
    """A `Recording`: a video, or a part of it, and what can be said of it."""

    video: VideoFile
    captions: tuple[str, ...]
    start: float = 0.0  # seconds after the first frame
    end: float | None = None  # None: of the video

    @property
    def seconds(self) -> float:
        return min(self.video.seconds, self.end or self.video.seconds) - self.start

    @property
    def fps(self) -> float:
        return self.video.fps

    def caption(self, rng: np.random.Generator) -> str:
        return _one(self.captions, rng)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        return self.video.frames(np.asarray(times) + self.start, size, repeat=False)


@dataclass(frozen=True)
class Listed:
    """A recording that was found, not yet opened."""

    path: Path  # of the video, or of the shard that holds it
    captions: tuple[str, ...]
    member: str = ""  # of a shard
    first: int = 0  # byte
    size: int = 0  # bytes
    start: float = 0.0
    end: float | None = None

    @property
    def name(self) -> str:
        end = "the end" if self.end is None else f"{self.end:g} s"
        part = f", {self.start:g} s to {end}" if self.start or self.end is not None else ""
        return f"{self.file}{part}"

    @property
    def file(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """The file, out of its shard; ValueError if that is not there any more."""
        try:
            with open(self.path, "rb") as shard:
                shard.seek(self.first)
                return shard.read(self.size)
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from None


@dataclass(frozen=True)
class Videos:
    """A `Source` of the videos of a folder, a table, or shards."""

    listed: tuple[Listed, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    opened: dict[tuple[Path, int], VideoFile] = field(default_factory=dict, compare=False)

    @property
    def count(self) -> int:
        return len(self.listed)

    def name(self, index: int) -> str:
        return self.listed[index].name

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return _one(self.listed[index].captions, rng)

    def __getitem__(self, index: int) -> Captioned:
        """Raises ValueError, with the name of the video, if it cannot be read."""
        one = self.listed[index]
        data, place = one.path if not one.member else one.read(), (one.path, one.first)
        if place not in self.opened:
            video = VideoFile.open(data, one.file)
            self.opened[place] = replace(video, data=b"")  # its rate and length, which take time to find out
        video = replace(self.opened[place], data=data)
        if one.start >= video.seconds:
            raise ValueError(f"{one.name} begins after the video's end, at {video.seconds:g} s")
        return Captioned(video, one.captions, one.start, one.end)


def _one(captions: tuple[str, ...], rng: np.random.Generator) -> str:
    return captions[rng.integers(len(captions))]
