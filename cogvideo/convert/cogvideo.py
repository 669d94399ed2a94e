"""Convert SAT checkpoint folders of the original to a model folder (docs/reference.md, "Checkpoint files").

A conversion is a table of key rules. It fails on any tensor of the file that the table does not name, and on
any tensor of our model that the file does not have. Notable:
- A checkpoint is a base and the part that the model adds to it. The first base becomes that of the folder;
  another stage must have an equal one, but super-resolution may have its own.
- Checkpoints are memory-mapped and parts are written tensor by tensor, so memory holds one tensor at a time.
- Files are written to a temporary folder next to OUT, and moved at the end; until then OUT is unchanged.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideo.convert import keys, sat
from cogvideo.convert.keys import Rule
from cogvideo.convert.sat import Checkpoint
from cogvideo.files import atomic_folder, only_writer
from cogvideo.model import presets
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import FolderConfig, ModelFolder, Piece
from cogvideo.model.superres import SuperResConfig
from cogvideo.text import START

Say = Callable[[str], None]
Table = tuple[Rule, ...]

ABOUT = "CogVideo (2022), converted from the released weights, whose licence restricts their use"
# the text templates of the original's scripts (docs/reference.md, "Inference")
PROMPTS = {
    "image": "{prompt} 高清摄影",
    "stage1": "{seconds:.1f}秒<n>{prompt} 视频",
    "stage2": "{seconds:.1f}秒<n>{prompt}",
    "superres": "{prompt}",
}
SAMPLING = presets.SAMPLING["cogvideo-9b"]
SPECIALS = (START, "<start_of_english>", "<start_of_chinese>")  # pieces that CogVideo appends to icetk's
MAX_SIZE = 10**6  # of every number in a configuration
FIRST_FRAME = 512  # position of the first token of frame 0, a constant of the original's code

# name in the checkpoint ({l} a layer, {p} weight and bias), our name, and how the ranks are joined
BASE: Table = (
    ("transformer.word_embeddings.weight", "embed.weight", "rows"),
    ("transformer.position_embeddings.weight", "positions.weight", 0),
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
POSITIONS: Table = (("mixins.extra_position_embedding.position_embeddings.weight", "positions.weight", 0),)
ATTENTION: Table = (
    ("mixins.attention_plus.query_key_value.{l}.{p}", "attention.{l}.qkv.{p}", "thirds"),
    ("mixins.attention_plus.dense.{l}.{p}", "attention.{l}.out.{p}", "columns"),
)
TEMPORAL = (*POSITIONS, *ATTENTION, ("mixins.attention_plus.attn_distribution.{l}", "gate.{l}", "same"))
# the small map of super-resolution starts one position later (docs/reference.md, "Super-resolution")
SMALL_MAP: Table = (("transformer.position_embeddings.weight", "low_positions.weight", FIRST_FRAME + 1),)

# name -> the part that a model adds to its base, its table, and its layout in the original's code
MODELS: dict[str, tuple[str, Table, list[int]]] = {
    "CogVideoModel of stage 1": ("stage1", TEMPORAL, [64, 464, 2064]),
    "CogVideoModel of stage 2": ("stage2", TEMPORAL, [64, 464, 2064]),
    "DsrModel": ("superres", POSITIONS + ATTENTION + SMALL_MAP, [96, 496, 4096]),
    "ItersrModel": ("itersr", POSITIONS, [16, 3616]),
}
STAGES = {"stage1", "stage2"}
# name in model_config.json -> name in our TransformerConfig
SIZES = {
    "num_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}


@dataclass
class Output:
    """A model folder that is being written, and the folder that it will replace or extend."""

    before: ModelFolder
    work: ModelFolder
    spec: CogVideoSpec
    sources: dict[str, str]  # part -> the name of its source


@contextmanager
def open_output(path: Path) -> Iterator[Output]:
    """Yield a new model folder, or that of an earlier conversion, to which parts are added."""
    with only_writer(path):
        before = ModelFolder(path)
        config = _begun_config(before)
        spec = config.spec
        assert isinstance(spec, CogVideoSpec)  # nothing else is converted
        with atomic_folder(path) as work:
            output = Output(before, ModelFolder(work), spec, dict(config.converted or {}))
            yield output
            output.work.write_config(replace(config, spec=output.spec, converted=output.sources))


def _begun_config(before: ModelFolder) -> FolderConfig:
    """The configuration of a conversion, as far as it has come. ValueError for a folder of something else."""
    path = before.path
    if not any(path.iterdir()):
        return FolderConfig(
            spec=replace(presets.released(), superres=None),
            about=ABOUT,
            languages=("zh",),
            prompts=PROMPTS,
            sampling=SAMPLING,
            converted={},
        )
    if not (path / "config.json").exists() or before.config.converted is None:
        raise ValueError(f"{path} exists and is not the output of a conversion; choose another name")
    return before.config


def convert_sat(
    sources: Sequence[Path], out: Path, codes: int | None = None, say: Say = print, model: str | None = None
) -> None:
    """Convert checkpoint folders, zips or folders of them to parts of the model folder `out`.

    codes: how many of the ids are image codes; by default icetk's 20000. model: the key of MODELS that the
    checkpoints must be; then they need no model_config.json. Raise ValueError if a source is not exactly what
    is expected; `out` then has the parts of those before it.
    """
    for source in sat.find_checkpoints(sources):
        with (
            open_output(out) as output,
            sat.open_checkpoint(source, output.work.path / "unpacked") as checkpoint,
        ):
            _convert_checkpoint(checkpoint, output, codes, say, model)


def _convert_checkpoint(
    checkpoint: Checkpoint, output: Output, codes: int | None, say: Say, model: str | None
) -> None:
    """Write the parts of one checkpoint."""
    name, described, ranks = checkpoint
    part, table, layout = MODELS[_identify(name, described, model)]
    if output.sources.get(part) == name:
        say(f"{name}: {part} is there already; to convert it anew, choose another folder")
        return
    if part in output.sources:
        raise ValueError(f"{name} is {part}, which the folder has from {output.sources[part]}")
    try:
        spec = _fit({"layout": layout, **described}, part, codes, output)
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted, by its model_config.json: {error}") from None
    c = spec.model
    say(f"{name}: {c.layers} layers, width {c.width}, {c.codes} of {c.vocab} ids are image codes")

    layers = min(c.layers, len(ranks[0]))  # a configuration with too many is an error that names them
    rules = {"base": keys.expand(BASE, layers), part: keys.expand(table, layers)}
    parts = keys.convert(name, ranks, rules, spec.shapes)
    if "base" in output.sources:
        spec = _share_base(name, part, parts, spec, output, say)
    for written, pieces in parts.items():
        say(f"{written}: {output.work.write(written, pieces) / 1e9:.2f} GB")
        output.sources[written] = name
    output.spec = spec


def _identify(name: str, described: dict[str, Any], model: str | None) -> str:
    """The key of MODELS for a checkpoint: by its model_config.json, or the `model` that the user names."""
    kind = described.get("model_class")
    stage = described.get("cogvideo_stage")
    if not described:
        label = model or "without model_config.json"
    elif stage is not None:
        label = f"{kind} of stage {stage}"
    elif model and kind == model.partition(" ")[0]:  # the user says which stage it is
        label = model
    else:
        label = str(kind)
    if label not in MODELS or model not in (None, label):
        raise ValueError(f"{name} is {label}; what can be converted: {model or ', '.join(MODELS)}")
    return label


def _share_base(
    name: str, part: str, parts: dict[str, dict[str, Piece]], spec: CogVideoSpec, output: Output, say: Say
) -> CogVideoSpec:
    """Remove the base from `parts` if the folder has an equal one; another base becomes the part's own."""
    first = output.sources["base"]
    base = parts.pop("base")
    folder = output.work if output.work.has("base") else output.before
    different = next(folder.differing("base", base), None)
    if different is None:
        say(f"base: the same as that of {first}, stored once")
        return spec
    if part in STAGES:
        raise ValueError(
            f"{name} has another base than {first}: {different} is not the same; convert it "
            "to a folder of its own, or the stages before super-resolution"
        )
    parts[f"{part}_base"] = base
    return replace(spec, bases=(*spec.bases, f"{part}_base"))


