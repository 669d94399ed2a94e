"""Choose a frame rate and cut a clip out of a video (CogVideo section 3.1: multi-frame-rate training).

A video is anything with a length, a caption, and frames at given times. A cut says how many frames to take
and at which rates. The seconds that the whole window spans at the chosen rate become the duration prompt of
the text, so a model learns what "4.0 seconds" and "0.5 seconds" look like.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from cogvideo.video import Frames, TooFewFrames


class Video(Protocol):
    """One captioned video, read on demand."""

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        ...

    @property
    def fps(self) -> float:
        """Frames per second."""
        ...

    def caption(self, rng: np.random.Generator) -> str: ...

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> Frames:
        """uint8 [F, size, size, 3] at `times` (seconds)."""
        ...


@runtime_checkable
class ObjectVideo(Protocol):
    """A video that knows where its object is."""

    def cover(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """float32 [F, size, size] at `times` (seconds): the share of each cell that the object covers."""
        ...


class Source(Protocol):
    """Videos by index, `count` of them; None for a source without end."""

    @property
    def count(self) -> int | None: ...

    def __getitem__(self, index: int) -> Video: ...

    @property
    def skipped(self) -> dict[str, str]:
        """Entries that are not usable, with the reason."""
        ...

    def name(self, index: int) -> str:
        """The name of a video, for messages."""
        ...

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption of a video, without opening it."""
        ...


@dataclass(frozen=True)
class Cut:
    """How to cut a clip: a window of `frames` at one of `rates`, of which the first `keep` are used."""

    frames: int
    rates: tuple[float, ...]  # frames per second; one that is listed twice is taken twice as often
    keep: int | None = None  # None: the whole window
    sizes: tuple[int, ...] = (48,)  # the same frames at each of these sizes, in pixels
    crop: int = 0  # pixels a side of a window cut out of every frame, over the object if it is known
    cover: int = 0  # cells a side of the map that says where the object is, if the video knows it


@dataclass(frozen=True)
class Sample:
    caption: str
    duration: float  # seconds that the window spans
    frames: tuple[Frames, ...]  # for each size of the cut: uint8 [F, size, size, 3]
    cover: np.ndarray | None = None  # float32 [F, cover, cover], if the cut asks for it


def cut(video: Video, how: Cut, rng: np.random.Generator) -> Sample:
    """Cut one clip at random.

    The rate is one of those that the video has frames for and whose window fits into it. If it has too few
    frames just there, the next lower rate is taken: no frame appears twice. Raise ValueError if no rate fits.
    """
    fitting = _fitting_rates(video, how)
    chosen = fitting[rng.integers(len(fitting))]
    lower = sorted({rate for rate in fitting if rate < chosen}, reverse=True)

    for rate in (chosen, *lower):
        span = _span(how, rate)
        start = rng.uniform(0, max(video.seconds - span, 0))
        times = np.minimum(start + np.arange(how.keep or how.frames) / rate, video.seconds)
        try:
            frames = tuple(video.frames(times, size) for size in how.sizes)
        except TooFewFrames:
            if rate == min(fitting):
                raise
            continue

        cover = _cover(video, times, how.cover) if how.cover else None
        sample = Sample(video.caption(rng), span, frames, cover)
        return _crop(sample, how, rng) if how.crop else sample
    raise AssertionError  # the lowest rate returns or raises


def _span(how: Cut, rate: float) -> float:
    """Seconds from the first frame of the window to the last."""
    return (how.frames - 1) / rate


def _fitting_rates(video: Video, how: Cut) -> list[float]:
    """The rates for which the video is long enough and has frames; ValueError if there are none."""
    slack = 0.5 / video.fps  # each time takes the nearest frame
    fitting = [
        rate for rate in how.rates if rate <= 1.01 * video.fps and _span(how, rate) <= video.seconds + slack
    ]
    if not fitting:
        rates = ", ".join(f"{rate:g}" for rate in sorted(set(how.rates)))
        raise ValueError(
            f"{video.seconds:.2f} s at {video.fps:g} frames a second are too few for "
            f"{how.frames} frames at {rates} frames a second"
        )
    return fitting


def _cover(video: Video, times: np.ndarray, size: int) -> np.ndarray:
    if isinstance(video, ObjectVideo):
        return video.cover(times, size)
    return np.zeros((len(times), size, size), np.float32)


def _crop(sample: Sample, how: Cut, rng: np.random.Generator) -> Sample:
    """The same window of all frames of one size: over the object, give or take a twelfth, or anywhere."""
    (size,) = how.sizes
    cells = how.cover or size
    side = how.crop * cells // size
    corner = rng.integers(0, cells - side + 1, 2)
    if sample.cover is not None and sample.cover.any():
        covered = np.argwhere(sample.cover[0] > 0.5 * sample.cover[0].max())
        middle = (covered.min(0) + covered.max(0)) // 2 + rng.integers(-cells // 12, cells // 12 + 1, 2)
        corner = np.clip(middle - side // 2, 0, cells - side)

    top, left = corner * (size // cells)
    frames = sample.frames[0][:, top : top + how.crop, left : left + how.crop]
    if sample.cover is None:
        return replace(sample, frames=(frames,))
    top, left = corner
    return replace(sample, frames=(frames,), cover=sample.cover[:, top : top + side, left : left + side])
