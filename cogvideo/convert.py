"""Importers of the original's files: SAT checkpoint folders (SPEC A.6, A.7) and icetk (SPEC C.10).

An importer is a table of key rules. It fails on anything that a file has and the table does not name, and on
anything that our model has and the file does not give. Notable:
- A pickle is read by torch's restricted unpickler; numpy's names stand for `Ignored`: nothing of numpy runs.
- Checkpoints are mapped, not read, and parts are written tensor by tensor, so memory holds one tensor.
- The base that both stages have in common is stored once. Part files carry a digest of each tensor; the base
  of a checkpoint that comes later must have the same ones.
- All is written to a folder beside OUT, which takes its place at the end; until then OUT is not touched.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogvideo import presets
from cogvideo.model.system import System
from cogvideo.model.transformer import ModelConfig
from cogvideo.text import PAD, START, TextTokenizer
from cogvideo.vqvae import VQVAEConfig
from cogvideo.weights import ModelFolder

Say = Callable[[str], None]
Config = dict[str, Any]  # what becomes config.json; `converted` names the source of every part
States = dict[str, Tensor]

ABOUT = "CogVideo (2022), converted from the released weights, whose licence restricts their use"
SPECIALS = (START, "<start_of_english>", "<start_of_chinese>")  # CogVideo's own, behind icetk's pieces
FIRST_FRAME = 512  # position of the first token of frame 0: a number in the original's code
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# in the checkpoint ({l} a layer, {p} weight and bias), in ours, how model-parallel ranks are put together
BASE = (
    ("transformer.word_embeddings.weight", "embed.weight", "rows"),
    ("transformer.position_embeddings.weight", "positions.weight", "table"),
    ("transformer.layers.{l}.input_layernorm.{p}", "blocks.{l}.norm1.{p}", "same"),
    ("transformer.layers.{l}.post_attention_layernorm.{p}", "blocks.{l}.norm2.{p}", "same"),
    ("transformer.layers.{l}.third_layernorm.{p}", "blocks.{l}.norm3.{p}", "same"),
    ("transformer.layers.{l}.fourth_layernorm.{p}", "blocks.{l}.norm4.{p}", "same"),
    ("transformer.layers.{l}.attention.query_key_value.{p}", "blocks.{l}.attention.qkv.{p}", "thirds"),
    ("transformer.layers.{l}.attention.dense.{p}", "blocks.{l}.attention.out.{p}", "columns"),
    ("transformer.layers.{l}.mlp.dense_h_to_4h.{p}", "blocks.{l}.up.{p}", "rows"),
    ("transformer.layers.{l}.mlp.dense_4h_to_h.{p}", "blocks.{l}.down.{p}", "columns"),
    ("transformer.final_layernorm.{p}", "norm.{p}", "same"),
)
TEMPORAL = (
    ("mixins.extra_position_embedding.position_embeddings.weight", "positions.weight", "table"),
    ("mixins.attention_plus.query_key_value.{l}.{p}", "attention.{l}.qkv.{p}", "thirds"),
    ("mixins.attention_plus.dense.{l}.{p}", "attention.{l}.out.{p}", "columns"),
    ("mixins.attention_plus.attn_distribution.{l}", "gate.{l}", "same"),
)
# the tables of the parts of a checkpoint, by its model_class and cogvideo_stage; dsr: ("DsrModel", None)
SAT = {
    ("CogVideoModel", 1): {"base": BASE, "stage1": TEMPORAL},
    ("CogVideoModel", 2): {"base": BASE, "stage2": TEMPORAL},
}
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


class Piece(NamedTuple):
    """A tensor of a part, before it is made."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]


# -- SAT


def convert_sat(sources: Sequence[Path], out: Path, codes: int | None = None, say: Say = print) -> None:
    """Checkpoint folders of stage 1 and stage 2, zips or folders of them, to parts of the model folder `out`.

    codes: how many of the ids are image codes; by default icetk's 20000. Raises ValueError, and leaves `out`
    as it was, if a source is not exactly what is expected.
    """
    with building(out) as (work, config):
        for source in _find(sources):
            with unpacked(source, work / "unpacked") as folder:
                _convert_stage(folder, source.name, work, ModelFolder(out), config, codes, say)


