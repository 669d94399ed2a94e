"""The two attention channels of a block (CogVideo section 3.2), for whole sequences and for single steps.

The spatial channel is the attention of the inherited text-to-image model: text and the token's own frame. The
temporal channel has weights of its own and looks over frames. Both are the same computation over different
groups of tokens: text keys in front, then the group's, one call of `scaled_dot_product_attention`; the layout
says which tokens make a group.

Legend: B batch, S frame tokens, T text tokens, G groups of n tokens, H heads, d width of a head, D = H * d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.layout import Layout
from cogvideo.model.cache import ChannelCache

ROWS = 192  # queries that attend together: enough to fill a matrix, few enough to leave out what none sees


class Attention(nn.Module):
    """Projections of one channel: queries, keys and values as thirds [q | k | v] of one matrix, and the way
    out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """[B, S, D] to queries, keys, values [3, B, H, S, d]."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Channels:
    """The channels of one layer side by side: what each projects, and how their outputs become one.

    The gate (CogVideo section 3.2) is one number for each dimension: sigmoid(gate) of the spatial channel's
    output, the rest of the temporal one's.
    """

    def __init__(self, attentions: list[Attention], gate: nn.Parameter | None):
        self.attentions, self.gate = attentions, gate

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """[B, S, D] to queries, keys, values of every channel, each [3, B, H, S, d]."""
        return [attention.project(x) for attention in self.attentions]

    def merge(self, seen: list[Tensor]) -> Tensor:
        """What every channel attended to, each [B, S, D], to the output of the layer's attention [B, S,
        D]."""
        outputs = [attention.out(y) for attention, y in zip(self.attentions, seen)]
        if self.gate is None:
            return outputs[0]
        return torch.lerp(outputs[1], outputs[0], self.gate.sigmoid().to(outputs[0].dtype))


@dataclass(frozen=True)
class Groups:
    """Which frame tokens attend together, as tensors on a device."""

    index: Tensor  # [G * n] laid places, group by group
    back: Tensor  # [S] the inverse permutation
    mask: Tensor  # [G, 1, n, n] 0 or -inf
    rows: tuple[tuple[int, int, int], ...]  # queries from, up to; keys up to the last that one of them sees
    whole: bool  # index is the identity: nothing need be moved


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def groups_of(
    layout: Layout, channel: str, window: int, shifted: bool, device: torch.device, dtype: torch.dtype
) -> Groups:
    index = layout.groups(channel, window, shifted)  # [G, n]
    sees = layout.sees(channel, window, shifted)[index[:, :, None], index[:, None, :]]  # [G, n, n]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf")).unsqueeze(1)
    flat = index.flatten()
    whole = bool((flat == torch.arange(len(flat))).all())
    seen = [int(part.any(1).any(0).nonzero().max()) + 1 for part in sees.split(ROWS, 1)]
    rows = tuple((i * ROWS, min((i + 1) * ROWS, sees.shape[1]), last) for i, last in enumerate(seen))
    return Groups(flat.to(device), flat.argsort().to(device), mask.to(device), rows, whole)


def attend_text(qkv: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Text attends to text, in both directions: [3, B, H, T, d] to [B, T, D]. `bias` [B, T] is 0, or -inf on
    padding."""
    q, k, v = qkv
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :], dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def attend_groups(
    frames: Tensor,
    text: Tensor,
    groups: Groups,
    bias: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Frame tokens attend to all text and to their group.

    frames: queries, keys, values [3, B, H, S, d]; text: keys, values [2, B, H, T, d]; bias [B, T], added to
    scores of text. Returns [B, S, D].
    """
    count, _, n, _ = groups.mask.shape
    _, b, h, s, d = frames.shape
    frames = frames if groups.whole else frames[:, :, :, groups.index]
    frames = frames.unflatten(3, (count, n)).transpose(2, 3).flatten(1, 2)  # [3, B*G, H, n, d]
    text = text.repeat_interleave(count, 1) if count > 1 else text  # [2, B*G, H, T, d]
    q, t = frames[0], text.shape[3]
    k, v = torch.cat((text, frames[1:]), 3)
    mask = torch.cat(
        (bias[:, None, None, None, :].expand(b, count, 1, n, -1), groups.mask.expand(b, count, 1, n, n)), -1
    ).flatten(0, 1)  # [B*G, 1, n, T+n]
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, i:j], k[:, :, : t + seen], v[:, :, : t + seen], mask[:, :, i:j, : t + seen], dropout
        )
        for i, j, seen in groups.rows
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 2)  # [B*G, H, n, d]
    y = y.unflatten(0, (b, count)).transpose(2, 3).reshape(b, s, h * d)  # group order
    return y if groups.whole else y[:, groups.back]


def attend_step(
    qkv: Tensor, cache: ChannelCache, layer: int, places: Sequence[int], bias: Tensor
) -> Tensor:
    """New tokens at some laid places attend to what the cache holds for each: [3, B, H, m, d] to [B, m, D].

    bias [B, 1, 1, L]: added to the scores, text first, zeros after; cut to what is seen.
    """
    seen = []
    for i, place in enumerate(places):
        one = qkv.narrow(3, i, 1)
        keys, values = cache.append(layer, place, one[1:])  # [B, H, seen, d]
        mask = bias.narrow(3, 0, keys.shape[2])
        seen.append(F.scaled_dot_product_attention(one[0], keys, values, attn_mask=mask))
    y = seen[0] if len(seen) == 1 else torch.cat(seen, 2)
    return y.transpose(1, 2).flatten(2)
