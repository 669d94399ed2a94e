"""The ladder: where on the way from a rendered clip to a generated one the picture is lost.

    python -m benchmarks.classifier --judge frame                       trains the judge, once
    python -m benchmarks.ladder --model tiny --sprites 32 --clips 32    all rungs
    python -m benchmarks.ladder --vqvae runs/tok/vqvae.safetensors      those of a tokenizer alone

Each rung takes the same held-out scenes and leaves one thing more to the model: rendered at 192 px | bicubic
from the size that the tokenizer codes | codes of the true frames, decoded | the same codes, a tenth of them
replaced | generated from true key frames | from a true first frame | all generated. The grey frame judge
(benchmarks/frame_judge.py) says what a single frame still shows.

Notable:
- Codes are turned into frames by the model's own verbs: decode and, if it has them, super-resolution and
  refiner. If a video decoder does it, a second row shows the same codes decoded frame by frame by the
  tokenizer: a decoder that paints the named sprite over a wrong blob is no model that drew it.
- Where frames should equal the rendered ones (`TRUE`), they are compared with them. Flicker and sharpness are
  measured inside the object there, flicker in a square that follows it, so that its motion does not count.
- Generated codes are kept in --out: a killed run resumes, and another judge need not wait for them again.
- Frechet distance: between features of the frame judge's penultimate layer, to rendered clips of other scenes
  with the same sprites, one for each; that of the rendered clips themselves is the floor.

Shapes: F = 33 frames, S = 192 pixels.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks import frame_judge
from benchmarks.fidelity import compare
from benchmarks.frame_judge import SIZE, TIMES, FrameJudge, Sight
from cogvideo.data.tinyworld import Scene, TinyWorld, cover, path, render, sample_scene, sprites
from cogvideo.data.tinyworld.world import SceneVideo
from cogvideo.eval.metrics import flicker, frechet_distance, sharpness
from cogvideo.files import atomic_path
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.draft import Draft, DraftStore
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.model.features import ImageFeatures
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.vqvae import VQVAE, to_frames, to_images
from cogvideo.video import Clip

FPS = 8.0
FOLLOWED = 96  # pixels of the square that follows the object
REPLACED = 0.1  # share of codes


@dataclass(frozen=True)
class Batch:
    """Scenes, the prompts about them, and a seed for each."""

    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def part(self, start: int, count: int) -> "Batch":
        cut = slice(start, start + count)
        return Batch(self.scenes[cut], self.prompts[cut], self.seeds[cut])

    @cached_property
    def clips(self) -> list[Clip]:
        """The scenes, rendered."""
        return [Clip(render(s, TIMES, SIZE), FPS, p) for s, p in zip(self.scenes, self.prompts)]


def draw_batch(names: Sequence[str], count: int, seed: int) -> Batch:
    """`count` held-out scenes with English prompts; scene i depends on `seed` and i only."""
    world = TinyWorld(tuple(names), seed, True)
    scenes = tuple(world[i].scene for i in range(count))
    seeds = tuple(range(seed, seed + count))
    prompts = [SceneVideo(s, "en").caption(np.random.default_rng(i)) for s, i in zip(scenes, seeds)]
    return Batch(scenes, tuple(prompts), seeds)


class TokenizerOnly:
    """A tokenizer without a model: those verbs of a pipeline that need no other part."""

    def __init__(self, vqvae: VQVAE):
        self.vqvae = vqvae

    @torch.inference_mode()
    def encode(self, clips: Sequence[Clip], prompts: Sequence[str], seeds: Sequence[int]) -> Draft:
        small = [clip.square(self.vqvae.config.resolution).frames for clip in clips]
        codes = torch.stack([self.vqvae.encode(to_images(frames)) for frames in small])
        return Draft(codes, clips[0].fps, tuple(prompts), tuple(seeds))

    def superresolve(self, draft: Draft) -> Draft:
        return draft

    @torch.inference_mode()
    def decode(self, draft: Draft) -> list[Clip]:
        return [Clip(to_frames(self.vqvae.decode(codes)), draft.fps) for codes in draft.codes]

    def upscale(self, clips: Sequence[Clip]) -> list[Clip]:
        return list(clips)


# -- the rungs: a pipeline and a batch to codes or clips --


def rendered(pipe: Any, batch: Batch) -> list[Clip]:
    return batch.clips


def bicubic(pipe: Any, batch: Batch) -> list[Clip]:
    return [clip.square(coded_size(pipe)) for clip in batch.clips]


def coded(pipe: Any, batch: Batch) -> Draft:
    return pipe.encode(batch.clips, batch.prompts, batch.seeds)


def damaged(pipe: Any, batch: Batch) -> Draft:
    draft, count = coded(pipe, batch), tokenizer_config(pipe).codes
    codes = [replace_codes(codes, count, seed) for codes, seed in zip(draft.codes, batch.seeds)]
    return replace(draft, codes=torch.stack(codes))


def from_keyframes(pipe: Any, batch: Batch) -> Draft:
    return interpolate(pipe, keyframes(pipe, batch))


def from_first(pipe: Any, batch: Batch) -> Draft:
    true = keyframes(pipe, batch)
    begin = replace(true, codes=true.codes[:, :1])
    return interpolate(pipe, pipe.keyframes(batch.prompts, batch.seeds, begin=begin))


def generated(pipe: Any, batch: Batch) -> Draft | list[Clip]:
    if isinstance(pipe, RegressionPipeline):
        return pipe(batch.prompts, progress=False)
    return interpolate(pipe, pipe.keyframes(batch.prompts, batch.seeds))


RUNGS: dict[str, tuple[Callable[[Any, Batch], Draft | list[Clip]], str]] = {
    "rendered": (rendered, "rendered, 192 px"),
    "bicubic": (bicubic, "bicubic from the coded size"),
    "codes": (coded, "codes of true frames, decoded"),
    "replaced": (damaged, "the same, a tenth of the codes replaced"),
    "keyframes": (from_keyframes, "generated from true key frames"),
    "first": (from_first, "generated from a true first frame"),
    "generated": (generated, "all generated"),
}
RECONSTRUCTIONS = ("rendered", "bicubic", "codes", "replaced")  # need no more than a tokenizer
GENERATED = ("keyframes", "first", "generated")
BY_FRAME = ", by frame"  # behind the name of a rung
TRUE = (*RECONSTRUCTIONS, "keyframes")  # where every frame has a rendered one that it should equal


def tokenizer_config(pipe: Any) -> Any:
    return pipe.vqvae.config if isinstance(pipe, TokenizerOnly) else pipe.spec.vqvae


def has_decoder(pipe: Any) -> bool:
    """Whether a video decoder turns codes into frames."""
    return isinstance(pipe, CogVideo) and "decoder" in pipe.folder.postprocessing_parts


def rows_of(pipe: Any, rung: str) -> list[str]:
    """The names of the rows of a rung."""
    makes_codes = rung not in ("rendered", "bicubic")
    return [rung, rung + BY_FRAME] if makes_codes and has_decoder(pipe) else [rung]


def title_of(row: str) -> str:
    rung = row.removesuffix(BY_FRAME)
    return RUNGS[rung][1] + (", frame by frame" if row != rung else "")


def coded_size(pipe: Any) -> int:
    return pipe.spec.resolution if hasattr(pipe, "spec") else tokenizer_config(pipe).resolution


def keyframes(pipe: Any, batch: Batch) -> Draft:
    """Codes of the true key frames."""
    fps = min(pipe.frame_counts.values())
    clips = [replace(clip, frames=clip.frames[:: int(FPS / fps)], fps=fps) for clip in batch.clips]
    return pipe.encode(clips, batch.prompts, batch.seeds)


def interpolate(pipe: Any, draft: Draft) -> Draft:
    while draft.fps < FPS:
        draft = pipe.interpolate(draft)
    return draft


def replace_codes(codes: Tensor, count: int, seed: int, share: float = REPLACED) -> Tensor:
    """Codes [F, N] of a codebook of `count`, a `share` of them replaced by any others."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(codes.shape, generator=generator) < share
    others = codes.cpu() + torch.randint(1, count, codes.shape, generator=generator)
    return torch.where(chosen.to(codes.device), others.to(codes.device) % count, codes)


