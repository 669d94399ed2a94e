"""The judge of prompt adherence: a small classifier that says which sprite moves how, and where, in a clip.

    python -m benchmarks.classifier --out runs/classifier        trains another (~20 minutes on one core)
    python -m benchmarks.classifier --judge frame                the grey frame judge: frame_judge.py

The one that judges ships with the package (`cogvideo/eval/tinyworld.py`). Notable:
- It is trained on rendered clips only, never on anything a model made. Blur, noise, block noise, colours and
  crops vary, so that it looks at what is drawn and not at the renderer's pixel statistics.
- Places are shuffled among scenes where that keeps the drawing right, so that the sprite does not tell the
  place: a judge that knows that fish live in the sea would forgive a model that draws no sea.

Shapes: B clips, F = 9 frames (2 a second), S = 48 pixels; features D = 128.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import frame_judge
from cogvideo.data.tinyworld import MOTIONS, PLACES, Scene, TinyWorld, render, sample_scene, sprites
from cogvideo.eval.tinyworld import FPS, FRAMES, HEADS, SIZE, ClipClassifier, load, pixels

TIMES = np.arange(FRAMES) / FPS  # seconds: frames 0, 4, ..., 32 of a clip at 8 fps
FILE = Path("runs/classifier/classifier.safetensors")


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Indices [B, 3] of sprite (in the order of all sprites), motion and place."""
    index = {name: i for i, name in enumerate(sprites())}
    return torch.tensor([(index[s.sprite], MOTIONS.index(s.motion), PLACES.index(s.place)) for s in scenes])


@torch.inference_mode()
def classify(net: ClipClassifier, clips: np.ndarray, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Clips uint8 [B, 9, 48, 48, 3] to the classes [B, 3] (sprite, motion, place), and features [B, D]."""
    parts = [net.features(pixels(clips[i : i + batch])) for i in range(0, len(clips), batch)]
    features = torch.cat(parts)
    logits = net.logits(features)
    return torch.stack([logits[name].argmax(1) for name in HEADS], 1), features


# -- training --


def draw_scene(rng: np.random.Generator, names: Sequence[str]) -> Scene:
    """Any scene, every second one in a place where it need not belong but is drawn the same."""
    scene = sample_scene(rng, names, None)
    if rng.random() < 0.5:
        other = replace(scene, place=PLACES[rng.integers(len(PLACES))])
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


def train(
    out: Path, names: Sequence[str], steps: int, batch: int = 48, fresh: int = 16, seed: int = 0
) -> ClipClassifier:
    """Train from a fixed seed and save to `out`.

    Each step renders `fresh` new clips into a pool of the last 8192 and draws a batch from the pool.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    net = ClipClassifier(len(names)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    pool = np.zeros((8192, FRAMES, SIZE, SIZE, 3), np.uint8)
    known = torch.zeros(len(pool), 3, dtype=torch.long)
    begun, recent = time.time(), []
    for step in range(steps):
        scenes = [draw_scene(rng, names) for _ in range(batch if step == 0 else fresh)]
        at = (step * fresh + np.arange(len(scenes))) % len(pool)
        pool[at] = np.stack([render(scene, TIMES, SIZE) for scene in scenes])
        known[at] = labels(scenes)
        chosen = rng.integers(min((step + 1) * fresh, len(pool)), size=batch)
        clips, target = vary(pixels(pool[chosen]), generator), known[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(clips)
        losses = [F.cross_entropy(logits[name].float(), target[:, i]) for i, name in enumerate(HEADS)]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        recent.append([loss.item() for loss in losses])
        if step % 100 == 99 or step + 1 == steps:
            numbers = " ".join(f"{name} {loss:.4f}" for name, loss in zip(HEADS, np.mean(recent, 0)))
            print(f"{step + 1}/{steps}  {numbers}  {time.time() - begun:.0f} s", flush=True)
            recent.clear()
            out.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out / FILE.name)
    return net.eval()


def test(net: ClipClassifier, names: Sequence[str], count: int, seed: int = 777) -> None:
    """Print accuracies on fresh clips, seen by no training (its seeds are other ones)."""
    for kind, held_out in (("seen triples", False), ("held-out triples", True)):
        world = TinyWorld(tuple(names), seed, held_out)
        scenes = [world[i].scene for i in range(count)]
        seen, _ = classify(net, np.stack([render(scene, TIMES, SIZE) for scene in scenes]))
        right = seen == labels(scenes)
        parts = "  ".join(f"{name} {100 * right[:, i].float().mean():.2f} %" for i, name in enumerate(HEADS))
        print(f"{kind:<17} {parts}  all {100 * right.all(1).float().mean():.2f} %  n {count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="train and test the judge of prompt adherence")
    parser.add_argument(
        "--judge",
        choices=("clip", "frame"),
        default="clip",
        help="clip: of sprite, motion and place; frame: of the sprite in one grey frame",
    )
    parser.add_argument("--out", type=Path, help="default: runs/classifier or runs/judge")
    parser.add_argument("--sprites", type=int, default=96, help="of the clip judge; the other knows all")
    parser.add_argument("--steps", type=int, help="default: 1600 or 4500")
    parser.add_argument("--crops", type=int, help="of the frame judge: steps on crops, default: 3 of 4")
    parser.add_argument("--init", type=Path, help="of the frame judge: weights to start from")
    parser.add_argument(
        "--count", type=int, default=1000, help="clips to test on, seen and held-out triples each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-only", action="store_true", help="test the one in --out")
    args = parser.parse_args()
    args.out = args.out or (FILE.parent if args.judge == "clip" else frame_judge.OUT)
    if args.judge == "frame":
        frame_judge.run(args)
        return
    names = sprites(args.sprites)
    if not args.test_only:
        train(args.out, names, args.steps or 1600, seed=args.seed)
    test(load(args.out / FILE.name), names, args.count)


if __name__ == "__main__":
    main()
