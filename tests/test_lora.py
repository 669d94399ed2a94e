"""Low-rank adapters: training changes nothing else, and generation computes what training saw."""

import dataclasses
import shutil
import sys

import pytest
import torch
from torch import nn

from cogvideo import CogVideo, cli
from cogvideo.data.tinyworld import TinyWorld
from cogvideo.generate.int8 import Int8Linear, join, pack
from cogvideo.model import lora, presets
from cogvideo.model.folder import ModelError, ModelFolder, read_state, write_state
from cogvideo.model.lora import Adapter, Factors, LoraLinear
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.train import inherit, loop, recipes
from cogvideo.train.preview import probe
from cogvideo.train.run import Options, Run

PROMPTS = ["a dog runs to the right", "a cat spins in the snow"]


def phase(name, **changes):
    """A phase of the recipe of adapters for the nano model."""
    row = recipes.of_adapters(recipes.find("tiny")).phase(name)
    clips = dataclasses.replace(row.clips, sizes=(16,), cover=4)
    small = dict(steps=6, batch=2, warmup=1, precision="float32", clips=clips, lr=0.02)
    return dataclasses.replace(row, **{**small, **changes})


def train(out, world, init, *phases, **options):
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=phases)
    chosen = Options(quiet=True, init=init and ModelFolder(init), **{"lora": 2, **options})
    return loop.train(Run(recipe, out, world, presets.find("nano"), list(phases), chosen))


@pytest.fixture(scope="module", autouse=True)
def _few_captions():
    before = inherit.CAPTIONS
    inherit.CAPTIONS = 1000
    yield
    inherit.CAPTIONS = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world, nano):
    """A run of three phases, with sheets that compare."""
    out = tmp_path_factory.mktemp("lora")
    phases = [phase(name) for name in ("image", "stage1", "stage2")]
    train(out, world, nano, *phases, probe=probe, probe_every=3)
    return out


def merged(nano, adapters, path):
    """The model folder with adapters added to its weights."""
    shutil.copytree(nano, path)
    folder = ModelFolder(path)
    for name in ("base", "stage1", "stage2"):
        part = folder.load(name)
        lora.merge(part, lora.weighted(adapters, name))
        folder.save(name, part)
    return path


def codes(pipe):
    """Generated codes [B, F, N] of a round of interpolation."""
    return pipe.interpolate(pipe.keyframes(PROMPTS, [1, 2])).codes


def test_training_writes_an_adapter_and_leaves_the_model_as_it_was(trained, nano):
    adapter = Adapter.load(trained)
    assert adapter.parts == {"base", "stage1", "stage2"}
    assert adapter.about["rank"] == adapter.about["alpha"] == "2" and "dog" in adapter.words
    spec = presets.find("nano")
    linear = [name for name, module in spec.build("stage1").named_modules() if isinstance(module, nn.Linear)]
    assert {f"stage1.{name}" for name in linear} == {x for x in adapter.layers() if x.startswith("stage1")}
    for name in ("base", "stage1", "stage2"):
        before = ModelFolder(nano).load(name).state_dict()
        after = ModelFolder(trained / "model").load(name).state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert adapter.relative_change(ModelFolder(nano).load(name), name) > 1e-3
    for row in ("image", "stage1", "stage2"):
        assert len(list((trained / row / "strips").iterdir())) == 2  # without and with it


