"""The world as data to train on: an endless `Source` of recordings (see `cogvideo.data.clips`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cogvideo.data.tinyworld.phrasing import caption
from cogvideo.data.tinyworld.picture import cover, render
from cogvideo.data.tinyworld.scene import MOTIONS, SECONDS, Scene, sample_scene


@dataclass(frozen=True)
class SceneVideo:
    """A scene as a recording: drawn when it is asked for, at any size."""

    scene: Scene
    language: str | None = None
    varied: bool = False
    seconds: float = SECONDS
    fps: float = float("inf")  # there is a frame at every time

    def caption(self, rng: np.random.Generator) -> str:
        return caption(self.scene, rng, self.language, self.varied)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        return render(self.scene, times, size)

    def cover(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """float32 [F, size, size]: the share of each cell that the object covers."""
        return cover(self.scene, times, size)


@dataclass(frozen=True)
class TinyWorld:
    """Scenes of the sprites `names`, without end: number `i` depends on `seed` and `i` only.

    `held_out`: False has no held-out triple, True has only those, None both. `language` of the captions is
    "en", "zh" or None for both. `even`: all motions are equally frequent instead of all sprites, of which few
    can fly. `varied`: captions as people write them, and a share of small, big, slow and fast scenes whose
    captions say so; without it the world is the one of the first models.
    """

    names: tuple[str, ...]
    seed: int
    held_out: bool | None = False
    language: str | None = None
    even: bool = False
    varied: bool = False
    count = None  # there is no last one
    skipped: ClassVar[dict[str, str]] = {}

    def __getitem__(self, i: int) -> SceneVideo:
        rng = np.random.default_rng((self.seed, i))
        motion = MOTIONS[rng.integers(len(MOTIONS))] if self.even else None
        scene = sample_scene(rng, self.names, self.held_out, motion=motion, varied=self.varied)
        return SceneVideo(scene, self.language, self.varied)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self[index].caption(rng)

    def name(self, index: int) -> str:
        return f"scene {index}"
