"""The judge of the tiny world: a small classifier that says which sprite moves how, and where, in a clip.

`judge_training.py` trains it, on rendered clips alone; a user's world has its own judge. Its features give a
Frechet distance under its own name, and `Asked` compares what it sees with what a caption asks for
(`data/tinyworld/reading.py`).

Shapes: B clips, F = 9 frames (2 a second), S = 48 pixels; features D = 128.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.data.tinyworld import MOTIONS, PLACES, Scene, sprites
from cogvideo.data.tinyworld.own import JUDGE, OwnWorld, open_world
from cogvideo.data.tinyworld.reading import read
from cogvideo.model.folder import read_state
from cogvideo.video import Clip, Frames

SIZE = 48  # pixels a side
FRAMES = 9
FPS = 2
HEADS = ("sprite", "motion", "place")
SHIPPED = Path(__file__).with_name("tinyworld.safetensors")


class ClipClassifier(nn.Module):
    """Clips [B, 9, 3, 48, 48] in [0, 1] to logits of sprite [B, names], motion [B, 12] and place
    [B, places]."""

    def __init__(self, names: int = 64, width: int = 32, places: int = len(PLACES)):
        super().__init__()
        self.trunk = nn.Sequential(  # each frame, with its difference to the mean of the clip
            _conv(6, width, 4, 2),
            _conv(width, width),
            _conv(width, 2 * width, 3, 2),
            _conv(2 * width, 2 * width),
            _conv(2 * width, 2 * width),
            _conv(2 * width, 4 * width, 3, 2),
            _conv(4 * width, 4 * width),
        )
        self.look = nn.Linear(8 * width, 96)
        self.spot = nn.Conv2d(4 * width, 16, 1)
        self.way = nn.Sequential(
            nn.Conv1d(16 * 36, 128, 3, padding=1),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Conv1d(128, 64, 3, padding=1),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * FRAMES, 32),
        )
        self.heads = nn.ModuleDict(
            {
                "sprite": nn.Linear(96, names),
                "motion": nn.Linear(32, len(MOTIONS)),
                "place": nn.Linear(96, places),
            }
        )

    def features(self, clips: Tensor) -> Tensor:
        """[B, F, 3, S, S] to [B, 128]: 96 numbers of what is seen, 32 of how it moves."""
        both = torch.cat((clips, clips - clips.mean(1, keepdim=True)), 2).flatten(0, 1)  # [B * F, 6, S, S]
        both = both.sub(0.25).mul(2).contiguous(memory_format=torch.channels_last)
        maps = self.trunk(both)  # [B * F, C, 6, 6]
        pooled = torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1)  # [B * F, 2 * C]
        pooled = pooled.unflatten(0, (-1, FRAMES)).mean(1)  # [B, 2 * C]
        spots = self.spot(maps).flatten(1).unflatten(0, (-1, FRAMES)).transpose(1, 2)  # [B, 16 * 36, F]
        return torch.cat((self.look(pooled), self.way(spots)), 1)  # [B, D]

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        look, way = features.split((96, 32), 1)
        return {name: head(F.relu(way if name == "motion" else look)) for name, head in self.heads.items()}

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        return self.logits(self.features(clips))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def load(file: str | Path = SHIPPED) -> ClipClassifier:
    """A trained classifier, by default the shipped one."""
    state = read_state(Path(file))
    net = ClipClassifier(
        len(state["heads.sprite.weight"]), len(state["trunk.0.0.weight"]), len(state["heads.place.weight"])
    )
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B, F, S, S, 3] to float [B, F, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 1, 4, 2, 3).float() / 255


def reduce(frames: Frames, fps: float) -> Frames:
    """The 9 frames of 48 pixels that the judge sees, uint8 [9, 48, 48, 3], of frames [F, size, size, 3] at
    `fps`.

    ValueError if the clip is not four seconds long.
    """
    times = np.arange(FRAMES) / FPS
    last = (len(frames) - 1) / fps
    if abs(last - times[-1]) > 0.5 / FPS:
        raise ValueError(f"the judge of the tiny world sees clips of {times[-1]:g} s; these last {last:g} s")
    numbers = np.clip(np.round(times * fps).astype(int), 0, len(frames) - 1)
    return Clip(frames[numbers], FPS).square(SIZE).frames


@dataclass(frozen=True)
class Classes:
    """What a judge tells apart, in the order of its logits."""

    sprites: tuple[str, ...]
    places: tuple[str, ...] = PLACES
    world: OwnWorld | None = None  # None: the tiny world

    @classmethod
    def of(cls, folder: str | Path) -> "Classes":
        """Those of a user's world."""
        world = open_world(folder)
        return cls(tuple(world.sprites), world.places, world)

    def labels(self, scenes: Sequence[Scene]) -> Tensor:
        """Indices [B, 3] of sprite, motion and place."""
        rows = []
        for scene in scenes:
            rows.append([self._number(name, getattr(scene, name)) for name in HEADS])
        return torch.tensor(rows).view(-1, len(HEADS))

    def asked(self, captions: Sequence[str]) -> "Asked":
        rows = []
        for caption in captions:
            reading = read(caption, self.world)
            rows.append([self._number(name, getattr(reading, name)) for name in HEADS])
        return Asked(torch.tensor(rows).view(-1, len(HEADS)))

    def _number(self, head: str, value: str | None) -> int:
        """The index of a class; -1 if there is none."""
        known = {"sprite": self.sprites, "motion": MOTIONS, "place": self.places}[head]
        return known.index(value) if value in known else -1


def classes() -> Classes:
    """Those of the shipped judge."""
    return Classes(sprites(None))


def judge_of(folder: str | Path) -> Path:
    """The judge of a user's world. ValueError if it was not trained."""
    file = open_world(folder).folder / JUDGE
    if not file.exists():
        raise ValueError(f"{folder} has no {JUDGE} yet; cogvideo data world trains it")
    return file


@dataclass(frozen=True)
class Asked:
    """What captions ask for: indices of sprite, motion and place [B, 3], -1 where a caption does not say."""

    classes: Tensor

    def right(self, seen: Tensor) -> Tensor:
        """float [B, 4], of seen classes [B, 3]: 1 or 0 for sprite, motion, place and all three; NaN where a
        caption does not say."""
        said = self.classes >= 0
        right = (self.classes == seen).double().masked_fill(~said, float("nan"))
        together = ((self.classes == seen) | ~said).all(1).double()
        together = together.masked_fill(~said.all(1), float("nan"))
        return torch.cat((right, together[:, None]), 1)
