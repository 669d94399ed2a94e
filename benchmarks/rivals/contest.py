"""What all systems share: sizes, sprites, prompts, the tokenizer, and what a system is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cogvideo.data.tinyworld import Scene, TinyWorld, render, sprites
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.vqvae import VQVAE, to_frames
from cogvideo.video import Clip

FPS = 8.0
TIMES = np.arange(33) / FPS
PROMPT_SEED = 77  # of held-out scenes


@dataclass(frozen=True)
class Size:
    """How large a system is, and what it learns."""

    layers: int = 4
    width: int = 256
    sprites: int = 12
    model: str = "tiny"  # whose tokenizer is used

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sprites(self.sprites))

    @property
    def spec(self) -> CogVideoSpec:
        """The sizes of ours: those of the tokenizer's model, with fewer and narrower layers."""
        spec = ModelFolder(find_model(self.model)).spec()
        assert isinstance(spec, CogVideoSpec)
        heads = max(1, self.width // 64)
        model = replace(spec.model, layers=self.layers, width=self.width, heads=heads)
        return replace(spec, model=model, decoder=None, refiner=None)


@dataclass(frozen=True)
class Prompt:
    """A held-out scene, and a sentence about it."""

    scene: Scene
    caption: str


def prompts(names: Sequence[str], count: int) -> list[Prompt]:
    """The prompts of the contest: held out of all training, in English."""
    world = TinyWorld(tuple(names), PROMPT_SEED, True, language="en", even=True)
    rows = []
    for i in range(count):
        rng = np.random.default_rng((PROMPT_SEED, i))
        rows.append(Prompt(world[i].scene, world[i].caption(rng)))
    return rows


def rendered(rows: Sequence[Prompt], size: int) -> list[Clip]:
    """The scenes of the prompts as they should look."""
    return [Clip(render(row.scene, TIMES, size), FPS, row.caption) for row in rows]


@torch.inference_mode()
def to_clips(vqvae: VQVAE, codes: Tensor, captions: Sequence[str]) -> list[Clip]:
    """Codes [B, F, N] to clips, frame by frame."""
    clips = []
    for row, caption in zip(codes, captions):
        clips.append(Clip(to_frames(vqvae.decode(row)), FPS, caption))
    return clips


class System(ABC):
    """Something that learns the tiny world and turns sentences into videos."""

    name: ClassVar[str]

    def __init__(self, size: Size, out: Path):
        self.size = size
        self.out = out

    @abstractmethod
    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        """Train for so many minutes of one core in all; go on with what `out` holds."""

    @abstractmethod
    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        """Clips of 33 frames at 8 fps."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Numbers that are learnt, without the tokenizer."""

    @property
    @abstractmethod
    def minutes(self) -> float:
        """How long it was trained."""