def take(pipe: Any, rung: str, batch: Batch, folder: Path | None) -> Draft | list[Clip]:
    """The codes or clips of a rung. Generated codes are kept in `folder`, and read from there."""
    kept = DraftStore(None, "", torch.device("cpu"))
    if folder is not None and rung in GENERATED:
        call = (pipe.folder.version(), pipe.dtype, pipe.sampling, batch.prompts, batch.seeds)
        kept = DraftStore(folder, repr(call), pipe.device)
    made: Draft | list[Clip] | None = kept.load(rung)
    if made is None:
        made = RUNGS[rung][0](pipe, batch)
    if isinstance(made, Draft):
        kept.save(rung, made)
    return made


def show(pipe: Any, made: Draft | list[Clip]) -> dict[str, list[Clip]]:
    """The clips of a rung, and, under `BY_FRAME`, the same codes decoded frame by frame if a video decoder
    made the former."""
    if not isinstance(made, Draft):
        return {"": made}
    shown = {"": pipe.upscale(pipe.decode(pipe.superresolve(made)))}
    if has_decoder(pipe):
        shown[BY_FRAME] = TokenizerOnly(pipe.parts.vqvae).decode(made)
    return shown


# -- what is measured --


def follow(pictures: Tensor, scene: Scene) -> Tensor:
    """Pictures [F, C, S, S] at `TIMES` to a square that follows the object and its turn: [F, C, 96, 96]."""
    x, y, size, turn, _ = path(scene, TIMES[: len(pictures)])
    angle = np.deg2rad(turn)
    rows = (
        np.stack((size * np.cos(angle), -size * np.sin(angle), 2 * x - 1), 1),
        np.stack((size * np.sin(angle), size * np.cos(angle), 2 * y - 1), 1),
    )
    turned = torch.from_numpy(np.stack(rows, 1)).float()  # [F, 2, 3]
    grid = F.affine_grid(turned, [*pictures.shape[:2], FOLLOWED, FOLLOWED], align_corners=False)
    return F.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)


