"""Do the videos show what the prompts say? A classifier of rendered clips judges generated ones.

    python -m benchmarks.classifier                                  trains the judge, once
    python -m benchmarks.adherence --model tiny --out runs/adherence
    python -m benchmarks.adherence --model tiny --reconstructions    only the upper bound, without generating

Rows: prompts about held-out compositions, about seen ones, and about the first held-out ones in Chinese. The
rendered clips of the same scenes, in rows of their own, show what the judge itself reaches. With
--reconstructions they go through tokenizer and refiner: what no model of their tokens should exceed.
Generated clips are kept in --out as they are made, at 48 px: a killed run goes on.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity import reconstruct, trained_sprites
from cogvideo.data.tinyworld import MOTIONS, PLACES, Scene, TinyWorld, render, sprites
from cogvideo.eval import judge_training, tinyworld
from cogvideo.eval.metrics import frechet_distance
from cogvideo.eval.tinyworld import FRAMES, HEADS, SHIPPED, SIZE, ClipClassifier
from cogvideo.files import atomic_path
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import to_frames, to_images

if TYPE_CHECKING:
    from cogvideo import CogVideo

TIMES = np.arange(33) / 8  # seconds


@dataclass(frozen=True)
class Split:
    """Scenes and the prompts about them."""

    name: str
    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in clips of known scenes."""

    truth: Tensor  # [B, 3]: indices of sprite, motion, place
    seen: Tensor  # [B, 3]
    features: Tensor  # [B, D]

    @property
    def right(self) -> Tensor:
        """bool [B, 4]: sprite, motion, place, all three."""
        right = self.truth == self.seen
        return torch.cat((right, right.all(1, keepdim=True)), 1)


@dataclass(frozen=True)
class Judged:
    """What the judge saw of a split: clips that a model made, and rendered ones to compare them with."""

    generated: Verdict | None
    rendered: Verdict  # the same scenes
    tokenized: Verdict | None  # the same scenes through tokenizer and refiner
    still: Verdict  # their first frames, repeated
    others: Verdict  # other scenes of the same kind


def draw_split(
    name: str, names: Sequence[str], count: int, seed: int, held_out: bool, language: str
) -> Split:
    """`count` scenes and prompts that follow from `seed`."""
    world = TinyWorld(tuple(names), seed, held_out, language)
    recordings = [world[i] for i in range(count)]
    prompts = [r.caption(np.random.default_rng((seed, i, 1))) for i, r in enumerate(recordings)]
    return Split(name, tuple(r.scene for r in recordings), tuple(prompts))


def judge(net: ClipClassifier, clips: np.ndarray, scenes: Sequence[Scene]) -> Verdict:
    """Judge clips uint8 [B, F, 48, 48, 3] of 4 s, F = 9, 17 or 33, that should show `scenes`."""
    count, rest = divmod(clips.shape[1] - 1, FRAMES - 1)
    assert rest == 0 and clips.shape[2:] == (SIZE, SIZE, 3), f"clips {clips.shape}"
    seen, features = judge_training.classify(net, clips[:, ::count])
    return Verdict(tinyworld.classes().labels(scenes), seen, features)


def to_small(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, H, H, 3] to the judge's size, uint8 [F, 48, 48, 3], by the mean over areas."""
    if frames.shape[1] == SIZE:
        return frames
    return to_frames(torch.nn.functional.interpolate(to_images(frames), size=(SIZE, SIZE), mode="area"))


def generate(pipe: "CogVideo", split: Split, seed: int, batch: int, frames: int, out: Path) -> np.ndarray:
    """A clip for every prompt, uint8 [B, frames, 48, 48, 3]; sample i has seed + i.

    What is in `out` already is not made again. Raises ValueError if `out` holds clips of other prompts.
    """
    clips, begun, made = [], time.time(), 0
    for start in range(0, len(split.prompts), batch):
        prompts = list(split.prompts[start : start + batch])
        file = out / f"{split.name.replace(' ', '-')}-{start:04d}.npz"
        if file.exists():
            with np.load(file) as kept:
                if kept["prompts"].tolist() != prompts:
                    raise ValueError(f"{file} holds clips of other prompts; choose another --out")
                clips.append(kept["clips"])
            continue
        made_now = pipe(prompts, seed=seed + start, num_frames=frames, progress=False)
        clips.append(np.stack([to_small(clip.frames) for clip in made_now]))
        with atomic_path(file) as part:
            np.savez_compressed(part, clips=clips[-1], prompts=np.array(prompts))
        made += len(prompts)
        pace = (time.time() - begun) / made
        print(
            f"{split.name}: {start + len(prompts)}/{len(split.prompts)}  {pace:.2f} s a clip  "
            f"{pace * (len(split.prompts) - start - len(prompts)) / 60:.0f} min left",
            flush=True,
        )
    return np.concatenate(clips)


