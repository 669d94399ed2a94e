"""The recipe at toy scale: every phase runs, learns, leaves alone what it should, and a killed run goes on as
if uninterrupted."""

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
from data.goldens import DATA

from cogvideo import CogVideo, presets
from cogvideo.preview import probe
from cogvideo.train import inherit, loop, objectives, recipes
from cogvideo.train.losses import LossWeights
from cogvideo.train.optim import learning_rate, optimizers
from cogvideo.train.report import Report, draw_curve
from cogvideo.weights import ModelFolder


def nano_phase(name: str, **changes) -> recipes.Phase:
    """A phase of the tiny recipe for the nano model: two clips a step, 16 px, float32."""
    phase = recipes.find("tiny").phase(name)
    sizes = (16,) if len(phase.cut.sizes) == 1 else (16, 32)
    defaults = dict(
        steps=6, batch=2, warmup=1, precision="float32", cut=dataclasses.replace(phase.cut, sizes=sizes)
    )
    return dataclasses.replace(phase, **{**defaults, **changes})


def run(out, world, *phases, **options) -> ModelFolder:
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=phases)
    return loop.train(recipe, out, world, presets.find("nano"), list(phases), quiet=True, **options)


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Fewer captions for the text model, and a codebook filled at once: seconds instead of minutes."""
    before = inherit.CAPTIONS, objectives.UNQUANTISED
    inherit.CAPTIONS, objectives.UNQUANTISED = 1000, 2
    yield
    inherit.CAPTIONS, objectives.UNQUANTISED = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    out = tmp_path_factory.mktemp("run")
    phases = [nano_phase(name) for name in ("tokenizer", "image", "stage1", "stage2", "refiner")]
    run(out, world, *phases, log_every=2, save_every=3, probe_every=6, probe=probe)
    return out


def test_all_phases_make_a_model_that_generates(trained):
    clips = CogVideo.from_pretrained(trained / "model")("a dog runs to the right", seed=1, progress=False)
    assert clips[0].frames.shape == (33, 32, 32, 3)
    config = ModelFolder(trained / "model").config
    assert list(config["trained"]) == ["tokenizer", "image", "stage1", "stage2", "refiner"]
    assert "dog" in config["words"]


def test_every_phase_reports(trained):
    for name in ("tokenizer", "image", "stage1", "stage2", "refiner"):
        rows = [json.loads(line) for line in (trained / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(row["clips_per_second"] > 0 and row["lr"] > 0 and row["loss"] > 0 for row in rows)
        assert (trained / name / "loss.png").exists()
        assert (trained / name / "strips" / "0000006.png").exists()


@pytest.mark.parametrize("name", ["tokenizer", "image", "stage1"])
def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, world, name):
    whole = nano_phase(name, steps=7)
    results = []
    for stops in ((7,), (3, 5, 7)):
        out = tmp_path / f"{len(stops)}"
        shutil.copytree(trained / "model", out / "model")
        for stop in stops:
            probe_at = Stop(stop) if stop != 7 else None
            with contextlib.suppress(KeyboardInterrupt):
                run(out, world, whole, save_every=1, probe_every=1, probe=probe_at)
        results.append(ModelFolder(out / "model").load(whole.trains[0]).state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_log_that_a_full_disk_cut_off_goes_on(tmp_path):
    whole = Report(tmp_path, "image", 4, 1, every=1, quiet=True)
    for step in range(3):
        whole.step(step, 0.1, {"loss": 1.0 / (step + 1)})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    again = Report(tmp_path, "image", 4, 1, every=1, quiet=True, first=2)
    for step in (2, 3):
        again.step(step, 0.1, {"loss": 0.1})
    draw_curve(log, tmp_path / "loss.png")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.1), (4, 0.1)]


class Stop:
    """A probe that kills the run after some steps, as a user would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, folder, parts, phase, batch, out) -> None:
        if int(out.stem) >= self.step:
            raise KeyboardInterrupt


def test_parts_that_a_phase_does_not_train_stay_as_they_are(trained, tmp_path, world):
    shutil.copytree(trained / "model", tmp_path / "model")
    before = {
        part: (tmp_path / "model" / f"{part}.safetensors").read_bytes()
        for part in ("vqvae", "base", "stage2")
    }
    stage1 = (tmp_path / "model" / "stage1.safetensors").read_bytes()
    run(tmp_path, world, nano_phase("stage1", steps=2, lr=1e-2))
    for part, data in before.items():
        assert (tmp_path / "model" / f"{part}.safetensors").read_bytes() == data
    assert (tmp_path / "model" / "stage1.safetensors").read_bytes() != stage1


