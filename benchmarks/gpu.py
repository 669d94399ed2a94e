"""What does a GPU do in a second?

    python -m benchmarks.gpu                        the shipped model, and the hours of its recipe
    python -m benchmarks.gpu --sizes cogvideo-9b    the original's sizes, with random weights

For each size: the tokens that steps with a cache generate in a second, one video and sixteen at a time, and
how much of the memory's speed that is (weights read a step); whole videos of the shipped model; and for
--recipe the hours of each phase, with the share of the device's multiplications that training uses (MFU). In
bfloat16, after a warm-up; the median of --runs and their range.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.generate.cogvideo import load
from cogvideo.hardware import find_device
from cogvideo.model import presets
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.train import pace, recipes

STEPS = 32
PROMPT = "a dog runs to the right across a green field"


def median(action: Callable[[], object], runs: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds of an action: the median, the least and the most."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    measured = taken[1:]
    return statistics.median(measured), min(measured), max(measured)


def random_stage(spec: CogVideoSpec, device: torch.device) -> DualChannelTransformer:
    """The first stage with random weights, filled on the device."""
    parts = []
    for name in ("base", "stage1"):
        part = spec.outline(name).to_empty(device=device).to(torch.bfloat16)
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.02)
        parts.append(part.requires_grad_(False))
    base, channel = parts
    assert isinstance(base, Base) and isinstance(channel, TemporalChannel)
    return DualChannelTransformer(base, channel).eval()


@torch.inference_mode()
def steps(model: DualChannelTransformer, videos: int) -> None:
    """The first tokens of some videos, one step after another."""
    layout = model.config.layout("stage1")
    device = model.base.embed.weight.device
    cache = model.new_cache(layout, videos)
    text = torch.full((videos, layout.text_len), model.config.codes, device=device)
    model.prefill(text, layout, cache)
    token = torch.zeros(videos, 1, dtype=torch.long, device=device)
    for place in range(STEPS):
        model.step(token, cache, [place])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["tiny"], help="rows of the table of presets")
    parser.add_argument("--model", default="tiny", help="whose videos are timed")
    parser.add_argument("--recipe", default="tiny", help="whose hours are measured; none: leave that out")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    for size in arguments.sizes:
        spec = presets.find(size)
        if not isinstance(spec, CogVideoSpec):
            parser.error(f"{size} has no tokens; choose a size of the family cogvideo")
        model = random_stage(spec, device)
        read = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2)
        for videos in (1, 16):
            taken, least, most = median(partial(steps, model, videos), arguments.runs, device)
            print(
                f"{size}, {videos} at a time: {STEPS * videos / taken:.0f} tokens/s "
                f"({STEPS * videos / most:.0f} to {STEPS * videos / least:.0f}), "
                f"{STEPS * read / taken / 1e9:.0f} GB/s of weights"
            )
    pipe = load(arguments.model, device, "bfloat16")
    taken, least, most = median(lambda: pipe(PROMPT, seed=1, progress=False), arguments.runs, device)
    print(f"a video of {arguments.model}: {taken:.1f} s ({least:.1f} to {most:.1f})")
    if arguments.recipe != "none":
        recipe = recipes.find(arguments.recipe)
        world = TinyWorld(sprites(recipe.sprites), recipe.seed)
        spec = presets.find(recipe.preset)
        options = {"device": device, "processes": 1, "workers": 0 if device.type == "cpu" else 4}
        print(pace.table([*pace.measure(recipe, world, spec, [*recipe.phases], **options)]))


if __name__ == "__main__":
    main()