# -- sizes


def _fit(described: dict[str, Any], part: str, codes: int | None, output: Output) -> CogVideoSpec:
    """The spec with the sizes that model_config.json gives for a part; ValueError if they are not possible or
    do not suit the parts that the folder has. Sizes that it omits are those of the folder, or of the released
    model."""
    spec = output.spec
    c = spec.model
    text_len, grid, times = _read_layout(described["layout"], part, c.grid)
    window = described.get("window_size", 10)  # the default of the original's script
    fields = _read_sizes(described, spec, codes, output) | {"grid": grid}
    if part in STAGES:
        fields |= {"text_len": text_len, "frames": 1 + times}
    _check_sizes(fields, described, part, window, output)

    resolution = grid * spec.vqvae.rate
    parts: dict[str, Any] = {"vqvae": replace(spec.vqvae, codes=fields["codes"], resolution=resolution)}
    if part == "stage2":
        fields["window"] = window
    elif c.window and grid % c.window:  # that of the released stage 2, which this is not
        fields["window"] = 0
    if part not in STAGES:
        reach = described.get("kernel_size", 5)
        cross = described.get("kernel_size2", 5)
        seen = (cross, cross) if part == "superres" else None
        parts[part] = SuperResConfig(grid, math.isqrt(times), text_len, 0, (2 * reach - 1, reach), seen)
    model: dict[str, Any] = {**fields}
    return replace(spec, model=replace(c, **model), **parts)