def object_flicker(pictures: Tensor, scene: Scene) -> float:
    """`flicker` of a clip [F, 3, S, S] inside the object, which is followed: in levels of 255."""
    inside = torch.from_numpy(cover(scene, TIMES[: len(pictures)], pictures.shape[-1]))[:, None]
    inside = (follow(inside, scene) > 0.5).float()  # [F, 1, 96, 96]
    inside = inside[2:] * inside[1:-1] * inside[:-2]
    x = follow(pictures, scene)
    jumps = (x[2:] - 2 * x[1:-1] + x[:-2]).abs().mean(1, keepdim=True)
    return 255 * float((jumps * inside).sum() / inside.sum().clamp_min(1))


def object_sharpness(pictures: Tensor, scene: Scene) -> float:
    """`sharpness` of a clip [F, 3, S, S] inside the object."""
    inside = torch.from_numpy(cover(scene, TIMES[: len(pictures)], pictures.shape[-1])) > 0.5
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    edges = F.conv2d(pictures.mean(1, keepdim=True), kernel.view(1, 1, 3, 3), padding=1)[:, 0]
    variances = [edge[here].var() for edge, here in zip(edges, inside) if here.sum() > 1]
    return 1000 * float(torch.stack(variances).mean()) if variances else 0.0


@dataclass(frozen=True)
class Measured:
    """One clip of a rung."""

    classes: Tensor  # [F], what the judge sees
    features: Tensor  # [F, D]
    numbers: dict[str, float]


def measure(
    judge: FrameJudge,
    net: ImageFeatures | None,
    frames: np.ndarray,
    real: np.ndarray,
    scene: Scene,
    true: bool,
) -> Measured:
    """Judge a clip uint8 [F, S, S, 3]; if it is a `true` one, compare it with the rendered clip `real`."""
    pictures = to_images(frames)
    numbers = {"flicker": float(flicker(pictures)), "sharpness": float(sharpness(pictures))}
    if true:
        numbers["object flicker"] = object_flicker(pictures, scene)
        numbers["object sharpness"] = object_sharpness(pictures, scene)
    if true and net is not None and frames is not real:
        numbers |= compare(net, frames[::4], real[::4])
    return Measured(*frame_judge.look(judge, frames), numbers)


def summary(measured: Sequence[Measured], scenes: Sequence[Scene], others: Tensor) -> dict[str, float]:
    """The row of a rung: shares recognised, means of the numbers, Frechet distance to features `others`."""
    truth = torch.tensor([sprites().index(scene.sprite) for scene in scenes])
    classes = torch.stack([m.classes for m in measured])
    sight = Sight(classes, truth, torch.stack([m.features for m in measured]))
    means = {key: float(np.mean([m.numbers[key] for m in measured])) for key in measured[0].numbers}
    return {
        "frames right": sight.frames_right,
        "clips right": sight.clips_right,
        "neighbours alike": sight.neighbours_alike,
        **means,
        "frechet": frechet_distance(sight.features.flatten(0, 1), others),
    }


