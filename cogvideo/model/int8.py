"""Linear layers with int8 weights, for stepping on a CPU, where reading weights is what takes the time.

Weights are rounded once, a scale for each output; inputs are rounded as they come, a scale for each call;
products are exact in int32. A quarter of the bytes of float32, and none of its precision where it is not
needed: norms, softmax, gates and embeddings stay in float32.
"""

import warnings

import torch
from torch import Tensor, nn

from cogvideo.model.transformer import Base, TemporalChannel


class Int8Linear(nn.Module):
    """A linear layer whose weights were rounded to int8: [..., inputs] to [..., outputs], float32, CPU
    only."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        scales = weight.abs().amax(1).clamp_min(1e-8) / 127
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but there in all versions of torch that we take
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight.detach(), scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)
        # without VNNI two products could overflow the 16 bits they are summed in, so inputs give up one bit
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def to_int8(part: Base | TemporalChannel) -> Base | TemporalChannel:
    """Replace every linear layer of a loaded part, and the head of a base, in place."""
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
    if isinstance(part, Base):
        part.head = Int8Linear(  # type: ignore[assignment]
            part.embed.weight[: part.config.codes], None)
    return part
