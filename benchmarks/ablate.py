"""What each ingredient is worth: variants trained for equal time, judged by what they make.

    python -m benchmarks.ablate base --model runs/tiny/model --minutes 30 --out runs/ablation
    python -m benchmarks.ablate decoder --model runs/tiny/model --minutes 25 --out runs/ablation

A variant is a phase of the recipe with fields of the part or of the phase changed. Each is trained on one
thread for the same minutes of processor time, from the same seed, with the tokenizer of --model and nothing
else of it; a run that was killed resumes.

The base generates first frames for held-out prompts: the grey frame judge says in how many the sprite is
recognised, and the loss on unseen pictures, unweighted, stands next to it. The decoder, whose rate falls to 0
all along, decodes held-out clips, from their codes and from damaged ones: the ladder's rows tell.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import frame_judge, ladder
from benchmarks.budget import steps_within
from cogvideo import CogVideo
from cogvideo.data.loader import batches
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.files import atomic_path
from cogvideo.model import presets
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.features import ImageFeatures
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.train import inputs, loop, losses, recipes
from cogvideo.train.phase import Phase
from cogvideo.train.run import Options, Run

Row = dict[str, float]

ORIGINAL = {
    "rotary": False,
    "qk_norm": False,
    "activation": "gelu",
    "norm": "sandwich",
    "zero_init": False,
    "skew": 0,
}
SPEC = presets.find("tiny")
DECODER_LOSS = recipes.find("tiny").phase("decoder").loss
MEASURED_STEPS = 30  # that tell how many fit into the minutes


@dataclass(frozen=True)
class Variant:
    """Fields of the part's config and of the phase that differ from the recipe's."""

    part: dict[str, Any] = field(default_factory=dict)
    phase: dict[str, Any] = field(default_factory=dict)


BASE = {
    "recipe": Variant(),
    "as the original": Variant(ORIGINAL, {"object_weight": 0.0}),
    "no rotary positions": Variant({"rotary": False}),
    "no norm of queries and keys": Variant({"qk_norm": False}),
    "gelu": Variant({"activation": "gelu"}),
    "sandwich norms": Variant({"norm": "sandwich"}),
    "no zero initialisation": Variant({"zero_init": False}),
    "one code after another": Variant({"skew": 0}),
    "all codes count alike": Variant(phase={"object_weight": 0.0}),
    "whole frames only": Variant(phase={"crop_share": 0.0, "batch": 32}),
    "codes read with errors": Variant(phase={"corrupt": 0.05}),
    "adamw": Variant(phase={"optimizer": "adamw", "lr": 1e-3}),
    "half the batch": Variant(phase={"batch": 32}),
    "twice the rate": Variant(phase={"lr": 1.4e-3}),
}
DECODER = {
    "recipe": Variant(),
    "one frame at a time": Variant({"mix": False}),
    "no caption": Variant({"read": 0}),
    "neither": Variant({"mix": False, "read": 0}),
    "true codes alone": Variant(phase={"corrupt": 0.0}),
    "no flow term": Variant(phase={"loss": replace(DECODER_LOSS, temporal=0.0)}),
    "a discriminator": Variant(phase={"adversary": 0.1}),
}


def train_for(
    minutes: float, phase: Phase, spec: CogVideoSpec, init: ModelFolder, out: Path, names: tuple[str, ...]
) -> ModelFolder:
    """Train one phase in `out` on these sprites. Its number of steps is decided once and kept in
    steps.json."""
    recipe = replace(recipes.find("tiny"), phases=(phase,), sprites=len(names))
    source = open_source("tinyworld", sprites=recipe.sprites)
    measuring = Run(recipe, out / "speed", source, spec, [phase], Options(init=init, quiet=True))
    steps = steps_within(minutes, measuring, MEASURED_STEPS, out / "steps.json")
    phase = replace(phase, steps=steps, warmup=min(phase.warmup, steps // 10))
    return loop.train(
        Run(recipe, out / "run", source, spec, [phase], Options(init=init, log_every=50, save_every=20))
    )


@torch.inference_mode()
def loss_of(folder: ModelFolder, names: tuple[str, ...], count: int = 64) -> float:
    """Nats a code on `count` held-out pictures, every code alike."""
    world = TinyWorld(names, 555, True, varied=True)
    phase = recipes.find("tiny").phase("image")
    batch = next(batches(world, phase.clips, count, seed=9))
    c, text = folder.spec().model, folder.text()
    ids = inputs.prepare_text(text, batch, c.text_len)
    codes = inputs.encode_clips(folder.load("vqvae"), batch.frames[0])
    model = DualChannelTransformer(folder.load("base"))
    return float(losses.token_loss(model, c.layout("image"), ids, codes)[0])


def recognised(
    folder: ModelFolder, judge: frame_judge.FrameJudge, count: int, names: tuple[str, ...]
) -> float:
    """Share of first frames, generated for held-out prompts, whose sprite the judge names."""
    batch = ladder.draw_batch(names, count, seed=31)
    pipe = CogVideo.from_pretrained(folder.path)
    draft = pipe.first_frames(batch.prompts, batch.seeds, guidance_scale=2.0)
    frames = pipe.parts.vqvae.decode(draft.codes[:, 0])
    pictures = (frames * 255).round().byte().movedim(1, -1).numpy()[:, None]
    return frame_judge.judge(judge, list(pictures), [scene.sprite for scene in batch.scenes]).frames_right


def tokenizer_of(model: ModelFolder, out: Path) -> ModelFolder:
    """A model folder with the tokenizer of `model` alone."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (model.path / "config.json", model.file("vqvae")):
        shutil.copy(file, out)
    return ModelFolder(out)


