"""Convert SAT checkpoint folders of the original to a model folder (docs/reference.md, "Checkpoint files").

An importer is a table of key rules. It fails on anything that a file has and the table does not name, and on
anything that our model has and the file does not give. Notable:
- A checkpoint is a base and what the model adds to it. The first base becomes that of the folder; another
  stage must have the same, number by number, while super-resolution may bring its own.
- Checkpoints are mapped, not read, and parts are written tensor by tensor, so memory holds one tensor.
- All is written to a folder beside OUT, which takes its place at the end; until then OUT is not touched.
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
from cogvideo.files import replacing_folder
from cogvideo.model import presets
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.superres import SuperResConfig
from cogvideo.text import START

Say = Callable[[str], None]
Table = tuple[Rule, ...]

ABOUT = "CogVideo (2022), converted from the released weights, whose licence restricts their use"
# what the original's scripts ask for (docs/reference.md, "Inference")
PROMPTS = {
    "image": "{prompt} 高清摄影",
    "stage1": "{seconds:.1f}秒<n>{prompt} 视频",
    "stage2": "{seconds:.1f}秒<n>{prompt}",
    "superres": "{prompt}",
}
SAMPLING = presets.SAMPLING["cogvideo-9b"]
SPECIALS = (START, "<start_of_english>", "<start_of_chinese>")  # CogVideo's own, behind icetk's pieces
MOST = 10**6  # of anything that a configuration counts
FIRST_FRAME = 512  # position of the first token of frame 0: a number in the original's code

# in the checkpoint ({l} a layer, {p} weight and bias), in ours, and how the ranks are joined
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
# the small map of super-resolution begins one position behind frame 0 (docs/reference.md, "Super-resolution")
SMALL_MAP: Table = (("transformer.position_embeddings.weight", "low_positions.weight", FIRST_FRAME + 1),)

# what a model adds to its base, and its layout in the original's code
MODELS: dict[str, tuple[str, Table, list[int]]] = {
    "CogVideoModel of stage 1": ("stage1", TEMPORAL, [64, 464, 2064]),
    "CogVideoModel of stage 2": ("stage2", TEMPORAL, [64, 464, 2064]),
    "DsrModel": ("superres", POSITIONS + ATTENTION + SMALL_MAP, [96, 496, 4096]),
    "ItersrModel": ("itersr", POSITIONS, [16, 3616]),
}
STAGES = {"stage1", "stage2"}
# in model_config.json, and in our ModelConfig
SIZES = {
    "num_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}


@dataclass
class Output:
    """A model folder in the making, which becomes `before` or is added to it."""

    before: ModelFolder
    work: ModelFolder
    spec: CogVideoSpec
    made: dict[str, str]  # the source of every part


@contextmanager
def building(path: Path) -> Iterator[Output]:
    """A new model folder, or what an earlier conversion made, to be added to."""
    config: dict[str, Any] = {
        "family": "cogvideo",
        "about": ABOUT,
        "languages": ["zh"],
        "prompts": PROMPTS,
        "sampling": SAMPLING,
        "converted": {},
    }
    before, spec = ModelFolder(path), replace(presets.find("cogvideo-9b"), superres=None)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / "config.json").exists() or "converted" not in before.config:
            raise ValueError(f"{path} exists and no conversion made it; choose another name")
        config, spec = before.config, before.spec()
    with replacing_folder(path) as work:
        output = Output(before, ModelFolder(work), spec, config["converted"])
        yield output
        output.work.write_config(config | output.spec.to_dict())


def convert_sat(
    sources: Sequence[Path], out: Path, codes: int | None = None, say: Say = print, model: str | None = None
) -> None:
    """Checkpoint folders, zips or folders of them, to parts of the model folder `out`.

    codes: how many of the ids are image codes; by default icetk's 20000. model: the row of MODELS that they
    must be; then they need no model_config.json. Raises ValueError, and leaves `out` as it was, if a source
    is not exactly what is expected.
    """
    with building(out) as output:
        for source in sat.find_checkpoints(sources):
            with sat.opened(source, output.work.path / "unpacked") as checkpoint:
                _convert_checkpoint(checkpoint, output, codes, say, model)


def _convert_checkpoint(
    checkpoint: Checkpoint, output: Output, codes: int | None, say: Say, model: str | None
) -> None:
    """Write what one checkpoint adds."""
    name, described, ranks = checkpoint
    kind, stage = described.get("model_class"), described.get("cogvideo_stage")
    found = f"{kind} of stage {stage}" if stage is not None else str(kind)
    if not described:
        found = model or "without model_config.json"
    elif model and stage is None and kind == model.partition(" ")[0]:  # the user says which stage it is
        found = model
    if found not in MODELS or model not in (None, found):
        raise ValueError(f"{name} is {found}; what can be converted: {model or ', '.join(MODELS)}")
    part, table, layout = MODELS[found]
    if part in output.made:
        raise ValueError(f"{name} is {part}, but {output.made[part]} is that already")
    try:
        spec = _fit({"layout": layout, **described}, part, codes, output)
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted, by its model_config.json: {error}") from None
    c = spec.model
    say(f"{name}: {c.layers} layers, width {c.width}, {c.codes} of {c.vocab} ids are image codes")
    layers = min(c.layers, len(ranks[0]))  # whoever claims more is told what is missing
    rules = {"base": keys.expand(BASE, layers), part: keys.expand(table, layers)}
    plan = keys.pick(name, ranks, rules, spec.shapes)
    if first := output.made.get("base"):
        base, held = plan.pop("base"), output.work if output.work.has("base") else output.before
        differs = next(held.differing("base", base), None)
        if differs and part in STAGES:
            raise ValueError(
                f"{name} has another base than {first}: {differs} is not the same; convert it "
                "to a folder of its own, or the stages before super-resolution"
            )
        if differs:
            plan[f"{part}_base"], spec = base, replace(spec, bases=(*spec.bases, f"{part}_base"))
        else:
            say(f"base: the same as that of {first}, stored once")
    for new, pieces in plan.items():
        say(f"{new}: {output.work.write(new, pieces) / 1e9:.2f} GB")
        output.made[new] = name
    output.spec = spec


def _fit(described: dict[str, Any], part: str, codes: int | None, output: Output) -> CogVideoSpec:
    """The spec with what model_config.json says of a part, if that can be and suits what is there. Sizes
    that it leaves out are those of what is there, or of the released spec."""
    spec, made, c = output.spec, output.made, output.spec.model
    for key in {*SIZES, "kernel_size", "kernel_size2"} & described.keys():
        if type(described[key]) is not int or not 0 < described[key] < MOST:
            raise ValueError(f"{key} is {described[key]!r}, where a size belongs")
    fields = {ours: described.get(theirs, getattr(c, ours)) for theirs, ours in SIZES.items()}
    text_len, grid, times = _read_layout(described["layout"], part, c.grid)
    vocab, window = fields["vocab"], described.get("window_size", 10)  # which the original's script has, too
    codes = codes or (c.codes if made else min(20000, vocab))
    # ids as the original's script makes them of icetk's; `convert icetk` sets them right for other pieces
    pad, start = min(codes + 3, vocab - 1), max(min(150000, vocab - len(SPECIALS)), 0)
    if "text" in made:
        pad, start = c.pad, c.start
    fields |= {"codes": codes, "pad": pad, "start": start, "grid": grid}
    fixed = set(fields) if "base" in made else {"codes"} if "vqvae" in made else set()
    if part in STAGES:
        fields |= {"text_len": text_len, "frames": 1 + times}
        fixed |= {"text_len", "frames"} if STAGES & made.keys() else set()
    other = [
        f"{key} {fields[key]}, not {getattr(c, key)}"
        for key in sorted(fixed)
        if fields[key] != getattr(c, key)
    ]
    divides = type(window) is int and window > 0 and grid % window == 0
    checks = {
        f"num_attention_heads is missing, for a width of {fields['width']}": "num_attention_heads"
        in described
        or fields["width"] == c.width,
        f"{fields['heads']} heads do not make {fields['width']}": fields["width"] % fields["heads"] == 0,
        "layernorm_order is not sandwich": described.get("layernorm_order", "sandwich") == "sandwich",
        f"window_size {window} does not divide {grid}": part != "stage2" or divides,
        f"{codes} codes, and {START} at {start}, do not fit in {vocab} ids": 0 < codes <= vocab > start,
        f"it does not suit what is there: {', '.join(other)}": not other,
    }
    for complaint, fine in checks.items():
        if not fine:
            raise ValueError(complaint)
    parts: dict[str, Any] = {"vqvae": replace(spec.vqvae, codes=codes, resolution=grid * spec.vqvae.rate)}
    if part == "stage2":
        fields["window"] = window
    if part not in STAGES:
        reach, cross = described.get("kernel_size", 5), described.get("kernel_size2", 5)
        seen = (cross, cross) if part == "superres" else None
        parts[part] = SuperResConfig(grid, math.isqrt(times), text_len, 0, (2 * reach - 1, reach), seen)
    return replace(spec, model=replace(c, **fields), **parts)


def _read_layout(layout: Any, part: str, grid: int) -> tuple[int, int, int]:
    """Where the text ends, a frame (not of itersr, which has `grid`), and the rest: text_len, grid, and how
    many frames long the rest is."""
    if isinstance(layout, str) and re.fullmatch(r"[\d, ]+", layout):
        layout = [int(number) for number in layout.split(",") if number.strip()]
    if (
        isinstance(layout, list)
        and [type(n) for n in layout] == [int] * (2 if part == "itersr" else 3)
        and max(layout) < MOST
    ):
        text_len, *spans = (end - begin for begin, end in zip([0, *layout], layout))
        frame_len, rest = [grid**2, *spans][-2:]
        if 0 < text_len <= FIRST_FRAME and min(frame_len, rest) > 0 and rest % frame_len == 0:
            grid, times = math.isqrt(frame_len), rest // frame_len
            if grid**2 == frame_len and (part in STAGES or math.isqrt(times) ** 2 == times):
                return text_len, grid, times
    raise ValueError(f"layout {layout} is no text with whole square frames")
