"""The original's checkpoints become our model folders and compute what the original computed."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from data.goldens import DATA, digest, read
from safetensors.torch import load_file

from cogvideo.convert import cogvideo as convert
from cogvideo.convert.icetk import convert_icetk
from cogvideo.convert.keys import expand
from cogvideo.convert.sat import IGNORED, Ignored, read_states
from cogvideo.layout import Layout
from cogvideo.model.folder import ModelFolder
from cogvideo.model.superres import SuperRes, SuperResConfig
from cogvideo.model.transformer import DualChannelTransformer, TemporalChannel
from cogvideo.text import TextTokenizer, train_text
from cogvideo.train.losses import token_loss

FILE = "mp_rank_00_model_states.pt"
STAGE1 = DATA / "cogvideo-stage1-tiny.zip"
DESCRIBED = json.loads(zipfile.ZipFile(STAGE1).read("cogvideo-stage1-tiny/model_config.json"))


def quiet(_: str) -> None:
    pass


def sat(folder: Path, states: list[dict], **described: object) -> Path:
    """A checkpoint folder as SAT writes it, with the states of every rank. What is None is left out."""
    (folder / "7").mkdir(parents=True)
    (folder / "latest").write_text("7")
    settings = {**DESCRIBED, "model_parallel_size": len(states), **described}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "model_config.json").write_text(json.dumps(settings))
    for rank, state in enumerate(states):
        torch.save({"module": state, "iteration": 7}, folder / "7" / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The folder of stage 1 that SAT itself wrote, and one of stage 2."""
    folder = tmp_path_factory.mktemp("sat")
    zipfile.ZipFile(STAGE1).extractall(folder)
    sat(folder / "stage2", [read("weights_stage2")], cogvideo_stage=2, window_size=10)
    return folder


@pytest.fixture(scope="session")
def folders(original, tmp_path_factory) -> dict[str, ModelFolder]:
    made = tmp_path_factory.mktemp("made")
    convert.convert_sat([STAGE1], made / "stage1", 256, quiet)
    convert.convert_sat([original / "stage2"], made / "stage2", 256, quiet)
    return {name: ModelFolder(made / name) for name in ("stage1", "stage2")}


UPSCALES = {
    "model_class": "DsrModel",
    "cogvideo_stage": None,
    "window_size": None,
    "layout": [5, 9, 45],
    "kernel_size": 3,
    "kernel_size2": 1,
    "additional_seqlen": 40,
}
STAGE2 = {"cogvideo_stage": 2, "window_size": 1}


def small(tmp_path: Path, name: str = "small", change=None, **described: object) -> tuple[Path, dict]:
    """A checkpoint of sizes of its own, with random weights that are the same every time, and the same base
    for every model; unless there is a `change` of them."""
    settings = {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_sequence_length": 600,
        "additional_seqlen": 20,
        "layout": [6, 10, 18],
    } | described
    generator, width, states = torch.Generator().manual_seed(0), settings["hidden_size"], {}
    sizes = {
        "query_key_value": (3 * width, width),
        "dense": (width, width),
        "dense_h_to_4h": (4 * width, width),
        "dense_4h_to_h": (width, 4 * width),
        "word_embeddings": (settings["vocab_size"], width),
    }
    model = next(row for row in convert.MODELS if row.startswith(settings.get("model_class", "CogVideo")))
    for key, _, _ in expand(convert.BASE + convert.MODELS[model][1], settings["num_layers"]):
        kind = next((part for part in key.split(".") if part in sizes), "")
        shape = sizes.get(kind, (width, width))
        if key.endswith("position_embeddings.weight"):
            shape = (settings["additional_seqlen" if "mixins" in key else "max_sequence_length"], width)
        if key.endswith("bias") or "norm" in key or "distribution" in key:
            shape = shape[:1]
        if key not in states:
            states[key] = torch.randn(shape, generator=generator)
    if change:
        change(states)
    return sat(tmp_path / name, [states], **settings), states


