"""The model against itself computed another way, and causality shown by gradients. All in float32."""

import dataclasses

import pytest
import torch
from conftest import loosen
from torch._dynamo.testing import CompileCounter

from cogvideo.layout import Layout
from cogvideo.model import attention, groups
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel, TransformerConfig

CONFIG = TransformerConfig(
    layers=3, width=32, heads=4, vocab=80, codes=40, pad=41, start=42, text_len=6, grid=4, window=2
)
MODERN = dataclasses.replace(
    CONFIG, rotary=True, qk_norm=True, activation="relu2", norm="pre", zero_init=True
)
CONFIGS = {"original": CONFIG, "modern": MODERN}
STAGES = {
    "image": (None, Layout.image(6, 4)),
    "stage1": (0, Layout.keyframes(6, 4, 5)),
    "stage1 windows": (2, Layout.keyframes(6, 4, 5)),
    "stage2": (2, Layout.interpolation(6, 4, 5)),
    "image in diagonals": (None, Layout.image(6, 4, skew=2)),
    "stage1 in diagonals": (0, Layout.keyframes(6, 4, 5, skew=2)),
    "stage2 in diagonals": (2, Layout.interpolation(6, 4, 5, skew=2)),
}


def make(window: int | None, config: TransformerConfig = CONFIG) -> DualChannelTransformer:
    generator = torch.Generator().manual_seed(0)
    parts = [Base(config)] + ([TemporalChannel(config, window)] if window is not None else [])
    for part in parts:
        part.init_weights(generator)
        loosen(part, generator)
    return DualChannelTransformer(*parts).eval()


