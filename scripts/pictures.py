"""The pictures of the README: videos of a model side by side, as one animated image.

    python -m scripts.pictures --model tiny -o docs/pictures/tiny.webp

Prompts and seed were fixed before the results were seen. Rocket, cat, ghost and penguin are in compositions
that were held out of all training.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideo import CogVideo

PROMPTS = (
    "a dog runs to the right across a green field",
    "a rocket flies up over the meadow",
    "a cat runs to the right in the desert",
    "an octopus spins under the sea",
    "a ghost moves in circles among the stars",
    "一只企鹅在沙漠里向右走",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures/tiny.webp"))
    arguments = parser.parse_args()

    clips = CogVideo.from_pretrained(arguments.model)(PROMPTS, seed=1)
    rows = [clips[i : i + arguments.columns] for i in range(0, len(clips), arguments.columns)]
    strips = [np.concatenate([clip.frames for clip in row], axis=2) for row in rows]
    wall = np.concatenate(strips, axis=1)  # [F, rows * H, columns * W, 3]

    first, *rest = (Image.fromarray(frame) for frame in wall)
    duration = round(1000 / clips[0].fps)  # milliseconds a frame
    first.save(
        arguments.out, save_all=True, append_images=rest, duration=duration, loop=0, quality=80, method=6
    )
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
