"""Videos of a model side by side, as one animated image.

    python -m scripts.pictures --model tiny -o docs/pictures/tiny.webp
    python -m scripts.pictures --model tiny --drawn 24 --columns 6 --size 96 -o docs/pictures/gallery.webp

The six prompts of the first are those of the README. They and the seed were fixed before the results were
seen; rocket, cat, ghost and penguin are in compositions that were held out of all training. The prompts of
the second are drawn: captions of held-out compositions in English and Chinese by turns.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideo import CogVideo
from cogvideo.data.tinyworld import TinyWorld, sprites

PROMPTS = (
    "a dog runs to the right across a green field",
    "a rocket flies up over the meadow",
    "a cat runs to the right in the desert",
    "an octopus spins under the sea",
    "a ghost moves in circles among the stars",
    "一只企鹅在沙漠里向右走",
)
SPRITES = 96  # of the shipped model
SEED = 1  # of the videos, and of what is drawn


def draw_prompts(count: int) -> list[str]:
    """Captions of held-out compositions; of every two, the second is in Chinese."""
    worlds = [
        TinyWorld(sprites(SPRITES), SEED, held_out=True, language=language) for language in ("en", "zh")
    ]
    return [worlds[i % 2].caption(i, np.random.default_rng((SEED, i))) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--drawn", type=int, default=0, help="prompts that are drawn, in place of the README's"
    )
    parser.add_argument("--num-frames", type=int, help="default: all")
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--size", type=int, default=192, help="pixels a side of each video")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures/tiny.webp"))
    arguments = parser.parse_args()

    prompts = draw_prompts(arguments.drawn) if arguments.drawn else PROMPTS
    clips = CogVideo.from_pretrained(arguments.model)(prompts, seed=SEED, num_frames=arguments.num_frames)
    small = [clip.square(arguments.size).frames for clip in clips]
    rows = [small[i : i + arguments.columns] for i in range(0, len(small), arguments.columns)]
    wall = np.concatenate(
        [np.concatenate(row, axis=2) for row in rows], axis=1
    )  # [F, rows * H, columns * W, 3]

    first, *rest = (Image.fromarray(frame) for frame in wall)
    duration = round(1000 / clips[0].fps)  # milliseconds a frame
    first.save(
        arguments.out, save_all=True, append_images=rest, duration=duration, loop=0, quality=80, method=6
    )
    for i, prompt in enumerate(prompts):
        print(f"{i // arguments.columns + 1}.{i % arguments.columns + 1}  {prompt}")
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
