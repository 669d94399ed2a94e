"""Super-resolution against dense masked attention, its local attention against the original's; its receptive
field by gradients. What the whole computes is compared with the original in test_convert.py."""

from pathlib import Path

import pytest
import torch
from conftest import loosen
from safetensors.torch import load_file

from cogvideo.model import superres
from cogvideo.model.superres import SuperRes, SuperResChannel, SuperResConfig, attend_tiles, due, tiles_of
from cogvideo.model.transformer import Base, TransformerConfig

DATA = Path(__file__).parent / "data"
LIKE = (torch.device("cpu"), torch.float32)
DIRECT = SuperResConfig(grid=20, scale=3, text_len=96, pad=0, window=(9, 5), cross=(5, 5))

SMALL = {
    "direct": SuperResConfig(grid=4, scale=3, text_len=5, pad=41, window=(5, 3), cross=(3, 3)),
    "direct, uneven": SuperResConfig(grid=5, scale=2, text_len=4, pad=41, window=(3, 7), cross=(5, 1)),
    "direct, all in reach": SuperResConfig(grid=3, scale=1, text_len=3, pad=41, window=(9, 9), cross=(7, 7)),
    "iterative": SuperResConfig(grid=4, scale=3, text_len=5, pad=41, window=(5, 3)),
    "iterative, uneven": SuperResConfig(grid=7, scale=1, text_len=6, pad=41, window=(1, 5)),
}


@pytest.fixture(params=[2, 5, 12])
def tile(request, monkeypatch):
    monkeypatch.setattr(superres, "TILE", request.param)
    tiles_of.cache_clear()
    yield request.param
    tiles_of.cache_clear()


def make(config: SuperResConfig, layers: int = 2) -> SuperRes:
    sizes = {"layers": layers, "width": 24, "heads": 2, "vocab": 60, "codes": 40, "pad": 41, "start": 42}
    model = TransformerConfig(**sizes, text_len=9, grid=config.grid)
    generator = torch.Generator().manual_seed(0)
    base, channel = Base(model), SuperResChannel(model, config)
    for part in (base, channel):
        part.init_weights(generator)
        loosen(part, generator, 0.2)
    return SuperRes(base, channel).eval()


