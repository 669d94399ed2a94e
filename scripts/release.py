"""Prepare a model folder for shipping: int8 weights, sampling options, measured numbers and a model card.

python -m scripts.release runs/tiny/model cogvideo/models/tiny --measured runs/measured.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from cogvideo.files import atomic_path
from cogvideo.model.card import WORLD, model_card
from cogvideo.model.config import SamplingConfig, read_table
from cogvideo.model.folder import ModelFolder
from cogvideo.train import recipes


def main() -> None:
    arguments = parse_arguments()
    source = ModelFolder(arguments.model)
    target = ModelFolder(arguments.out)

    config = replace(source.config, about=arguments.about)
    if arguments.sampling:
        options = {stage: read_table(SamplingConfig, row) for stage, row in arguments.sampling.items()}
        config = replace(config, sampling=options)
    if arguments.measured:
        config = replace(config, measured=json.loads(arguments.measured.read_text()))

    for part in source.spec().parts:
        target.save(part, source.load(part), getattr(torch, arguments.dtype))
    if config.text != "gpt2":
        target.write_text(source.text().model)
    target.write_config(config)

    with atomic_path(target.path / "README.md") as file:
        recipe = recipes.find(config.recipe)
        how = arguments.how or f"`cogvideo train {recipe.name}`, seed {recipe.seed}."
        data = WORLD.format(sprites=recipe.sprites)
        file.write_text(model_card(target.path.name, config, source.spec().family, how, data))
    size = sum(file.stat().st_size for file in target.path.iterdir()) / 1e6
    print(f"{target.path}: {size:.1f} MB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="prepare a model folder for shipping")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--about", default="An animated object moves over a drawn place: 4 s at 192 px.")
    parser.add_argument("--measured", type=Path, help='JSON: {"what": "number with its unit", ...}')
    parser.add_argument("--how", default="", help="how it was trained, if not by one command")
    parser.add_argument(
        "--dtype",
        choices=("int8", "float16"),
        default="int8",
        help="of the weights; int8 gives the same results as `generate` on a CPU, which rounds all weights",
    )
    parser.add_argument("--sampling", type=json.loads, help='JSON: {"stage1": {"guidance_scale": 3.0}, ...}')
    return parser.parse_args()


if __name__ == "__main__":
    main()