@pytest.mark.parametrize("name", ["image", "stage1", "stage2"])
def test_a_few_clips_can_be_learnt_by_heart(trained, world, name):
    """The loss of one batch, seen again and again, falls far: gradients reach what the phase trains."""
    folder, phase = ModelFolder(trained / "model"), nano_phase(name, lr=1e-2, optimizer="adamw")
    parts = {part: folder.load(part) for part in ("vqvae", "base", "stage1", "stage2")}
    for part in phase.trains:
        parts[part].requires_grad_(True)
    model = torch.nn.ModuleDict({part: parts[part] for part in phase.trains})
    (optimizer,) = optimizers(model, "adamw", 0.0, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = phase.lr
    step = phase.objective(parts, folder.text(), phase)
    batch = next(loop.batches(world, phase.cut, 2, seed=0))
    losses = []
    for number in range(80):
        loss, _ = step(batch, number, torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3  # nats a token; embeddings and head of a frozen base stay random


def test_a_share_of_captions_is_dropped_and_keeps_its_duration(trained, world):
    text = ModelFolder(trained / "model").text()
    batch = next(loop.batches(world, nano_phase("image").cut, 200, seed=0))
    rows = objectives.prepare_text(text, batch, 64, 0.25, torch.Generator().manual_seed(0)).tolist()
    plain = [text.pad_left(text.prompt("", seconds), 64) for seconds in batch.durations]
    share = sum(row == empty for row, empty in zip(rows, plain)) / 200
    assert 0.15 < share < 0.35


def test_the_learning_rate_of_the_released_models():
    golden = json.loads((DATA / "lr_schedule.json").read_text())["lr"]
    rates = {i: learning_rate(int(i) - 1, 500_000, 2e-4, 500, 0.0, "cosine") for i in golden}
    assert rates == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize("field, value, message", [
    ("schedule", "linear", "one of trapezoid, cosine"), ("precision", "half", "one of float32, bfloat16"),
    ("batch", 0, "image.batch must be 1 or more"), ("lr", float("nan"), "image.lr must be 0 or more"),
    ("drop", 1.5, "image.drop is a share and must be 1 or less"), ("decay", 7, "image.decay is a share"),
])
def test_what_a_phase_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        nano_phase("image", **{field: value})


@pytest.mark.parametrize("weights, message", [
    ({"perceptual": float("nan")}, "loss.perceptual must be 0 or more, got nan"),
    ({"pixel": -1.0}, "loss.pixel must be 0 or more"),
    ({"pixel": 0, "perceptual": 0, "temporal": 0}, "one of loss.pixel, loss.perceptual"),
])
def test_what_a_loss_cannot_be_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**weights)


def test_what_a_phase_cannot_do_is_known_before_the_first(tmp_path, world, monkeypatch):
    recipe = recipes.find("tiny")
    short = dataclasses.replace(recipe.phase("tokenizer"), steps=objectives.UNQUANTISED)
    with pytest.raises(ValueError, match="tokenizer: there are no codes before step"):
        loop.train(recipe, tmp_path, world, presets.find("tiny"), [short])
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="'muon' needs torch 2.9 or later"):
        loop.train(recipe, tmp_path, world, presets.find("tiny"), list(recipe.phases))
    assert not list(tmp_path.iterdir())


def test_a_part_is_the_same_for_the_same_seed():
    for preset, name in (("nano", "refiner"), ("direct-nano", "direct")):
        one, two, other = (
            inherit.new_part(presets.find(preset), name, seed).state_dict() for seed in (1, 1, 2)
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=0.3) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2.0 / 30)


def test_muon_takes_hidden_matrices_only():
    base = presets.find("nano").build("base")
    adamw, muon = optimizers(base, "muon", 0.1, (0.9, 0.95))
    taken = [p for group in muon.param_groups for p in group["params"]]
    assert taken and all(p.ndim == 2 for p in taken)
    assert not any(p is base.embed.weight or p is base.positions.weight for p in taken)
    count = len(taken) + sum(len(group["params"]) for group in adamw.param_groups)
    assert count == len(list(base.parameters()))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of tiny"):
        recipes.find("huge")
    with pytest.raises(ValueError, match="tokenizer, image, stage1, stage2, refiner"):
        recipes.find("tiny").phase("stage3")
    with pytest.raises(ValueError, match="choose one of adamw, muon"):
        optimizers(torch.nn.Linear(2, 2), "sgd", 0.0, (0.9, 0.95))