def _convert_stage(folder: Path, name: str, work: Path, before: ModelFolder, config: Config,
                   codes: int | None, say: Say) -> None:
    """Write what one checkpoint adds to `work`, and describe it in `config`."""
    described = _read_json(folder / "model_config.json")
    kind = (described.get("model_class"), described.get("cogvideo_stage"))
    tables = next((tables for known, tables in SAT.items() if known == kind), None)
    if tables is None:
        known = " and ".join(f"{model} of stage {stage}" for model, stage in SAT)
        raise ValueError(f"{name} is {kind[0]} of stage {kind[1]}; what can be converted: {known}")
    for part in set(tables) & set(config["converted"]) - {"base"}:
        raise ValueError(f"{name} is {part}, but {config['converted'][part]} is that already")
    system = _fit(described, config, codes, name)
    ranks = [read_states(file) for file in _rank_files(folder, described)]
    say(f"{name}: {system.model.layers} layers, width {system.model.width}, {len(ranks)} rank(s)")
    if system.model.codes == system.model.vocab:
        say(f"{name}: the {system.model.vocab} ids are not those of icetk; --codes tells how many are codes")
    plan = _plan(system, tables, ranks, name)
    if "base" in config["converted"]:
        written = ModelFolder(work) if ModelFolder(work).has("base") else before
        _compare(plan.pop("base"), written.file("base"), name, config["converted"]["base"])
        say(f"base: the same as that of {config['converted']['base']}, stored once")
    for part, pieces in plan.items():
        say(f"{part}: {write_part(work / f'{part}.safetensors', pieces) / 1e9:.2f} GB")
        config["converted"][part] = name
    config.update(system.to_dict())


def _fit(described: Config, config: Config, codes: int | None, name: str) -> System:
    """The whole model with the transformer that model_config.json describes; it must suit what is there."""
    system, there = _system(config), config["converted"]
    model = _model_config(described, codes or (system.model.codes if there else None), name)
    if "text" in there:  # icetk knows the ids
        model = replace(model, pad=system.model.pad, start=system.model.start)
    if "base" in there:
        model = replace(model, window=model.window or system.model.window)
        if model != replace(system.model, window=model.window):
            raise ValueError(f"{name} does not suit {there['base']}: it is {model}, that is {system.model}")
    if ("vqvae" in there and model.codes != system.vqvae.codes) or model.start >= model.vocab:
        raise ValueError(f"{name} does not suit icetk's files: it has {model.codes} image codes of "
                         f"{model.vocab} ids, those have {system.vqvae.codes} and {START} is {model.start}")
    vqvae = replace(system.vqvae, codes=model.codes, resolution=model.grid * system.vqvae.rate)
    return replace(system, model=model, vqvae=vqvae)


def _system(config: Config) -> System:
    return System.from_dict(config) if "model" in config else presets.find("cogvideo-9b")