def test_only_the_adapter_learns_and_at_first_it_changes_nothing():
    spec = presets.find("nano")
    base = spec.build("base")
    base.init_weights(torch.Generator().manual_seed(0))
    model = DualChannelTransformer(base)
    tokens = torch.randint(0, 100, (2, spec.model.text_len + 16))
    layout = spec.model.layout("image")
    before = model(tokens, layout)
    lora.attach(base, 3, seed=0)
    after = model(tokens, layout)
    assert torch.equal(before, after)
    after.sum().backward()
    learnt = {name for name, p in base.named_parameters() if p.grad is not None}
    assert learnt and all("lora_" in name for name in learnt)
    for layer in lora.layers_of(base).values():
        nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    changed = model(tokens, layout)
    assert not torch.allclose(changed, before)
    with lora.inactive([base]):
        assert torch.equal(model(tokens, layout), before)
    assert torch.equal(model(tokens, layout), changed)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_generation_with_an_adapter_is_that_of_the_merged_model(trained, nano, tmp_path, dtype):
    pipe = CogVideo.from_pretrained(nano, dtype=dtype)
    plain = codes(pipe)
    adapter = Adapter.load(trained)
    name = pipe.load_lora_weights(trained)
    adapted = codes(pipe)
    assert not torch.equal(adapted, plain)
    if dtype == "float32":
        whole = CogVideo.from_pretrained(merged(nano, [(adapter, 1.0)], tmp_path / "merged"), dtype=dtype)
        assert torch.equal(codes(whole), adapted)
    pipe.set_adapters([name], [0.0])
    assert torch.equal(codes(pipe), plain)
    pipe.set_adapters(name, 1.0)
    assert torch.equal(codes(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(codes(pipe), plain) and pipe.active_adapters == {}


def test_several_adapters_add_up_and_fused_ones_stay(trained, nano, tmp_path):
    adapter = Adapter.load(trained)
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    pipe.load_lora_weights(trained, "a")
    pipe.load_lora_weights(trained / "lora" / lora.FILE, "b")
    pipe.set_adapters(["a", "b"], [0.5, -0.25])
    assert pipe.active_adapters == {"a": 0.5, "b": -0.25}
    both = codes(pipe)
    whole = CogVideo.from_pretrained(merged(nano, [(adapter, 0.25)], tmp_path / "quarter"), dtype="float32")
    assert torch.equal(codes(whole), both)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(codes(pipe), both)
    assert "dog" in pipe.prompts.words


def test_int8_keeps_a_change_that_rounding_would_lose():
    """A change of a hundredth of a rounding step goes through, beside the rounded weights."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40)
    x = torch.randn(3, 24, generator=generator)
    step = linear.weight.abs().max() / 127
    down = torch.randn(2, 24, generator=generator)
    up = torch.randn(40, 2, generator=generator) * step / 100
    rounded = Int8Linear(linear.weight, linear.bias)
    holder = nn.Sequential(linear)
    pack(holder, "int8", {"0": Factors(down, up)})
    change = holder(x) - rounded(x)
    assert torch.allclose(change, x @ down.T @ up.T, atol=1e-6)
    assert change.abs().max() > 0


def test_joined_channels_compute_what_separate_ones_do():
    """An int8 stage with adapters on both its channels: joined equals separate, up to rounding."""
    spec = presets.find("nano")
    generator = torch.Generator().manual_seed(0)
    base = Base(spec.model)
    channel = TemporalChannel(spec.model, 0)
    adapters = {}
    for name, part in (("base", base), ("stage1", channel)):
        part.init_weights(generator)
        for p in part.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
        lora.attach(part, 3, seed=4)
        for layer in lora.layers_of(part).values():
            layer.lora_B.weight.data.normal_(std=0.1, generator=generator)
        adapters[name] = Adapter.of({name: part}).factors(name)
        for module in list(part.modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, LoraLinear):
                    setattr(module, child, layer.linear)
    tokens = torch.randint(0, 60, (2, spec.model.text_len + 5 * 16), generator=generator)
    layout = spec.model.layout("stage1")
    with torch.inference_mode():
        plain = DualChannelTransformer(base, channel).eval()(tokens, layout)
        pack(base, "int8", adapters["base"])
        pack(channel, "int8", adapters["stage1"])
        model = DualChannelTransformer(base, channel).eval()
        separate = model(tokens, layout)
        joined = join(model)(tokens, layout)
    scale = separate.std()
    assert (plain - separate).abs().mean() > 0.1 * scale  # the adapters matter
    assert (joined - separate).abs().mean() < 0.05 * scale


def test_a_resumed_run_makes_the_same_adapter(trained, world, nano, tmp_path):
    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    phases = [phase(name) for name in ("image", "stage1", "stage2")]
    for _ in range(2):  # of the first phase and, resumed, of the second
        with pytest.raises(Killed):
            train(tmp_path, world, nano, *phases, save_every=3, probe=kill, probe_every=4)
        shutil.rmtree(tmp_path / "image" / "strips", ignore_errors=True)
        train(tmp_path, world, nano, *phases[:1], save_every=3)
    train(tmp_path, world, nano, *phases, save_every=3)
    one, other = (Adapter.load(folder).tensors for folder in (trained, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_processes_train_the_adapter_that_one_trains(trained, world, nano, tmp_path):
    train(tmp_path, world, nano, phase("image"), processes=2)
    one = Adapter.load(trained).factors("base")
    two = Adapter.load(tmp_path).factors("base")
    for name in one:
        assert torch.allclose(one[name].up @ one[name].down, two[name].up @ two[name].down, atol=2e-3)


def test_half_of_each_batch_can_be_rehearsed(world, nano, tmp_path):
    """Clips of another world change what is learnt, the same way in one process and in two."""
    known = TinyWorld(world.names[:2], seed=9)
    rows = [phase("image", batch=4, steps=3)]
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=tuple(rows))
    options = Options(quiet=True, init=ModelFolder(nano), lora=2)
    factors = []
    for name, processes, rehearsal in (("alone", 1, None), ("one", 1, known), ("two", 2, known)):
        chosen = dataclasses.replace(options, processes=processes)
        loop.train(Run(recipe, tmp_path / name, world, presets.find("nano"), rows, chosen, rehearsal))
        factors.append(Adapter.load(tmp_path / name).factors("base"))
    alone, one, two = factors
    for name in one:
        assert torch.allclose(one[name].up @ one[name].down, two[name].up @ two[name].down, atol=2e-3)
    assert any(not torch.allclose(alone[name].up, one[name].up, atol=2e-3) for name in one)

    rows = [dataclasses.replace(rows[0], batch=1)]
    with pytest.raises(
        ValueError, match="--rehearse takes half of each batch; choose --image.batch 2 or more"
    ):
        loop.train(Run(recipe, tmp_path / "odd", world, presets.find("nano"), rows, options, known))


def test_kept_tokens_belong_to_their_adapters(trained, nano, tmp_path):
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    ask = dict(seed=3, progress=False, keep=tmp_path)
    plain = pipe(PROMPTS[0], **ask)[0].frames
    pipe.load_lora_weights(trained)
    adapted = pipe(PROMPTS[0], **ask)[0].frames
    assert (plain != adapted).any()
    pipe.unload_lora_weights()
    assert (pipe(PROMPTS[0], **ask)[0].frames == plain).all()


def test_what_cannot_be_adapted_is_refused(world, nano, nano_large, tmp_path, trained):
    with pytest.raises(ValueError, match="give it as --init"):
        train(tmp_path / "a", world, None, phase("image"))
    with pytest.raises(ValueError, match="tokenizer does not train; choose another recipe"):
        train(tmp_path / "b", world, nano, dataclasses.replace(recipes.find("tiny").phase("tokenizer")))
    with pytest.raises(ValueError, match="no transformer of codes to adapt; choose tiny"):
        recipes.of_adapters(recipes.find("direct-tiny"))
    with pytest.raises(ValueError, match="--lora must be from 1 to 1024"):
        Options(lora=-1)
    with pytest.raises(ValueError, match="goes with neither --shard nor --mesh"):
        Options(lora=2, shard=True)
    with pytest.raises(ValueError, match="changes nothing"):
        train(tmp_path / "c", world, nano, phase("image", lr=0.0))
    assert not (tmp_path / "c" / "lora").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, "has no tensor whose name ends in"),
        (lambda t: {**t, "base.embed.weight": torch.zeros(2)}, "unknown tensor base.embed.weight"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lacks base.blocks.0"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "not finite"),
        (lambda t: {k: v[:, :1] if "lora_B" in k else v for k, v in t.items()}, "has shapes"),
        (lambda t: {k: v[:, :3] if "lora_A" in k else v for k, v in t.items()}, "is of another model"),
        (lambda t: {k.replace("base.", "basis."): v for k, v in t.items()}, "has no layer basis"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(trained, nano, tmp_path, change, message):
    tensors = read_state(lora.find(trained))
    write_state(tmp_path / lora.FILE, change(tensors), {"alpha": "2"})
    pipe = CogVideo.from_pretrained(nano)
    with pytest.raises(ModelError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert pipe.active_adapters == {}


def test_wrong_names_are_answered_with_the_right_ones(trained, nano, tmp_path):
    pipe = CogVideo.from_pretrained(nano)
    pipe.load_lora_weights(trained, "mine")
    with pytest.raises(ValueError, match="no adapter 'other'; those loaded are mine"):
        pipe.set_adapters("other")
    with pytest.raises(ValueError, match="there is an adapter 'mine' already"):
        pipe.load_lora_weights(trained, "mine")
    with pytest.raises(ValueError, match="2 adapters need as many weights"):
        pipe.set_adapters(["mine", "mine"], [1.0])
    with pytest.raises(ModelError, match="there is no adapter at"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / lora.FILE).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="is damaged"):
        pipe.load_lora_weights(tmp_path)


def test_the_command_generates_with_weighted_adapters(trained, nano, tmp_path, monkeypatch, capsys):
    def generate(*more):
        out = tmp_path / "out.png"
        command = ["cogvideo", "generate", PROMPTS[0], "-o", str(out), "--model", str(nano), "--seed", "1"]
        monkeypatch.setattr(sys, "argv", [*command, *more, "--quiet"])
        cli.main()
        return out.read_bytes()

    plain = generate()
    assert generate("--lora", str(trained)) != plain
    assert generate("--lora", f"{trained}:0") == plain
    assert generate("--lora", f"{trained}:0.5", f"{trained}:-0.5") == plain
    with pytest.raises(SystemExit):
        generate("--lora", "nowhere")
    assert "there is no adapter at nowhere" in capsys.readouterr().err