CASES = {
    "stage1_train_full": ("stage1", 0, Layout.keyframes(64, 20, 5)),
    "stage1_train_window": ("stage2", 10, Layout.keyframes(64, 20, 5)),  # with the weights of stage 2
    "stage2_train_window": ("stage2", 10, Layout.interpolation(64, 20, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_the_original_ones(folders, case):
    part, window, layout = CASES[case]
    golden, folder = read(case), folders[part]
    config = folder.spec().model
    temporal = TemporalChannel(config, window)
    temporal.load_state_dict(folder.load(part).state_dict())
    model = DualChannelTransformer(folder.load("base"), temporal).eval()
    tokens, labels = golden["in.tokens"].long(), golden["in.labels"].long()
    assert int(tokens[0, 64]) == config.start and int(tokens[0, 0]) == config.pad
    codes = labels[:, 64:].unflatten(1, (5, 400))
    loss, numbers = token_loss(model, layout, tokens[:, :64], codes)
    with torch.no_grad():
        inputs = layout.inputs(layout.lay(codes), config.start)
        logits = model(torch.cat((tokens[:, :64], inputs), 1), layout)
    made = layout.unlay(logits.unflatten(1, (5, 400))).flatten(1, 2)
    expected = golden["out.logits"][..., : config.codes]
    assert (made[:, ::199] - expected).abs().max() < 1e-5 * 3 * expected.std()
    each = torch.nn.functional.cross_entropy(made.flatten(0, 1), labels[:, 64:].flatten(), reduction="none")
    assert (each - golden["out.losses_per_token"].flatten()).abs().max() < 1e-4
    assert abs(float(loss.detach()) - float(golden["out.loss"])) < 1e-5
    for key, value in golden.items():
        if key.startswith("out.log."):
            assert abs(numbers[f"frame{key[-6]}"] - float(value)) < 1e-5, key
    loss.backward()
    gradients = {ours: parameter.grad for ours, parameter in temporal.named_parameters()}
    for theirs, ours, _ in expand(convert.TEMPORAL, config.layers):
        norm = float(golden[f"gradnorm.{theirs}"])
        assert abs(float(gradients[ours].norm()) - norm) < 1e-4 * norm + 1e-8, theirs
        if f"grad.{theirs}" in golden:
            assert (gradients[ours] - golden[f"grad.{theirs}"]).abs().max() < 1e-4 * norm
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert abs(float(total / golden["out.grad_total_norm_trainable"]) - 1) < 1e-5


def split(states: dict[str, torch.Tensor], ranks: int) -> list[dict[str, torch.Tensor]]:
    """As SAT's model parallelism does (docs/reference.md, "Checkpoint files")."""
    rules = {theirs: how for theirs, _, how in expand(convert.BASE + convert.TEMPORAL, 4)}
    cut: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for key, value in states.items():
        if rules[key] == "thirds":
            thirds = [third.chunk(ranks) for third in value.chunk(3)]
            pieces = [torch.cat([third[rank] for third in thirds]) for rank in range(ranks)]
        elif rules[key] == "rows" or (rules[key] == "columns" and value.ndim == 2):
            pieces = list(value.chunk(ranks, 0 if rules[key] == "rows" else 1))
        else:
            pieces = [value] * ranks
        for rank, piece in enumerate(pieces):
            cut[rank][key] = piece.clone()
    return cut


def test_ranks_of_different_checkpoints_are_refused(original, tmp_path):
    states = read_states(original / "cogvideo-stage1-tiny" / "1000" / FILE)
    for key, message in (
        ("transformer.final_layernorm.bias", "final_layernorm.bias is not the same in all"),
        ("transformer.layers.0.attention.query_key_value.weight", "different shapes in the ranks"),
    ):
        ranks = split(states, 2)
        ranks[1][key] = ranks[1][key] + 1 if "norm" in key else ranks[1][key][:-6]
        with pytest.raises(ValueError, match=message):
            convert.convert_sat([sat(tmp_path / message[:5], ranks)], tmp_path / "out", 256, quiet)
    assert not (tmp_path / "out").exists()


def test_ranks_are_put_together(original, folders, tmp_path):
    states = read_states(original / "cogvideo-stage1-tiny" / "1000" / FILE)
    ranks = split({key: value.half() for key, value in states.items()}, 2)
    kept = json.loads((DATA / "cogvideo-stage1-tiny-mp2.json").read_text())  # of the original's own two files
    assert [{key: digest(value) for key, value in rank.items()} for rank in ranks] == [kept["0"], kept["1"]]
    convert.convert_sat([sat(tmp_path / "mp2", ranks)], tmp_path / "out", 256, quiet)
    for part in ("base", "stage1"):
        whole = folders["stage1"].load(part).state_dict()
        merged = ModelFolder(tmp_path / "out").load(part).state_dict()
        assert all(torch.equal(whole[key].half().float(), value) for key, value in merged.items())


def test_a_folder_of_checkpoints_shares_one_base(tmp_path):
    def shift(states: dict) -> None:
        states.update({key: value + 1 for key, value in states.items() if key.startswith("mixins")})

    source, _ = small(tmp_path / "home", "a")
    small(tmp_path / "home", "b", shift, **STAGE2)
    told: list[str] = []
    convert.convert_sat([tmp_path / "home"], tmp_path / "out", 20, told.append)
    assert any("stored once" in line for line in told)
    folder = ModelFolder(tmp_path / "out")
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "base.safetensors",
        "config.json",
        "stage1.safetensors",
        "stage2.safetensors",
    ]
    assert torch.equal(folder.load("stage1").gate[1] + 1, folder.load("stage2").gate[1])
    model = folder.spec().model
    assert (model.window, model.layers, model.frames, model.grid, model.text_len) == (1, 2, 3, 2, 6)
    # the same, one after the other
    convert.convert_sat([tmp_path / "home" / "b"], tmp_path / "slowly", 20, quiet)
    convert.convert_sat([source], tmp_path / "slowly", say=quiet)
    for file in folder.path.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "slowly" / file.name).read_bytes()
    assert ModelFolder(tmp_path / "slowly").spec() == folder.spec()
    told.clear()
    convert.convert_sat([source], tmp_path / "slowly", say=told.append)
    assert told == ["a: stage1 is there already; to convert it anew, choose another folder"]
    with pytest.raises(ValueError, match="which the folder has from a"):
        convert.convert_sat([source.rename(tmp_path / "c")], tmp_path / "slowly", say=quiet)


def shift_norm(states: dict) -> None:
    states["transformer.final_layernorm.bias"] += 1


def test_a_stage_of_another_base_is_refused(tmp_path):
    sources = [small(tmp_path, "a")[0], small(tmp_path, "b", shift_norm, **STAGE2)[0]]
    with pytest.raises(ValueError, match="b has another base than a: norm.bias"):
        convert.convert_sat(sources, tmp_path / "out", 20, quiet)
    assert {*ModelFolder(tmp_path / "out").config.converted} == {"base", "stage1"}  # of a, which is finished


# -- super-resolution


SUPERRES = {
    "superres": SuperResConfig(grid=20, scale=3, text_len=96, pad=0, window=(9, 5), cross=(5, 5)),
    "itersr": SuperResConfig(grid=20, scale=3, text_len=16, pad=0, window=(9, 5)),
}
RELEASED = {
    "superres": {"model_class": "DsrModel", "layout": [96, 496, 4096], "kernel_size": 5, "kernel_size2": 5},
    "itersr": {"model_class": "ItersrModel", "layout": [16, 3616], "kernel_size": 5},
}


@pytest.mark.parametrize("part, file", [("superres", "superres_dsr"), ("itersr", "superres_itersr")])
def test_larger_maps_are_the_original_ones(tmp_path, part, file):
    golden = load_file(DATA / f"{file}.safetensors")
    weights = {key: value for key, value in golden.items() if key.startswith(("transformer.", "mixins."))}
    settings = {
        "num_layers": 2,
        "new_sequence_length": 4624,
        "cogvideo_stage": None,
        "window_size": None,
        "additional_seqlen": None,
    }
    source = sat(tmp_path / "sr", [weights], **settings, **RELEASED[part])
    convert.convert_sat([source], tmp_path / "out", 256, quiet)
    folder = ModelFolder(tmp_path / "out")
    spec = folder.spec()
    assert getattr(spec, part) == SUPERRES[part] and part in spec.parts and not spec.bases
    model = SuperRes(folder.load("base"), folder.load(part)).eval()
    text, rest = golden["in.tokens"].long().tensor_split([model.config.text_len], 1)
    codes = rest[:, : 400 if part == "superres" else 3600]
    with torch.inference_mode():
        hidden = model.hidden(text, codes)
        logits = model.head(hidden)[:, golden["in.places"].long()]
        full = hidden @ model.base.embed.weight.T
    expected = golden["out.logits"]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (full.argmax(-1) == golden["out.argmax"]).all()


GATE = "mixins.attention_plus.attn_distribution.0"


def unused_rows(states: dict) -> None:
    """Rows of positions that the small map has, but not frame 0, nor text."""
    states["transformer.position_embeddings.weight"][516:] += 1


@pytest.mark.parametrize("first", ["stage", "superres"])
@pytest.mark.parametrize("change", [None, unused_rows])
def test_super_resolution_shares_an_equal_base(tmp_path, first, change):
    sources = [small(tmp_path, "stage")[0], small(tmp_path, "sr", change, **UPSCALES)[0]]
    for source in sources if first == "stage" else sources[::-1]:
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    folder = ModelFolder(tmp_path / "out")
    spec = folder.spec()
    assert spec.superres == SuperResConfig(2, 3, text_len=5, pad=0, window=(5, 3), cross=(1, 1))
    assert (spec.model.text_len, spec.model.frames, spec.bases) == (6, 3, ())
    assert sorted(file.stem for file in folder.path.iterdir()) == ["base", "config", "stage1", "superres"]
    table = torch.load(sources[1] / "7" / FILE)["module"]["transformer.position_embeddings.weight"]
    assert torch.equal(folder.load("superres").low_positions.weight, table[513:517])
    assert torch.equal(folder.load("base").positions.weight, table[:516])


def test_super_resolution_brings_a_base_of_its_own(tmp_path):
    sources = [small(tmp_path, "stage")[0], small(tmp_path, "sr", shift_norm, **UPSCALES)[0]]
    convert.convert_sat(sources, tmp_path / "out", 20, quiet)
    folder = ModelFolder(tmp_path / "out")
    assert folder.spec().parts[-2:] == ("superres", "superres_base")
    own, base = folder.load("superres_base"), folder.load("base")
    assert torch.equal(own.norm.bias, base.norm.bias + 1) and torch.equal(own.norm.weight, base.norm.weight)
    iterative = {**UPSCALES, "model_class": "ItersrModel", "layout": [5, 41]}
    convert.convert_sat([small(tmp_path, "it", **iterative)[0]], tmp_path / "out", say=quiet)
    assert folder.spec().parts[-3:] == ("superres", "itersr", "superres_base")
    with pytest.raises(ValueError, match="stage has another base than sr: .* the stages before super-res"):
        convert.convert_sat(sources[::-1], tmp_path / "other", 20, quiet)


def test_a_stage_that_its_description_does_not_tell(tmp_path):
    """Older files name no stage, no window (stage 2 has the 10 of the original's script), or a layout as
    words."""
    first, _ = small(tmp_path, "first", cogvideo_stage=None, window_size=None, layout="6, 10,26")
    with pytest.raises(ValueError, match="first is CogVideoModel; what can be converted: CogVideoM"):
        convert.convert_sat([first], tmp_path / "out", 20, quiet)
    with pytest.raises(ValueError, match="window_size 10 does not divide 2"):
        convert.convert_sat([first], tmp_path / "out", 20, quiet, "CogVideoModel of stage 2")
    convert.convert_sat([first], tmp_path / "out", 20, quiet, "CogVideoModel of stage 1")
    spec = ModelFolder(tmp_path / "out").spec()
    assert (spec.model.frames, spec.model.grid, spec.model.text_len) == (5, 2, 6)
    told, _ = small(tmp_path, "told")
    with pytest.raises(ValueError, match="told is CogVideoModel of stage 1"):
        convert.convert_sat([told], tmp_path / "new", 20, quiet, "CogVideoModel of stage 2")


def test_super_resolution_needs_no_description(tmp_path):
    """The original's code never read it: the sizes are those of the model before it."""
    stage, _ = small(
        tmp_path,
        "stage",
        vocab_size=40,
        max_sequence_length=1024,
        layout=[64, 464, 864],
        additional_seqlen=400,
    )
    source, _ = small(tmp_path, "sr", max_sequence_length=1024, **{**UPSCALES, "additional_seqlen": 3600})
    (source / "model_config.json").unlink()
    convert.convert_sat([stage], tmp_path / "out", 20, quiet)
    with pytest.raises(ValueError, match="without model_config.json; what can be converted: CogVideo"):
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    convert.convert_sat([source], tmp_path / "out", 20, quiet, "DsrModel")
    folder = ModelFolder(tmp_path / "out")
    assert folder.spec().superres == SUPERRES["superres"] and len(folder.load("superres").attention) == 2
    with pytest.raises(ValueError, match="stage is CogVideoModel of stage 1; .*: DsrModel"):
        convert.convert_sat([stage], tmp_path / "new", 20, quiet, "DsrModel")


@pytest.mark.parametrize(
    "described, change, message",
    [
        ({"hidden_size": 16}, None, "does not suit the parts that the folder has: width 16, not 8"),
        ({"num_layers": 3, "vocab_size": 50}, None, "has: layers 3, not 2, start 47, not 37, vocab 50,"),
        ({"layout": [5, 14, 50]}, None, "grid 3, not 2"),
        ({"layout": [5, 9, 29]}, None, "not a text followed by whole square frames"),
        ({"layout": [5, 45]}, None, "not a text followed by whole square frames"),
        ({"layout": "5,9,x"}, None, "not a text followed by whole square frames"),
        ({"kernel_size": 2}, None, "window .* must be an odd number"),
        ({"kernel_size2": "x"}, None, "kernel_size2 is 'x', where a size"),
        ({"cogvideo_stage": 1}, None, "sr is DsrModel of stage 1; what can be converted: .*, DsrModel"),
        ({"additional_seqlen": 30}, None, r"\[30, 8\] .* does not make the \[36, 8\]"),
        ({}, lambda s: s.pop("mixins.attention_plus.dense.1.bias"), "plus.dense.1.bias is missing"),
        ({}, lambda s: s.update({GATE: torch.zeros(8)}), f"{GATE} is unknown"),
    ],
)
def test_bad_super_resolution_is_refused(tmp_path, described, change, message):
    source, _ = small(tmp_path, "sr", change, **{**UPSCALES, **described})
    convert.convert_sat([small(tmp_path, "stage")[0]], tmp_path / "out", 20, quiet)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=message):
        convert.convert_sat([source], tmp_path / "out", say=quiet)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sr", "stage"]


