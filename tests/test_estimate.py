"""What is said before loading is what is found after it."""

import pytest
import torch
from torch import nn

from cogvideo.generate import cogvideo as pipeline
from cogvideo.generate import cost, estimate, parts
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.int8 import Int8Linear, PackedLinear, pack, unpack
from cogvideo.generate.sampling import stages
from cogvideo.layout import Layout
from cogvideo.model import presets
from cogvideo.model.config import SamplingConfig
from cogvideo.model.folder import ModelFolder

GUIDED = stages({"stage1": SamplingConfig(guidance_scale=3.0)})


def test_the_paper_makes_13200_tokens_a_video():
    """docs/reference.md, "Inference": 400 and 1600 in stage 1, 800 a window in stage 2;
    guidance doubles the rows of stage 1."""
    work = {one.name: one for one in cost.plan(presets.find("cogvideo-9b"), GUIDED)}
    made = [work[name].tokens for name in ("first frame", "key frames", "to 2 fps", "to 4 fps", "to 8 fps")]
    assert made == [400, 2 * 1600, 2 * 800, 4 * 800, 8 * 800]
    assert work["key frames"].steps == 1600 and work["to 8 fps"].steps < 800
    assert work["larger frames"].steps == 33 and work["larger frames"].rows == 96 + 400 + 3600


def test_the_steps_are_those_of_the_fills(nano):
    """As many as the model is called for, and as many tokens as are made."""
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    calls: list[int] = []
    draft = pipe.first_frames(["a dog"], [1])
    block = pipe.parts.stage1.base.blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[:2]))
    for name, verb in (
        ("key frames", lambda d: pipe.keyframes(["a dog"], [1], begin=d)),
        ("to 2 fps", pipe.interpolate),
        ("to 4 fps", pipe.interpolate),
    ):
        calls.clear()
        draft = verb(draft)
        work = next(one for one in cost.plan(pipe.spec, pipe.sampling) if one.name == name)
        steps = [call for call in calls if call[1] < pipe.spec.model.text_len]  # after the prompts
        assert len(steps) == work.steps and sum(rows * tokens for rows, tokens in steps) == work.tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_memory_is_that_of_the_loaded_parts(nano, dtype):
    folder = ModelFolder(nano)
    held = cost.memory(folder.spec(), dtype, rows=2)
    for name in ("base", "stage1", "refiner"):
        part = folder.load(name)
        if name != "refiner":
            pack(part, dtype)
        mapped = "" if dtype == "bfloat16" else "embed.weight"
        taken = sum(t.nbytes for key, t in part.state_dict().items() if key != mapped)
        for module in part.modules():
            if isinstance(module, Int8Linear):
                taken += unpack(module)[0].numel() + len(module.bias) * 4
            if isinstance(module, PackedLinear):
                tensors = [module.packed] + ([] if module.bias is None else [module.bias])
                taken += sum(t.numel() * t.element_size() for t in tensors)
        assert held[name] == pytest.approx(taken, rel=0.02), name
    assert any(isinstance(m, nn.Conv2d) for m in folder.load("vqvae").modules())


def test_caches_are_as_large_as_said(nano):
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    c, model = pipe.spec.model, pipe.parts.stage2
    layout = Layout.interpolation(c.text_len, c.grid, c.frames)
    cache = model.new_cache(layout, 3)
    taken = sum(t.nbytes for channel in cache.channels.values() for t in channel.kv)
    assert taken == 3 * cost.cache_bytes(c, layout, model.window, "float32")


def test_what_does_not_fit_at_once_is_made_in_turn(nano, monkeypatch):
    """A few windows at a time make the same tokens, and progress counts them all."""
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    draft = pipe.keyframes(["a dog", "a cat"], [1, 2])
    whole, told = pipe.interpolate(draft).codes, []
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1.0)
    parts = pipe.interpolate(draft, progress=lambda what, done, total: told.append((done, total))).codes
    assert torch.equal(whole, parts)
    assert told[-1][0] == told[-1][1] == 4 * 2 * pipe.spec.model.frame_tokens and told == sorted(told)


def test_a_measured_speed_predicts_seconds():
    speed = estimate.Speed("int8", (1e-11, 2e-11, 4e-11, 8e-11, 16e-11), 1e-4, 1e10, 1e11)
    assert [speed.per_weight(rows) for rows in (0.5, 1, 2.5, 4, 512, 1024)] == pytest.approx(
        [1e-11, 1e-11, 1.5e-11, 2e-11, 16e-11, 32e-11]
    )
    step = cost.Cost("a", steps=10, rows=1, layers=2, weights=10**9, seen=1e9)
    assert speed.seconds(step) == pytest.approx(10 * (1e-2 + 2e-4 + 0.4))
    assert speed.seconds(cost.Cost("b", flops=3e11)) == pytest.approx(3)


def test_one_channel_at_a_time_where_memory_is_short(nano, monkeypatch):
    """The same clip, with less in memory; the base, which all channels share, stays."""
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    whole = pipe.interpolate(pipe.keyframes(["a dog"], [1])).codes
    assert {"stage1", "stage2"} <= vars(pipe.parts).keys()
    monkeypatch.setattr(parts, "free_memory", lambda device: 1.0)
    short = CogVideo.from_pretrained(nano, dtype="float32")
    draft = short.keyframes(["a dog"], [1])
    base = short.parts.base
    assert torch.equal(short.interpolate(draft).codes, whole)
    assert "stage1" not in vars(short.parts) and short.parts.stage2.base is base
    costs = short.estimate()
    assert sum(costs.held.values()) - costs.least == min(costs.held["stage1"], costs.held["stage2"])
