"""Convert icetk, the original's tokenizer of text and images, to the parts `text.model` and `vqvae` of a
model folder (docs/reference.md, "icetk")."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cogvideo.convert import keys
from cogvideo.convert.cogvideo import SPECIALS, Say, open_output
from cogvideo.convert.keys import Rule, States
from cogvideo.convert.sat import read_states
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import Piece, read_clusters
from cogvideo.model.vqvae import VQVAEConfig
from cogvideo.text import PAD, TextTokenizer

# pattern in our names, once modules are named as in icetk -> icetk's name
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
    """Convert the ice_text.model and ice_image.pt in a folder to text.model and the part vqvae of `out`.

    A cluster_label2.npy in that folder becomes cluster_labels.npy (docs/reference.md, "Sampling by
    clusters"). Raise ValueError if a file is missing, damaged, or does not suit the parts of `out`.
    """
    with open_output(out) as output:
        if "vqvae" in output.sources:
            say(f"{out} has the files of icetk already; to convert them anew, choose another folder")
            return
        states = read_states(source / "ice_image.pt")
        spec = output.spec
        model = spec.model
        vqvae = _vqvae_config(states, spec)
        text = _text(source / "ice_text.model", vqvae.codes)
        ids = vqvae.codes + len(text)
        if "base" not in output.sources:
            model = replace(model, codes=vqvae.codes, vocab=max(model.vocab, ids))
        if model.codes != vqvae.codes or model.vocab < ids:
            raise ValueError(
                f"icetk has {vqvae.codes} image codes and {len(text)} pieces, the transformer "
                f"{model.codes} codes (--codes of its conversion) of {model.vocab} ids"
            )
        model = replace(model, pad=text.pad, start=text.start)
        spec = replace(spec, vqvae=vqvae, model=model)

        output.spec = spec
        output.work.write("vqvae", _vqvae_pieces(states, spec))
        output.work.write_text(text.model)
        if (source / "cluster_label2.npy").exists():
            labels = read_clusters(source / "cluster_label2.npy", vqvae.codes)
            np.save(output.work.path / "cluster_labels.npy", labels)
        output.sources.update(vqvae="ice_image.pt", text="ice_text.model")
        say(f"vqvae: {vqvae.codes} codes, factors {vqvae.rates}; text: {len(text)} ids from {vqvae.codes} on")


def _text(file: Path, codes: int) -> TextTokenizer:
    """icetk's pieces, followed by CogVideo's own.

    A sentencepiece model is a protobuf message whose field 1 is the list of pieces, so appended bytes add
    pieces: a name, and score 0 as in the original.
    """
    try:
        model = file.read_bytes()
        for special in SPECIALS:
            piece = b"\x0a" + bytes([len(special)]) + special.encode() + b"\x15\0\0\0\0"
            model += b"\x0a" + bytes([len(piece)]) + piece
        text = TextTokenizer(model, codes)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is missing, damaged or not icetk's: {error}") from None
    if text.pieces.id_to_piece(text.pad - codes) != PAD:
        raise ValueError(f"{file} is not icetk's: it has no {PAD}")
    return text


def _vqvae_config(states: States, spec: CogVideoSpec) -> VQVAEConfig:
    """The sizes of icetk's image tokenizer, read off its tensors."""
    first = re.compile(r"enc\.down\.\d+\.block\.0\.conv1\.weight")
    try:
        channels = len(states["enc.conv_in.weight"])
        multipliers = tuple(len(states[key]) // channels for key in sorted(filter(first.fullmatch, states)))
        decoders = len({key.split(".")[1] for key in states if key.startswith("decs.")})
        rates = tuple(2 ** (len(multipliers) - 1 + number) for number in range(decoders))
        rate = 8 if 8 in rates else rates[0]
        codes, width = states["quantize.embed.weight"].shape
    except (LookupError, ArithmeticError, ValueError) as error:
        raise ValueError(f"ice_image.pt is not icetk's image tokenizer: {error}") from None
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
    """The tensors of our vqvae."""
    modules = _vqvae_modules(spec.vqvae)
    shapes = spec.shapes("vqvae")
    rules: list[Rule] = []
    filled = Piece(shapes.pop("codebook.filled"), torch.bool, lambda: torch.tensor(True))
    for ours in shapes:
        their_name = re.sub(r"^(encoder|decoders\.\d+)\.\d+", lambda module: modules[module[0]], ours)
        for pattern, replacement in ICETK:
            their_name = re.sub(pattern, replacement, their_name)
        names = dict.fromkeys(their_name.replace(".qkv.", f".{x}.") for x in "qkv")  # one or three
        rules.append((" ".join(names), ours, "rows"))
    pieces = keys.convert("ice_image.pt", [states], {"vqvae": rules}, lambda _: shapes)
    return pieces["vqvae"] | {"codebook.filled": filled}


def _vqvae_modules(config: VQVAEConfig) -> dict[str, str]:
    """Modules of our encoder and decoders -> icetk's names of them."""
    middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    levels = len(config.multipliers)
    down = _level_modules("down", range(levels), config.encoder_blocks, config)
    modules = _name_modules("encoder", "enc", [*down, *middle])
    for number in range(len(config.rates)):  # icetk's decoders begin with the largest factor
        up = _level_modules("up", range(levels + number)[::-1], config.decoder_blocks, config)
        their_name = f"decs.{len(config.rates) - 1 - number}"
        modules |= _name_modules(f"decoders.{number}", their_name, [*middle, *up])
    return modules


def _level_modules(name: str, levels: Sequence[int], blocks: int, config: VQVAEConfig) -> list[str]:
    """icetk's names of the blocks of all levels, in order, with the resampling layers between levels."""
    names = []
    for level in levels:
        for number in range(blocks):
            names.append(f"{name}.{level}.block.{number}")
            if level in config.attended:
                names.append(f"{name}.{level}.attn.{number}")
        names.append(f"{name}.{level}.{name}sample")
    return names[:-1]


def _name_modules(ours: str, their_name: str, inner: list[str]) -> dict[str, str]:
    """The numbered modules of one of our sequences -> icetk's names."""
    steps = ["conv_in", *inner, "norm_out", "", "conv_out"]
    return {f"{ours}.{number}": f"{their_name}.{step}" for number, step in enumerate(steps)}
