"""Convert icetk, the original's tokenizer of text and pictures, to the parts `text.model` and `vqvae` of a
model folder (docs/reference.md, "icetk")."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cogvideo.convert import keys
from cogvideo.convert.cogvideo import SPECIALS, Say, building
from cogvideo.convert.keys import Rule, States
from cogvideo.convert.sat import read_states
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import Piece, read_clusters
from cogvideo.model.vqvae import VQVAEConfig
from cogvideo.text import PAD, TextTokenizer

# in our vqvae, once its modules have icetk's names, and in icetk
ICETK = (
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
    (r"^halves\.(\d+)\.", r"down_samplers.\1.conv_down_sampler."),
    (r"^project\.", "quantize.proj."),
    (r"^codebook\.vectors$", "quantize.embed.weight"),
    (r"^codebook\.uses$", "quantize.cluster_size"),
    (r"^codebook\.sums$", "quantize.embed_avg"),
)


def convert_icetk(source: Path, out: Path, say: Say = print) -> None:
    """The folder of icetk's ice_text.model and ice_image.pt to text.model and the part vqvae of `out`.

    A cluster_label2.npy in that folder becomes cluster_labels.npy (docs/reference.md, "Sampling by clusters").
    """
    with building(out) as output:
        states, spec = read_states(source / "ice_image.pt"), output.spec
        vqvae, model = _vqvae_config(states, spec), spec.model
        text = _text(source / "ice_text.model", vqvae.codes)
        ids = vqvae.codes + len(text)
        if "vqvae" in output.made:
            raise ValueError(f"{out} has the files of icetk already")
        if "base" not in output.made:
            model = replace(model, codes=vqvae.codes, vocab=max(model.vocab, ids))
        if model.codes != vqvae.codes or model.vocab < ids:
            raise ValueError(
                f"icetk has {vqvae.codes} image codes and {len(text)} pieces, the transformer "
                f"{model.codes} codes (--codes when it was converted) of {model.vocab} ids"
            )
        model = replace(model, pad=text.pad, start=text.start)
        output.spec = spec = replace(spec, vqvae=vqvae, model=model)
        output.work.write("vqvae", _vqvae_pieces(states, spec))
        output.work.write_text(text.model)
        if (source / "cluster_label2.npy").exists():
            labels = read_clusters(source / "cluster_label2.npy", vqvae.codes)
            np.save(output.work.path / "cluster_labels.npy", labels)
        output.made.update(vqvae="ice_image.pt", text="ice_text.model")
        say(f"vqvae: {vqvae.codes} codes, rates {vqvae.rates}; text: {len(text)} pieces from {vqvae.codes}")


def _text(file: Path, codes: int) -> TextTokenizer:
    """icetk's pieces, and behind them CogVideo's own.

    A sentencepiece model is a protobuf message; bytes appended to it are appended to its list, field 1, of
    pieces: name, and score 0 as in the original.
    """
    try:
        model = file.read_bytes()
        for special in SPECIALS:
            piece = b"\x0a" + bytes([len(special)]) + special.encode() + b"\x15\0\0\0\0"
            model += b"\x0a" + bytes([len(piece)]) + piece
        text = TextTokenizer(model, codes)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} is missing, damaged or not icetk's: {error}") from None
    if text.pieces.id_to_piece(text.pad - codes) != PAD:
        raise ValueError(f"{file} is not icetk's: it has no {PAD}")
    return text


def _vqvae_config(states: States, spec: CogVideoSpec) -> VQVAEConfig:
    """The sizes of icetk's image tokenizer, by its tensors."""
    first = re.compile(r"enc\.down\.\d+\.block\.0\.conv1\.weight")
    try:
        channels = len(states["enc.conv_in.weight"])
        multipliers = tuple(len(states[key]) // channels for key in sorted(filter(first.fullmatch, states)))
        decoders = len({key.split(".")[1] for key in states if key.startswith("decs.")})
        rates = tuple(2 ** (len(multipliers) - 1 + number) for number in range(decoders))
        rate = 8 if 8 in rates else rates[0]
        codes, width = states["quantize.embed.weight"].shape
    except (LookupError, ArithmeticError, ValueError) as error:
        raise ValueError(f"ice_image.pt is no image tokenizer of icetk: {error}") from None
    return replace(
        spec.vqvae,
        channels=channels,
        multipliers=multipliers,
        codes=codes,
        code_width=width,
        rates=rates,
        rate=rate,
        resolution=spec.model.grid * rate,
    )


def _vqvae_pieces(states: States, spec: CogVideoSpec) -> dict[str, Piece]:
    modules, shapes = _vqvae_modules(spec.vqvae), spec.shapes("vqvae")
    rules: list[Rule] = []
    filled = Piece(shapes.pop("codebook.filled"), torch.bool, lambda: torch.tensor(True))
    for ours in shapes:
        theirs = re.sub(r"^(encoder|decoders\.\d+)\.\d+", lambda module: modules[module[0]], ours)
        for mine, other in ICETK:
            theirs = re.sub(mine, other, theirs)
        names = dict.fromkeys(theirs.replace(".qkv.", f".{x}.") for x in "qkv")  # one or three
        rules.append((" ".join(names), ours, "rows"))
    pieces = keys.pick("ice_image.pt", [states], {"vqvae": rules}, lambda _: shapes)
    return pieces["vqvae"] | {"codebook.filled": filled}


def _vqvae_modules(config: VQVAEConfig) -> dict[str, str]:
    """The modules of our encoder and decoders, and icetk's names of them."""

    def way(name: str, levels: Sequence[int], blocks: int) -> list[str]:
        """Level by level, and what resamples between them."""
        steps = []
        for level in levels:
            kinds = ("block", "attn") if level in config.attended else ("block",)
            steps += [f"{name}.{level}.{kind}.{n}" for n in range(blocks) for kind in kinds]
            steps += [f"{name}.{level}.{name}sample"]
        return steps[:-1]

    middle, end = ["mid.block_1", "mid.attn_1", "mid.block_2"], ["norm_out", "", "conv_out"]
    levels, rates = len(config.multipliers), len(config.rates)
    names = {"encoder": ("enc", [*way("down", range(levels), config.encoder_blocks), *middle])}
    for number in range(rates):  # icetk's begin with the largest rate
        up = way("up", range(levels + number)[::-1], config.decoder_blocks)
        names[f"decoders.{number}"] = (f"decs.{rates - 1 - number}", [*middle, *up])
    return {
        f"{ours}.{place}": f"{theirs}.{step}"
        for ours, (theirs, steps) in names.items()
        for place, step in enumerate(["conv_in", *steps, *end])
    }