def to_size(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, H, H, 3], bicubically resized to 192 px if they are not of this size."""
    if frames.shape[1] == SIZE:
        return frames
    resized = F.interpolate(to_images(frames), size=(SIZE, SIZE), mode="bicubic", antialias=True)
    return to_frames(resized)


# -- the whole --


@dataclass
class Ladder:
    """Rows by rung, and every fourth frame of the first clips, uint8 [9, S, S, 3] each, by rung."""

    rows: dict[str, dict[str, float]]
    shown: dict[str, list[np.ndarray]]
    batch: Batch


def climb(
    pipe: Any,
    batch: Batch,
    rungs: Sequence[str],
    judge: FrameJudge,
    net: ImageFeatures | None = None,
    at_once: int = 4,
    shown: int = 8,
    keep: Path | None = None,
) -> Ladder:
    """Take all scenes over the rungs, `at_once` at a time; `rendered`, to which others relate, is always one.

    net: for the perceptual distance, PSNR and SSIM; without it they are not measured. keep: a folder for
    generated codes; what is there already takes no seconds to generate.
    """
    unknown = [rung for rung in rungs if rung not in RUNGS]
    if unknown:
        raise ValueError(f"unknown rung {unknown[0]!r}; choose from {', '.join(RUNGS)}")
    rungs = ["rendered", *(rung for rung in rungs if rung != "rendered")]
    names = [row for rung in rungs for row in rows_of(pipe, rung)]
    kept: dict[str, list[Measured]] = {row: [] for row in names}
    pictures: dict[str, list[np.ndarray]] = {row: [] for row in names}
    seconds = dict.fromkeys(rungs, 0.0)
    for start in range(0, len(batch.scenes), at_once):
        part = batch.part(start, at_once)
        real = [clip.frames for clip in part.clips]
        for rung in rungs:
            begun = time.perf_counter()
            ways = show(pipe, take(pipe, rung, part, keep))
            seconds[rung] += time.perf_counter() - begun
            for way, clips in ways.items():
                for clip, true_frames, scene in zip(clips, real, part.scenes):
                    frames = to_size(clip.frames)
                    kept[rung + way].append(measure(judge, net, frames, true_frames, scene, rung in TRUE))
                    if len(pictures[rung + way]) < shown:
                        pictures[rung + way].append(frames[::4])
        spent = ", ".join(f"{rung} {seconds[rung]:.0f} s" for rung in rungs[1:])
        print(f"{start + len(part.scenes)}/{len(batch.scenes)} clips: {spent}", flush=True)

    others = floor_features(judge, batch)
    rows = {row: summary(kept[row], batch.scenes, others) for row in names}
    for rung in rungs[1:]:
        rows[rung]["seconds a clip"] = seconds[rung] / len(batch.scenes)
    return Ladder(rows, pictures, batch)


def floor_features(judge: FrameJudge, batch: Batch) -> Tensor:
    """Features [M, D] of rendered frames: of another held-out scene for each one, with the same sprite."""
    features = []
    for scene, seed in zip(batch.scenes, batch.seeds):
        other = sample_scene(np.random.default_rng((seed, 1)), [scene.sprite], True)
        features.append(frame_judge.look(judge, render(other, TIMES, SIZE))[1])
    return torch.cat(features)


def reconstruction_rungs(
    vqvae: VQVAE,
    judge: FrameJudge,
    clips: int = 64,
    names: Sequence[str] | None = None,
    seed: int = 1000,
    net: ImageFeatures | None = None,
) -> Ladder:
    """The rungs of a tokenizer alone on `clips` held-out scenes of the sprites `names` (default: all 96)."""
    batch = draw_batch(names or sprites(), clips, seed)
    return climb(TokenizerOnly(vqvae.eval()), batch, rungs_of(TokenizerOnly(vqvae)), judge, net)


def rungs_of(pipe: Any) -> list[str]:
    """The rungs that a pipeline or tokenizer has; bicubic only if less than 192 px are coded."""
    if isinstance(pipe, RegressionPipeline):
        return ["rendered", "generated"]
    rungs = RECONSTRUCTIONS if isinstance(pipe, TokenizerOnly) else RUNGS
    return [rung for rung in rungs if rung != "bicubic" or coded_size(pipe) < SIZE]


COLUMNS = {  # title: key, factor, digits
    "frames right %": ("frames right", 100, 1),
    "clips >= 90 % right": ("clips right", 100, 1),
    "neighbours alike %": ("neighbours alike", 100, 1),
    "PSNR dB": ("psnr", 1, 2),
    "SSIM": ("ssim", 1, 3),
    "perceptual": ("perceptual", 1, 3),
    "Frechet": ("frechet", 1, 1),
    "s a clip": ("seconds a clip", 1, 2),
}
RELATIVE = {  # as a share of the rendered clips'
    "flicker: object, frame": ("object flicker", "flicker"),
    "sharpness: object, frame": ("object sharpness", "sharpness"),
}


def table(ladder: Ladder) -> str:
    """All rows as Markdown; flicker and sharpness as multiples of the rendered clips'."""
    titles = [*COLUMNS, *RELATIVE]
    lines = [f"| n = {len(ladder.batch.scenes)} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    real = ladder.rows["rendered"]
    for name, row in ladder.rows.items():
        cells = []
        for key, factor, digits in COLUMNS.values():
            cells.append(f"{factor * row[key]:.{digits}f}" if key in row else "")
        for keys in RELATIVE.values():
            cells.append(", ".join(f"{row[key] / real[key]:.2f}" if key in row else "-" for key in keys))
        lines.append(f"| {title_of(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sheet(ladder: Ladder, first: int, count: int, side: int = 96) -> Image.Image:
    """`count` clips from number `first` on, a block each: for each rung a row of nine frames."""
    rungs, margin, gap = list(ladder.shown), 92, 16
    block = gap + len(rungs) * side
    picture = Image.new("RGB", (margin + 9 * side, count * block), "white")
    pen = ImageDraw.Draw(picture)
    for number in range(count):
        top = number * block
        pen.text((4, top + 2), ladder.batch.prompts[first + number], "black")
        for row, rung in enumerate(rungs):
            pen.text((4, top + gap + row * side + side // 2 - 6), rung, "black")
            for column, frame in enumerate(ladder.shown[rung][first + number]):
                small = Image.fromarray(frame).resize((side, side), Image.Resampling.BOX)
                picture.paste(small, (margin + column * side, top + gap + row * side))
    return picture


def save(ladder: Ladder, out: Path, about: dict[str, Any]) -> None:
    """Write report.json, table.md and sheets of four clips each."""
    out.mkdir(parents=True, exist_ok=True)
    report = {**about, "clips": len(ladder.batch.scenes), "rungs": ladder.rows}
    with atomic_path(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    with atomic_path(out / "table.md") as part:
        part.write_text(table(ladder) + "\n")
    count = len(ladder.shown["rendered"])
    for first in range(0, count, 4):
        sheet(ladder, first, min(4, count - first)).save(out / f"sheet-{first // 4}.png")


def load_tokenizer(file: Path) -> VQVAE:
    """A tokenizer from its file in a model folder, of which it needs config.json alone."""
    folder = ModelFolder(file.parent)
    if file.name != folder.file("vqvae").name:
        raise ValueError(f"--vqvae must be the {folder.file('vqvae').name} of a model folder; got {file}")
    return folder.load("vqvae")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="tiny", help="name, folder or hub id")
    source.add_argument("--vqvae", type=Path, help="a tokenizer's safetensors file, config.json next to it")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, help="default: all that the model has")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--sprites", type=int, default=96, help="the first so many")
    parser.add_argument("--batch", type=int, default=4, help="clips generated together")
    parser.add_argument("--shown", type=int, default=8, help="clips in the sheets")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--judge", type=Path, default=frame_judge.FILE, help="weights of the frame judge")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    args = parser.parse_args()

    judge = frame_judge.load(args.judge)
    pipe = TokenizerOnly(load_tokenizer(args.vqvae)) if args.vqvae else CogVideo.from_pretrained(args.model)
    rungs = args.rungs or rungs_of(pipe)
    missing = [rung for rung in rungs if rung not in rungs_of(pipe)]
    if missing:
        raise SystemExit(f"this model has no rung {missing[0]}; choose from {', '.join(rungs_of(pipe))}")
    batch = draw_batch(sprites(args.sprites), args.clips, args.seed)
    ladder = climb(pipe, batch, rungs, judge, ImageFeatures(), args.batch, args.shown, args.out / "codes")
    about = {"model": str(args.vqvae or find_model(args.model)), "sprites": args.sprites, "seed": args.seed}
    save(ladder, args.out, about)
    print(table(ladder))


if __name__ == "__main__":
    main()
