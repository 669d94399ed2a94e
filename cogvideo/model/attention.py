"""The two attention channels of a block (CogVideo section 3.2), for whole sequences and for single steps.

The spatial channel is the attention of the inherited text-to-image model: text and the token's own frame. The
temporal channel has weights of its own and looks over frames. Both are the same computation over different
groups of tokens: text keys in front, then the group's, one call of `scaled_dot_product_attention`. The layout
says which tokens make a group, a `View` which of them are there. Training in bfloat16 on a CPU computes the
same by matrix products whose gradient is written out (`MatrixAttention`), with fewer passes over the scores.

Legend: B batch, S frame tokens, T text tokens, G groups of n tokens, H heads, d width of a head, D = H * d.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.layout import Layout
from cogvideo.model.cache import Cache, Channel, ChannelCache

PADDED = -1e4  # added to scores of padding, where -inf could leave a row without any key
ROWS = 192  # queries that attend together: enough to fill a matrix, few enough to skip keys that none sees


class Attention(nn.Module):
    """One channel of one layer: queries, keys and values as thirds [q | k | v] of one matrix, and the output
    projection. With `qk_norm`, queries and keys are normalised for each head (Dehghani 2023)."""

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool = False,
        *,
        channel: Channel = "spatial",
        layer: int = 0,
    ):
        super().__init__()
        self.heads = heads
        self.channel = channel
        self.layer = layer
        self.odd = layer % 2 == 1  # torch.compile would specialise on `layer` and compile every layer
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width // heads, bias=False) for _ in range(2 * qk_norm))

    def forward(self, x: Tensor, view: "View") -> tuple[Tensor | None, Tensor]:
        """Attend to what `view` shows: [B, T + S, D] to text [B, T, D] and frames [B, S, D].

        Text is None where the view has none, and in the temporal channel, for text never looks over frames.
        """
        qkv = self.project(x, view.turns)
        text, frames = view.attend(self, qkv)
        if text is not None:
            text = self.out(text)
        return text, self.out(frames)

    def project(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """[B, S, D] to queries, keys, values [3, B, H, S, d]; `turns` [2, S, d] rotates queries and keys."""
        return self.prepare(self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4), turns)

    def prepare(self, qkv: Tensor, turns: Tensor | None) -> Tensor:
        """Queries and keys of [3, B, H, S, d], normalised and rotated as they meet in the scores."""
        if not self.norms and turns is None:
            return qkv
        q, k, v = qkv  # not by index: its gradient would be summed up in a tensor of all three
        qk = [norm(x) for norm, x in zip(self.norms, (q, k))] or [q, k]
        if turns is not None:
            qk = [rotate(x, turns.to(x.dtype)) for x in qk]
        return torch.stack((*qk, v))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding (Su 2021): rotate each pair (x[k], x[k + d / 2]) of x [..., S, d] by an angle of
    its position. `turns` [2, S, d] holds cosines, and sines with the sign of the first half turned."""
    cosine, sine = turns
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


def turns_of(positions: Tensor, width: int) -> Tensor:
    """Cosines and sines [2, S, width] for `rotate`, of positions [S, 3] (time, row, column).

    Of the width / 2 pairs a quarter turns with time and three eighths each with row and column, at
    wavelengths from about 6 to 200 positions.
    """
    pairs = width // 2
    shares = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    angles = []
    for axis, share in enumerate(shares):
        speed = 32.0 ** -torch.linspace(0, 1, share, device=positions.device)
        angles.append(positions[:, axis : axis + 1].float() * speed)
    angle = torch.cat(angles, 1)  # [S, pairs]
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cosine, cosine), 1), torch.cat((-sine, sine), 1)))


@dataclass(frozen=True)
class Groups:
    """Which frame tokens attend together, as tensors on a device."""

    index: Tensor  # [G * n] laid places, group by group
    back: Tensor  # [S] the inverse permutation
    mask: Tensor  # [G, 1, n, n] 0 or -inf
    rows: tuple[tuple[int, int, int], ...]  # queries from, up to; keys up to the last that one of them sees
    clear: tuple[int, ...]  # of each of `rows`: the first keys, which all of these queries see
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
    clear = tuple(int(part.all(1).all(0).long().cumprod(0).sum()) for part in sees.split(ROWS, 1))
    return Groups(flat.to(device), flat.argsort().to(device), mask.to(device), rows, clear, whole)