def example(layout: Layout, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(43, 80, (batch, 6), generator=generator)
    text[0, :2] = CONFIG.pad
    return text, torch.randint(0, 40, (batch, layout.frames, 16), generator=generator)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", STAGES)
def test_cached_stepping_equals_the_full_forward(name, config):
    window, layout = STAGES[name]
    model = make(window, CONFIGS[config])
    text, codes = example(layout)
    inputs = layout.inputs(codes, CONFIG.start)
    with torch.inference_mode():
        full = model(torch.cat((text, inputs), 1), layout)
        for known in sorted({len(layout.given), max(len(layout.given), layout.frames - 1)}):
            cache, first = model.new_cache(layout, 2), known * 16
            prompt = torch.cat((text, inputs[:, :first]), 1)
            stepped = torch.full_like(full, float("nan"))
            stepped[:, :first] = model(prompt, layout)
            model.prefill(prompt, layout, cache)
            for places in layout.waves(known, window or 0):
                stepped[:, places] = model.step(inputs[:, places], cache, places)
            difference = (stepped - full).abs().max()
            assert difference < 1e-5, f"{known} frames known: {difference}"
            if layout.skew:
                continue  # the codes of a diagonal see each other
            steps = [model(prompt, layout)]
            model.prefill(prompt, layout, cache)
            steps += [model.step(inputs[:, i : i + 1], cache, [i]) for i in range(first, layout.clip_tokens)]
            difference = (torch.cat(steps, 1) - full).abs().max()
            assert difference < 1e-5, f"{known} frames known, one by one: {difference}"


@pytest.mark.parametrize("rows", [5, 192])
@pytest.mark.parametrize("name", STAGES)
def test_grouped_attention_equals_dense_masked_attention(name, rows, monkeypatch):
    """One layer against softmax over one big score matrix with the drawn mask, queries in parts and all
    together."""
    monkeypatch.setattr(groups, "CHUNK", rows)
    groups.groups_of.cache_clear()
    window, layout = STAGES[name]
    model = make(window)
    x = torch.randn(2, 6 + layout.clip_tokens, 32, generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(2, 6)
    bias[0, :2] = float("-inf")
    view = attention.SequenceView(layout, window or 0, bias)
    for layer in range(2):  # unshifted and shifted
        block, half = model.layers[layer]
        h = block.norm1(x)
        channels = [(model.base.blocks[layer].attention, layout.sees("spatial"))]
        if window is not None:
            sees = layout.sees("temporal", window, bool(window) and layer == 1)
            channels.append((model.temporal.attention[layer], sees))
        outputs = []
        for channel, sees in channels:
            mask = torch.zeros(2, 6 + layout.clip_tokens, 6 + layout.clip_tokens)
            mask[:, :6, 6:] = float("-inf")  # text is blind to frames
            mask[:, 6:, 6:].masked_fill_(~sees, float("-inf"))
            mask[:, :, :6] += bias[:, None]
            q, k, v = channel.project(h)
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask[:, None]).softmax(-1)
            outputs.append(channel.out((weights @ v).transpose(1, 2).flatten(2)))
        expected = outputs[0].clone()
        if window is not None:
            gate = model.temporal.gate[layer].sigmoid()
            expected[:, 6:] = gate * outputs[0][:, 6:] + (1 - gate) * outputs[1][:, 6:]
        expected = x + block.norm3(expected)
        expected = expected + block.norm4(block.mlp(block.norm2(expected)))
        difference = (block(x, view, half) - expected).abs().max()
        assert difference < 1e-5, difference


def test_rotary_scores_depend_on_how_far_apart_two_places_are():
    """The same query and key at two pairs of places with the same difference in time, row and column."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 16, generator=generator)
    places = torch.tensor([[0, 1, 2], [2, 3, 1], [1, 4, 3], [3, 6, 2]])  # the last two: the first two, moved

    def score(i: int, j: int) -> torch.Tensor:
        rotary = [attention.rotary_table(places[p : p + 1], 16) for p in (i, j)]
        return (attention.rotate(query, rotary[0]) * attention.rotate(key, rotary[1])).sum()

    assert (score(0, 1) - score(2, 3)).abs() < 1e-5
    assert (score(0, 1) - score(1, 0)).abs() > 1e-2
    norms = attention.rotate(query, attention.rotary_table(places, 16)).norm(dim=-1)
    assert (norms - query.norm()).abs().max() < 1e-5


def test_a_zero_initialised_block_passes_everything_through():
    base = Base(MODERN)
    base.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(1, 6 + 16, 32)
    view = attention.SequenceView(STAGES["image"][1], 0, torch.zeros(1, 6))
    assert torch.equal(base.blocks[0](x, view), x)


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="activation must be one of gelu, relu2; got 'swish'"):
        dataclasses.replace(CONFIG, activation="swish")
    with pytest.raises(ValueError, match="norm must be one of sandwich, pre"):
        dataclasses.replace(CONFIG, norm="none")


def influence(model: DualChannelTransformer, layout: Layout) -> torch.Tensor:
    """Bool [S, T + S]: the output at a frame slot depends on an input, by the gradient of its logits."""
    text, codes = example(layout, batch=1)
    text[:] = 50
    tokens = torch.cat((text, layout.inputs(codes, CONFIG.start)), 1)
    rows = []
    seen: list[torch.Tensor] = []
    hook = model.base.embed.register_forward_hook(
        lambda module, inputs, output: seen.append(output) or output
    )
    logits = model(tokens, layout)
    hook.remove()
    for slot in range(layout.clip_tokens):
        (gradient,) = torch.autograd.grad(logits[0, slot].sum(), seen[0], retain_graph=True)
        rows.append(gradient[0].abs().sum(-1) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["image", "stage1", "stage2"])
def test_causality_by_gradients(name, config):
    window, layout = STAGES[name]
    depends = influence(make(window, CONFIGS[config]), layout)
    assert depends[:, :6].all()  # all text reaches every slot
    n, given = 16, len(layout.given)
    for slot in range(layout.clip_tokens):
        frame = slot // n
        allowed = given * n if frame < given else slot + 1
        assert not depends[slot, 6 + allowed :].any(), f"slot {slot} sees the future"
        assert depends[slot, 6 + slot]
    if name == "stage1":
        assert depends[-1, 6:].all()  # full attention: the last token depends on everything before


def test_receptive_field_of_one_window_layer():
    """One unshifted layer: a token depends on its own frame (spatial) and on its tile of the others
    (temporal)."""
    config = dataclasses.replace(CONFIG, layers=1)
    generator = torch.Generator().manual_seed(0)
    parts = Base(config), TemporalChannel(config, 2)
    for part in parts:
        part.init_weights(generator)
        loosen(part, generator)
    layout = Layout.interpolation(6, 4, 5)
    depends = influence(DualChannelTransformer(*parts).eval(), layout)[:, 6:]
    expected = layout.sees("spatial") | layout.sees("temporal", 2, False)
    assert torch.equal(depends, expected)


def test_text_is_blind_to_frames_and_padding_to_all():
    model = make(0)
    layout = Layout.keyframes(6, 4, 5)
    text, codes = example(layout)
    tokens = torch.cat((text, layout.inputs(codes, CONFIG.start)), 1)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 40
    hidden = []
    for inputs in (tokens, other):
        seen: list[torch.Tensor] = []
        hook = model.base.blocks[-1].norm2.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        model(inputs, layout)
        hook.remove()
        hidden.append(seen[0][:, :6])
    assert torch.equal(hidden[0], hidden[1])
    before = model(tokens, layout)
    with torch.no_grad():
        model.base.embed.weight[CONFIG.pad] += 1
    assert torch.equal(model(tokens, layout), before)


def test_a_short_text_does_not_depend_on_how_much_padding_it_has():
    """The same prompt in a longer text field gives the same logits: padding has no position and no weight."""
    wide = dataclasses.replace(CONFIG, text_len=9, text_positions=6)
    narrow = dataclasses.replace(CONFIG, text_positions=6)
    logits = []
    text, codes = example(Layout.image(6, 4), batch=1)
    for config in (narrow, wide):
        generator = torch.Generator().manual_seed(0)
        base = Base(config)
        base.init_weights(generator)
        layout = Layout.image(config.text_len, 4)
        row = torch.cat((torch.full((1, config.text_len - 6), CONFIG.pad), text), 1)
        tokens = torch.cat((row, layout.inputs(codes, CONFIG.start)), 1)
        logits.append(DualChannelTransformer(base).eval()(tokens, layout))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_inherited_channel_copies_the_base():
    base = Base(CONFIG)
    base.init_weights(torch.Generator().manual_seed(0))
    channel = TemporalChannel(CONFIG, 0)
    channel.inherit(base)
    first = base.positions.weight[CONFIG.first_frame :]
    assert torch.equal(channel.positions.weight.view(4, 16, 32), first.expand(4, -1, -1))
    for mine, block in zip(channel.attention, base.blocks):
        assert torch.equal(mine.qkv.weight, block.attention.qkv.weight)
        assert mine.qkv.weight is not block.attention.qkv.weight


def test_layers_of_one_kind_are_compiled_once():
    """Dynamo compiles code again for each new constant and gives up at a limit: layers must not differ in
    one."""
    window, layout = STAGES["stage2"]
    text, codes = example(layout)
    tokens = torch.cat((text, layout.inputs(codes, CONFIG.start)), 1)
    counts = []
    for layers in (2, 6):
        torch._dynamo.reset()
        model = make(window, dataclasses.replace(CONFIG, layers=layers))
        model(tokens, layout)  # fills the caches of groups and rotations, which are compiled as well
        counter = CompileCounter()
        for block in model.base.blocks:
            block.compile(backend=counter)
        model(tokens, layout).sum().backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] == counts[1]
