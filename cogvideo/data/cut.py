"""Choose a frame rate and cut a clip out of a recording (CogVideo section 3.1: multi-frame-rate training).

A recording is anything with a length, a caption, and frames at given times. A cut says how many frames are
taken and at which rates; the seconds that the whole window spans at the chosen rate become the duration
prompt of the text, so a model learns what "4.0 seconds" and "0.5 seconds" look like.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from cogvideo.video import TooFewFrames


class Recording(Protocol):
    """One captioned video, read lazily."""

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        ...

    @property
    def fps(self) -> float:
        """The frames that there are each second."""
        ...

    def caption(self, rng: np.random.Generator) -> str: ...

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        ...


@runtime_checkable
class Segmented(Protocol):
    """A recording that knows where its object is."""

    def cover(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """float32 [F, size, size] at these seconds: the share of each cell that the object covers."""
        ...


class Source(Protocol):
    """Recordings by index, `count` of them; a source without end says None."""

    @property
    def count(self) -> int | None: ...

    def __getitem__(self, index: int) -> Recording: ...

    @property
    def skipped(self) -> dict[str, str]:
        """What was found not to be a recording, and why."""
        ...

    def name(self, index: int) -> str:
        """Of a recording, for messages."""
        ...

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """That of a recording, without opening it."""
        ...


@dataclass(frozen=True)
class Cut:
    """How a clip is taken: a window of `frames` at one of `rates`, of which the first `keep` are used."""

    frames: int
    rates: tuple[float, ...]  # frames a second; one that is listed twice is taken twice as often
    keep: int | None = None  # None: all of the window
    sizes: tuple[int, ...] = (48,)  # the same frames at each of these sizes, in pixels
    crop: int = 0  # pixels a side of a window cut out of every frame, over the object if it is known
    cover: int = 0  # cells a side of the map that says where the object is, of recordings that know it


@dataclass(frozen=True)
class Sample:
    caption: str
    duration: float  # seconds that the window spans
    frames: tuple[np.ndarray, ...]  # for each size of the cut: uint8 [F, size, size, 3]
    cover: np.ndarray | None = None  # float32 [F, cover, cover], if the cut asks for it


def cut(recording: Recording, how: Cut, rng: np.random.Generator) -> Sample:
    """One clip at random, at one of the rates that the recording has frames for and whose window fits into
    it, or at the next lower one if it has too few just there: no frame is taken twice. ValueError if there is
    no such rate."""
    spans = {rate: (how.frames - 1) / rate for rate in how.rates}
    slack = 0.5 / recording.fps  # each time takes the nearest frame
    fitting = [
        rate
        for rate in how.rates
        if rate <= 1.01 * recording.fps and spans[rate] <= recording.seconds + slack
    ]
    if not fitting:
        rates = ", ".join(f"{rate:g}" for rate in sorted(set(how.rates)))
        raise ValueError(
            f"{recording.seconds:.2f} s at {recording.fps:g} frames a second are too few for "
            f"{how.frames} frames at {rates} frames a second"
        )
    chosen = fitting[rng.integers(len(fitting))]
    lower = sorted({rate for rate in fitting if rate < chosen}, reverse=True)
    for rate in (chosen, *lower):
        start = rng.uniform(0, max(recording.seconds - spans[rate], 0))
        times = np.minimum(start + np.arange(how.keep or how.frames) / rate, recording.seconds)
        try:
            frames = tuple(recording.frames(times, size) for size in how.sizes)
            cover = _cover(recording, times, how.cover) if how.cover else None
            sample = Sample(recording.caption(rng), spans[rate], frames, cover)
            return _crop(sample, how, rng) if how.crop else sample
        except TooFewFrames:
            if rate == min(fitting):
                raise
    raise AssertionError  # a rate is the lowest


def _cover(recording: Recording, times: np.ndarray, size: int) -> np.ndarray:
    if isinstance(recording, Segmented):
        return recording.cover(times, size)
    return np.zeros((len(times), size, size), np.float32)


def _crop(sample: Sample, how: Cut, rng: np.random.Generator) -> Sample:
    """The same window of all frames of one size: over the object, give or take a twelfth, or anywhere."""
    (size,), cells = how.sizes, how.cover or how.sizes[0]
    side = how.crop * cells // size
    corner = rng.integers(0, cells - side + 1, 2)
    if sample.cover is not None and sample.cover.any():
        object = np.argwhere(sample.cover[0] > 0.5 * sample.cover[0].max())
        middle = (object.min(0) + object.max(0)) // 2 + rng.integers(-cells // 12, cells // 12 + 1, 2)
        corner = np.clip(middle - side // 2, 0, cells - side)
    top, left = corner * (size // cells)
    frames = sample.frames[0][:, top : top + how.crop, left : left + how.crop]
    top, left = corner
    cover = None if sample.cover is None else sample.cover[:, top : top + side, left : left + side]
    return replace(sample, frames=(frames,), cover=cover)