def by_matrices(x: Tensor) -> bool:
    """Whether attention is computed by `MatrixAttention`: in training in bfloat16 on a CPU, where the kernels
    of `scaled_dot_product_attention` take two to three times as long."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad


def attend_text(qkv: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Text attends to text, in both directions: [3, B, H, T, d] to [B, T, D]. `bias` [B, T] is 0, or -inf on
    padding."""
    q, k, v = qkv
    if by_matrices(qkv) and not dropout:
        hidden = bias[:, None, None, :].clamp_min(PADDED).to(q.dtype)  # a text of padding alone sees itself
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + hidden
        seen: Tensor = scores.softmax(-1) @ v
        return seen.transpose(1, 2).flatten(2)
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
    if by_matrices(frames) and not dropout:
        seen: Tensor = MatrixAttention.apply(frames, text, bias, groups)  # type: ignore[no-untyped-call]
        return seen
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
    y = y.view(b, count, h, n, d).transpose(2, 3).reshape(b, s, h * d)  # group order
    return y if groups.whole else y[:, groups.back]


class MatrixAttention(torch.autograd.Function):
    """`attend_groups` as matrix products and a softmax, in both directions.

    What it saves against autograd through `scaled_dot_product_attention`: no search for rows that see
    nothing (there are none: a token sees itself), masks only for those keys that some queries do not see,
    gradients of keys and values summed in place. Exponentials without the maximum in front would save one
    hundredth more, and could overflow.
    """

    @staticmethod
    def forward(ctx: Any, frames: Tensor, text: Tensor, bias: Tensor, groups: Groups) -> Tensor:
        count, _, n, _ = groups.mask.shape
        _, b, h, s, d = frames.shape
        t = text.shape[3]
        x = frames if groups.whole else frames.index_select(3, groups.index)
        x = x.unflatten(3, (count, n)).transpose(2, 3)  # [3, B, G, H, n, d]

        q = x.new_empty(b, count, h, n, d)
        torch.mul(x[0], d**-0.5, out=q)
        kv = x.new_empty(2, b, count, h, t + n, d)
        kv[..., :t, :] = text.unsqueeze(2)
        kv[..., t:, :] = x[1:]
        q, (k, v) = q.flatten(0, 2), kv.flatten(1, 3)  # [B * G * H, n, d], [B * G * H, T + n, d]

        hidden = bias.to(q.dtype)[:, None, None, None, :]
        turned = _turned(k, groups)
        seen_by, y = [], q.new_empty(b, count, n, h, d)
        for (i, j, seen), clear in zip(groups.rows, groups.clear):
            scores = torch.bmm(q[:, i:j], turned[..., : t + seen])  # [B * G * H, rows, T + seen]
            each = scores.view(b, count, h, j - i, t + seen)
            each[..., :t] += hidden
            if clear < seen:
                each[..., t + clear :] += groups.mask[:, :, i:j, clear:seen].to(q.dtype)
            seen_by.append(scores.softmax(-1))
            out = torch.bmm(seen_by[-1], v[:, : t + seen])
            y[:, :, i:j] = out.view(b, count, h, j - i, d).transpose(2, 3)

        ctx.groups, ctx.sizes = groups, (b, count, h, n, d, t)
        ctx.save_for_backward(q, k, v, *seen_by)
        found: Tensor = y.view(b, s, h * d)
        return found if groups.whole else found.index_select(1, groups.back)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, v, *seen_by = ctx.saved_tensors
        groups, (b, count, h, n, d, t) = ctx.groups, ctx.sizes
        dy = dy if groups.whole else dy.index_select(1, groups.index)
        dout = dy.reshape(b, count, n, h, d).transpose(2, 3).reshape(q.shape)  # [B * G * H, n, d]

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        turned = _turned(v, groups)
        for (i, j, seen), p in zip(groups.rows[::-1], seen_by[::-1]):  # the last queries see all keys
            keys, first = slice(0, t + seen), j == n
            dp = torch.bmm(dout[:, i:j], turned[..., keys])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, i:j] = torch.bmm(ds, k[:, keys])
            for total, a, b_ in ((dk, ds, q), (dv, p, dout)):
                if first:
                    torch.bmm(a.transpose(1, 2), b_[:, i:j], out=total)
                else:
                    total[:, keys].baddbmm_(a.transpose(1, 2), b_[:, i:j])

        dx = q.new_empty(b, count, n, 3, h, d)  # as the projection lays it out
        torch.mul(dq.view(b, count, h, n, d).transpose(2, 3), d**-0.5, out=dx[..., 0, :, :])
        dtext = q.new_empty(2, b, h, t, d)
        for number, one in enumerate((dk, dv)):
            one = one.view(b, count, h, t + n, d)
            torch.sum(one[..., :t, :], 1, out=dtext[number])
            dx[..., 1 + number, :, :] = one[..., t:, :].transpose(2, 3)
        dx = dx.flatten(1, 2)  # [B, S, 3, H, d]
        dx = dx if groups.whole else dx.index_select(1, groups.back)
        return dx.permute(2, 0, 3, 1, 4), dtext, None, None