# -- what is wrong is said, and nothing is left behind


def reconfigure(**values):
    def harm(folder: Path) -> None:
        file = folder / "model_config.json"
        described = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))

    return harm


def with_states(change):
    def harm(folder: Path) -> None:
        saved = torch.load(folder / "7" / FILE)
        change(saved["module"])
        torch.save(saved, folder / "7" / FILE)

    return harm


def truncate(folder: Path) -> None:
    data = (folder / "7" / FILE).read_bytes()
    (folder / "7" / FILE).write_bytes(data[: len(data) // 2])


def add_rank(folder: Path) -> None:
    shutil.copy(folder / "7" / FILE, folder / "7" / "mp_rank_01_model_states.pt")


def exaggerate(folder: Path) -> None:
    """A tensor of terabytes over a storage of four bytes."""
    torch.save({"module": {"a": torch.zeros(1).expand(1 << 40)}}, folder / "7" / FILE)


def shorten(folder: Path) -> None:
    """A well-formed file with a record that is shorter than its tensor."""
    with zipfile.ZipFile(folder / "7" / FILE) as old, zipfile.ZipFile(folder / "new", "w") as new:
        for name in old.namelist():
            longest = name == max(old.namelist(), key=lambda n: old.getinfo(n).file_size)
            new.writestr(name, bytes(8) if longest else old.read(name))
    (folder / "new").replace(folder / "7" / FILE)


def compress(folder: Path) -> None:
    with zipfile.ZipFile(folder / "7" / FILE) as old, zipfile.ZipFile(folder / "new", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    (folder / "new").replace(folder / "7" / FILE)


LAST = "transformer.final_layernorm.bias"
HARMS = [
    (lambda f: (f / "latest").unlink(), "no file named latest"),
    (lambda f: (f / "latest").write_text("../../etc"), "where a number or 'release' belongs"),
    (lambda f: (f / "model_config.json").unlink(), "without model_config.json"),
    (lambda f: (f / "model_config.json").write_text("{"), "model_config.json: it is not JSON"),
    (lambda f: (f / "model_config.json").write_text("[1]"), "model_config.json is damaged"),
    (lambda f: (f / "7" / FILE).unlink(), "the files are: none"),
    (reconfigure(model_parallel_size=2), "should be 2 rank"),
    (reconfigure(model_parallel_size="x"), "should be x rank"),
    (add_rank, "should be 1 rank"),
    (truncate, "damaged"),
    (compress, "compressed inside"),
    (shorten, "larger than what it holds|damaged"),
    (exaggerate, "larger than what it holds"),
    (reconfigure(model_class="CogView3"), "is CogView3 of stage 1; what can be converted"),
    (reconfigure(model_class=["CogVideoModel"]), "what can be converted"),
    (reconfigure(cogvideo_stage=3), "of stage 3; what can be converted"),
    (reconfigure(cogvideo_stage=2), "window_size -1 does not divide 2"),
    (reconfigure(hidden_size=16, num_attention_heads=None), "num_attention_heads is missing, for a width"),
    (reconfigure(layout=[6, 6 + 10**20, 6 + 3 * 10**20]), "whole square frames"),
    (reconfigure(num_layers=3), "layers.2.attention.dense.bias is missing"),
    (reconfigure(num_layers=1), "layers.1.attention.dense.bias is unknown"),
    (reconfigure(num_layers=10**5), "is missing"),
    (reconfigure(num_layers=10**12), "num_layers is 1000000000000"),
    (reconfigure(num_layers="2"), "num_layers is '2', where a size"),
    (reconfigure(hidden_size=16), r"word_embeddings.weight is \[40, 8\]"),
    (reconfigure(hidden_size=2 * 10**15), "hidden_size is 2000000"),
    (reconfigure(num_attention_heads=3), "3 heads do not divide 8"),
    (reconfigure(vocab_size=41), r"word_embeddings.weight is \[40, 8\]"),
    (reconfigure(layout=[6, 11, 21]), "whole square frames"),
    (reconfigure(layout=[6, 10, 50]), r"\[20, 8\] .* does not make the \[40, 8\]"),
    (reconfigure(layernorm_order="pre"), "not sandwich"),
    (with_states(lambda s: s.pop("mixins.attention_plus.dense.1.bias")), "plus.dense.1.bias is missing"),
    (with_states(lambda s: s.update({"transformer.extra": torch.zeros(2)})), "transformer.extra is unknown"),
    (with_states(lambda s: s.update({LAST: torch.zeros(9)})), r"\[9\]"),
    (with_states(lambda s: s.update({LAST: "x"})), "not plain tensors"),
    (with_states(lambda s: s.update({LAST: torch.zeros(8).int()})), "not plain"),
]


@pytest.mark.parametrize("harm, message", HARMS, ids=[message[:40] for _, message in HARMS])
def test_bad_checkpoints_are_refused(tmp_path, harm, message):
    source, _ = small(tmp_path)
    harm(source)
    with pytest.raises(ValueError, match=message):
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.place,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, legacy):
    source, states = small(tmp_path)
    Evil.place = str(tmp_path / "pwned")
    evil = {"module": states, "x": Evil()}
    torch.save(evil, source / "7" / FILE, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="is refused, .* holds more than tensors: .*mkdir"):
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    (source / "7" / FILE).write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError):
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_numpy_in_a_pickle_is_not_even_built(tmp_path):
    """A forged numpy dtype could point anywhere; what stands for numpy keeps nothing."""
    saved = {
        "module": {"a": torch.ones(3)},
        "np_rng_state": np.random.get_state(),
        "loss": np.float32(3),
        "random_rng_state": random.getstate(),
        "many": {1, 2},
        "torch_rng_state": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "a.pt")
    assert torch.equal(read_states(tmp_path / "a.pt")["a"], torch.ones(3))
    with torch.serialization.safe_globals(IGNORED):
        loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert isinstance(loaded["np_rng_state"][1], Ignored) and not vars(loaded["loss"])


def test_files_of_old_torch_are_read(tmp_path):
    source, states = small(tmp_path)
    torch.save({"module": states}, source / "7" / FILE, _use_new_zipfile_serialization=False)
    convert.convert_sat([source], tmp_path / "out", 20, quiet)
    embedded = ModelFolder(tmp_path / "out").load("base").embed.weight
    assert torch.equal(embedded, states["transformer.word_embeddings.weight"])


# -- zips


def zipped(folder: Path, change=lambda archive: None) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
        change(archive)
    return file


def link(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("small/latest")
    entry.external_attr = 0o120777 << 16
    archive.writestr(entry, "/etc/passwd")


def rot(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def test_a_zip_is_as_good_as_its_folder(tmp_path):
    source, _ = small(tmp_path)
    convert.convert_sat([source], tmp_path / "a", 20, quiet)
    convert.convert_sat([zipped(source)], tmp_path / "b", 20, quiet)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.writestr("../../evil/latest", "7"), "leads out of the folder"),
        (lambda a: a.writestr("/evil", "7"), "leads out of the folder"),
        (lambda a: a.writestr("C:\\evil", "7"), "leads out of the folder"),
        (lambda a: a.writestr("a\\..\\..\\evil", "7"), "leads out of the folder"),
        (link, "latest says '/etc/passwd', where a number"),
        (lambda a: a.writestr("small/8/mp_rank_00_model_states.pt", bytes(50_000_000)), "zip bomb"),
        (lambda a: a.writestr("other/latest", "7"), "holds 2 SAT checkpoints"),
    ],
)
def test_bad_zips_are_refused(tmp_path, change, message):
    source, _ = small(tmp_path / "work")
    file = zipped(source, change)
    with pytest.raises(ValueError, match=message):
        convert.convert_sat([file], tmp_path / "out", 20, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_damaged_zip_is_refused(tmp_path):
    file = zipped(small(tmp_path)[0])
    rot(file)
    with pytest.raises(ValueError, match="damaged"):
        convert.convert_sat([file], tmp_path / "out", 20, quiet)


# -- the place of the output


def test_too_little_disk_is_said_first(tmp_path, monkeypatch):
    source, _ = small(tmp_path)
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for one in (source, zipped(source)):
        with pytest.raises(ValueError, match="GB are free"):
            convert.convert_sat([one], tmp_path / "out", 20, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.zip"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    source, _ = small(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not the output of a conversion"):
        convert.convert_sat([source], tmp_path / "out", 20, quiet)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_killed_conversion_can_be_started_again(tmp_path):
    source, _ = small(tmp_path)
    killed = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from cogvideo.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as part:\n"
        "    (part / 'base.safetensors').write_bytes(b'half')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", killed, tmp_path / "out"])
    assert len([*tmp_path.iterdir()]) == 2
    convert.convert_sat([source], tmp_path / "out", 20, quiet)
    ModelFolder(tmp_path / "out").load("base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


# -- icetk


def write_icetk(folder: Path) -> Path:
    """A folder as icetk keeps it: the golden image tokenizer, and a text model of the same construction."""
    folder.mkdir()
    torch.save({"module": read("weights_vqvae_tiny")}, folder / "ice_image.pt")
    things, ways = ("dog", "cat", "boat"), ("left", "right")
    captions = [f"a {thing} runs to the {way} 一只狗在跑" for thing in things for way in ways]
    model = train_text(captions * 20, 400)
    # as icetk's: <pad> is piece 3, start-of-image is not in it
    (folder / "ice_text.model").write_bytes(model.replace(b"<start_of_image>", b"<start_of_nobody"))
    np.save(folder / "cluster_label2.npy", np.arange(128) % 7)
    return folder


@pytest.fixture(scope="module")
def icetk(tmp_path_factory) -> Path:
    return write_icetk(tmp_path_factory.mktemp("icetk") / "models")


def test_icetk_becomes_text_and_tokenizer(icetk, tmp_path):
    convert_icetk(icetk, tmp_path / "out", quiet)
    folder = ModelFolder(tmp_path / "out")
    text, before = folder.text(), TextTokenizer((icetk / "ice_text.model").read_bytes(), 128)
    model = folder.spec().model
    assert len(text) == len(before) + 3 and text.pad == 128 + 3 == model.pad
    assert text.start == 128 + len(before) == model.start  # the first id behind icetk's pieces
    for caption in ("a dog runs", "4.0秒<n>一只猫", "never seen words!"):
        assert text.encode(caption) == before.encode(caption)
    assert np.array_equal(np.load(folder.path / "cluster_labels.npy"), np.arange(128) % 7)
    golden = read("vqvae_tiny")
    ids = folder.load("vqvae").encode(golden["in.image01"])
    assert torch.equal(ids, golden["out.ids_compress8"].flatten(1))


@pytest.mark.parametrize("icetk_first", [True, False])
def test_icetk_and_checkpoints_meet_in_one_folder(icetk, tmp_path, icetk_first):
    source, _ = small(tmp_path, vocab_size=700)
    steps = [
        lambda: convert_icetk(icetk, tmp_path / "out", quiet),
        lambda: convert.convert_sat([source], tmp_path / "out", None if icetk_first else 128, quiet),
    ]
    for step in steps if icetk_first else steps[::-1]:
        step()
    folder = ModelFolder(tmp_path / "out")
    spec, text = folder.spec(), folder.text()
    assert (spec.model.vocab, spec.model.codes, spec.model.start) == (700, 128, text.start)
    assert spec.vqvae.grid == spec.model.grid == 2
    assert all(folder.load(part) is not None for part in ("vqvae", "base", "stage1"))


def test_icetk_of_another_model_is_refused(icetk, tmp_path):
    source, _ = small(tmp_path)
    convert.convert_sat([source], tmp_path / "out", 20, quiet)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="icetk has 128 image codes"):
        convert_icetk(icetk, tmp_path / "out", quiet)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "ice_text.model").unlink(), "ice_text.model is missing"),
        (lambda f: (f / "ice_image.pt").unlink(), "ice_image.pt is missing"),
        (lambda f: (f / "ice_text.model").write_bytes(b"nothing"), "ice_text.model is missing, damaged"),
        (lambda f: (f / "cluster_label2.npy").write_bytes(b"nothing"), "cluster_label2.npy is damaged"),
        (lambda f: np.save(f / "cluster_label2.npy", np.arange(5)), "to each of 128 codes"),
        (lambda f: torch.save({"module": {}}, f / "ice_image.pt"), "not icetk's image tokenizer"),
    ],
)
def test_bad_icetk_files_are_refused(icetk, tmp_path, harm, message):
    folder = shutil.copytree(icetk, tmp_path / "icetk")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        convert_icetk(folder, tmp_path / "out", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["icetk"]


def test_the_command_line(tmp_path):
    small(tmp_path)
    small(tmp_path, "sr", **UPSCALES)
    command = [sys.executable, "-m", "cogvideo", "convert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    assert run("sat", "small", "out", "--codes", "20").returncode == 0
    assert "stored once" in run("cogview2-dsr", "sr", "out").stdout
    for arguments in (["sat", "small"], ["sat", "nowhere", "out2"], ["icetk", "small", "small", "out2"]):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("cogvideo: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small", "sr"]


WATCHED = """
import sys, threading, time
from pathlib import Path
from cogvideo.convert import cogvideo as convert
import torch

def held():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024

little, large, out = map(Path, sys.argv[1:])
convert.convert_sat([little], out / "little", 20, print)  # torch imports much when it is first needed
most = before = held()
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert.convert_sat([large], out / "large", 20, print)
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_conversion_holds_a_few_tensors_at_a_time(tmp_path):
    """Also where those of two ranks are put together."""
    made = {}
    for size in (8, 512):
        _, states = small(tmp_path, f"{size}", num_layers=4, hidden_size=size)
        described = json.loads((tmp_path / f"{size}" / "model_config.json").read_text())
        sat(tmp_path / f"{size}-2", split(states, 2), **{**described, "model_parallel_size": 2})
        made[size] = [4 * tensor.numel() for tensor in states.values()]
    largest = max(made[512])
    assert sum(made[512]) > 15 * largest
    for ranks in ("", "-2"):
        (out := tmp_path / f"out{ranks}").mkdir()
        command = [sys.executable, "-c", WATCHED, tmp_path / f"8{ranks}", tmp_path / f"512{ranks}", out]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(run.stdout.split()[-1]) < 4 * largest