def claim(out: Path, folder: ModelFolder, **options: object) -> None:
    """Mark `out` as the place of this model's clips; ValueError if it is that of other weights or options."""
    claimed = json.dumps({"weights": folder.version(), **options}, indent=2)
    file = out / "run.json"
    if file.exists() and file.read_text() != claimed:
        what = f"clips of other weights, or another --{', --'.join(options)}"
        raise ValueError(f"{out} holds {what} (see {file}); choose another --out")
    with atomic_path(file) as part:
        part.write_text(claimed)


@torch.inference_mode()
def through_tokenizer(folder: ModelFolder, scenes: Sequence[Scene]) -> np.ndarray:
    """Rendered clips encoded, decoded, refined if that is possible, made small: uint8 [B, 9, 48, 48, 3]."""
    vqvae, clips = folder.load("vqvae"), []
    refiner = folder.load("refiner") if folder.has("refiner") else None
    for scene in scenes:
        times = TIMES[::4] if refiner is None else TIMES  # a refiner looks at the neighbours in time
        frames, _ = reconstruct(vqvae, render(scene, times, vqvae.config.resolution))
        if refiner is not None:
            frames = to_frames(refiner(to_images(frames)[None])[0])[::4]
        clips.append(to_small(frames))
    return np.stack(clips)


# -- tables --