def _turned(x: Tensor, groups: Groups) -> Tensor:
    """[M, n, d] as [M, d, n]; copied once if parts of it are wanted, which `bmm` would copy one by one."""
    turned = x.transpose(1, 2)
    return turned.contiguous() if len(groups.rows) > 1 else turned


def attend_step(
    qkv: Tensor, cache: ChannelCache, layer: int, parts: Sequence[Sequence[int]], bias: Tensor
) -> Tensor:
    """New tokens at some laid places attend to what the cache holds for each: [3, B, H, m, d] to [B, m, D].

    parts: the places, grouped by what they see (`ChannelCache.split`). bias [B * H, 1, L]: added to the
    scores, text first, zeros after; cut to what is seen. Scores, softmax and mean are three calls and not
    `scaled_dot_product_attention`, which for a single query shares the keys of the whole batch out over the
    threads: its sums depend on the batch and on how many threads there are.
    """
    _, b, h, m, d = qkv.shape
    qkv, seen = qkv.flatten(1, 2), []  # [3, B * H, m, d]
    for some, one in zip(parts, qkv.split([len(part) for part in parts], 2)):
        kept = cache.append(layer, some, one[1:])  # [2, B * H, seen, d]
        mask = bias.narrow(2, 0, kept.shape[2])
        scores = torch.baddbmm(mask, one[0], kept[0].transpose(1, 2), alpha=d**-0.5)  # [B * H, m, seen]
        seen.append(torch.bmm(scores.softmax(-1), kept[1]))
    y = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
    return y.view(b, h, m, d).transpose(1, 2).flatten(2)


# -- views: who attends to whom in a forward, for both channels of all layers


class View(Protocol):
    """What the tokens of one forward see."""

    @property
    def turns(self) -> Tensor | None:
        """[2, T + S, d] rotations of queries and keys, if there are any."""
        ...

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        """Queries, keys, values [3, B, H, T + S, d] of a channel to what its text [B, T, D] and its frames
        [B, S, D] see."""
        ...


@dataclass(frozen=True)
class SequenceView:
    """Text and the first whole frames of a layout, all at once."""

    layout: Layout  # of the frames that are there
    window: int  # of the temporal channel; odd layers shift theirs
    bias: Tensor  # [B, T] added to the scores of text
    turns: Tensor | None = None
    boost: float = 0.0  # what of the bias is the boost of text
    dropout: float = 0.0

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        text, frames = qkv.tensor_split((self.bias.shape[1],), 3)  # [3, B, H, T, d], [3, B, H, S, d]
        temporal = attention.channel == "temporal"
        text_seen = None if temporal else attend_text(text, self.bias, self.dropout)
        if not self.layout.frames:
            return text_seen, frames[0].transpose(1, 2).flatten(2)  # [B, 0, D]

        shifted = bool(self.window) and attention.odd
        groups = groups_of(self.layout, attention.channel, self.window, shifted, qkv.device, self.bias.dtype)
        unboosted = self.layout.reference and temporal  # there the original boosts steps alone
        bias = self.bias - self.boost if unboosted else self.bias
        return text_seen, attend_groups(frames, text[1:], groups, bias, self.dropout)


@dataclass(frozen=True)
class PromptView(SequenceView):
    """The same, and keys and values are left in a cache for the steps that follow."""

    cache: Cache = field(kw_only=True)

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        self.cache.write(attention.channel, attention.layer, qkv)
        return super().attend(attention, qkv)


class StepView:
    """One token a row at some laid places, or several that do not depend on each other."""

    def __init__(self, cache: Cache, places: Sequence[int]):
        self.cache = cache
        self.turns = None if cache.turns is None else cache.turns[:, places]
        self.splits = {channel: one.split(places) for channel, one in cache.channels.items()}

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        channel = self.cache.channels[attention.channel]
        parts = self.splits[attention.channel][attention.layer % 2]
        return None, attend_step(qkv, channel, attention.layer, parts, self.cache.bias)
