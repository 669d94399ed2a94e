"""How fast is a step of generation at larger sizes?

    python -m benchmarks.step --threads 2

Random weights, the released vocabulary, 20 x 20 tokens a frame, with guidance in stage 1. A token of stage 2
is here what a round takes, divided by its 800 tokens a window, since several are made in one step. Share of
memory: the bytes that a step has to read (all weights once, keys and values of every row) against what this
machine was measured to read in the time.

How many times as fast as the original's code that is can only be said where the two take turns in one run on
one machine; docs/results.md has what came out.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from cogvideo.generate.cost import Cost, matrices
from cogvideo.generate.estimate import bandwidth
from cogvideo.generate.int8 import join, pack
from cogvideo.layout import Layout
from cogvideo.model import presets
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel, TransformerConfig

DTYPES = ("float32", "bfloat16", "int8")
SIZES = {"12 x 768": (12, 768, 12), "4 x 3072": (4, 3072, 48)}  # layers, width, heads


def models(
    c: TransformerConfig, window: int, dtypes: list[str]
) -> Iterator[tuple[str, DualChannelTransformer]]:
    """The same random weights in each dtype."""
    generator = torch.Generator().manual_seed(0)
    base, temporal = Base(c), TemporalChannel(c, window)
    for part in (base, temporal):
        part.init_weights(generator)
        part.requires_grad_(False)
    for dtype in dtypes:
        packed = (pack(copy.deepcopy(part), dtype) for part in (base, temporal))
        model = DualChannelTransformer(*packed).eval()
        yield dtype, join(model) if dtype == "int8" else model


@torch.inference_mode()
def steps(
    model: DualChannelTransformer, layout: Layout, known: int, rows: int
) -> Iterator[tuple[float, int]]:
    """Steps after `known` frames: milliseconds, and tokens that each makes for a row."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    text = torch.randint(c.codes, c.vocab, (rows, c.text_len), generator=generator)
    codes = torch.randint(0, c.codes, (rows, layout.clip_tokens), generator=generator)
    cache = model.new_cache(layout, rows)
    model.prefill(torch.cat((text, codes[:, : known * c.frame_tokens]), 1), layout, cache)
    for places in layout.waves(known, model.window):
        begin = time.perf_counter()
        model.step(codes[:, places], cache, places)
        yield 1e3 * (time.perf_counter() - begin), len(places)


def read(c: TransformerConfig, dtype: str, rows: int, known: int) -> float:
    """Bytes of a step of stage 1 in the frame after `known`, on average over its first tokens."""
    seen = 2 * c.text_len + known * c.frame_tokens  # of the spatial channel the text, of the temporal one all
    return Cost("", weights=matrices(c, True), seen=rows * c.layers * 2 * seen * c.width).read(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="layers x width")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--windows", type=int, default=8, help="windows of stage 2 generated together")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    full = presets.find("cogvideo-9b").model
    print(f"{arguments.threads} threads; ms a token\n")
    print("| size | what | dtype | median | least | most | of memory | GB/s |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for size in arguments.sizes:
        layers, width, heads = SIZES[size]
        c = replace(full, layers=layers, width=width, heads=heads, dropout=0.0)
        keyframes = Layout.keyframes(c.text_len, c.grid, c.frames)
        between = Layout.interpolation(c.text_len, c.grid, c.frames)
        for dtype, model in models(c, 0, arguments.dtypes):
            for known in (1, 4):
                memory = bandwidth()  # now: on a machine that others share it changes
                first = islice(steps(model, keyframes, known, 2), 3, arguments.steps + 3)
                taken = [milliseconds for milliseconds, _ in first]
                share = read(c, dtype, 2, known) / (statistics.median(taken) / 1e3) / memory
                what = f"stage 1, {known} frames of context"
                row(size, what, dtype, taken, f"{share:.2f} | {memory / 1e9:.0f}")
        if size == "12 x 768":
            for dtype, model in models(c, c.window, arguments.dtypes):
                all_steps = list(steps(model, between, 3, arguments.windows))
                taken = [sum(ms for ms, _ in all_steps) / sum(tokens for _, tokens in all_steps)]
                row(size, f"stage 2, {arguments.windows} windows", dtype, taken, " |")


def row(size: str, what: str, dtype: str, taken: list[float], share: str) -> None:
    middle, least, most = statistics.median(taken), min(taken), max(taken)
    print(f"| {size} | {what} | {dtype} | {middle:.1f} | {least:.1f} | {most:.1f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
