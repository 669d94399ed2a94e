"""Attention of groups as matrix products and a softmax, with a gradient that is written out.

Training in bfloat16 on a CPU computes attention this way: it takes a third to a half of the time of autograd
through `scaled_dot_product_attention`. There is no search for rows that see nothing (there are none, for a
token sees itself), masks are added only where some query does not see a key, and gradients of keys and values
are summed in place. Exponentials without subtracting the maximum would save one hundredth more, and could
overflow.

Legend: B batch, S frame tokens, T text tokens, G groups of n tokens, H heads, d width of a head, D = H * d.
"""

from typing import Any

import torch
from torch import Tensor

from cogvideo.model.groups import Groups


def uses_matrices(x: Tensor) -> bool:
    """Whether attention over `x` is computed by `MatrixAttention`: in training in bfloat16 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad


class MatrixAttention(torch.autograd.Function):
    """The same as `attention.attend_groups`, forward and backward."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, text: Tensor, bias: Tensor, groups: Groups) -> Tensor:
        count, _, n, _ = groups.mask.shape
        _, b, h, s, d = frames.shape
        t = text.shape[3]
        x = groups.gather(frames, 3).unflatten(3, (count, n)).transpose(2, 3)  # [3, B, G, H, n, d]

        q = x.new_empty(b, count, h, n, d)
        torch.mul(x[0], d**-0.5, out=q)
        kv = x.new_empty(2, b, count, h, t + n, d)
        kv[..., :t, :] = text.unsqueeze(2)
        kv[..., t:, :] = x[1:]
        q = q.flatten(0, 2)  # [B * G * H, n, d]
        k, v = kv.flatten(1, 3)  # each [B * G * H, T + n, d]

        padding_bias = bias.to(q.dtype)[:, None, None, None, :]
        transposed_k = _transposed(k, groups)
        probs = []
        y = q.new_empty(b, count, n, h, d)
        for start, end, seen, unmasked in groups.chunks:
            scores = torch.bmm(q[:, start:end], transposed_k[..., : t + seen])  # [B * G * H, rows, T + seen]
            by_group = scores.view(b, count, h, end - start, t + seen)
            by_group[..., :t] += padding_bias
            if unmasked < seen:
                by_group[..., t + unmasked :] += groups.mask[:, :, start:end, unmasked:seen].to(q.dtype)
            probs.append(scores.softmax(-1))
            out = torch.bmm(probs[-1], v[:, : t + seen])
            y[:, :, start:end] = out.view(b, count, h, end - start, d).transpose(2, 3)

        ctx.groups = groups
        ctx.sizes = (b, count, h, n, d, t)
        ctx.save_for_backward(q, k, v, *probs)
        return groups.restore(y.view(b, s, h * d), 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, v, *probs = ctx.saved_tensors
        groups: Groups = ctx.groups
        b, count, h, n, d, t = ctx.sizes
        dy = groups.gather(dy, 1)
        dout = dy.reshape(b, count, n, h, d).transpose(2, 3).reshape(q.shape)  # [B * G * H, n, d]

        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        transposed_v = _transposed(v, groups)
        for chunk, p in zip(groups.chunks[::-1], probs[::-1]):  # the last queries see all keys
            rows = slice(chunk.start, chunk.end)
            keys = slice(0, t + chunk.seen)
            dp = torch.bmm(dout[:, rows], transposed_v[..., keys])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.bmm(ds, k[:, keys])
            for total, dscores, factor in ((dk, ds, q), (dv, p, dout)):
                if chunk.end == n:
                    torch.bmm(dscores.transpose(1, 2), factor[:, rows], out=total)
                else:
                    total[:, keys].baddbmm_(dscores.transpose(1, 2), factor[:, rows])

        dx = q.new_empty(b, count, n, 3, h, d)  # as the projection lays it out
        torch.mul(dq.view(b, count, h, n, d).transpose(2, 3), d**-0.5, out=dx[..., 0, :, :])
        dtext = q.new_empty(2, b, h, t, d)
        for i, gradient in enumerate((dk, dv)):
            by_group = gradient.view(b, count, h, t + n, d)
            torch.sum(by_group[..., :t, :], 1, out=dtext[i])
            dx[..., 1 + i, :, :] = by_group[..., t:, :].transpose(2, 3)
        dx = groups.restore(dx.flatten(1, 2), 1)  # [B, S, 3, H, d]
        return dx.permute(2, 0, 3, 1, 4), dtext, None, None


def _transposed(x: Tensor, groups: Groups) -> Tensor:
    """[M, n, d] as [M, d, n]; copied once if parts of it are wanted, which `bmm` would copy one by one."""
    transposed = x.transpose(1, 2)
    return transposed.contiguous() if len(groups.chunks) > 1 else transposed
