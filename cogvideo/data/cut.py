"""Choose a frame rate and cut a clip out of a video (CogVideo section 3.1: multi-frame-rate training).

A video is anything with a length, a caption, and frames at given times. A `ClipSpec` says how many frames to
take and at which fps. The seconds that the frames span at the chosen fps become the duration prompt of the
text, so a model learns what "4.0 seconds" and "0.5 seconds" look like.
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


@runtime_checkable
class CodedVideo(Protocol):
    """A video of which codes are stored instead of frames."""

    def codes(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Codes [F, N] of the frames at `times` (seconds)."""
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
class ClipSpec:
    """What a clip is: `frames` frames at one of several fps, of which the first `keep` are used."""

    frames: int
    fps: tuple[float, ...]  # frames per second; one that is listed twice is chosen twice as often
    keep: int | None = None  # None: all of them
    sizes: tuple[int, ...] = (48,)  # the same frames at each of these sizes, in pixels
    crop: int = 0  # pixels a side of a square cropped from every frame, over the object if it is known
    cover: int = 0  # cells a side of the map that says where the object is

    @property
    def bytes(self) -> int:
        """Of the frames of a clip, at least."""
        sides = [self.crop] if self.crop else self.sizes
        return (self.keep or self.frames) * sum(3 * side**2 for side in sides)


@dataclass(frozen=True)
class Sample:
    caption: str
    duration: float  # seconds from the first frame to the last, as if all `frames` were kept
    frames: tuple[Frames, ...]  # for each size: uint8 [F, size, size, 3]
    # float32 [F, cover, cover], if asked for; zeros if the video does not know where its object is
    cover: np.ndarray | None = None
    codes: np.ndarray | None = None  # [F, N], of a video of which codes are stored; it has no frames


def cut_clip(video: Video, spec: ClipSpec, rng: np.random.Generator) -> Sample:
    """Cut one clip at random.

    The fps is one for which the video is long enough and has frames. If it has too few frames just there, the
    next lower fps is tried: no frame appears twice. Raise ValueError if none fits.
    """
    fitting = _fitting_fps(video, spec)
    chosen = fitting[rng.integers(len(fitting))]
    lower = sorted({fps for fps in fitting if fps < chosen}, reverse=True)

    for fps in (chosen, *lower):
        span = _span(spec, fps)
        start = rng.uniform(0, max(video.seconds - span, 0))
        times = np.minimum(start + np.arange(spec.keep or spec.frames) / fps, video.seconds)
        try:
            codes = None
            frames: tuple[Frames, ...] = ()
            if isinstance(video, CodedVideo) and not spec.crop:
                codes = video.codes(times)
            else:
                frames = tuple(video.frames(times, size) for size in spec.sizes)
        except TooFewFrames:
            if fps == min(fitting):
                raise
            continue

        cover = _cover(video, times, spec.cover) if spec.cover else None
        sample = Sample(video.caption(rng), span, frames, cover, codes)
        return _crop(sample, spec, rng) if spec.crop else sample
    raise AssertionError  # the lowest fps returns or raises


def _span(spec: ClipSpec, fps: float) -> float:
    """Seconds from the first frame to the last."""
    return (spec.frames - 1) / fps


def _fitting_fps(video: Video, spec: ClipSpec) -> list[float]:
    """The fps for which the video is long enough and has frames; ValueError if there are none."""
    slack = 0.5 / video.fps  # each time takes the nearest frame
    fitting = []
    for fps in spec.fps:
        if fps <= 1.01 * video.fps and _span(spec, fps) <= video.seconds + slack:
            fitting.append(fps)
    if not fitting:
        choices = ", ".join(f"{fps:g}" for fps in sorted(set(spec.fps)))
        raise ValueError(
            f"{video.seconds:.2f} s at {video.fps:g} frames a second are too few for "
            f"{spec.frames} frames at {choices} frames a second"
        )
    return fitting


def _cover(video: Video, times: np.ndarray, size: int) -> np.ndarray:
    """float32 [F, size, size] the share of each cell that the object covers; zeros if the video does not
    know."""
    if isinstance(video, ObjectVideo):
        return video.cover(times, size)
    return np.zeros((len(times), size, size), np.float32)


def _crop(sample: Sample, spec: ClipSpec, rng: np.random.Generator) -> Sample:
    """Crop the same square from all frames: over the object, shifted by up to a twelfth of the frame, or
    anywhere if the video does not know where its object is."""
    (size,) = spec.sizes
    cells = spec.cover or size
    side = spec.crop * cells // size
    corner = rng.integers(0, cells - side + 1, 2)
    if sample.cover is not None and sample.cover.any():
        covered = np.argwhere(sample.cover[0] > 0.5 * sample.cover[0].max())
        middle = (covered.min(0) + covered.max(0)) // 2 + rng.integers(-cells // 12, cells // 12 + 1, 2)
        corner = np.clip(middle - side // 2, 0, cells - side)

    top, left = corner * (size // cells)
    frames = sample.frames[0][:, top : top + spec.crop, left : left + spec.crop]
    if sample.cover is None:
        return replace(sample, frames=(frames,))
    top, left = corner
    return replace(sample, frames=(frames,), cover=sample.cover[:, top : top + side, left : left + side])
