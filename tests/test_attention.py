"""Attention by matrix products equals `scaled_dot_product_attention`, forward and backward."""

import pytest
import torch

from cogvideo.layout import Layout
from cogvideo.model.attention import attend_groups, attend_text
from cogvideo.model.groups import groups_of
from cogvideo.model.matrix_attention import MatrixAttention, uses_matrices
from cogvideo.train import peers

B, H, D, T = 2, 3, 8, 6  # clips, heads, width of a head, text tokens
CPU = torch.device("cpu")
CASES = [  # layout, channel, window, shifted
    (Layout.image(T, 16), "spatial", 0, False),
    (Layout.keyframes(T, 8, 5), "spatial", 0, False),
    (Layout.keyframes(T, 8, 5), "temporal", 0, False),
    (Layout.interpolation(T, 8, 5), "temporal", 4, False),
    (Layout.interpolation(T, 8, 5), "temporal", 4, True),
]


def tensors(layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values of frames; keys and values of text; a bias that hides padding; a direction."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, B, H, layout.clip_tokens, D), (2, B, H, T, D), (B, layout.clip_tokens, H * D))
    frames, text, along = (torch.randn(size, generator=generator) for size in sizes)
    bias = torch.zeros(B, T)
    bias[0, :3] = float("-inf")
    return frames.to(dtype), text.to(dtype), bias.to(dtype), along.to(dtype)


def results(attend, layout: Layout, case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """What was attended to, and the gradients of frames and text, as float64."""
    frames, text, bias, along = tensors(layout, torch.bfloat16)  # the same numbers in any dtype
    frames, text = frames.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
    y = attend(frames, text, groups_of(layout, *case, CPU, torch.float32), bias.to(dtype))
    (y * along.to(dtype)).sum().backward()
    return [one.detach().double() for one in (y, frames.grad, text.grad)]


def plain(frames, text, groups, bias):
    return MatrixAttention.apply(frames, text, bias, groups)


@pytest.mark.parametrize("layout, channel, window, shifted", CASES)
def test_matrix_attention_is_scaled_dot_product_attention(layout, channel, window, shifted):
    case = (channel, window, shifted)
    for one, other in zip(*(results(f, layout, case, torch.float32) for f in (plain, attend_groups))):
        assert (one - other).abs().max() < 2e-6 * one.abs().max()


@pytest.mark.parametrize("layout, channel, window, shifted", CASES)
def test_in_bfloat16_it_rounds_no_more_than_that(layout, channel, window, shifted, monkeypatch):
    case = (channel, window, shifted)
    right = results(attend_groups, layout, case, torch.float32)
    ours = results(attend_groups, layout, case, torch.bfloat16)
    monkeypatch.setattr("cogvideo.model.attention.uses_matrices", lambda x: False)
    with peers.Distributed(CPU).arithmetic("bfloat16"):
        theirs = results(attend_groups, layout, case, torch.bfloat16)
    for exact, mine, other in zip(right, ours, theirs):
        assert 0 < (mine - exact).norm() < (other - exact).norm() < 0.01 * exact.norm()


def test_scores_may_be_large():
    layout = CASES[2][0]
    frames, text, bias, _ = tensors(layout, torch.bfloat16)
    y = plain(100 * frames, 100 * text, groups_of(layout, "temporal", 0, False, CPU, torch.float32), bias)
    assert y.isfinite().all() and y.abs().max() <= 100 * max(frames[2].abs().max(), text[1].abs().max())


def test_it_serves_training_only():
    x = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    assert uses_matrices(x) and not uses_matrices(x.detach()) and not uses_matrices(x.float())


def test_text_attends_alike_and_padding_alone_is_finite():
    _, text, bias, _ = tensors(CASES[0][0], torch.bfloat16)
    qkv = torch.cat((text, text[:1])).requires_grad_()
    assert uses_matrices(qkv)
    assert torch.allclose(attend_text(qkv, bias), attend_text(qkv.detach(), bias), atol=0.02, rtol=0.02)
    y = attend_text(qkv, torch.full_like(bias, float("-inf")))
    y.sum().backward()
    assert y.isfinite().all() and qkv.grad.isfinite().all()
