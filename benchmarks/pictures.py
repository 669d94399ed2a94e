"""The pictures of the README: videos of a model side by side, as one moving picture.

    python -m benchmarks.pictures --model tiny -o docs/pictures/tiny.webp

Prompts and seeds were not chosen by what comes out. Rocket, cat, ghost and penguin are in compositions
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
    pipe = CogVideo.from_pretrained(arguments.model)
    clips = pipe(PROMPTS, **({"seed": 1} if pipe.draws else {}))
    rows = [clips[i : i + arguments.columns] for i in range(0, len(clips), arguments.columns)]
    wall = np.concatenate([np.concatenate([clip.frames for clip in row], 2) for row in rows], 1)
    first, *rest = (Image.fromarray(frame) for frame in wall)
    pace = round(1000 / clips[0].fps)
    first.save(arguments.out, save_all=True, append_images=rest, duration=pace, loop=0, quality=80, method=6)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
