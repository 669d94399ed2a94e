"""Filling frames: guidance as a doubled batch, samples apart and together, known frames kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cogvideo.generate.fill import fill
from cogvideo.generate.int8 import join, pack
from cogvideo.generate.sampling import Sampling, guide, sample, uniforms
from cogvideo.layout import Layout
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel

CONFIG = presets.find("nano").model
LAYOUT = Layout.keyframes(CONFIG.text_len, CONFIG.grid, CONFIG.frames)
SAMPLING = Sampling(temperature=1.0, top_k=20, guidance_scale=3.0)


def setup(nano, batch: int = 3):
    folder = ModelFolder(nano)
    model = DualChannelTransformer(folder.load("base"), folder.load("stage1"))
    text = folder.text()
    rows = [
        text.pad_left(text.prompt(p, 4.0), CONFIG.text_len)
        for p in ("a dog runs", "a cat in the snow", "a car")
    ]
    plain = [text.pad_left(text.prompt("", 4.0), CONFIG.text_len)] * 3
    known = torch.randint(
        0, CONFIG.codes, (3, 1, CONFIG.frame_tokens), generator=torch.Generator().manual_seed(0)
    )
    return model, torch.tensor(rows)[:batch], torch.tensor(plain)[:batch], known[:batch]


def run(model, text, plain, known, seeds, sampling=SAMPLING):
    uniform = uniforms(seeds, 4 * CONFIG.frame_tokens, 1)
    *_, last = fill(model, LAYOUT, text, known, sampling, uniform, unconditional=plain)
    return last.frames


def test_guidance_as_a_doubled_batch_equals_two_separate_passes(nano):
    model, text, plain, known = setup(nano)
    uniform = uniforms([5, 6, 7], 4 * CONFIG.frame_tokens, 1)
    caches, inputs = [], LAYOUT.inputs(known, CONFIG.start)
    with torch.inference_mode():
        for rows in (text, plain):
            cache = model.new_cache(LAYOUT, 3)
            model.prefill(torch.cat((rows, inputs), 1), LAYOUT, cache)
            caches.append(cache)
        made, token = [], torch.full((3,), CONFIG.start)
        for k in range(4 * CONFIG.frame_tokens):
            entering = torch.full((3,), CONFIG.start) if k % CONFIG.frame_tokens == 0 else token
            prompted, unprompted = (
                model.step(entering[:, None], cache, [CONFIG.frame_tokens + k])[:, -1] for cache in caches
            )
            logits = unprompted + 3.0 * (prompted - unprompted)
            assert (guide(torch.cat((prompted, unprompted)), 3.0) - logits).abs().max() < 1e-5
            token = sample(logits, SAMPLING, uniform[:, k])
            made.append(token)
    expected = torch.stack(made, 1).view(3, 4, -1)
    assert torch.equal(run(model, text, plain, known, [5, 6, 7])[:, 1:], expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_sample_alone_equals_the_same_sample_in_a_batch(nano, dtype):
    model, text, plain, known = setup(nano)
    if dtype == "int8":
        model = join(DualChannelTransformer(pack(model.base, "int8"), pack(model.temporal, "int8")))
    together = run(model, text, plain, known, [5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        alone = run(model, text[i : i + 1], plain[i : i + 1], known[i : i + 1], [seed])
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together[0, 1:], together[1, 1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_sample_of_a_larger_model_is_the_same_bits_in_any_batch_on_any_threads(dtype):
    """Wide enough that kernels choose their blocks by how many rows there are."""
    config = replace(CONFIG, width=192, heads=3, grid=8)
    torch.manual_seed(0)
    base, stage = Base(config), TemporalChannel(config, config.window)
    for weight in (*base.parameters(), *stage.parameters()):
        nn.init.normal_(weight, std=0.05)
    model = DualChannelTransformer(pack(base, dtype), pack(stage, dtype)).eval()
    model = join(model) if dtype == "int8" else model
    layout = Layout.interpolation(config.text_len, config.grid, config.frames)
    text = torch.randint(config.codes, config.vocab, (16, config.text_len))
    known = torch.randint(config.codes, (16, 3, config.frame_tokens))
    uniform = torch.rand(16, 2 * config.frame_tokens)

    def made(start: int, stop: int) -> torch.Tensor:
        those = slice(start, stop)
        *_, last = fill(model, layout, text[those], known[those], Sampling(1.0, 20), uniform[those])
        return last.frames

    before, together = torch.get_num_threads(), made(0, 16)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for start, stop in ((0, 1), (15, 16), (2, 5), (4, 12)):
                assert torch.equal(made(start, stop), together[start:stop])
    finally:
        torch.set_num_threads(before)


def test_known_frames_are_kept_and_progress_is_told(nano):
    model, text, plain, known = setup(nano)
    states = list(
        fill(
            model,
            LAYOUT,
            text,
            known,
            SAMPLING,
            uniforms([1, 2, 3], 4 * CONFIG.frame_tokens, 1),
            unconditional=plain,
        )
    )
    assert [s.done for s in states] == list(range(CONFIG.grid, 4 * CONFIG.frame_tokens + 1, CONFIG.grid))
    assert torch.equal(states[-1].frames[:, 0], known[:, 0])
    assert int(states[-1].frames.min()) >= 0 and int(states[-1].frames.max()) < CONFIG.codes


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_filling_in_waves_equals_one_token_after_the_other(nano, stage):
    """Greedy, each token is the likeliest by the full forward over all frames."""
    folder = ModelFolder(nano)
    model = DualChannelTransformer(folder.load("base"), folder.load(stage))
    _, text, _, _ = setup(nano)
    sizes = (CONFIG.text_len, CONFIG.grid, CONFIG.frames)
    layout = Layout.keyframes(*sizes) if stage == "stage1" else Layout.interpolation(*sizes)
    count = 3 if stage == "stage2" else 1
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, CONFIG.codes, (3, count, CONFIG.frame_tokens), generator=generator)
    missing = (CONFIG.frames - count) * CONFIG.frame_tokens
    *_, last = fill(model, layout, text, known, Sampling(temperature=0.0), torch.zeros(3, missing))
    laid = layout.lay(last.frames)
    with torch.inference_mode():
        logits = model(torch.cat((text, layout.inputs(laid, CONFIG.start)), 1), layout)
    likeliest = logits.argmax(-1).view(laid.shape)
    assert torch.equal(laid[:, :count], known)
    assert torch.equal(laid[:, count:], likeliest[:, count:])


def test_a_cache_may_have_been_used_before(nano):
    """What others left in it, and rows that are not needed, change nothing."""
    model, text, plain, known = setup(nano)
    uniform = uniforms([5, 6, 7], 4 * CONFIG.frame_tokens, 1)
    *_, fresh = fill(model, LAYOUT, text, known, SAMPLING, uniform, unconditional=plain)
    with torch.inference_mode():
        cache = model.new_cache(LAYOUT, 8)
        for kv in (kv for channel in cache.channels.values() for kv in channel.kv):
            kv.fill_(float("nan"))
    *_, used = fill(model, LAYOUT, text, known, SAMPLING, uniform, unconditional=plain, cache=cache)
    assert torch.equal(fresh.frames, used.frames)


def test_guidance_changes_what_is_made(nano):
    model, text, plain, known = setup(nano)
    guided = run(model, text, plain, known, [5, 6, 7])
    free = run(model, text, plain, known, [5, 6, 7], Sampling(1.0, 20, 1.0))
    assert not torch.equal(guided, free)


def test_int8_of_stored_halves_is_that_of_floats(nano, tmp_path):
    """Out of the mapped file, layer by layer, as out of a part that was read as float32."""
    folder, halves = ModelFolder(nano), ModelFolder(tmp_path)
    halves.write_config(folder.config)
    for name in ("base", "stage1"):
        halves.save(name, folder.load(name), torch.float16)
    made = []
    for dtype in (None, torch.float32):
        base, stage1 = (pack(halves.load(name, dtype=dtype), "int8") for name in ("base", "stage1"))
        assert base.embed.weight.dtype == (torch.float16 if dtype is None else torch.float32)
        assert base.norm.weight.dtype == stage1.positions.weight.dtype == torch.float32
        model = join(DualChannelTransformer(base, stage1))
        c = model.config
        layout = Layout.keyframes(c.text_len, c.grid, c.frames)
        tokens = torch.arange(c.text_len + layout.clip_tokens)[None] % c.codes
        made.append(model(tokens, layout))
    assert torch.equal(*made)


def test_int8_stays_near_float32(nano):
    """Rounded weights move logits by a few per cent of their spread and keep their order in the main."""
    model, text, plain, known = setup(nano)
    tokens = torch.cat((text, LAYOUT.inputs(known.expand(-1, 5, -1), CONFIG.start)), 1)
    folder = ModelFolder(nano)
    rounded = DualChannelTransformer(pack(folder.load("base"), "int8"), pack(folder.load("stage1"), "int8"))
    with torch.inference_mode():
        exact, apart = model(tokens, LAYOUT), rounded(tokens, LAYOUT)
        joint = join(rounded)(tokens, LAYOUT)
    for logits in (apart, joint):
        assert 0 < (logits - exact).std() < 0.05 * exact.std()
        assert torch.corrcoef(torch.stack((logits.flatten(), exact.flatten())))[0, 1] > 0.998
    apart_by = 0.03 if torch.cpu._is_vnni_supported() else 0.04  # inputs have a bit less without VNNI
    assert (joint - apart).std() < apart_by * exact.std()


@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 2e-2)])
@pytest.mark.parametrize("rows", [1, 2, 300])
def test_a_packed_layer_is_the_layer(dtype, near, rows):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 48), torch.randn(rows, 3, 64)
    expected = layer(x)
    part = pack(torch.nn.Sequential(layer), dtype)
    unpacked = dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(part[0], torch.nn.Linear) == unpacked
    made = part(x.bfloat16() if dtype == "bfloat16" else x)
    assert made.shape == expected.shape
    assert (made.float() - expected).abs().max() < near * expected.abs().max()