def ablate_base(args: argparse.Namespace, variant: Variant, init: ModelFolder, out: Path) -> Row:
    judge = frame_judge.load(args.judge)
    size = {"layers": args.layers, "width": args.width, "heads": args.width // 64}
    spec = replace(SPEC, model=replace(SPEC.model, **size, **variant.part))
    phase = replace(recipes.find("tiny").phase("image"), **variant.phase)
    names = sprites(args.sprites)
    folder = train_for(args.minutes, phase, spec, init, out, names)
    right = recognised(folder, judge, args.clips, names)
    return {"nats a code": loss_of(folder, names), "sprite recognised %": 100 * right}


def ablate_decoder(args: argparse.Namespace, variant: Variant, init: ModelFolder, out: Path) -> Row:
    judge = frame_judge.load(args.judge)
    spec = replace(SPEC, decoder=replace(SPEC.decoder, **variant.part))
    phase = replace(recipes.find("tiny").phase("decoder"), decay=1.0, **variant.phase)
    names = sprites(args.sprites)
    folder = train_for(args.minutes, phase, spec, init, out, names)
    pipe, batch = CogVideo.from_pretrained(folder.path), ladder.draw_batch(names, args.clips, seed=1000)
    rungs = ("codes", "replaced")
    found = ladder.climb(pipe, batch, rungs, judge, ImageFeatures())
    ladder.save(found, out / "ladder", {"model": str(folder.path), "seed": 1000})
    row: Row = {}
    for rung in rungs:
        for title, (key, factor, _) in ladder.COLUMNS.items():
            row[f"{rung}: {title}"] = factor * found.rows[rung][key]
        for title, (key, _) in ladder.RELATIVE.items():
            row[f"{rung}: {title}"] = found.rows[rung][key] / found.rows["rendered"][key]
    return row


PARTS = {"base": (BASE, ablate_base), "decoder": (DECODER, ablate_decoder)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--model", required=True, help="a model with a trained tokenizer")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--layers", type=int, default=8, help="of the base")
    parser.add_argument("--width", type=int, default=384, help="of the base: a multiple of 64")
    parser.add_argument("--sprites", type=int, default=96, help="fewer are learnt sooner")
    parser.add_argument("--clips", type=int, default=192, help="generated frames, or decoded clips, judged")
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--judge", type=Path, default=frame_judge.FILE)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    variants, measure = PARTS[args.part]
    names = args.variants or list(variants)
    if unknown := {*names} - {*variants}:
        parser.error(f"--variants: no {', '.join(sorted(unknown))}; choose from {', '.join(variants)}")
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    init = tokenizer_of(ModelFolder(find_model(args.model)), args.out / "tokenizer")
    for name in names:
        out = args.out / args.part / name.replace(" ", "-")
        row = measure(args, variants[name], init, out)
        rows[name] = {"steps": json.loads((out / "steps.json").read_text()), **row}
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in rows[name].items()), flush=True)
        with atomic_path(args.out / f"{args.part}.json") as file:
            file.write_text(json.dumps({"minutes": args.minutes, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
