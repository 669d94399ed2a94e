"""What a GPU computes is what the CPU computes. `pytest -m gpu` runs these where there is one; with
COGVIDEO_TEST_DEVICE=cpu they run anywhere, to show that they would."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from test_parallel import nano_phase
from test_transformer import CONFIG, CONFIGS, STAGES, example, make

from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.generate.cogvideo import load
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.train import loop, recipes
from cogvideo.train.report import read_log
from cogvideo.train.run import Options, Run

DEVICE = os.environ.get("COGVIDEO_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROMPTS = ["a dog runs to the right", "a cat jumps"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", STAGES)
def test_both_channels_see_on_a_device_what_they_see_on_a_cpu(name, config, dtype, tolerance):
    """Whole sequences with their masks, and steps with their caches."""
    window, layout = STAGES[name]
    model = make(window, CONFIGS[config])
    text, codes = example(layout)
    tokens = torch.cat((text, layout.inputs(codes, CONFIG.start)), 1)
    with torch.inference_mode():
        expected = model(tokens, layout)
        model.to(DEVICE, dtype)
        there = tokens.to(DEVICE)
        whole = model(there, layout).cpu()
        cache = model.new_cache(layout, 2)
        model.prefill(there[:, :6], layout, cache)
        steps = [model.step(there[:, [6 + i]], cache, [i]).cpu() for i in range(16)]
    scale = expected.std()
    assert (whole - expected).abs().max() < tolerance * scale
    if not layout.given and not layout.skew:
        assert (torch.cat(steps, 1) - expected[:, :16]).abs().max() < tolerance * scale


def test_gradients_on_a_device_are_those_of_a_cpu():
    window, layout = STAGES["stage2"]
    text, codes = example(layout)
    tokens = torch.cat((text, layout.inputs(codes, CONFIG.start)), 1)
    gradients = []
    for device in ("cpu", DEVICE):
        model = make(window).to(device)
        model(tokens.to(device), layout).square().mean().backward()
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    for here, there in zip(*gradients, strict=True):
        assert (here - there).abs().max() <= 1e-4 * here.abs().max() + 1e-7


@pytest.mark.parametrize("model", ["nano", "nano_large"])
def test_a_device_generates_the_videos_of_a_cpu(model, request):
    """In float32 nearly all codes are the same: a sum may round otherwise, and a code tip over."""
    folder = request.getfixturevalue(model)
    drafts = []
    for device in ("cpu", DEVICE):
        pipe = load(folder, device, "float32")
        draft = pipe.interpolate(pipe.keyframes(PROMPTS, [1, 2]))
        clips = pipe.decode(draft)
        drafts.append((draft.codes.cpu(), clips[0].frames.shape))
    (here, shape), (there, other) = drafts
    assert shape == other
    assert (here == there).float().mean() > 0.98


def test_bfloat16_generates_on_a_device(nano):
    clips = load(nano, DEVICE, "bfloat16")(PROMPTS, seed=1, progress=False)
    assert len(clips) == 2 and clips[0].frames.std() > 0


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["image", "stage1"])
def test_a_phase_learns_on_a_device_what_it_learns_on_a_cpu(nano, tmp_path, name, compile):
    """Fused AdamW, clips from other processes, blocks compiled or not: the losses of the first steps."""
    phase = dataclasses.replace(nano_phase(name), steps=4)
    losses = []
    for device, options in (("cpu", {}), (DEVICE, {"compile": compile, "workers": 1})):
        losses.append(_losses(tmp_path / device / "run", nano, phase, device, options))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bfloat16_learns_on_a_device(nano, tmp_path):
    phase = dataclasses.replace(nano_phase("stage1"), steps=4, precision="bfloat16")
    exact = _losses(tmp_path / "exact", nano, dataclasses.replace(phase, precision="float32"), DEVICE, {})
    assert exact == pytest.approx(_losses(tmp_path / "half", nano, phase, DEVICE, {}), rel=0.02)


def _losses(out: Path, model: Path, phase: recipes.Phase, device: str, options: dict) -> list[float]:
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", phases=(phase,))
    world = TinyWorld(sprites(8), seed=1)
    start = ModelFolder(model)
    run = Options(device=device, log_every=1, quiet=True, init=start, **options)
    loop.train(Run(recipe, out, world, presets.find("nano"), [phase], run))
    return [row["loss"] for row in read_log(out / phase.name / "log.jsonl")]
