"""How much of a picture survives: the tokenizer on unseen clips, and the refiner against bicubic enlargement.

    python -m benchmarks.fidelity --model tiny

Both are measured on rendered clips that no training saw, half of them of held-out triples. Perceptual
distance: early layers of EfficientNet-Lite0 (`cogvideo.eval.features`); lower is better.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo.data.tinyworld import Scene, TinyWorld, render, sprites
from cogvideo.data.tinyworld.world import SceneVideo
from cogvideo.eval.metrics import psnr, ssim
from cogvideo.model.features import ImageFeatures, perceptual_distance
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.refiner import Refiner, resize
from cogvideo.model.vqvae import VQVAE, to_frames, to_images
from cogvideo.text import split_words

TIMES = np.arange(33) / 8  # seconds


def trained_sprites(folder: ModelFolder) -> int:
    """How many sprites of the tiny world a model was trained on: those whose names its captions had."""
    words = set(folder.config.words)
    known = [set(split_words(name)) <= words for name in sprites()]
    return known.index(False) if False in known else len(known)


def unseen_scenes(names: Sequence[str], count: int, seed: int) -> list[Scene]:
    """`count` scenes, every second one of a held-out triple."""
    worlds = [TinyWorld(tuple(names), seed, held_out) for held_out in (False, True)]
    return [worlds[i % 2][i].scene for i in range(count)]


def captions(scenes: Sequence[Scene]) -> list[str]:
    """An English one for each scene."""
    return [SceneVideo(scene, "en").caption(np.random.default_rng(i)) for i, scene in enumerate(scenes)]


@torch.inference_mode()
def reconstruct(vqvae: VQVAE, frames: np.ndarray, batch: int = 64) -> tuple[np.ndarray, Tensor]:
    """Frames uint8 [M, R, R, 3] through the tokenizer and back: (frames uint8 [M, R, R, 3], ids [M, N])."""
    made, ids = [], []
    for i in range(0, len(frames), batch):
        ids.append(vqvae.encode(to_images(frames[i : i + batch])))
        made.append(to_frames(vqvae.decode(ids[-1])))
    return np.concatenate(made), torch.cat(ids)


@torch.inference_mode()
def compare(net: ImageFeatures, made: np.ndarray, real: np.ndarray, batch: int = 32) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and perceptual distance of frames uint8 [M, H, W, 3] to the real ones."""
    rows = []
    for i in range(0, len(made), batch):
        a, b = to_images(made[i : i + batch]), to_images(real[i : i + batch])
        rows.append(torch.stack((psnr(a, b), ssim(a, b), perceptual_distance(net, a, b))))
    means = torch.cat(rows, 1).mean(1).tolist()
    return dict(zip(("psnr", "ssim", "perceptual"), means))


def measure_tokenizer(vqvae: VQVAE, net: ImageFeatures, scenes: Sequence[Scene]) -> dict[str, float]:
    """The tokenizer on 9 frames of every scene; codes in use and their perplexity, of all there are."""
    size = vqvae.config.resolution
    real = np.concatenate([render(scene, TIMES[::4], size) for scene in scenes])
    made, ids = reconstruct(vqvae, real)
    share = torch.bincount(ids.flatten(), minlength=vqvae.config.codes) / ids.numel()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {
        **compare(net, made, real),
        "codes used": int((share > 0).sum()),
        "codes": vqvae.config.codes,
        "perplexity": float(entropy.exp()),
        "frames": len(real),
    }


@torch.inference_mode()
def measure_refiner(
    vqvae: VQVAE, refiner: Refiner, net: ImageFeatures, scenes: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    """Refiner and bicubic on the same decoded clips, against the scenes rendered large.

    All 33 frames go in, as neighbours are seen; every 4th is measured.
    """
    size, scale = vqvae.config.resolution, refiner.config.scale
    made: dict[str, list] = {"bicubic": [], "refiner": []}
    for scene in scenes:
        decoded, _ = reconstruct(vqvae, render(scene, TIMES, size))
        clip = to_images(decoded)[None]  # [1, 33, 3, R, R]
        real = render(scene, TIMES[::4], size * scale)
        for name, large in (("bicubic", resize(clip, scale)), ("refiner", refiner(clip))):
            made[name].append(compare(net, to_frames(large[0, ::4]), real))
    return {
        n: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for n, rows in made.items()
    }


def print_tokenizer(row: dict[str, float], what: str) -> None:
    print(f"tokenizer at {what}\n")
    print("| PSNR dB | SSIM | perceptual | codes in use | perplexity |\n|---:|---:|---:|---:|---:|")
    codes = f"{row['codes used']} of {row['codes']} | {row['perplexity']:.0f}"
    print(f"| {row['psnr']:.2f} | {row['ssim']:.4f} | {row['perceptual']:.4f} | {codes} |\n", flush=True)


def print_refiner(rows: dict[str, dict[str, float]], what: str) -> None:
    print(f"decoded clips enlarged to {what}\n")
    print("| | PSNR dB | SSIM | perceptual |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['perceptual']:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="fidelity of the tokenizer and of the refiner")
    parser.add_argument("--model", default="tiny", help="name, folder or hub id")
    parser.add_argument("--count", type=int, default=512, help="clips for the tokenizer")
    parser.add_argument("--refiner-count", type=int, default=64, help="clips for the refiner")
    parser.add_argument("--sprites", type=int, help="default: as many as the model was trained on")
    parser.add_argument("--seed", type=int, default=4321)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()
    folder = ModelFolder(find_model(args.model))
    names = sprites(args.sprites or trained_sprites(folder))
    net, vqvae = ImageFeatures(), folder.load("vqvae")
    scenes = unseen_scenes(names, args.count, args.seed)
    size, of = vqvae.config.resolution, f"of {len(names)} sprites"
    numbers = {"tokenizer": measure_tokenizer(vqvae, net, scenes)}
    print_tokenizer(numbers["tokenizer"], f"{size} px, 9 frames of each of {len(scenes)} unseen clips {of}")
    if folder.spec().refiner is None or not folder.has("refiner"):
        print("no refiner in this model folder yet")
    else:
        refiner, scenes = folder.load("refiner"), scenes[: args.refiner_count]
        rows = measure_refiner(vqvae, refiner, net, scenes)
        print_refiner(rows, f"{size * refiner.config.scale} px, {len(scenes)} unseen clips {of}")
        numbers.update(rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
