"""The rivals of a contest: causal, resumable, on equal terms, judged by what they write."""

import json
import os

import pytest
import torch

from benchmarks.rivals import __main__ as contest
from benchmarks.rivals.ablations import ABLATIONS, Unwindowed
from benchmarks.rivals.contest import Size, prompts, rendered
from benchmarks.rivals.direct import Direct
from benchmarks.rivals.ours import Ours
from benchmarks.rivals.phased import Phased
from benchmarks.rivals.raster import Raster, RasterGPT, WholeView
from cogvideo.generate.sampling import Sampling, uniforms
from cogvideo.model.transformer import TransformerConfig

TINY = TransformerConfig(
    layers=2,
    width=32,
    heads=2,
    vocab=90,
    codes=40,
    pad=41,
    start=42,
    text_len=5,
    grid=3,
    rotary=True,
    qk_norm=True,
    norm="pre",
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = RasterGPT(TINY, frames=3)
    made.base.init_weights(torch.Generator().manual_seed(1))
    return made


def test_the_raster_model_sees_the_codes_before_each_and_no_other(model):
    text = torch.randint(43, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    codes = torch.randint(40, (1, 27), generator=torch.Generator().manual_seed(3))
    embedded = (
        model.embed(text, torch.cat((torch.full((1, 1), 42), codes[:, :-1]), 1)).detach().requires_grad_()
    )
    x = embedded
    view = WholeView(model.rotary()[:, : x.shape[1]], 5)
    for block in model.base.blocks:
        x = block(x, view)
    x[0, 5 + 10].sum().backward()  # predicts code 10
    reached = embedded.grad[0].abs().sum(1) > 0
    assert reached[:16].all() and not reached[16:].any()


def test_token_by_token_equals_the_whole_pass(model):
    text = torch.randint(43, 90, (2, 5), generator=torch.Generator().manual_seed(4))
    uniform = uniforms([1, 2], 27, 0)
    codes = model.eval().generate(text, Sampling(temperature=0.0), uniform)
    likeliest = model(text, codes).argmax(-1)
    assert torch.equal(codes, likeliest)
    alone = model.generate(text[1:], Sampling(temperature=1.0, top_k=5), uniform[1:])
    both = model.generate(text, Sampling(temperature=1.0, top_k=5), uniform)
    assert torch.equal(alone[0], both[1])


def test_no_prompt_is_of_a_composition_that_is_trained():
    size = Size(sprites=12)
    rows = prompts(size.names, 40)
    assert all(row.scene.held_out for row in rows) and {row.scene.sprite for row in rows} <= set(size.names)
    assert rows == prompts(size.names, 60)[:40]
    clip = rendered(rows[:1], 48)[0]
    assert clip.frames.shape == (33, 48, 48, 3) and clip.caption == rows[0].caption


def test_a_training_that_was_killed_resumes_with_the_time_it_had(tmp_path, monkeypatch):
    """Three steps of one clip in one go, and in two runs: the same weights."""
    clock = iter(float(second) for second in range(0, 1000, 10))
    monkeypatch.setattr("benchmarks.rivals.stepwise.time.process_time", lambda: next(clock))  # 10 s a step
    monkeypatch.setattr("benchmarks.rivals.stepwise.SAVE_SECONDS", 5.0)
    monkeypatch.setattr(Raster, "batch", 1)
    monkeypatch.setattr(Raster, "fresh", 1)
    size = Size(layers=1, width=64, sprites=4)
    whole = Raster(size, tmp_path / "whole")
    whole.train(0.5, None, 0)
    parts = Raster(size, tmp_path / "parts")

    class Killed(Exception):
        pass

    step = Raster._step

    def killed(self, model, optims, world, number):
        if number == 2:
            raise Killed
        return step(self, model, optims, world, number)

    monkeypatch.setattr(Raster, "_step", killed)
    with pytest.raises(Killed):
        parts.train(0.5, None, 0)
    monkeypatch.setattr(Raster, "_step", step)
    parts.train(0.5, None, 0)
    states = [torch.load(s.out / "state.pt", weights_only=True) for s in (whole, parts)]
    assert states[0]["step"] == states[1]["step"] == 3 and whole.minutes == parts.minutes == 0.5
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_systems_of_equal_size_are_of_equal_size_but_for_the_channels(tmp_path):
    size = Size(layers=2, width=64)
    base = Raster(size, tmp_path).parameters
    ours = Ours(size, tmp_path).parameters
    assert base < ours < 3 * base
    for kind in contest.SYSTEMS.values():
        if issubclass(kind, Phased):
            assert sum(part.share for part in kind.plan) == 1


@pytest.fixture
def quick(monkeypatch, small_batches):
    """Trainings of a few steps of two clips."""
    monkeypatch.setattr("benchmarks.rivals.phased.MEASURED_STEPS", 1)
    monkeypatch.setattr("cogvideo.train.inherit.CAPTIONS", 500)


SLOW = ABLATIONS if "COGVIDEO_SLOW" in os.environ else ()


@pytest.mark.parametrize("kind", [Ours, Direct, *SLOW], ids=lambda kind: kind.name)
def test_every_variant_trains_and_generates_33_frames(kind, tmp_path, quick):
    """A few steps at nano size; a second call has nothing left to do."""
    system = kind(Size(layers=1, width=64, sprites=4), tmp_path / kind.name)
    system.train(0.001, None, 1)
    spent = system.minutes
    system.train(0.001, None, 1)
    assert 0 < spent <= system.minutes < spent + 0.2
    clips = system.generate(["a dog runs to the right"], [3])
    side = 48 if kind is Direct else 192
    assert clips[0].frames.shape == (33, side, side, 3) and clips[0].fps == 8
    assert contest.trained(system.size, tmp_path).keys() >= {kind.name}


def test_an_ablation_begins_with_what_ours_has_trained_on_the_same_terms(tmp_path, quick):
    """The frozen base comes from `ours` with its time, and is trained anew on other terms."""
    size = Size(layers=1, width=64, sprites=4)
    ours = Ours(size, tmp_path / "ours")
    ours.train(0.001, None, 0)
    taken = json.loads((ours.out / "seconds.json").read_text())
    for _ in range(2):  # the second call has nothing left to do
        other = Unwindowed(size, tmp_path / "unwindowed")
        other.train(0.001, None, 0)
        own = json.loads((other.out / "seconds.json").read_text())
        assert own["image"] == taken["image"] and own["stage1"] == taken["stage1"]
    base = "model/base.safetensors"
    assert (ours.out / "stage2" / base).read_bytes() == (other.out / "stage2" / base).read_bytes()
    assert not (other.out / "image").exists() and other.generate(["a dog runs"], [0])

    elsewhere = Unwindowed(size, tmp_path / "unwindowed-seed1")
    elsewhere.train(0.001, None, 1)
    assert (elsewhere.out / "image" / base).exists()


@pytest.mark.parametrize("name", ["diffusion", "phenaki"])
def test_packages_of_others_train_and_resume_and_generate(name, tmp_path, monkeypatch):
    """Where they are installed; alone = in a batch."""
    pytest.importorskip({"diffusion": "diffusers", "phenaki": "phenaki_pytorch"}[name])
    monkeypatch.setattr("benchmarks.rivals.diffusion.STEPS", 2)
    system = contest.SYSTEMS[name](Size(layers=1, width=64, sprites=4), tmp_path / name)
    system.train(0.01, None, 1)
    spent = system.minutes
    system.train(0.01, None, 1)
    assert 0 < spent == system.minutes
    words = ["a dog runs to the right", "a cat spins"]
    both = system.generate(words, [3, 4])
    alone = system.generate(words[1:], [4])
    assert both[1].frames.shape[0] == 33 and both[1].frames.shape[1] >= 96
    difference = abs(both[1].frames.astype(int) - alone[0].frames.astype(int))
    assert difference.mean() < 2  # bfloat16


def test_the_table_has_a_row_for_each_system():
    values = dict.fromkeys(contest.COLUMNS, 1.0)
    text = contest.table(
        {"ours": {**values, "parameters": 2.0, "minutes": 3.0, "seconds": 4.0}, "rendered": values}
    )
    assert text.count("\n") == 3 and "| ours | 1.0 |" in text and json.dumps(values)
