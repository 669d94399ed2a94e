"""The world as data to train on: an endless `Source` of recordings (see `cogvideo.data.clips`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogvideo.data.tinyworld.picture import render
from cogvideo.data.tinyworld.scene import SECONDS, Scene, sample_scene
from cogvideo.data.tinyworld.words import caption


@dataclass(frozen=True)
class SceneRecording:
    """A scene as a recording: drawn when it is asked for, at any size."""

    scene: Scene
    language: str | None = None
    seconds: float = SECONDS

    def caption(self, rng: np.random.Generator) -> str:
        return caption(self.scene, rng, self.language)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """uint8 [F, size, size, 3] at these seconds."""
        return render(self.scene, times, size)


@dataclass(frozen=True)
class TinyWorld:
    """Scenes of the sprites `names`, without end: number `i` depends on `seed` and `i` only.

    `held_out`: False has no held-out triple, True has only those, None both. `language` of the captions is
    "en", "zh" or None for both.
    """

    names: tuple[str, ...]
    seed: int
    held_out: bool | None = False
    language: str | None = None
    count = None  # there is no last one

    def __getitem__(self, i: int) -> SceneRecording:
        scene = sample_scene(np.random.default_rng((self.seed, i)), self.names, self.held_out)
        return SceneRecording(scene, self.language)
