"""What the commands of the documents are run with where the real thing is too large or not here.

    python -m scripts.stand_ins files FOLDER      what a user would bring: prompts, videos, checkpoints ...
    python -m scripts.stand_ins models FOLDER     random models `tiny` and `direct-tiny` of nano size

A copy of the package can be made smaller in two ways (`shrink`): in the copy "few" every phase of every
recipe takes 2 steps of 2 clips; in the copy "nano", besides, the rows `tiny`, `direct-tiny`, `direct-gpt2`
and `cogvideo-9b` of the table of models have 1 to 2 layers and frames of 16 to 32 pixels, and the shipped
models are random ones of these sizes. All else is the package itself.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FEW = {  # file of the package: lines at its end
    "train/recipes.py": """
from scripts.stand_ins import few
RECIPES = {name: few(recipe) for name, recipe in RECIPES.items()}
ADAPTERS = dict.fromkeys(ADAPTERS, (2, 2))
""",
    "train/objectives.py": "UNQUANTISED = 1",
    "train/inherit.py": "CAPTIONS = 300",
}
NANO = FEW | {
    "train/recipes.py": FEW["train/recipes.py"].replace("few(recipe)", "few(recipe, 16)"),
    "model/presets.py": """
from scripts.stand_ins import nano
PRESETS = nano(PRESETS)
""",
}
SIZES = {"few": FEW, "nano": NANO}


def shrink(package: Path, copy: Path, size: str) -> None:
    """A copy of a package folder, of the size "few" or "nano", but for the nano models themselves."""
    shutil.copytree(package, copy)
    for file, lines in SIZES[size].items():
        with (copy / file).open("a", encoding="utf-8") as stream:
            stream.write(f"\n\n{lines}\n")


def few(recipe: Any, pixels: int = 0) -> Any:
    """A recipe whose phases take 2 steps of 2 clips; at most `pixels` a side, if that is not 0."""
    phases = []
    for phase in recipe.phases:
        cut = phase.clips
        if pixels:
            sizes = (pixels, 2 * pixels)[: len(cut.sizes)]
            cut = replace(cut, sizes=sizes, cover=cut.cover and 4, crop=cut.crop and pixels // 2)
        phases.append(replace(phase, steps=2, epochs=0, batch=2, warmup=1, clips=cut))
    pieces = recipe.pieces and 500 if pixels else recipe.pieces
    return replace(recipe, phases=tuple(phases), pieces=pieces)


def nano(presets: dict[str, Any]) -> dict[str, Any]:
    """The table of models with small ones under the names of the large ones."""
    words = presets["direct-gpt2"].regression
    words = replace(words, layers=1, width=8, heads=2, resolution=16, patch=8)
    large = presets["cogvideo-9b"]
    model = replace(
        large.model, layers=2, width=32, heads=2, vocab=700, codes=64, pad=67, start=690, grid=4, window=2
    )
    vqvae = replace(large.vqvae, resolution=32, channels=8, codes=64, code_width=8, groups=4)
    superres = replace(large.superres, grid=4, window=(3, 3), cross=(3, 3))
    return presets | {
        "tiny": presets["nano"],
        "direct-tiny": presets["direct-nano"],
        "direct-gpt2": replace(presets["direct-gpt2"], regression=words),
        "cogvideo-9b": replace(large, model=model, vqvae=vqvae, superres=superres),
    }


def write_models(folder: Path) -> None:
    """Random models of the sizes that the table of models has now, below `folder`."""
    import torch

    from cogvideo.data.loader import read_captions
    from cogvideo.data.tinyworld import TinyWorld, sprites
    from cogvideo.model import presets
    from cogvideo.model.folder import FolderConfig, ModelFolder
    from cogvideo.text import split_words, train_text
    from cogvideo.train.inherit import new_part

    captions = list(read_captions(TinyWorld(sprites(32), seed=1), 1000, seed=0))
    words = sorted({word for caption in captions for word in split_words(caption)})
    generator = torch.Generator().manual_seed(0)
    for name in ("tiny", "direct-tiny"):
        (folder / name).mkdir(parents=True)
        spec, model = presets.find(name), ModelFolder(folder / name)
        model.write_config(FolderConfig(spec, name, about="Random.", words=tuple(words)))
        model.write_text(train_text(captions, 500))
        for part in spec.parts:
            made = new_part(spec, part, seed=1)
            if part == "vqvae":
                latents = torch.randn(200, spec.vqvae.code_width, generator=generator)
                made.codebook.init_codes(latents, generator)
            if part == "regression":
                made.trained.fill_(True)
            model.save(part, made)


def write_files(folder: Path) -> None:
    """What the documents take for granted that a user has."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from benchmarks.frame_judge import FrameJudge
    from cogvideo.data.tinyworld import TinyWorld, sprites
    from cogvideo.video import Clip

    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("a dog runs to the right\na cat jumps\n")
    world, times = TinyWorld(sprites(8), seed=1), np.arange(49) / 8
    Image.fromarray(world[0].frames([0.0], 64)[0]).save(folder / "cat.png")
    (folder / "my_videos").mkdir()
    database, rows = {}, ["path,caption"]
    for i, name in enumerate("abc"):
        recording = world[i]
        caption = recording.caption(np.random.default_rng(i))
        Clip(recording.frames(times, 64), 8).save(folder / "my_videos" / f"{name}.mp4")
        (folder / "my_videos" / f"{name}.txt").write_text(caption, encoding="utf-8")
        rows.append(f'my_videos/{name}.mp4,"{caption}"')
        steps = [{"segment": [0, 5], "sentence": caption}]
        database[name] = {"subset": "training", "annotations": steps}
    (folder / "my_art").mkdir()
    for name, colour in (("ball", "red"), ("box", "blue")):
        picture = Image.new("RGBA", (40, 40))
        picture.paste(colour, (8, 8, 32, 32))
        picture.save(folder / "my_art" / f"{name}.png")
    (folder / "clips.csv").write_text("\n".join(rows), encoding="utf-8")
    annotations = json.dumps({"database": database})
    (folder / "youcookii_annotations_trainval.json").write_text(annotations, encoding="utf-8")
    save_file({"wte.weight": torch.randn(50257, 8)}, folder / "gpt2.safetensors")
    judge = folder / "runs" / "judge" / "frame.safetensors"  # whose training takes an hour
    judge.parent.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in FrameJudge().state_dict().items()}, judge)
    for side, seed in (("generated", 2), ("reference", 3)):  # to be judged
        (folder / side).mkdir()
        for i in range(8):
            video = TinyWorld(sprites(8), seed)[i]
            caption = video.caption(np.random.default_rng(i))
            Clip(video.frames(times[:33], 64), 8, caption).save(folder / side / f"out-{i}.mp4")
    (folder / "captions.txt").write_text("".join(f"sentence {i}\n" for i in range(8)))
    _write_study(folder)
    _write_checkpoints(folder)