def _read_sizes(
    described: dict[str, Any], spec: CogVideoSpec, codes: int | None, output: Output
) -> dict[str, int]:
    """Fields of our TransformerConfig that every model gives: sizes and ids."""
    c = spec.model
    for key in {*SIZES, "kernel_size", "kernel_size2"} & described.keys():
        if type(described[key]) is not int or not 0 < described[key] < MAX_SIZE:
            raise ValueError(f"{key} is {described[key]!r}, where a size belongs")
    fields: dict[str, int] = {ours: described.get(key, getattr(c, ours)) for key, ours in SIZES.items()}

    vocab = fields["vocab"]
    codes = codes or (c.codes if output.sources else min(20000, vocab))
    if "text" in output.sources:
        return fields | {"codes": codes, "pad": c.pad, "start": c.start}
    # the ids that icetk gives; `convert icetk` corrects them for other pieces
    pad = min(codes + 3, vocab - 1)
    start = max(min(150000, vocab - len(SPECIALS)), 0)
    return fields | {"codes": codes, "pad": pad, "start": start}


def _check_sizes(
    fields: dict[str, int], described: dict[str, Any], part: str, window: Any, output: Output
) -> None:
    """Raise ValueError if sizes are not possible, or differ from those of the parts that the folder has."""
    c = output.spec.model
    fixed: set[str] = set()
    if "base" in output.sources:
        fixed = fields.keys() - {"text_len", "frames"}
    elif "vqvae" in output.sources:
        fixed = {"codes"}
    if part in STAGES and STAGES & output.sources.keys():
        fixed |= {"text_len", "frames"}
    changed = [
        f"{key} {fields[key]}, not {getattr(c, key)}"
        for key in sorted(fixed)
        if fields[key] != getattr(c, key)
    ]

    width = fields["width"]
    heads = fields["heads"]
    grid = fields["grid"]
    codes = fields["codes"]
    if "num_attention_heads" not in described and width != c.width:
        raise ValueError(f"num_attention_heads is missing, for a width of {width}")
    if width % heads:
        raise ValueError(f"{heads} heads do not divide {width}")
    if described.get("layernorm_order", "sandwich") != "sandwich":
        raise ValueError("layernorm_order is not sandwich")
    if part == "stage2" and not (type(window) is int and window > 0 and grid % window == 0):
        raise ValueError(f"window_size {window} does not divide {grid}")
    if not 0 < codes <= fields["vocab"] > fields["start"]:
        raise ValueError(
            f"{codes} codes, and {START} at {fields['start']}, do not fit in {fields['vocab']} ids"
        )
    if changed:
        raise ValueError(f"it does not suit the parts that the folder has: {', '.join(changed)}")


def _read_layout(layout: Any, part: str, grid: int) -> tuple[int, int, int]:
    """text_len, grid, and how many frames long the rest is, of a layout: the ends of the text, of a frame
    (except for itersr, whose frame is `grid` tokens a side) and of the rest."""
    if isinstance(layout, str) and re.fullmatch(r"[\d, ]+", layout):
        layout = [int(number) for number in layout.split(",") if number.strip()]
    count = 2 if part == "itersr" else 3
    if isinstance(layout, list) and [type(n) for n in layout] == [int] * count and max(layout) < MAX_SIZE:
        text_len, *spans = (end - begin for begin, end in zip([0, *layout], layout))
        frame_tokens, rest = [grid**2, *spans][-2:]
        if 0 < text_len <= FIRST_FRAME and min(frame_tokens, rest) > 0 and rest % frame_tokens == 0:
            grid = math.isqrt(frame_tokens)
            times = rest // frame_tokens
            if grid**2 == frame_tokens and (part in STAGES or math.isqrt(times) ** 2 == times):
                return text_len, grid, times
    raise ValueError(f"layout {layout} is not a text followed by whole square frames")