def example(config: SuperResConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(43, 60, (batch, config.text_len), generator=generator)
    text[0, :2] = config.pad
    codes = torch.randint(
        0, 40, (batch, (config.grid if config.cross else config.side) ** 2), generator=generator
    )
    return text, codes


def windows(config: SuperResConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Place by place, from the definition: what is seen of the large map [S, S], of the small [S, N]."""

    def around(rows: int, columns: int, size: int, place: tuple[int, int]) -> list[bool]:
        row, column = place
        near = [
            [abs(r - row) <= rows // 2 and abs(c - column) <= columns // 2 for c in range(size)]
            for r in range(size)
        ]
        return [seen for line in near for seen in line]

    places = [(row, column) for row in range(config.side) for column in range(config.side)]
    large = torch.tensor([around(*config.window, config.side, p) for p in places])
    if config.cross is None:
        return large, None
    ratio = config.scale
    return large, torch.tensor(
        [around(*config.cross, config.grid, (r // ratio, c // ratio)) for r, c in places]
    )


def dense_attend(model: SuperRes, layer: int, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """One layer's attention by one score matrix with a mask over everything: [B, P + S, D] to the same."""
    config, text_len = model.config, text.shape[1]
    large, small = windows(config)
    known = x.shape[1] - len(large)
    real = torch.cat((text != config.pad, torch.ones(len(x), x.shape[1] - text_len, dtype=torch.bool)), 1)
    sees = real[:, None, :].repeat(1, x.shape[1], 1)
    sees[:, :text_len] |= ~real[:, :text_len, None]  # what padding sees is without effect
    sees[:, :text_len, text_len:] = False
    sees[:, text_len:known, known:] = False
    sees[:, known:, known:] = large
    if small is not None:
        sees[:, known:, :text_len] = False
        sees[:, known:, text_len:known] = small
    base = model.base.blocks[layer].attention
    mine = model.channel.attention[layer] if config.cross else base
    qkv = [torch.cat((a[:, :, :known], b[:, :, known:]), 2) for a, b in zip(base.project(x), mine.project(x))]
    q, k, v = qkv
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~sees[:, None], float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return torch.cat((base.out(y[:, :known]), mine.out(y[:, known:])), 1)


# -- against the original


def read_out(golden: dict[str, torch.Tensor], case: str, config: SuperResConfig) -> torch.Tensor:
    """Weights [B, S, keys] of `attend_tiles` for the original's queries and keys: one-hot values."""
    q, k = (golden[f"{case}.{name}"].flatten(2).transpose(1, 2) for name in "qk")  # [B, S, 3], [B, keys, 3]
    count = k.shape[1]
    wide = torch.zeros(2, q.shape[1], count)
    wide[..., :3], wide[..., 3] = q * count**0.5, 1
    keys = torch.cat((k, torch.zeros(2, count, count - 3)), -1)
    ones = torch.eye(count).expand(2, 1, -1, -1)
    tiles = tiles_of(config, *LIKE)
    if config.cross is None:
        none = torch.zeros(2, 1, 0, count)
        own = torch.stack((wide[:, None], keys[:, None], ones))
        return attend_tiles(own, torch.stack((none, none)), tiles)
    unseen = torch.zeros(2, 1, q.shape[1], count)
    unseen[..., 3] = -1e6  # nobody looks at the large map
    own = torch.stack((wide[:, None], unseen, torch.zeros_like(unseen)))
    return attend_tiles(own, torch.stack((keys[:, None], ones)), tiles)


@pytest.mark.parametrize(
    "case, config",
    [
        ("same", SuperResConfig(grid=6, scale=1, text_len=0, pad=0, window=(9, 5))),
        ("up3", SuperResConfig(grid=4, scale=3, text_len=0, pad=0, window=(1, 1), cross=(5, 5))),
    ],
)
def test_local_attention_is_the_originals(case, config, tile):
    golden = load_file(DATA / "superres_local.safetensors")
    weights = read_out(golden, case, config)
    value = golden[f"{case}.v"].flatten(2)  # [B, 3, keys]
    assert (
        torch.einsum("bsk,bck->bcs", weights, value) - golden[f"{case}.out"].flatten(2)
    ).abs().max() < 1e-5
    scores = golden[f"{case}.scores"].flatten(1, 2)
    large, small = windows(config)
    expected = torch.zeros_like(weights)  # window places in raster order are map places in raster order
    for place, seen in enumerate(large if small is None else small):
        inside = scores[0, place] > -9999
        expected[:, place, seen] = scores.softmax(-1)[:, place, inside]
    assert (weights - expected).abs().max() < 1e-6


# -- against itself, computed slowly


@pytest.mark.parametrize("name", SMALL)
def test_tiles_equal_dense_masked_attention(name, tile):
    config = SMALL[name]
    model, (text, codes) = make(config), example(config)
    known = config.text_len + (codes.shape[1] if config.cross else 0)
    x = torch.randn(2, known + config.side**2, 24, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    bias = None
    if config.cross is None:
        bias = torch.zeros(text.shape).masked_fill(text == config.pad, float("-inf"))
    outcomes = []
    for fast in (True, False):
        model.zero_grad()
        x.requires_grad_().grad = None
        if fast:
            y = model._attend(0, x, model._sees(text, known), tiles_of(config, *LIKE), bias)
        else:
            y = dense_attend(model, 0, x, text)
        (y * weight).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        outcomes.append({"output": y.detach(), "input": x.grad, **grads})
    fast, slow = outcomes
    assert fast.keys() == slow.keys() and len(fast) == 2 + (8 if config.cross else 4)
    for key, expected in slow.items():
        assert (fast[key] - expected).abs().max() < 2e-6 * expected.abs().max().clamp_min(1), key


@pytest.mark.parametrize("name", SMALL)
def test_gradients_show_the_receptive_field(name, tile):
    config = SMALL[name]
    model, (text, codes) = make(config, layers=1), example(config)
    large, small = windows(config)
    for place in range(0, config.side**2, 5):
        model.zero_grad()
        model(text, codes)[:, place].square().sum().backward()
        assert torch.equal(model.channel.positions.weight.grad.any(-1), large[place])
        if small is not None:
            assert torch.equal(model.channel.low_positions.weight.grad.any(-1), small[place])
        reached = model.base.positions.weight.grad.any(-1)
        assert reached[: config.text_len].any() == (small is None)  # text speaks to the small map only


def test_text_reaches_the_large_map_through_the_small_one():
    model, (text, codes) = make(SMALL["direct"], layers=2), example(SMALL["direct"])
    model(text, codes)[:, 0].sum().backward()
    assert model.base.positions.weight.grad[: model.config.text_len].any(-1).all()


@pytest.mark.parametrize("name", SMALL)
def test_rows_and_padding_do_not_matter(name):
    config = SMALL[name]
    model, (text, codes) = make(config), example(config, batch=3)
    with torch.inference_mode():
        together = model(text, codes)
        alone = torch.cat([model(text[i : i + 1], codes[i : i + 1]) for i in range(3)])
        assert (together - alone).abs().max() < 1e-5
        longer = SuperResConfig(**{**vars(config), "text_len": config.text_len + 2})
        padded = SuperRes(model.base, model.channel).eval()
        padded.config = longer
        text = torch.cat((torch.full((3, 2), config.pad), text), 1)
        assert (padded(text, codes) - together).abs().max() < 1e-5
        empty = padded(torch.full_like(text, config.pad), codes)
    assert empty.isfinite().all() and (empty - together).abs().max() > 1e-3


def test_an_iterative_forward_sees_what_is_known():
    model, (text, codes) = make(SMALL["iterative"]), example(SMALL["iterative"])
    unknown = codes.clone()
    unknown[:, 7] = model.base.config.start
    with torch.inference_mode():
        assert (model(text, codes) - model(text, unknown)).abs().amax((0, 2))[7] > 1e-3


# -- the rest


def test_the_released_size_runs_without_memory():
    sizes = {"layers": 48, "width": 3072, "heads": 48, "vocab": 150010, "codes": 20000, "pad": 20003}
    model = TransformerConfig(**sizes, start=150000, text_len=64, grid=20, text_positions=512)
    with torch.device("meta"):
        upscaler = SuperRes(Base(model), SuperResChannel(model, DIRECT)).eval()
        logits = upscaler(torch.zeros(2, 96, dtype=torch.long), torch.zeros(2, 400, dtype=torch.long))
    assert logits.shape == (2, 3600, 20000)
    assert (
        sum(p.numel() for p in upscaler.channel.parameters()) == 48 * (4 * 3072**2 + 4 * 3072) + 4000 * 3072
    )
    tiles = tiles_of(DIRECT, *LIKE)
    assert tiles.mask.numel() < 3600**2 / 9  # scores of a head


def test_a_channel_starts_from_its_base():
    config = SMALL["direct"]
    model = make(config)
    base, channel = model.base, model.channel
    channel.inherit(base)
    first = base.positions.weight[9:]
    assert torch.equal(channel.low_positions.weight, first)
    high = channel.positions.weight.view(12, 12, -1)
    assert torch.equal(high[7, 10], first[3 * 4 + 2])  # rows 7 % 4, columns 10 % 4
    for mine, block in zip(channel.attention, base.blocks):
        assert torch.equal(mine.qkv.weight, block.attention.qkv.weight)
        assert torch.equal(mine.out.bias, block.attention.out.bias)


def test_what_is_due():
    pattern = torch.tensor([[0, 1], [2, -1]])
    assert due(pattern, 4, -1).all()
    expected = [[False, True] * 2, [True, False] * 2] * 2
    assert due(pattern, 4, 1).view(4, 4).tolist() == expected
    assert int(due(pattern, 5, 2).sum()) == 2 * 3


@pytest.mark.parametrize("wrong", [{"window": (4, 5)}, {"window": (9,)}, {"cross": (5, 0)}])
def test_windows_have_a_centre(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SuperResConfig(**{**vars(DIRECT), **wrong})


def test_text_must_fit_the_base():
    config = SuperResConfig(**{**vars(SMALL["direct"]), "text_len": 10})
    with pytest.raises(ValueError, match="text_len 10"):
        make(config)
