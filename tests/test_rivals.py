"""The rivals of a contest: causal, resumable, on equal terms, judged by what they write."""

import json

import pytest
import torch

from benchmarks.rivals import __main__ as contest
from benchmarks.rivals.ablations import ABLATIONS
from benchmarks.rivals.contest import Size, prompts, rendered
from benchmarks.rivals.ours import Ours
from benchmarks.rivals.raster import Raster, RasterGPT
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
    from benchmarks.rivals.raster import WholeView

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
    """Three steps in one go, and in two runs: the same weights."""
    clock = iter(float(second) for second in range(0, 1000, 10))
    monkeypatch.setattr("benchmarks.rivals.raster.time.process_time", lambda: next(clock))  # 10 s a step
    monkeypatch.setattr("benchmarks.rivals.raster.SAVE_SECONDS", 5.0)
    size = Size(layers=1, width=64, sprites=4)
    whole = Raster(size, tmp_path / "whole")
    whole.train(0.5, None, 0)
    parts = Raster(size, tmp_path / "parts")

    class Killed(Exception):
        pass

    step = Raster._step

    def killed(self, model, optims, vqvae, text, world, number):
        if number == 2:
            raise Killed
        return step(self, model, optims, vqvae, text, world, number)

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
        if issubclass(kind, Ours):
            assert sum(part.share for part in kind.plan) == 1


@pytest.mark.parametrize("kind", [Ours, *ABLATIONS], ids=lambda kind: kind.name)
def test_every_variant_trains_and_generates_33_frames(kind, tmp_path, monkeypatch):
    """A few steps at nano size; a second call has nothing left to do."""
    monkeypatch.setattr("benchmarks.rivals.ours.MEASURED_STEPS", 1)
    monkeypatch.setattr("cogvideo.train.inherit.CAPTIONS", 500)
    system = kind(Size(layers=1, width=64, sprites=4), tmp_path / kind.name)
    system.train(0.001, None, 1)
    spent = system.minutes
    system.train(0.001, None, 1)
    assert 0 < spent <= system.minutes < spent + 0.2
    clips = system.generate(["a dog runs to the right"], [3])
    assert clips[0].frames.shape == (33, 192, 192, 3) and clips[0].fps == 8
    assert contest.trained(system.size, tmp_path).keys() >= {kind.name}


def test_the_table_has_a_row_for_each_system():
    values = dict.fromkeys(contest.COLUMNS, 1.0)
    text = contest.table(
        {"ours": {**values, "parameters": 2.0, "minutes": 3.0, "seconds": 4.0}, "rendered": values}
    )
    assert text.count("\n") == 3 and "| ours | 1.0 |" in text and json.dumps(values)
