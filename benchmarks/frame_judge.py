"""The grey frame judge: says which sprite a single picture shows, without colour and without motion.

    python -m benchmarks.classifier --judge frame      trains another in runs/judge (~40 minutes of a core)

The one in frame_judge.safetensors (float16) is trained so, with seed 0: of 64 held-out rendered clips it
recognises 98.2 % of the frames.

Notable:
- It sees one grey frame of 192 px at a time, so it cannot guess from colour or motion: only shape counts.
- It judges pictures, not prompts: it is trained on rendered frames of all 96 sprites, of seen and held-out
  triples alike, never on a picture that a model generated.
- Sizes vary from 0.26 to 0.75 of the frame, which is wider than in the world's clips, so that it stays right
  when those change. Shift, zoom, blur, noise and contrast vary as well.
- Drawing a place takes longer than all else, so a group of frames shares one. They enter a pool of grey uint8
  frames, from which batches are drawn and augmented anew.
- Most steps see only a square of 128 px around the object: 2.3 times as fast. The last ones see whole frames.

Shapes: B frames, S = 192 pixels, features D = 128.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo.data.tinyworld import LOOKS, PLACES, Scene, TinyWorld, path, render, sample_scene, sprites
from cogvideo.data.tinyworld.cast import shape
from cogvideo.files import atomic_path
from cogvideo.hardware import has_fast_bfloat16

SIZE, CROP = 192, 128
FILE = Path(__file__).with_name("frame_judge.safetensors")
NAME = "frame.safetensors"
OUT = Path("runs/judge")  # where another one is trained
SMALLEST, LARGEST = 0.26, 0.75  # longer side of an object, as a share of the frame
TIMES = np.arange(33) / 8  # seconds: all frames of a clip
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


class FrameJudge(nn.Module):
    """Grey frames [B, 1, 192, 192] in [0, 1] to logits of the sprite [B, names]."""

    def __init__(self, names: int = 96, width: int = 32):
        super().__init__()
        w = width
        self.trunk = nn.Sequential(
            _conv(1, w, 7, 4),  # [B, w, 48, 48]
            _conv(w, w),
            _conv(w, 2 * w, 3, 2),  # [B, 2w, 24, 24]
            _Residual(2 * w),
            _conv(2 * w, 4 * w, 3, 2),  # [B, 4w, 12, 12]
            _Residual(4 * w),
            _conv(4 * w, 8 * w, 3, 2),  # [B, 8w, 6, 6]
            _conv(8 * w, 8 * w),
        )
        self.look = nn.Linear(16 * w, 128)
        self.head = nn.Linear(128, names)

    def features(self, grey: Tensor) -> Tensor:
        """[B, 1, S, S] to the penultimate layer's output [B, D]."""
        maps = self.trunk(grey.sub(0.5).mul(4).contiguous(memory_format=torch.channels_last))
        pooled = torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1)  # [B, 16w]
        return F.relu(self.look(pooled))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.features(grey))


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


@dataclass(frozen=True)
class Sight:
    """What the judge sees in clips of equally many frames."""

    classes: Tensor  # [B, F], indices of sprites in the order of rank
    truth: Tensor  # [B]
    features: Tensor  # [B, F, D]

    @property
    def frames_right(self) -> float:
        """Share of frames whose sprite is recognised."""
        return float(self.right.mean())

    @property
    def clips_right(self) -> float:
        """Share of clips with at least 90 % of their frames right."""
        return float((self.right.mean(1) >= 0.9).float().mean())

    @property
    def neighbours_alike(self) -> float:
        """Share of neighbouring frames that show the same sprite to the judge, right or wrong."""
        return float((self.classes[:, 1:] == self.classes[:, :-1]).float().mean())

    @property
    def right(self) -> Tensor:
        """float [B, F], 1 where the judge is right."""
        return (self.classes == self.truth[:, None]).float()


def load(file: str | Path = FILE) -> FrameJudge:
    """The trained judge. Raises FileNotFoundError with the command that trains it."""
    file = Path(file)
    if not file.exists():
        command = f"python -m benchmarks.classifier --judge frame --out {file.parent}"
        raise FileNotFoundError(f"no frame judge at {file}; train it: {command}")
    state = load_file(file)
    net = FrameJudge(len(state["head.weight"]), len(state["trunk.0.0.weight"]))
    net.load_state_dict(state)
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def to_grey(frames: np.ndarray) -> np.ndarray:
    """Luma of frames uint8 [..., H, W, 3], uint8 [..., H, W]."""
    return (frames @ LUMA + 0.5).astype(np.uint8)


