"""What does the regression family reach, and what do its phases and the levels of its loss bring?

    python -m benchmarks.regression phases --model tiny       the table of phases, beside another model
    python -m benchmarks.regression losses --steps 600        the table of losses, and strips.png

phases: direct-tiny after `image`, after `low`, after `high`, and `high` without `low` for as many steps as
both, judged on the same held-out prompts by the judge of `benchmarks.classifier`: 9 frames, 2 a second. A
model that was not trained for these frames is asked for them all the same, with positions between those that
it knows.

losses: from the same image model, `low` with each loss; on unseen clips, what is made of the caption against
the clip it was written for: PSNR, perceptual distance, error of the optical flow, flicker.

Runs stay in --out and go on there.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.adherence import TIMES, claim, draw_split, generate, interval, judge_split
from benchmarks.fidelity import captions, compare, unseen_scenes
from benchmarks.generate import time_verbs
from benchmarks.hierarchical import ROWS
from cogvideo import CogVideo
from cogvideo.data.tinyworld import TinyWorld, render, sprites
from cogvideo.eval import tinyworld
from cogvideo.eval.metrics import flicker, frechet_distance, sharpness
from cogvideo.files import atomic_path
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.model import presets
from cogvideo.model.features import ImageFeatures
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import to_frames, to_images
from cogvideo.text import PLAIN
from cogvideo.train import loop, recipes
from cogvideo.train.losses import temporal_distance
from cogvideo.train.run import Options, Run

RECIPE = recipes.find("direct-tiny")


def train(out: Path, phases: Sequence[recipes.Phase], begin: Path | None = None) -> ModelFolder:
    """Train phases in a folder, which begins as a copy of another run's model; goes on where it stopped."""
    if begin is not None and not (out / "model").exists():
        with atomic_path(out / "model") as copy:
            shutil.copytree(begin / "model", copy)
    world = TinyWorld(sprites(RECIPE.sprites), RECIPE.seed, even=True)
    spec = presets.find(RECIPE.preset)
    return loop.train(Run(RECIPE, out, world, spec, list(phases), Options(log_every=100, save_every=100)))


@torch.inference_mode()
def regress(folder: ModelFolder, prompts: Sequence[str], rate: float) -> np.ndarray:
    """9 frames, 2 a second, for each prompt, with the rate's token, of a model that may know only some of
    them: uint8 [B, 9, R, R, 3]."""
    pipe = RegressionPipeline(folder)
    pipe.model.prepare(rate, [])
    text = torch.tensor(pipe.prompts.ids(prompts, 0.0, PLAIN, pipe.spec.regression.text_len))
    slots = range(0, pipe.spec.regression.frames, 4)
    made = [pipe.model(rows, rate, slots) for rows in text.split(16)]
    return np.stack([to_frames(clip) for clip in torch.cat(made)])


def duration(pipe) -> float:
    """Seconds that the most frames of one prompt take, before they are refined: the medians of all verbs."""
    _, taken = time_verbs(pipe, 3)
    return sum(statistics.median(times) for name, times in taken.items() if name != "upscale")


def phases_table(out: Path, other: str, count: int) -> None:
    image, low, high = (RECIPE.phase(name) for name in ("image", "low", "high"))
    longer = replace(high, steps=low.steps + high.steps)
    runs = {
        "image": ([image], None),
        "low": ([low], "image"),
        "high": ([high], "low"),
        "high without low": ([longer], "image"),
    }
    split = draw_split("held-out", sprites(RECIPE.sprites), count, 1000, True, "en")
    others = draw_split("others", sprites(RECIPE.sprites), count, 6000, True, "en").scenes
    net, rows = tinyworld.load(), {}
    for name, (phases, begin) in runs.items():
        folder = train(out / name.replace(" ", "-"), phases, None if begin is None else out / begin)
        clips = regress(folder, split.prompts, 8.0 if "high" in name else 1.0)
        rows[f"direct-tiny after {name}"] = (clips, duration(RegressionPipeline(folder)))
    pipe = CogVideo.from_pretrained(other)
    clips_of_it = out / pipe.folder.path.name
    claim(clips_of_it, pipe.folder, seed=1000, batch=8, frames=9, dtype=pipe.dtype)
    made = generate(pipe, split, 1000, 8, 9, clips_of_it)
    rows[other] = (made, duration(pipe))
    print("| | sprite % | motion % | place % | all three % | Frechet | sharpness | seconds a video |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    real = np.stack([render(scene, TIMES[::4], 48) for scene in split.scenes])
    for name, (clips, seconds) in {**rows, "rendered": (real, None)}.items():
        judged = judge_split(net, split, others, clips)
        shares = []
        for right in judged.generated.right.sum(0).tolist():
            low_end, high_end = interval(right, count)
            shares.append(f"{100 * right / count:.1f} ({100 * low_end:.1f}..{100 * high_end:.1f})")
        distance = frechet_distance(judged.generated.features, judged.others.features)
        numbers = f"{distance:.0f} | {mean(sharpness, clips):.2f}"
        taken = "" if seconds is None else f"{seconds:.2f}"
        print(f"| {name} | {' | '.join(shares)} | {numbers} | {taken} |", flush=True)


def losses_table(out: Path, steps: int, count: int) -> None:
    train(out / "image", [RECIPE.phase("image")])
    scenes = unseen_scenes(sprites(RECIPE.sprites), count, seed=4321)
    prompts = captions(scenes)
    times = TIMES[::8]
    real = np.stack([render(scene, times, 48) for scene in scenes])
    strips = [strip(real[:3])]
    print("| loss | PSNR dB | perceptual | flow error px | flicker | sharpness |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, weights in ROWS.items():
        phase = replace(RECIPE.phase("low"), steps=steps, loss=weights)
        folder = train(out / f"loss-{name.replace(', ', '-')}", [phase], out / "image")
        pipe = RegressionPipeline(folder)
        made = np.stack([clip.frames for clip in pipe.regress(prompts, 5)])
        row = compare(ImageFeatures(), made.reshape(-1, 48, 48, 3), real.reshape(-1, 48, 48, 3))
        flow = float(temporal_distance(to_images(made), to_images(real)).mean())
        print(f"| {name} | {row['psnr']:.2f} | {row['perceptual']:.3f} | {flow:.3f} ", end="")
        print(f"| {mean(flicker, made):.2f} | {mean(sharpness, made):.2f} |", flush=True)
        strips.append(strip(made[:3]))
    print(f"| rendered | | 0 | 0 | {mean(flicker, real):.2f} | {mean(sharpness, real):.2f} |")
    Image.fromarray(np.concatenate(strips)).save(out / "strips.png")


def mean(measure, clips: np.ndarray) -> float:
    return float(torch.stack([measure(to_images(clip)) for clip in clips]).mean())


def strip(clips: np.ndarray) -> np.ndarray:
    """Clips [B, F, H, W, 3] side by side, all frames."""
    return np.concatenate([np.concatenate(list(clip), 1) for clip in clips], 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("phases", "losses"))
    parser.add_argument("--model", default="tiny", help="phases: the autoregressive model beside it")
    parser.add_argument("--steps", type=int, default=600, help="losses: steps of each")
    parser.add_argument("--count", type=int, default=256, help="held-out prompts or unseen clips")
    parser.add_argument("--out", type=Path, default=Path("runs/direct"))
    arguments = parser.parse_args()
    if arguments.what == "phases":
        phases_table(arguments.out, arguments.model, arguments.count)
    else:
        losses_table(arguments.out, arguments.steps, arguments.count)


if __name__ == "__main__":
    main()