def interval(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of `right` in `n` (Wilson)."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def accuracy_table(verdicts: dict[str, Verdict]) -> str:
    """Rows: kinds of clips; columns: sprite, motion, place, all three, in % with 95 % intervals."""
    lines = ["| clips | sprite % | motion % | place % | all three % | n |", "|---|---:|---:|---:|---:|---:|"]
    for name, verdict in verdicts.items():
        n, cells = len(verdict.right), []
        for right in verdict.right.sum(0).tolist():
            low, high = interval(right, n)
            cells.append(f"{100 * right / n:.1f} ({100 * low:.1f}..{100 * high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {n} |")
    return "\n".join(lines)


def worst_table(verdicts: Sequence[Verdict], count: int = 5) -> str:
    """The sprites, motions and places that fail most, and what the judge took them for."""
    truth, seen = (torch.cat([getattr(v, part) for v in verdicts]) for part in ("truth", "seen"))
    lines = ["| | right % | n | taken for |", "|---|---:|---:|---|"]
    for head, words in enumerate((sprites(), MOTIONS, PLACES)):
        rows = []
        for index, word in enumerate(words):
            taken = Counter(seen[truth[:, head] == index, head].tolist())
            n = sum(taken.values())
            right = taken.pop(index, 0)
            if right < n:
                others = ", ".join(f"{words[k]} {c}" for k, c in taken.most_common(3))
                rows.append((right / n, f"| {HEADS[head]} {word} | {100 * right / n:.0f} | {n} | {others} |"))
        lines += [line for _, line in sorted(rows)[:count]]
    return "\n".join(lines)


def frechet_table(judged: dict[str, Judged]) -> str:
    """Frechet distance of the judge's features to those of rendered clips of other scenes, as many."""
    head = "| prompts | generated | through the tokenizer | rendered (floor) | still first frame | n |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for name, j in judged.items():
        cells = [
            "-" if v is None else f"{frechet_distance(v.features, j.others.features):.2f}"
            for v in (j.generated, j.tokenized, j.rendered, j.still)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(j.others.seen)} |")
    return "\n".join(lines)


# -- the whole --


def judge_split(
    net: ClipClassifier,
    split: Split,
    others: Sequence[Scene],
    generated: np.ndarray | None = None,
    tokenized: np.ndarray | None = None,
) -> Judged:
    """Judge clips uint8 [B, F, 48, 48, 3] made for `split`, and rendered ones of it and of `others`."""
    real, other = (np.stack([render(s, TIMES[::4], SIZE) for s in some]) for some in (split.scenes, others))
    return Judged(
        None if generated is None else judge(net, generated, split.scenes),
        judge(net, real, split.scenes),
        None if tokenized is None else judge(net, tokenized, split.scenes),
        judge(net, real[:, :1].repeat(FRAMES, 1), split.scenes),
        judge(net, other, others),
    )


def report(title: str, judged: dict[str, Judged]) -> str:
    """All tables, as Markdown."""
    rows, failing = {}, []
    for name, j in judged.items():
        kinds = {"": j.generated, ": rendered": j.rendered, ": through the tokenizer": j.tokenized}
        rows.update({name + kind: verdict for kind, verdict in kinds.items() if verdict is not None})
        failing.append(j.generated or j.tokenized or j.rendered)
    return "\n".join(
        [
            f"# {title}\n",
            accuracy_table(rows),
            "\nWhat fails most\n",
            worst_table(failing),
            "\nFrechet distance to as many rendered clips of other scenes, in the judge's features\n",
            frechet_table(judged),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="prompt adherence, judged by a classifier of rendered clips")
    parser.add_argument("--model", default="tiny", help="name, folder or hub id")
    parser.add_argument("--count", type=int, default=512, help="English prompts: held-out, and as many seen")
    parser.add_argument("--chinese", type=int, default=256, help="Chinese prompts, held-out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--frames",
        type=int,
        default=33,
        choices=(9, 17, 33),
        help="9: only the rounds that make what the judge sees, 2 frames a second",
    )
    parser.add_argument("--lora", help="a folder with an adapter, at weight 1")
    parser.add_argument("--dtype", help="numbers to compute with; default: as `cogvideo generate`")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--sprites", type=int, help="default: as many as the model was trained on")
    parser.add_argument("--reconstructions", action="store_true", help="only the bounds, nothing generated")
    parser.add_argument("--judge", type=Path, default=SHIPPED, help="weights of the classifier")
    parser.add_argument("--out", type=Path, default=Path("runs/adherence"))
    args = parser.parse_args()
    from cogvideo.generate.cogvideo import CogVideo, find_model

    folder = ModelFolder(find_model(args.model))
    names, net = sprites(args.sprites or trained_sprites(folder)), tinyworld.load(args.judge)
    known = len(net.heads["sprite"].bias)
    if len(names) > known:
        raise SystemExit(
            f"the judge knows {known} sprites, not {len(names)}: give --sprites or train another judge"
        )
    kinds = {
        "held-out": (args.count, args.seed, True, "en"),
        "seen": (args.count, args.seed + 10_000, False, "en"),
        "held-out zh": (args.chinese, args.seed, True, "zh"),  # only the language differs
    }
    if not args.reconstructions:
        pipe = CogVideo(folder, dtype=args.dtype)
        options = {"seed": args.seed, "batch": args.batch, "frames": args.frames, "dtype": pipe.dtype}
        if args.lora is not None:
            pipe.load_lora_weights(args.lora)
            options["lora"] = args.lora
        claim(args.out, folder, **options)
    judged = {}
    for name, (count, seed, held_out, language) in kinds.items():
        if count < 2:
            continue
        split = draw_split(name, names, count, seed, held_out, language)
        others = draw_split(name, names, count, seed + 5000, held_out, language).scenes
        if args.reconstructions:
            judged[name] = judge_split(net, split, others, tokenized=through_tokenizer(folder, split.scenes))
        else:
            clips = generate(pipe, split, seed, args.batch, args.frames, args.out)
            judged[name] = judge_split(net, split, others, generated=clips)
    text = report(f"{args.model}: adherence, {len(names)} sprites", judged)
    print(text)
    with atomic_path(args.out / ("bounds.md" if args.reconstructions else "report.md")) as part:
        part.write_text(text)


if __name__ == "__main__":
    main()
