"""Train the judge of the tiny world, or of a user's (`tinyworld.py`), on rendered clips alone.

Blur, noise, block noise, colours and crops vary, so that the judge looks at what is drawn and not at the
renderer's pixel statistics. Places are shuffled among scenes where that keeps the drawing right, so that the
sprite does not tell the place: a judge that knows that fish live in the sea would forgive a model that draws
no sea.

Shapes: B clips, F = 9 frames (2 a second), S = 48 pixels; features D = 128.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.data.tinyworld import Scene, TinyWorld, render, sample_scene
from cogvideo.data.tinyworld.own import JUDGE
from cogvideo.eval.tinyworld import FPS, FRAMES, HEADS, SIZE, Classes, ClipClassifier, load, pixels
from cogvideo.hardware import has_fast_bfloat16
from cogvideo.model.folder import write_state
from cogvideo.progress import Progress

TIMES = np.arange(FRAMES) / FPS  # seconds: frames 0, 4, ..., 32 of a clip at 8 fps
POOL = 8192  # clips in memory, of which batches are drawn
Report = Callable[[int, Sequence[float]], None]  # steps done, mean loss of each head since the last report


def new_judge(classes: Classes) -> ClipClassifier:
    """The shipped judge with new heads for other sprites and places."""
    shipped = load()
    net = ClipClassifier(len(classes.sprites), places=len(classes.places))
    taken = shipped.state_dict()
    for name, value in net.state_dict().items():
        if name.startswith(("heads.sprite", "heads.place")):
            taken[name] = value
    net.load_state_dict(taken)
    return net


def train(
    net: ClipClassifier,
    classes: Classes,
    steps: int,
    *,
    lr: float = 3e-3,
    batch: int = 48,
    fresh: int = 16,
    seed: int = 0,
    report: Report | None = None,
) -> ClipClassifier:
    """Train in place, from a fixed seed. Each step renders `fresh` new clips into a pool of the last 8192 and
    draws a batch from the pool."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    net.train().requires_grad_(True)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    pool = np.zeros((min(POOL, steps * fresh + batch), FRAMES, SIZE, SIZE, 3), np.uint8)
    known = torch.zeros(len(pool), len(HEADS), dtype=torch.long)
    recent: list[list[float]] = []
    fast = has_fast_bfloat16(torch.device("cpu"))
    for step in range(steps):
        scenes = [draw_scene(rng, classes) for _ in range(batch if step == 0 else fresh)]
        at = (step * fresh + np.arange(len(scenes))) % len(pool)
        pool[at] = np.stack([render(scene, TIMES, SIZE) for scene in scenes])
        known[at] = classes.labels(scenes)
        chosen = rng.integers(min((step + 1) * fresh, len(pool)), size=batch)
        clips = vary(pixels(pool[chosen]), generator)
        target = known[chosen]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = net(clips)

        losses = [F.cross_entropy(logits[name].float(), target[:, i]) for i, name in enumerate(HEADS)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        recent.append([loss.item() for loss in losses])
        if report is not None and (step % 20 == 19 or step + 1 == steps):
            report(step + 1, np.mean(recent, 0).tolist())
            recent.clear()
    return net.eval().requires_grad_(False)


def train_world_judge(classes: Classes, steps: int, progress: Progress | None = None) -> ClipClassifier:
    """A judge of a user's world, from the shipped one."""
    torch.manual_seed(0)

    def report(done: int, losses: Sequence[float]) -> None:
        if progress is not None:
            progress("judge", done, steps)

    return train(new_judge(classes), classes, steps, lr=2e-3, report=report)


def save_judge(net: ClipClassifier, folder: Path) -> None:
    """Store the judge of a user's world."""
    write_state(folder / JUDGE, net.state_dict())


@torch.inference_mode()
def classify(net: ClipClassifier, clips: np.ndarray, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Clips uint8 [B, 9, 48, 48, 3] to the classes [B, 3] (sprite, motion, place), and features [B, D]."""
    parts = [net.features(pixels(clips[i : i + batch])) for i in range(0, len(clips), batch)]
    features = torch.cat(parts)
    logits = net.logits(features)
    return torch.stack([logits[name].argmax(1) for name in HEADS], 1), features


@dataclass(frozen=True)
class Accuracy:
    """Shares of rendered clips that a judge gets right."""

    sprite: float
    motion: float
    place: float
    all_three: float


def test(net: ClipClassifier, classes: Classes, count: int, held_out: bool, seed: int = 777) -> Accuracy:
    """Test on `count` fresh clips, of a seed that no training has."""
    world = TinyWorld(classes.sprites, seed, held_out)
    scenes = [world[i].scene for i in range(count)]
    seen, _ = classify(net, np.stack([render(scene, TIMES, SIZE) for scene in scenes]))
    right = seen == classes.labels(scenes)
    sprite, motion, place = right.double().mean(0).tolist()
    return Accuracy(sprite, motion, place, float(right.all(1).double().mean()))


# -- clips to train on


def draw_scene(rng: np.random.Generator, classes: Classes) -> Scene:
    """Any scene, every second one in a place where it need not belong but is drawn the same."""
    scene = sample_scene(rng, classes.sprites, None)
    if rng.random() < 0.5:
        other = replace(scene, place=classes.places[rng.integers(len(classes.places))])
        scene = other if other.stands == scene.stands else scene
    return scene


def vary(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise, colours and crops that change no label, each clip its own: [B, F, 3, S, S] in [0, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def sometimes(changed: Tensor, clips: Tensor, chance: float) -> Tensor:
        return torch.where(uniform(0, 1, len(clips), 1, 1, 1, 1) < chance, changed, clips)

    count, frames = clips.shape[:2]
    zoom, shift = uniform(0.95, 1.05, count, 1), uniform(-0.05, 0.05, count, 2)
    grid = torch.zeros(count, 2, 3)
    grid[:, 0, :1] = grid[:, 1, 1:2] = zoom
    grid[:, :, 2] = shift
    flat = clips.flatten(1, 2)  # [B, F * 3, S, S]
    grid = F.affine_grid(grid, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
    clips = sometimes(moved.view_as(clips), clips, 0.7)
    sigma = uniform(0.3, 0.9, count, 1)
    kernel = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(frames * 3, 0)  # [B * F * 3, 5]
    x = clips.flatten(0, 2)[None]  # [1, B * F * 3, S, S]
    x = F.conv2d(F.pad(x, (2, 2, 0, 0), mode="replicate"), kernel[:, None, None], groups=len(kernel))
    x = F.conv2d(F.pad(x, (0, 0, 2, 2), mode="replicate"), kernel[:, None, :, None], groups=len(kernel))
    clips = sometimes(x.view_as(clips), clips, 0.5)
    colour = uniform(0.9, 1.1, count, 1, 3, 1, 1), uniform(-0.05, 0.05, count, 1, 3, 1, 1)
    clips = sometimes(clips * colour[0] + colour[1], clips, 0.5)
    blocks = torch.randn(
        count * frames, 3, 12, 12, generator=generator
    )  # like a tokenizer's flickering codes
    blocks = F.interpolate(blocks, scale_factor=4.0, mode="bilinear").view_as(clips)
    grain = torch.randn(clips.shape, generator=generator)
    noise = uniform(0, 0.05, count, 1, 1, 1, 1) * blocks + uniform(0, 0.03, count, 1, 1, 1, 1) * grain
    return sometimes(clips + noise, clips, 0.6).clamp(0, 1)
