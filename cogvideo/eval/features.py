"""Features and measures of every clip: computed once, cached by content, on one process, several, or a
cluster.

A clip is decoded once for all that is asked of it. What was computed is cached under a key of the video's
bytes, the protocol and the network's weights, so an interrupted evaluation resumes, and another with the same
clips is fast.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cogvideo.cluster import spread
from cogvideo.eval import metrics
from cogvideo.eval.clips import Item
from cogvideo.eval.extractors import Extractor, find_extractor
from cogvideo.eval.protocol import Protocol
from cogvideo.files import atomic_path, expand_user
from cogvideo.model.vqvae import to_images
from cogvideo.video import Frames, TooFewFrames

VERSION = 3  # of what is cached; raised when a computation changes
MEASURES = ("motion", "flicker", "warping error", "sharpness")  # of single clips
CONTROLS = ("shuffled", "frozen")  # a clip with its frames in random order; its first frame, repeated


def default_cache() -> Path:
    return expand_user(os.environ.get("COGVIDEO_CACHE", "~/.cache/cogvideo")) / "features"


@dataclass(frozen=True)
class Job:
    """What is asked of one clip."""

    item: Item
    protocol: Protocol
    extractors: tuple[str, ...]
    weights: tuple[tuple[str, Path], ...] = ()  # files of extractors
    controls: bool = False  # features of the controls as well
    cache: Path | None = None


@dataclass(frozen=True)
class Row:
    """What was found for one clip; too short a one has no features."""

    digest: str  # SHA-256 of its frames
    measures: dict[str, float]
    # By extractor and kind ("clip" or a control): float32 [rows, D].
    features: dict[tuple[str, str], np.ndarray]
    skipped: str = ""  # why, if it was


def run(
    jobs: Sequence[Job],
    workers: int = 0,
    address: str | None = None,
    report: Callable[[int], None] | None = None,
) -> Iterator[Row]:
    """The rows of all jobs, in order: here, in `workers` processes, or on the Ray cluster at `address`."""
    rows = spread(work, jobs, workers, address)
    for done, row in enumerate(rows, 1):
        if report is not None:
            report(done)
        yield row


@lru_cache(16)
def _extractor(name: str, weights: tuple[tuple[str, Path], ...]) -> Extractor:
    return find_extractor(name, dict(weights))


def work(job: Job) -> Row:
    """All that a job asks for; from the cache where possible. ValueError names a video that cannot be
    read."""
    key = _key(job)
    cached = _read(job.cache, key)
    if cached is not None:
        return cached
    try:
        frames = job.item.frames(job.protocol)
    except TooFewFrames as error:
        if job.protocol.short == "refuse":
            raise ValueError(str(error)) from None
        return Row("", {}, {}, str(error))

    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    kinds = {"clip": frames}
    if job.controls:
        kinds |= controls(frames, digest)
    features = {}
    for name in job.extractors:
        for kind, shown in kinds.items():
            rows = _extractor(name, job.weights).features(shown, job.protocol)
            features[name, kind] = rows.numpy().astype(np.float32)
    row = Row(digest, measure(frames), features)
    _write(job.cache, key, row)
    return row


def controls(frames: Frames, digest: str) -> dict[str, Frames]:
    """A clip whose motion is destroyed: its frames in random order (by their digest), and its first one
    repeated."""
    seed = int.from_bytes(bytes.fromhex(digest)[:8], "big")
    order = np.random.default_rng(seed).permutation(len(frames))
    return {"shuffled": frames[order], "frozen": np.repeat(frames[:1], len(frames), axis=0)}


def measure(frames: Frames) -> dict[str, float]:
    """The measures of one clip; those that need more frames are NaN."""
    clip = to_images(frames)
    several = len(clip) > 1
    return {
        "motion": float(metrics.motion(clip)) if several else float("nan"),
        "flicker": float(metrics.flicker(clip)) if len(clip) > 2 else float("nan"),
        "warping error": float(metrics.warping_error(clip)) if several else float("nan"),
        "sharpness": float(metrics.sharpness(clip)),
    }


def _key(job: Job) -> str:
    """All that decides the row of a job."""
    protocol = job.protocol.to_dict()
    del protocol["count"]
    if job.protocol.start == "random":
        protocol["name"] = job.item.stem
    networks = [(name, _extractor(name, job.weights).sha256) for name in job.extractors]
    decides = (VERSION, job.item.digest, sorted(protocol.items()), networks, job.controls)
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _read(cache: Path | None, key: str) -> Row | None:
    if cache is None or not (file := cache / key[:2] / f"{key}.npz").exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            features = {}
            for name in stored.files:
                if name.startswith("features/"):
                    extractor, _, kind = name.removeprefix("features/").rpartition("/")
                    features[extractor, kind] = stored[name]
            measures = dict(zip(MEASURES, stored["measures"].tolist()))
            return Row(str(stored["digest"]), measures, features)
    except (OSError, KeyError, ValueError, BadZipFile):
        return None  # damaged: computed again


def _write(cache: Path | None, key: str, row: Row) -> None:
    if cache is None:
        return
    values = [row.measures[name] for name in MEASURES]
    arrays: dict[str, Any] = {"digest": np.array(row.digest), "measures": np.array(values)}
    for (name, kind), rows in row.features.items():
        arrays[f"features/{name}/{kind}"] = rows
    with atomic_path(cache / key[:2] / f"{key}.npz", durable=False) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)