@torch.inference_mode()
def look(net: FrameJudge, frames: np.ndarray) -> tuple[Tensor, Tensor]:
    """Classes [F] and features [F, D] of the frames of a clip, uint8 [F, H, W, 3]; resized if not 192 px."""
    grey = torch.from_numpy(to_grey(frames))[:, None].float() / 255  # [F, 1, H, W]
    if grey.shape[-2:] != (SIZE, SIZE):
        grey = F.interpolate(grey, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    features = net.features(grey)
    return net.head(features).argmax(1), features


def judge(net: FrameJudge, clips: Sequence[np.ndarray], names: Sequence[str]) -> Sight:
    """Look at clips uint8 [F, H, W, 3] of one length, which should show the sprites `names`, one each."""
    seen = [look(net, clip) for clip in clips]
    truth = torch.tensor([sprites().index(name) for name in names])
    return Sight(torch.stack([one for one, _ in seen]), truth, torch.stack([one for _, one in seen]))


# -- training --


def draw_frames(
    rng: np.random.Generator, names: Sequence[str], count: int
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """`count` frames over one place, grey uint8 [count, S, S]; the indices of their sprites, and where these
    are: centres float [count, 2], x and y as shares of the frame.

    Every second object has a size of its own, and all lie wholly in the frame.
    """
    place, look_of_place = PLACES[rng.integers(len(PLACES))], int(rng.integers(LOOKS))
    frames, known, centres = [], [], []
    for _ in range(count):
        scene = sample_scene(rng, [n for n in names if n != "skier" or place == "snow"], None)
        scene = replace(scene, place=place, look=look_of_place)
        seconds = rng.uniform(0, 4)
        if rng.random() < 0.5:
            size = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))
            scene = replace(scene, size=scene.size * size / _at(scene, seconds)[2])
        scene = _inside(scene, seconds)
        frames.append(to_grey(render(scene, [seconds], SIZE)[0]))
        known.append(names.index(scene.sprite))
        centres.append(_at(scene, seconds)[:2])
    return np.stack(frames), known, np.array(centres)


def _at(scene: Scene, seconds: float) -> tuple[float, ...]:
    """Centre x, y, size, turn and foot line of the object at a time."""
    return tuple(float(part[0]) for part in path(scene, np.array([seconds])))


def _inside(scene: Scene, seconds: float) -> Scene:
    """The scene moved so that its object lies in the frame at that time."""
    x, y, size, _, _ = _at(scene, seconds)
    across, along = (size * part / 2 for part in shape(scene.sprite))
    dx, dy = np.clip(x, across, 1 - across) - x, np.clip(y, along, 1 - along) - y
    return replace(scene, x=scene.x + float(dx), y=scene.y + (0.0 if scene.stands else float(dy)))