def _write_study(folder: Path) -> None:
    """A study with the votes of one rater."""
    from cogvideo.eval.protocol import Protocol
    from cogvideo.eval.study import Ballot, Plan, create

    systems = [folder / "generated", folder / "reference"]
    protocol = Protocol(frames=9, fps=2, size=32)
    create(folder / "voted", Plan(systems, prompts=folder / "captions.txt", protocol=protocol, per_rater=4))
    ballot = Ballot(folder / "voted")
    rater = ballot.join()
    for position in range(len(ballot.study.order(rater))):
        clips = ballot.study.trials[ballot.study.order(rater)[position][0]].clips
        ballot.vote(rater, position, clips[0], {}, 2.0)


def _write_checkpoints(folder: Path) -> None:
    """The files of the released CogVideo at small sizes, by the makers that the tests have."""
    sys.path.append(str(ROOT / "tests"))
    from test_convert import STAGE2, UPSCALES, small, write_icetk, zipped

    sizes = {"vocab_size": 700, "max_sequence_length": 640}
    stage = {**sizes, "layout": [64, 80, 144], "additional_seqlen": 64}
    upscale = {**UPSCALES, **sizes, "layout": [96, 112, 256], "additional_seqlen": 160}
    described = {
        "cogvideo-stage1": stage,
        "cogvideo-stage2": {**stage, **STAGE2, "window_size": 2},
        "cogview2-dsr": upscale,
    }
    for name, settings in described.items():
        source, _ = small(folder, name, **settings)
        zipped(source)
        shutil.rmtree(source)
    write_icetk(folder / "ICETK_MODELS")


if __name__ == "__main__":
    what, where = sys.argv[1:]
    {"files": write_files, "models": write_models}[what](Path(where))
