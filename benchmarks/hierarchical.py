"""What do the levels of the hierarchical loss bring? The tokenizer trained with and without them.

    python -m benchmarks.hierarchical --steps 1000

Trains one small tokenizer for each row, all from the same seed on the same clips, and measures them on unseen
clips: PSNR, SSIM, perceptual distance, error of the optical flow between neighbouring frames, and whether the
judge of `benchmarks.classifier` (if it was trained) still recognises sprite and motion. Resumable: runs stay
in --out.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.adherence import TIMES, judge, through_tokenizer
from benchmarks.fidelity import compare, reconstruct, unseen_scenes
from cogvideo.data.tinyworld import TinyWorld, render, sprites
from cogvideo.eval import tinyworld
from cogvideo.model import presets
from cogvideo.model.features import ImageFeatures
from cogvideo.model.vqvae import to_images
from cogvideo.train import loop, recipes
from cogvideo.train.losses import LossWeights, temporal_distance
from cogvideo.train.run import Options, Run

WEIGHTS = LossWeights()
ROWS = {
    "pixel": replace(WEIGHTS, perceptual=0.0, temporal=0.0),
    "pixel, temporal": replace(WEIGHTS, perceptual=0.0),
    "pixel, perceptual": replace(WEIGHTS, temporal=0.0),
    "pixel, perceptual, temporal": WEIGHTS,
}


def measure(folder, scenes) -> list[float]:
    """PSNR, SSIM, perceptual distance, flow error, and shares of sprites and motions recognised."""
    vqvae, size = folder.load("vqvae"), folder.spec().resolution
    real = np.stack([render(scene, TIMES[8:12], size) for scene in scenes])  # four neighbouring frames
    made = reconstruct(vqvae, real.reshape(-1, size, size, 3))[0].reshape(real.shape)
    row = compare(ImageFeatures(), made.reshape(-1, size, size, 3), real.reshape(-1, size, size, 3))
    flow = float(temporal_distance(to_images(made), to_images(real)).mean())
    verdict = judge(tinyworld.load(), through_tokenizer(folder, scenes), scenes).right.float().mean(0)
    return [
        row["psnr"],
        row["ssim"],
        row["perceptual"],
        flow,
        100 * float(verdict[0]),
        100 * float(verdict[1]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=256, help="unseen clips")
    parser.add_argument("--out", type=Path, default=Path("runs/hierarchical"))
    arguments = parser.parse_args()
    recipe, spec = recipes.find("tiny"), presets.find("tiny")
    names = sprites(recipe.sprites)
    scenes = unseen_scenes(names, arguments.count, seed=4321)
    print(f"{arguments.steps} steps, {torch.get_num_threads()} threads\n")
    print("| loss | PSNR dB | SSIM | perceptual | flow error px | sprite % | motion % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, weights in ROWS.items():
        phase = replace(recipe.phase("tokenizer"), steps=arguments.steps, loss=weights)
        out = arguments.out / name.replace(", ", "-")
        folder = loop.train(
            Run(recipe, out, TinyWorld(names, recipe.seed), spec, [phase], Options(log_every=100))
        )
        psnr, ssim, perceptual, flow, sprite, motion = measure(folder, scenes)
        print(f"| {name} | {psnr:.2f} | {ssim:.4f} | {perceptual:.4f} | {flow:.4f} ", end="")
        print(f"| {sprite:.1f} | {motion:.1f} |")


if __name__ == "__main__":
    main()
