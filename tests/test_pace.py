"""What a step must compute, and how long a recipe takes."""

import copy
import dataclasses
import json

import pytest
import torch
from test_train import nano_phase
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvideo.cli import estimate
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.train import inputs, pace, recipes
from cogvideo.train.loop import batches
from cogvideo.train.report import Report

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["image", "stage1", "stage2"])
def test_operations_are_those_of_the_kernels(nano, world, name):
    """Products with weights are those of a real step, counted as they run; attention counts for tokens that
    see each other, of which the kernels compute all."""
    folder, phase = ModelFolder(nano), nano_phase(name)
    parts = {part: folder.load(part) for part in ("vqvae", "base", "stage1", "stage2")}
    for part in phase.trains:
        parts[part].requires_grad_(True)
    batch = next(batches(world, phase.clips, 2, seed=0))
    batch = dataclasses.replace(batch, codes=inputs.encode_clips(parts["vqvae"], batch.frames[0]))
    step = phase.objective.build_loss(parts, folder.text(), phase)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = step(batch, 0)
        loss.backward()
    counts = {str(op): count / 2 for op, count in counter.get_flop_counts()["Global"].items()}  # a clip
    attention = sum(count for op, count in counts.items() if "bmm" in op)
    base = parts["base"]
    blind = copy.copy(base)  # its matrices, and no layers that attend
    blind.config = dataclasses.replace(base.config, layers=0)
    products = phase.objective.clip_flops(phase, parts | {"base": blind})
    needed = phase.objective.clip_flops(phase, parts)
    # the way out of a temporal channel has no text, which is nearly half of what `nano` reads
    assert products == pytest.approx(sum(counts.values()) - attention, rel=0.08)
    assert 0.4 * attention < needed - products < attention


def test_a_recipe_takes_hours(world):
    phases = tuple(nano_phase(name, steps=steps) for name, steps in (("image", 7200), ("stage1", 3600)))
    phases = (dataclasses.replace(phases[0], reuse=2), phases[1])
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=phases)
    found = [*pace.measure(recipe, world, presets.find("nano"), [*phases], device=CPU, processes=1, steps=2)]
    assert [one.phase.name for one in found] == ["image", "stage1"]
    assert all(one.step > 0 and one.mfu > 0 for one in found)
    assert found[0].hours == pytest.approx(2 * found[0].step)
    assert found[1].hours == pytest.approx(found[1].step)
    assert found[0].clips == pytest.approx(2 / found[0].step)
    assert f"{sum(one.hours for one in found):8.1f}" in pace.table(found).splitlines()[-1]


def test_a_recipe_that_is_not_there_cannot_be_estimated():
    with pytest.raises(ValueError, match="unknown recipe 'huge'; choose one of tiny"):
        estimate(train="huge")
    with pytest.raises(ValueError, match="--image.steps is a field of a phase, for --train RECIPE"):
        estimate(fields={"image.steps": "3"})


def test_a_log_tells_utilisation(tmp_path, capsys):
    report = Report(tmp_path, "image", 10, 4, every=1, peak_clips=1e12)  # next to nothing is not nothing
    report.step(0, 0.1, {"loss": 1.0})
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["mfu"] == pytest.approx(row["clips_per_second"] / 1e12, rel=1e-3)
    line = capsys.readouterr().out
    assert f"mfu {row['mfu']:.0%}" in line and "left" in line