def augment(grey: Tensor, generator: torch.Generator, centres: Tensor | None = None) -> Tensor:
    """Shift, zoom, blur, noise and contrast, each frame its own: [B, 1, S, S] in [0, 1].

    With `centres` [B, 2] (shares of the frame), squares of 128 px around them: [B, 1, 128, 128].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def sometimes(changed: Tensor, grey: Tensor, chance: float) -> Tensor:
        return torch.where(uniform(0, 1, len(grey), 1, 1, 1) < chance, changed, grey)

    count, size = len(grey), SIZE if centres is None else CROP
    grid = torch.zeros(count, 2, 3)
    grid[:, 0, :1] = grid[:, 1, 1:2] = size / SIZE * uniform(0.92, 1.08, count, 1)
    grid[:, :, 2] = uniform(-0.06, 0.06, count, 2)
    if centres is not None:
        grid[:, :, 2] += 2 * centres - 1 + uniform(-0.12, 0.12, count, 2)
    grid = F.affine_grid(grid, [count, 1, size, size], align_corners=False)
    moved = F.grid_sample(grey, grid, padding_mode="border", align_corners=False)
    grey = sometimes(moved, grey, 0.7) if centres is None else moved

    sigma = uniform(0.4, 2.5, count, 1)  # pixels
    kernel = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum(1, keepdim=True)  # [B, 11]
    x = grey[:, 0][None]  # [1, B, S, S]
    x = F.conv2d(F.pad(x, (5, 5, 0, 0), mode="replicate"), kernel[:, None, None], groups=count)
    x = F.conv2d(F.pad(x, (0, 0, 5, 5), mode="replicate"), kernel[:, None, :, None], groups=count)
    grey = sometimes(x[0][:, None], grey, 0.5)

    grey = sometimes(0.5 + (grey - 0.5) * uniform(0.8, 1.2, count, 1, 1, 1), grey, 0.5)
    grey = sometimes(grey + uniform(-0.08, 0.08, count, 1, 1, 1), grey, 0.5)
    blocks = torch.randn(count, 1, 16, 16, generator=generator)  # like errors of a grid of codes
    blocks = F.interpolate(blocks, size=(size, size), mode="bilinear")
    grain = torch.randn(grey.shape, generator=generator)
    noise = uniform(0, 0.05, count, 1, 1, 1) * blocks + uniform(0, 0.04, count, 1, 1, 1) * grain
    return sometimes(grey + noise, grey, 0.6).clamp(0, 1)


def train(
    out: Path,
    steps: int,
    crops: int,
    init: Path | None = None,
    batch: int = 64,
    fresh: int = 24,
    seed: int = 0,
) -> FrameJudge:
    """Train from a fixed seed, or from the weights `init`, and save to `out`.

    Each step renders `fresh` frames into a pool of the last 16384, and draws a batch from the pool. The first
    `crops` steps see squares around the object, the others whole frames.
    """
    torch.manual_seed(seed)
    names = sprites()
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    net = FrameJudge(len(names)) if init is None else load(init).requires_grad_(True).train()
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    pool = np.zeros((16384, SIZE, SIZE), np.uint8)
    known, centres = torch.zeros(len(pool), dtype=torch.long), torch.zeros(len(pool), 2)
    begun, recent, filled = time.time(), [], 0
    for step in range(steps):
        for _ in range(32 if step == 0 else fresh // 8):  # groups of 8 frames over one place
            at = (filled + np.arange(8)) % len(pool)
            pool[at], labels, where = draw_frames(rng, names, 8)
            known[at], centres[at] = torch.tensor(labels), torch.from_numpy(where).float()
            filled += 8

        chosen = rng.integers(min(filled, len(pool)), size=batch)
        grey = torch.from_numpy(pool[chosen])[:, None].float() / 255
        grey = augment(grey, generator, centres[chosen] if step < crops else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            logits = net(grey)
        loss = F.cross_entropy(logits.float(), known[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()

        right = (logits.argmax(1) == known[chosen]).float().mean()
        recent.append((loss.item(), right.item()))
        if step % 50 == 49:
            mean = np.mean(recent, 0)
            print(
                f"{step + 1}/{steps}  loss {mean[0]:.4f}  right {100 * mean[1]:.1f} %  "
                f"{time.time() - begun:.0f} s",
                flush=True,
            )
            recent.clear()
            out.mkdir(parents=True, exist_ok=True)
            with atomic_path(out / NAME) as part:
                save_file({k: v.contiguous() for k, v in net.state_dict().items()}, part)
    return net.eval()


def test(net: FrameJudge, count: int, seed: int = 4242) -> dict[str, float]:
    """The ceiling: what the judge sees in `count` rendered held-out clips of 33 frames, in shares."""
    world = TinyWorld(sprites(), seed, True)
    scenes = [world[i].scene for i in range(count)]
    seen = judge(net, [render(scene, TIMES, SIZE) for scene in scenes], [scene.sprite for scene in scenes])
    return {
        "clips": count,
        "frames right": seen.frames_right,
        "clips with 90 % of frames right": seen.clips_right,
        "neighbouring frames alike": seen.neighbours_alike,
    }


def run(args: argparse.Namespace) -> None:
    """Train unless --test-only, test, print the ceiling and save it next to the weights."""
    if not args.test_only:
        steps = args.steps or 4500
        crops = steps * 3 // 4 if args.crops is None else args.crops
        train(args.out, steps, crops, args.init, seed=args.seed)
    ceiling = test(load(args.out / NAME), 64)
    print(json.dumps(ceiling, indent=2))
    with atomic_path(args.out / "frame.json") as part:
        part.write_text(json.dumps(ceiling, indent=2))
