"""Captioned videos as a source: listed once, opened one by one on demand.

An entry may be a segment of a video, from `start` to `end`, which is cut out when it is decoded. A video may
be stored in a shard, a plain tar; the entry then says where it begins and how long it is. A video may have
several captions: one of them is chosen at random each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cogvideo.video import Frames, VideoFile


@dataclass(frozen=True)
class CaptionedVideo:
    """A `Video`: a video file, or a segment of it, with its captions."""

    video: VideoFile
    captions: tuple[str, ...]
    start: float = 0.0  # seconds after the first frame
    end: float | None = None  # None: the end of the video

    @property
    def seconds(self) -> float:
        return min(self.video.seconds, self.end or self.video.seconds) - self.start

    @property
    def fps(self) -> float:
        return self.video.fps

    def caption(self, rng: np.random.Generator) -> str:
        return choose_caption(self.captions, rng)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> Frames:
        """uint8 [F, size, size, 3] at `times` (seconds)."""
        return self.video.frames(np.asarray(times) + self.start, size, repeat=False)


@dataclass(frozen=True)
class Entry:
    """A captioned video that was found, not yet opened."""

    path: Path  # of the video, or of the shard that holds it
    captions: tuple[str, ...]
    member: str = ""  # name within the shard
    first: int = 0  # byte of the shard at which it begins
    size: int = 0  # bytes
    start: float = 0.0
    end: float | None = None

    @property
    def name(self) -> str:
        """The file, and the segment if it is one."""
        if not self.start and self.end is None:
            return self.file
        end = "the end" if self.end is None else f"{self.end:g} s"
        return f"{self.file}, {self.start:g} s to {end}"

    @property
    def file(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """The video's bytes, from its shard. Raise ValueError if the shard cannot be read."""
        try:
            with open(self.path, "rb") as shard:
                shard.seek(self.first)
                return shard.read(self.size)
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from None


@dataclass(frozen=True)
class Videos:
    """A `Source` of the videos of a folder, a table, or shards."""

    entries: tuple[Entry, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    opened: dict[tuple[Path, int], VideoFile] = field(default_factory=dict, compare=False)

    @property
    def count(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return choose_caption(self.entries[index].captions, rng)

    def __getitem__(self, index: int) -> CaptionedVideo:
        """Raise ValueError, with the name of the video, if it cannot be read."""
        entry = self.entries[index]
        data = entry.read() if entry.member else entry.path
        key = (entry.path, entry.first)
        if key not in self.opened:
            video = VideoFile.open(data, entry.file)
            self.opened[key] = replace(video, data=b"")  # fps and length, which take time to find out
        video = replace(self.opened[key], data=data)

        if entry.start and entry.start >= video.seconds:
            raise ValueError(f"{entry.name} begins after the video's end, at {video.seconds:g} s")
        return CaptionedVideo(video, entry.captions, entry.start, entry.end)


def choose_caption(captions: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of the captions of a video, at random."""
    return captions[rng.integers(len(captions))]
