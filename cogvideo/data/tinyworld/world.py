"""The world as data to train on: an endless `Source` of recordings (see `cogvideo.data.clips`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cogvideo.data.tinyworld.picture import render
from cogvideo.data.tinyworld.scene import MOTIONS, SECONDS, Scene, sample_scene
from cogvideo.data.tinyworld.words import caption


@dataclass(frozen=True)
class SceneRecording:
    """A scene as a recording: drawn when it is asked for, at any size."""

    scene: Scene
    language: str | None = None
    seconds: float = SECONDS
    fps: float = float("inf")  # there is a frame at every time

    def caption(self, rng: np.random.Generator) -> str:
        return caption(self.scene, rng, self.language)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        return render(self.scene, times, size)


@dataclass(frozen=True)
class TinyWorld:
    """Scenes of the sprites `names`, without end: number `i` depends on `seed` and `i` only.

    `held_out`: False has no held-out triple, True has only those, None both. `language` of the captions is
    "en", "zh" or None for both. `even`: all motions are equally frequent instead of all sprites, of which few
    can fly.
    """

    names: tuple[str, ...]
    seed: int
    held_out: bool | None = False
    language: str | None = None
    even: bool = False
    count = None  # there is no last one
    skipped: ClassVar[dict[str, str]] = {}

    def __getitem__(self, i: int) -> SceneRecording:
        rng = np.random.default_rng((self.seed, i))
        motion = MOTIONS[rng.integers(len(MOTIONS))] if self.even else None
        scene = sample_scene(rng, self.names, self.held_out, motion=motion)
        return SceneRecording(scene, self.language)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self[index].caption(rng)

    def name(self, index: int) -> str:
        return f"scene {index}"
