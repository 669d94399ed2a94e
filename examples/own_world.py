"""A world of two drawn things, an adapter for it, and a video: python examples/own_world.py [STEPS]

It draws the artwork itself; put your own pictures with transparency into a folder instead.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from cogvideo import CogVideo

steps = sys.argv[1] if len(sys.argv) > 1 else "300"
art = Path("own_art")
art.mkdir(exist_ok=True)
for name, colour in (("lollipop", "deeppink"), ("blueberry", "royalblue")):
    picture = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(picture)
    draw.line((64, 64, 64, 124), fill="saddlebrown", width=8)
    draw.ellipse((24, 8, 104, 88), fill=colour)
    draw.ellipse((44, 22, 62, 40), fill="white")
    picture.save(art / f"{name}.png")

cogvideo = [sys.executable, "-m", "cogvideo"]
subprocess.run(
    [*cogvideo, "data", "world", art, "-o", "own_world", "--held-out", "8", "--judge-steps", "0"], check=True
)
train = ["train", "tiny", "--init", "tiny", "--data", "own_world", "--lora", "8", "--phases", "image"]
subprocess.run([*cogvideo, *train, "--image.steps", steps, "--out", "own_run"], check=True)

pipe = CogVideo.from_pretrained("tiny")
pipe.load_lora_weights("own_run")
(clip,) = pipe("a lollipop moves to the left in the snow", seed=1)
clip.save("own.mp4")