def _model_config(described: Config, codes: int | None, name: str) -> ModelConfig:
    """model_config.json as our configuration, if it describes a model that ours can be."""
    keys = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length",
            "additional_seqlen", "window_size")
    wrong = {key: described.get(key) for key in keys if type(described.get(key)) is not int}
    layout: Any = described.get("layout")
    if not isinstance(layout, list) or [type(n) for n in layout] != [int] * 3:
        wrong["layout"] = layout
    if wrong:
        raise ValueError(f"{name}: model_config.json says {wrong}, where numbers belong")
    layers, width, heads, vocab, positions, more, window = (described[key] for key in keys)
    text_len, frame_len, rest = layout[0], layout[1] - layout[0], layout[2] - layout[0]
    grid, stage = math.isqrt(max(frame_len, 0)), described["cogvideo_stage"]
    codes = min(20000, vocab) if codes is None else codes
    whole = grid > 0 and grid**2 == frame_len and rest > 0 and rest % frame_len == 0
    a_head, inner = described.get("hidden_size_per_attention_head"), described.get("inner_hidden_size")
    checks = {
        "a size is not positive": min(layers, width, heads, vocab, text_len, codes) > 0,
        f"layout {layout} is no text with whole square frames": whole,
        f"{heads} heads do not make {width}":
            heads > 0 and width % heads == 0 and a_head in (None, width // heads),
        f"inner_hidden_size is not {4 * width}": inner in (None, 4 * width),
        "layernorm_order is not sandwich": described.get("layernorm_order") == "sandwich",
        "there are too few positions": positions >= FIRST_FRAME + frame_len and more >= rest - frame_len,
        f"window_size {window} is not for stage 1, which has -1": stage != 1 or window == -1,
        f"window_size {window} does not divide {grid}": stage != 2 or (window > 0 and grid % window == 0),
        f"{codes} image codes are more than vocab_size {vocab}": codes <= vocab,
    }
    for complaint, fine in checks.items():
        if not fine:
            raise ValueError(f"{name} cannot be converted, by its model_config.json: {complaint}")
    # ids as the original's script makes them of icetk's; `convert icetk` sets them right for other pieces
    pad, start = min(codes + 3, vocab - 1), max(min(150000, vocab - len(SPECIALS)), 0)
    return ModelConfig(layers, width, heads, vocab, codes, pad, start, text_len, grid, rest // frame_len,
                       FIRST_FRAME, max(window, 0), dropout=0.1)


def _find(sources: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for source in sources:
        if source.is_file() or (source / "model_config.json").exists():
            found.append(source)
            continue
        inside = sorted([*(f.parent for f in source.glob("*/model_config.json")), *source.glob("*.zip")])
        if not inside:
            raise ValueError(f"{source} holds no SAT checkpoint: there is no model_config.json")
        found += inside
    return found


def _read_json(file: Path) -> Config:
    try:
        return {"model_parallel_size": 1, **json.loads(file.read_bytes()[:1_000_000])}
    except OSError:
        raise ValueError(f"{file.parent} is no SAT checkpoint: {file.name} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _rank_files(folder: Path, described: Config) -> list[Path]:
    """The files of all model-parallel ranks of the iteration that `latest` names."""
    try:
        latest = (folder / "latest").read_text()[:100].strip()
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no SAT checkpoint: latest is missing or damaged") from None
    if latest != "release" and not latest.isdecimal():
        raise ValueError(f"{folder / 'latest'} says {latest!r}, where a number or 'release' belongs")
    count, name = described["model_parallel_size"], "mp_rank_{}_model_states.pt"
    found = sorted(file.name for file in (folder / latest).glob(name.format("*")))
    if not found or count != len(found) or found != [name.format(f"{rank:02d}") for rank in range(count)]:
        raise ValueError(f"{folder / latest} is not complete: there should be {count} rank(s), by "
                         f"model_config.json, but the files are: {', '.join(found) or 'none'}")
    return [folder / latest / name for name in found]


def _plan(system: System, tables: Config, ranks: list[States], name: str) -> dict[str, dict[str, Piece]]:
    """Every tensor of every part, found in the checkpoint and measured."""
    layers = min(system.model.layers, len(ranks[0]))  # whoever claims more is told what is missing
    rules = {part: _expand(table, layers) for part, table in tables.items()}
    named = {theirs for rows in rules.values() for theirs, _, _ in rows}
    for states in ranks:
        check_names(named, set(states), name)
    plan = {}
    for part, rows in rules.items():
        target = _meta_state(system, part)
        check_names(set(target), {ours for _, ours, _ in rows}, part)
        plan[part] = {ours: _piece([states[theirs] for states in ranks], how, target[ours].shape, theirs)
                      for theirs, ours, how in rows}
    return plan


def _meta_state(system: System, part: str) -> States:
    try:
        with torch.device("meta"):
            return system.build(part).state_dict()
    except RuntimeError as error:
        raise ValueError(f"no {part} can be of these sizes: {error}") from None


def _expand(table: Sequence[tuple[str, str, str]], layers: int) -> list[tuple[str, str, str]]:
    """The rows of a table, written out for every layer, weight and bias."""
    rows = []
    for theirs, ours, how in table:
        for layer in range(layers if "{l}" in theirs else 1):
            for p in ("weight", "bias") if "{p}" in theirs else ("",):
                rows.append((theirs.format(l=layer, p=p), ours.format(l=layer, p=p), how))
    return rows


def _piece(shards: list[Tensor], how: str, shape: torch.Size, name: str) -> Piece:
    """One tensor of the shape that is due, out of the shards of all ranks."""
    try:
        fits = _join([shard.to("meta") for shard in shards], how, shape).shape == shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits or len({shard.dtype for shard in shards}) > 1:
        found = " and ".join(f"{list(shard.shape)} {shard.dtype}" for shard in shards)
        raise ValueError(f"{name} is {found}, which does not make the {list(shape)} of the configuration")
    return Piece(shape, shards[0].dtype, lambda: _join(shards, how, shape))


def _join(shards: list[Tensor], how: str, shape: torch.Size) -> Tensor:
    """Shards as one tensor (SPEC A.7); of a table of positions the rows that are used."""
    if how == "table":
        return shards[0][: shape[0]]
    if how == "same" or len(shards) == 1 or (how == "columns" and shards[0].ndim == 1):
        return shards[0]
    if how == "thirds":  # each rank has some heads of the queries, of the keys and of the values
        return torch.cat([third for thirds in zip(*(shard.chunk(3) for shard in shards)) for third in thirds])
    return torch.cat(shards, 1 if how == "columns" else 0)


# -- icetk


def convert_icetk(source: Path, out: Path, say: Say = print) -> None:
    """The folder of icetk's ice_text.model and ice_image.pt to text.model and the part vqvae of `out`.

    A cluster_label2.npy in that folder becomes cluster_labels.npy (SPEC C.7).
    """
    with building(out) as (work, config):
        if "vqvae" in config["converted"]:
            raise ValueError(f"{out} has the files of icetk already")
        states, system = read_states(source / "ice_image.pt"), _system(config)
        vqvae, model = _vqvae_config(states, system), system.model
        text = _text(source / "ice_text.model", vqvae.codes)
        if "base" not in config["converted"]:
            model = replace(model, codes=vqvae.codes, vocab=max(model.vocab, vqvae.codes + len(text)))
        if model.codes != vqvae.codes or model.vocab < vqvae.codes + len(text):
            raise ValueError(f"icetk has {vqvae.codes} image codes and {len(text)} pieces, the transformer "
                             f"{model.codes} codes (--codes when it was converted) of {model.vocab} ids")
        system = replace(system, vqvae=vqvae, model=replace(model, pad=text.pad, start=text.start))
        write_part(work / "vqvae.safetensors", _vqvae_pieces(states, system))
        ModelFolder(work).write_text(text.model)
        if (source / "cluster_label2.npy").exists():
            np.save(work / "cluster_labels.npy", _labels(source / "cluster_label2.npy", vqvae.codes))
        config["converted"] |= {"vqvae": "ice_image.pt", "text": "ice_text.model"}
        config.update(system.to_dict())
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


def _labels(file: Path, codes: int) -> np.ndarray:
    try:
        labels = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if labels.shape != (codes,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"{file} does not give a cluster to each of {codes} codes")
    return labels.astype(np.int64)


def _vqvae_config(states: States, system: System) -> VQVAEConfig:
    """The sizes of icetk's image tokenizer, by its tensors."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for key in states if (match := re.match(pattern, key))})

    try:
        channels = len(states["enc.conv_in.weight"])
        levels = numbers(r"enc\.down\.(\d+)\.")
        widths = [len(states[f"enc.down.{level}.block.0.conv1.weight"]) for level in levels]
        rates = tuple(2 ** (len(levels) - 1 + number) for number in numbers(r"decs\.(\d+)\."))
        rate = 8 if 8 in rates else rates[0]
        codes, code_width = states["quantize.embed.weight"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"ice_image.pt is no image tokenizer of icetk: {error}") from None
    return replace(
        system.vqvae, channels=channels, multipliers=tuple(width // channels for width in widths),
        encoder_blocks=len(numbers(r"enc\.down\.0\.block\.(\d+)\.")), codes=codes, code_width=code_width,
        decoder_blocks=len(numbers(r"decs\.0\.up\.0\.block\.(\d+)\.")), rates=rates, rate=rate,
        attended=tuple(numbers(r"decs\.0\.up\.(\d+)\.attn\.")), resolution=system.model.grid * rate,
    )


def _vqvae_pieces(states: States, system: System) -> dict[str, Piece]:
    config, pieces, used = system.vqvae, {}, set()
    encoder = _encoder_names(config)
    decoders = [_decoder_names(config, number) for number in range(len(config.rates))]
    for ours, tensor in _meta_state(system, "vqvae").items():
        if ours == "codebook.filled":
            pieces[ours] = Piece(tensor.shape, torch.bool, lambda: torch.tensor(True))
            continue
        theirs = re.sub(r"^encoder\.(\d+)", lambda m: f"enc.{encoder[int(m[1])]}", ours)
        if match := re.match(r"decoders\.(\d+)\.(\d+)", ours):  # icetk's begin with the largest rate
            number, module = int(match[1]), int(match[2])
            theirs = f"decs.{len(decoders) - 1 - number}.{decoders[number][module]}" + ours[match.end() :]
        for mine, other in ICETK:
            theirs = re.sub(mine, other, theirs)
        keys = [theirs.replace(".qkv.", f".{x}.") for x in "qkv"] if ".qkv." in theirs else [theirs]
        used |= set(keys)
        if set(keys) <= set(states):
            pieces[ours] = _piece([states[key] for key in keys], "rows", tensor.shape, theirs)
    check_names(used, set(states), "ice_image.pt")
    return pieces


def _encoder_names(config: VQVAEConfig) -> list[str]:
    """icetk's names of the modules of our encoder, in our order."""
    names = ["conv_in"]
    for level in range(len(config.multipliers)):
        names += [f"down.{level - 1}.downsample"] if level else []
        names += _block_names(f"down.{level}", config.encoder_blocks, level in config.attended)
    return [*names, "mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "", "conv_out"]


def _decoder_names(config: VQVAEConfig, number: int) -> list[str]:
    names = ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"]
    for level in reversed(range(len(config.multipliers) + number)):
        names += _block_names(f"up.{level}", config.decoder_blocks, level in config.attended)
        names += [f"up.{level}.upsample"] if level else []
    return [*names, "norm_out", "", "conv_out"]


def _block_names(prefix: str, count: int, attended: bool) -> list[str]:
    return [f"{prefix}.{kind}.{n}" for n in range(count) for kind in ("block", "attn")[: 1 + attended]]


# -- reading what others made


class Ignored:
    """Stands for whatever of numpy is in a checkpoint (states of random generators). It keeps nothing."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY = [f"{c}.multiarray.{f}" for c in ("numpy.core", "numpy._core") for f in ("_reconstruct", "scalar")]
IGNORED = [(Ignored, name) for name in (*NUMPY, "numpy.ndarray", "numpy.dtype", "_codecs.encode")]


def read_states(file: Path) -> States:
    """The tensors under `module` of a pickled checkpoint, mapped into memory; code in it is never run."""
    try:
        packed = zipfile.is_zipfile(file)  # what torch wrote before 2020 is not, and cannot be mapped
        entries = zipfile.ZipFile(file).infolist() if packed else []
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"{file} is refused: it is compressed inside, which torch never does")
        with torch.serialization.safe_globals(IGNORED):  # type: ignore[arg-type]
            loaded = torch.load(file, map_location="cpu", mmap=packed, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except pickle.UnpicklingError as error:
        why = re.search(r"(?i)unsupported .*?(?=\. |\.?\n|$)", str(error))  # the rest is advice to allow it
        raise ValueError(f"{file} is refused, it is damaged or holds more than tensors: "
                         f"{why[0] if why else 'no pickle'}") from None
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged or no checkpoint: {str(error)[:200]}") from None
    states = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(states, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
        and value.dtype in TYPES and value.device.type == "cpu" for key, value in states.items()
    ):
        raise ValueError(f"{file} is no checkpoint: what is under 'module' are not plain tensors")
    held = sum(entry.file_size for entry in entries) if packed else file.stat().st_size
    if sum(value.numel() * value.itemsize for value in states.values()) > held:
        raise ValueError(f"{file} is refused: its tensors claim to be larger than what it holds")
    return states


@contextmanager
def unpacked(source: Path, place: Path) -> Iterator[Path]:
    """The checkpoint folder itself, or the one in a zip, which is at `place` as long as it is needed."""
    if source.is_dir():
        yield source
        return
    wanted = re.compile(r"(.*/)?(latest|model_config\.json|mp_rank_\d+_model_states\.pt)")
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                parts = re.split(r"[/\\]", entry.filename)
                if ".." in parts or ":" in parts[0] or not parts[0] or entry.external_attr >> 28 == 0xA:
                    raise ValueError(f"{source} is refused: {entry.filename!r} leads out of the folder")
            entries = [entry for entry in archive.infolist() if wanted.fullmatch(entry.filename)]
            packed, size = source.stat().st_size, sum(entry.file_size for entry in entries)
            if size > 20 * packed + 1_000_000:  # weights hardly shrink
                raise ValueError(f"{source} is refused as a zip bomb: its {packed} bytes would become {size}")
            check_space(place, 2 * size)  # as it is, and converted
            for entry in entries:
                archive.extract(entry, place)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{source} is damaged or no zip: {error}") from None
    roots = [file.parent for file in place.rglob("model_config.json")]
    if len(roots) != 1:
        raise ValueError(f"{source} holds {len(roots)} SAT checkpoints, where one belongs")
    yield roots[0]
    shutil.rmtree(place)


def check_names(expected: set[str], found: set[str], name: str) -> None:
    """Raise ValueError, with names, if not all that is expected was found, or more."""
    wrong = [f"{key} is missing" for key in sorted(expected - found)]
    wrong += [f"{key} is unknown" for key in sorted(found - expected)]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{name} is not the expected model: {', '.join(wrong[:20])}{more}")


# -- writing


def write_part(file: Path, pieces: dict[str, Piece]) -> int:
    """Write a safetensors file, one tensor at a time, the digest of each in its header. Returns the size."""
    table: Config = {"__metadata__": dict.fromkeys(pieces, "0" * 32)}
    order, end = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name)), 0
    for name in order:
        shape, dtype, _ = pieces[name]
        begin, end = end, end + shape.numel() * dtype.itemsize
        table[name] = {"dtype": TYPES.get(dtype, "BOOL"), "shape": [*shape], "data_offsets": [begin, end]}
    check_space(file, end)
    with file.open("wb") as stream:
        stream.write(_header(table))
        for name in order:
            data = _bytes(pieces[name])
            stream.write(data)
            table["__metadata__"][name] = _digest(data)
        stream.seek(0)
        stream.write(_header(table))
    return end


def _header(table: Config) -> bytes:
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(piece: Piece) -> memoryview:
    return piece.make().detach().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(data: memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _compare(pieces: dict[str, Piece], file: Path, name: str, before: str) -> None:
    """Raise ValueError if tensors are not those of a part that is written."""
    with file.open("rb") as stream:
        written = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    differ = [key for key, piece in pieces.items() if written.get(key) != _digest(_bytes(piece))]
    if differ:
        raise ValueError(f"{name} has another base than {before}: {len(differ)} of {len(pieces)} tensors "
                         f"differ, {differ[0]} is the first; convert it to a folder of its own")


def check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if needed > free:
        raise ValueError(f"{path.parent} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")


@contextmanager
def building(out: Path) -> Iterator[tuple[Path, Config]]:
    """A folder beside `out` to write to, and the configuration to fill in; they become `out` if all is well.

    A folder that a conversion made gets what is new. What a killed conversion left is removed.
    """
    out = out.expanduser().resolve()
    config: Config = {"family": "cogvideo", "about": ABOUT, "converted": {}}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        config = ModelFolder(out).config if (out / "config.json").exists() else {}
        if "converted" not in config:
            raise ValueError(f"{out} exists and no conversion made it; choose another name")
    work = out.with_name(f".{out.name}.converting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work, config
        ModelFolder(work).write_config(config)
        if not (out / "config.json").exists():
            os.replace(work, out)
        else:
            for file in sorted(work.iterdir(), key=lambda file: file.name == "config.json"):  # it comes last
                os.replace(file, out / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
