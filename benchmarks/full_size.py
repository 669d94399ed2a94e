"""Does the released system run here at its real size?

    python -m benchmarks.full_size --out runs/full_size

Writes a model folder of random weights at the exact released shapes (23 GB of float16: one base, both
temporal channels, super-resolution, the tokenizer), then makes one video of noise with it: first frame, four
key frames with guidance, three rounds of interpolation, super-resolution, 33 frames of 480 x 480 as an mp4.
Prints the time of every verb beside what `cogvideo estimate` predicts, the time of reading its weights before
it, and the most memory that was not file cache. Tokens are kept in --out after every verb, and after every
frame of super-resolution: a killed run goes on.
"""

import argparse
import json
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.generate import timed, verbs
from cogvideo import CogVideo
from cogvideo.convert.cogvideo import PROMPTS, SAMPLING
from cogvideo.data.loader import read_captions
from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.generate.draft import Draft
from cogvideo.generate.estimate import Speed
from cogvideo.model import presets
from cogvideo.model.folder import FolderConfig, ModelFolder, Piece
from cogvideo.text import TextTokenizer, train_text

PROMPT = "一只小狗在草地上向右跑"
PART = {"first frame": "image", "key frames": "stage1", "larger frames": "superres", "decode": "vqvae"}


def write_random(path: Path, preset: str) -> ModelFolder:
    """The parts that are not there yet, tensor by tensor; matrices small enough to keep activations alive."""
    folder, spec = ModelFolder(path), presets.find(preset)
    path.mkdir(parents=True, exist_ok=True)
    pieces = min(1280, spec.model.vocab - spec.model.codes)  # icetk's text model cannot be had here
    folder.write_text(train_text(read_captions(TinyWorld(sprites(32), 1), 20_000, 1), pieces))
    ids = TextTokenizer.load(path / "text.model", spec.model.codes)
    spec = replace(spec, model=replace(spec.model, pad=ids.pad, start=ids.start))
    folder.write_config(FolderConfig(spec, preset, prompts=PROMPTS, sampling=SAMPLING))

    def make(shape: torch.Size, name: str) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight"))).half()
        return (0.02 * torch.randn(shape)).half()

    for part in spec.parts:
        if folder.has(part):
            continue
        if part == "vqvae":  # a tenth of a billion weights, with a codebook that must be filled
            vqvae = spec.build(part)
            vectors = torch.randn(spec.vqvae.codes, spec.vqvae.code_width)
            vqvae.codebook.init_codes(vectors, torch.Generator().manual_seed(0))
            folder.save(part, vqvae, torch.float16)
            continue
        fresh = {
            name: Piece(shape, torch.float16, lambda shape=shape, name=name: make(shape, name))
            for name, shape in spec.shapes(part).items()
        }
        print(f"{part}: {folder.write(part, fresh) / 1e9:.1f} GB", flush=True)
    return folder


class Peak(threading.Thread):
    """The most anonymous memory that this process held, in bytes, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            held = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.most = max(self.most, int(held.split()[1]) * 1024)
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--preset", default="cogvideo-9b", help="a smaller one tries this program out")
    arguments = parser.parse_args()
    folder = write_random(arguments.out / "model", arguments.preset)
    speed = Speed.measure(arguments.dtype)
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    pipe = CogVideo.from_pretrained(folder.path, dtype=arguments.dtype)
    print(f"opened in {time.perf_counter() - begin:.1f} s, {torch.get_num_threads()} threads", flush=True)
    predicted = {one.name: speed.seconds(one) for one in pipe.estimate().costs}
    value, total = None, 0.0
    print(f"{'verb':<16}{'reading':>8}{'seconds':>9}{'predicted':>11}{'peak GB':>9}")
    part = arguments.out / "larger-so-far.npz"  # a frame takes minutes
    begun = Draft.load(part) if part.exists() else None
    larger = partial(pipe.superresolve, begin=begun, each=lambda draft: draft.save(part))
    for name, verb in verbs(pipe, [PROMPT], [1]).items():
        verb = larger if name == "larger frames" else verb
        tokens, told = arguments.out / f"{name}.npz", arguments.out / f"{name}.json"
        if told.exists() and tokens.exists():
            value, figures = Draft.load(tokens), json.loads(told.read_text())
        else:
            _, (reading,) = timed(partial(getattr, pipe.parts, PART.get(name, "stage2")), 1)
            value, (seconds,) = timed(partial(verb, value), 1)
            if name == "larger frames" and begun:  # measured on the frames that were left
                frames = value.codes.shape[1]
                seconds *= frames / (frames - begun.codes.shape[1])
            figures = {"reading": reading, "seconds": seconds, "peak": peak.most}
            if isinstance(value, Draft):
                value.save(tokens)
                told.write_text(json.dumps(figures))
        line = f"{name:<16}{figures['reading']:>8.1f}{figures['seconds']:>9.1f}"
        print(f"{line}{predicted.get(name, 0.0):>11.1f}{figures['peak'] / 1e9:>9.1f}", flush=True)
        if name != "larger frames" and isinstance(value, Draft):
            frames = value.codes.shape[1]
            total += figures["reading"] + figures["seconds"]
    value[0].save(arguments.out / "noise.mp4")
    _, height, width, _ = value[0].frames.shape
    print(f"{total / 60:.1f} minutes up to the {frames} frames of tokens; {width}x{height} pixels written")


if __name__ == "__main__":
    main()
