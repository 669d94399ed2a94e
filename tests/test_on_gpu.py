"""The training program for one GPU computes what the package computes: here on the CPU, in float32."""

from dataclasses import replace

import pytest
import torch

from cogvideo.data.tinyworld.canvas import Canvas
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.train import losses
from scripts import on_gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def canvas():
    return Canvas(192)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped model's text and tokenizer, and the size of small token models to be made."""
    source = ModelFolder(find_model("tiny"))
    target = ModelFolder(tmp_path_factory.mktemp("model"))
    spec = source.spec()
    spec = replace(spec, model=replace(spec.model, layers=2, width=96, heads=2))
    target.write_config(replace(source.config, spec=spec))
    target.write_text(source.text().model)
    target.save("vqvae", source.load("vqvae"))
    return target.path


@pytest.fixture
def trainer(monkeypatch, canvas, folder, request):
    monkeypatch.setattr(on_gpu, "HALF", torch.float32)
    plan = replace(on_gpu.PLANS[request.param], batch=2, crop_share=0.5)
    made = on_gpu.Trainer(folder, plan, canvas, CPU, 0, False, 1)
    torch.manual_seed(0)
    for state in (made.base, made.more or {}):
        for value in state.values():  # no part does nothing any more
            value.add_(0.02 * torch.randn_like(value))
    made.learner = on_gpu.Learner(made.base if made.more is None else made.more)
    made.fixed = None if made.more is None else made.base
    return made


def drawn(trainer):
    rows, ids, _ = next(trainer.loader)
    chances = {name: numbers.uniform_() for name, numbers in trainer.chances().items()}
    return trainer.prepare(rows, ids, chances)


@pytest.mark.parametrize("trainer", ["base", "stage1", "stage2"], indirect=True)
@pytest.mark.parametrize("crop_share", [False, True])
def test_loss_and_gradients_are_those_of_the_package(trainer, crop_share):
    base = Base(trainer.config)
    base.load_state_dict(trainer.base)
    learnt = base
    if trainer.more is not None:
        learnt = TemporalChannel(trainer.config, trainer.model.window)
        learnt.load_state_dict(trainer.more)
    model = DualChannelTransformer(base, None if learnt is base else learnt)

    ids, codes, context, weights, cover, uniform = drawn(trainer)
    layout, corners, maps = trainer.layout, None, [x.flatten(2) for x in (codes, context, weights)]
    if crop_share:
        layout = trainer.small
        corners = on_gpu.corners_of(cover, trainer.side, trainer.model.window or 1, uniform)
        whole = (layout.grid * 2,) * 2
        maps = [on_gpu.window(x.unflatten(2, whole), corners, trainer.side) for x in maps]

    seen = trainer.learner.seen
    states = (seen, None) if learnt is base else (trainer.fixed, seen)
    loss = trainer.model.loss(*states, ids, *maps, layout, corners)
    right, _ = losses.token_loss(model, layout, ids, *maps, corners)
    assert float(loss.detach()) == pytest.approx(float(right.detach()), abs=1e-5)

    loss.backward()
    right.backward()
    for name, p in learnt.named_parameters():
        if p.grad is not None:
            assert (p.grad - seen[name].grad).norm() <= 1e-4 * p.grad.norm() + 1e-8, name


@pytest.mark.parametrize("trainer", ["base"], indirect=True)
def test_a_window_holds_the_object(trainer):
    *_, cover, uniform = drawn(trainer)
    corners = on_gpu.corners_of(cover, trainer.side, 1, uniform)
    kept = on_gpu.window(cover, corners, trainer.side)
    for mine, whole in zip(kept, cover):
        lines = (whole.amax(0) > 0.05).nonzero()
        fits = len(lines) and int((lines.amax(0) - lines.amin(0)).max()) < trainer.side
        if fits:
            assert float(mine.sum()) >= 0.9 * float(whole.sum())


@pytest.mark.parametrize("trainer", ["base"], indirect=True)
def test_a_step_learns_and_is_saved(trainer, tmp_path):
    run = on_gpu.Replay(trainer)
    batch = next(trainer.loader)
    losses = [float(run(batch, 3e-3)[0]) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05
    trainer.save(tmp_path)
    on_gpu.divide(tmp_path, limit=2**20)
    parts = sorted(tmp_path.glob("base.*.safetensors"))
    kept = {name for part in parts for name in on_gpu.load_file(part)}
    assert len(parts) > 1 and kept == trainer.base.keys()


def test_muon_takes_the_steps_of_torch():
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 4), (8, 4), (4, 4), (4, 16))
    mine = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    right = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    muon = on_gpu.Muon(mine)
    torchs = torch.optim.Muon(right, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(mine, right):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step(torch.tensor(0.01))
        torchs.step()
    for a, b in zip(mine, right):
        assert torch.allclose(a, b, atol=1e-6)
