"""The world as training data: an endless `Source` of videos (see `cogvideo.data.cut`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cogvideo.data.tinyworld.phrasing import caption
from cogvideo.data.tinyworld.picture import cover, render
from cogvideo.data.tinyworld.scene import SECONDS, Scene, possible_motions, sample_scene
from cogvideo.video import Frames


@dataclass(frozen=True)
class SceneVideo:
    """A scene as an `ObjectVideo`: rendered on demand, at any size."""

    scene: Scene
    language: str | None = None
    varied: bool = False
    seconds: float = SECONDS
    fps: float = float("inf")  # it has a frame at every time

    def caption(self, rng: np.random.Generator) -> str:
        return caption(self.scene, rng, self.language, self.varied)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> Frames:
        """uint8 [F, size, size, 3] at `times` (seconds)."""
        return render(self.scene, times, size)

    def cover(self, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
        """float32 [F, size, size]: the share of each cell that the object covers."""
        return cover(self.scene, times, size)


@dataclass(frozen=True)
class TinyWorld:
    """Endless scenes of the sprites `names`, of the tiny world or of a user's: number `i` depends on `seed`
    and `i` only.

    `held_out`: False excludes held-out triples, True allows only those, None allows all. `language` of the
    captions is "en", "zh" or None for both. `even`: all motions are equally frequent instead of all sprites,
    of which few can fly. `varied`: captions as people write them, and a share of small, big, slow and fast
    scenes whose captions say so; without it the world is that of the first models.
    """

    names: tuple[str, ...]
    seed: int
    held_out: bool | None = False
    language: str | None = None
    even: bool = False
    varied: bool = False
    count = None  # it is endless
    skipped: ClassVar[dict[str, str]] = {}

    def __getitem__(self, i: int) -> SceneVideo:
        rng = np.random.default_rng((self.seed, i))
        motion = None
        if self.even:
            motions = possible_motions(self.names, self.held_out)
            motion = motions[rng.integers(len(motions))]
        scene = sample_scene(rng, self.names, self.held_out, motion=motion, varied=self.varied)
        return SceneVideo(scene, self.language, self.varied)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self[index].caption(rng)

    def name(self, index: int) -> str:
        return f"scene {index}"
