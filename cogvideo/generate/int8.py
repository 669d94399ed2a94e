"""Linear layers as a CPU computes them fastest for few rows, when reading weights takes most of the time.

int8: weights are quantised once, with a scale for each output; inputs are quantised on the fly, with a scale
for each row, so a row does not depend on the rest of its batch; products are exact in int32. Weights take a
quarter of the bytes of float32. Norms, softmax, gates and embeddings stay in float32.

float32, bfloat16: the same numbers in the order in which oneDNN reads them, up to six times as fast.
"""

import warnings
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model.attention import PromptView, View
from cogvideo.model.lora import Factors, merge
from cogvideo.model.transformer import (
    Base,
    Block,
    DualChannelTransformer,
    TemporalChannel,
    TemporalLayer,
)

WIDEST_JOINED = 1024
CHUNK_ROWS = 256  # quantised per chunk, to stay in the processor's cache


class PackedLinear(nn.Module):
    """A linear layer that cannot learn: [..., inputs] to [..., outputs], CPU only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.outputs = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.outputs)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: [..., inputs] to [..., outputs], float32, CPU only."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        # the operator that takes the range of its inputs is of x86; the other one has to be shown it
        self.shown = 0 if torch.backends.quantized.engine in ("x86", "fbgemm") else 2
        weight = F.pad(weight, (0, self.shown))
        scales = weight.abs().amax(1).clamp_min(1e-8) / 127
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but there in all versions of torch that we take
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        self.ends = torch.tensor([1.0, -1.0])
        # without VNNI two products could overflow the 16 bits they are summed in, so inputs give up one bit
        self.reduce_range = not torch.cpu._is_vnni_supported()
        self.most = 63 if self.reduce_range else 127  # inputs become whole numbers from -most to most

    def forward(self, x: Tensor) -> Tensor:
        """Each row is brought to -1..1 by its own largest number, so that it does not depend on others."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], len(self.bias))
        if x.numel() > CHUNK_ROWS * x.shape[-1]:
            y = x.new_empty(*x.shape[:-1], len(self.bias))
            for part, out in zip(x.flatten(0, -2).split(CHUNK_ROWS), y.flatten(0, -2).split(CHUNK_ROWS)):
                out.copy_(self(part))
            return y
        largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        return torch.addcmul(self.bias, self._product(x / largest), largest)

    def _product(self, rows: Tensor) -> Tensor:
        """Rows in -1..1 by the rounded weights. An operator that rounds by the least and the largest number
        of all rows gets these ends as two more inputs of each row, which meet weights of zero."""
        y: Tensor
        if self.shown:
            rows = torch.cat((rows, self.ends.expand(*rows.shape[:-1], 2)), -1)
            y = torch.ops.quantized.linear_dynamic(rows, self.packed, self.reduce_range)
        else:
            y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                rows, 1 / self.most, self.most + 1, self.packed
            )
        return y


class AdaptedInt8Linear(nn.Module):
    """An int8 layer and adapters beside it, in float32: [..., inputs] to [..., outputs]."""

    def __init__(self, linear: Int8Linear, factors: Factors):
        super().__init__()
        self.linear = linear
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + F.linear(F.linear(x, self.factors.down), self.factors.up)


def with_adapters(linear: Int8Linear, factors: Factors | None) -> nn.Module:
    """A layer with adapters beside it, if their rank is not 0."""
    if factors is None or not len(factors.down):
        return linear
    return AdaptedInt8Linear(linear, factors)


def factors_of(linear: nn.Module) -> Factors:
    """The adapters of an int8 layer, of rank 0 if it has none."""
    if isinstance(linear, AdaptedInt8Linear):
        return linear.factors
    weight, _ = unpack(linear)
    outputs, inputs = weight.shape
    return Factors(torch.zeros(0, inputs), torch.zeros(outputs, 0))


def unpack(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the quantised weights and the bias of an int8 layer without its adapters, in float32."""
    if isinstance(linear, AdaptedInt8Linear):
        linear = linear.linear
    assert isinstance(linear, Int8Linear)
    weight, _ = torch.ops.quantized.linear_unpack(linear.packed)
    return weight.dequantize()[:, : weight.shape[1] - linear.shown], linear.bias


def packs(dtype: str) -> bool:
    """Whether this processor has packed layers of a dtype; without AVX-512 it has none in bfloat16."""
    if dtype == "int8":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != "bfloat16" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(part: nn.Module, dtype: str, adapters: Mapping[str, Factors] | None = None) -> nn.Module:
    """Replace every linear layer of a loaded part, and the head of a base, in place. In int8, `adapters` of
    layers by name are kept beside them; else they are added to the weights.

    The rest becomes `dtype`, float32 for int8. An embedding keeps its dtype, for its rows become float32 when
    positions are added: so most of a memory-mapped vocabulary is never read.
    """
    rest = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    make = Int8Linear if dtype == "int8" else partial(PackedLinear, dtype=rest)
    packed = packs(dtype)
    beside = dict(adapters or {})
    if dtype != "int8":
        merge(part, beside)
    if packed:
        for path, module in list(part.named_modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    layer: nn.Module = make(child.weight, child.bias)
                    if isinstance(layer, Int8Linear):
                        layer = with_adapters(layer, beside.get(f"{path}.{name}".lstrip(".")))
                    setattr(module, name, layer)
        if isinstance(part, Base):
            part.head = make(part.embed.weight[: part.config.codes], None)  # type: ignore[assignment]
    for name, parameter in part.named_parameters():
        if name != "embed.weight" or rest == torch.bfloat16 or not packed:
            parameter.data = parameter.data.to(rest)
    return part


class JointBlock(nn.Module):
    """A layer of both channels with one matrix in and one out: half the calls a step. Exact up to rounding.

    The gate is folded into the way out: gate * A a + (1 - gate) * B b = [gate * A | (1 - gate) * B] [a | b].
    """

    def __init__(self, block: Block, temporal: TemporalLayer):
        super().__init__()
        self.block = block
        self.attentions = (block.attention, temporal.attention)
        qkvs = [attention.qkv for attention in self.attentions]
        weights, biases = zip(*map(unpack, qkvs))
        downs, ups = zip(*map(factors_of, qkvs))
        together = Factors(torch.cat(downs), torch.block_diag(*ups))
        self.qkv = with_adapters(Int8Linear(torch.cat(weights), torch.cat(biases)), together)

        gate = temporal.gate.detach().sigmoid()
        shares = (gate, 1 - gate)
        outs = [attention.out for attention in self.attentions]
        weights, biases = zip(*map(unpack, outs))
        weight = torch.cat([share[:, None] * w for share, w in zip(shares, weights)], 1)
        linear = Int8Linear(weight, sum(share * b for share, b in zip(shares, biases)))
        downs, ups = zip(*map(factors_of, outs))
        up = torch.cat([share[:, None] * u for share, u in zip(shares, ups)], 1)
        self.out = with_adapters(linear, Factors(torch.block_diag(*downs), up))

    def forward(self, x: Tensor, view: View, temporal: TemporalLayer | None = None) -> Tensor:
        """[B, T + S, D] to the same, as `Block.forward` with the temporal half that it was built of."""
        h = self.block.norm1(x)
        spatial, over_time = self.project(h, view)
        text, frames = view.attend(self.attentions[0], spatial)
        _, frames_over_time = view.attend(self.attentions[1], over_time)
        frames = self.out(torch.cat((frames, frames_over_time), -1))

        h = frames if text is None else torch.cat((self.attentions[0].out(text), frames), 1)
        x = x + self.block.norm3(h)

        h = self.block.mlp(self.block.norm2(x))
        x = x + self.block.norm4(h)
        return x

    def project(self, x: Tensor, view: View) -> list[Tensor]:
        """[B, S, D] to queries, keys, values of both channels, each [3, B, H, S, d]."""
        heads = self.attentions[0].heads
        qkvs = self.qkv(x).view(*x.shape[:2], 2, 3, heads, -1).permute(2, 3, 0, 4, 1, 5).contiguous()
        return [attention.prepare(qkv, view.rotary) for attention, qkv in zip(self.attentions, qkvs)]

    def write_keys(self, x: Tensor, view: PromptView, temporal: TemporalLayer | None = None) -> None:
        """As `Block.write_keys`."""
        qkvs = self.project(self.block.norm1(x), view)
        for attention, qkv in zip(self.attentions, qkvs):
            view.cache.write(attention.channel, attention.layer, qkv)


class JointTransformer(DualChannelTransformer):
    """A stage of int8 parts that computes its channels jointly."""

    def __init__(self, base: Base, temporal: TemporalChannel):
        super().__init__(base, temporal)
        halves = map(TemporalLayer, temporal.attention, temporal.gate)
        self.layers = [(JointBlock(block, half), half) for block, half in zip(base.blocks, halves)]


def join(model: DualChannelTransformer) -> DualChannelTransformer:
    """A stage of int8 parts that computes its channels jointly; the model itself if it has one channel, or is
    so wide that a second copy of the weights costs more than the calls."""
    if model.temporal is None or model.config.width > WIDEST_JOINED:
        return model
    return JointTransformer(model.base, model.temporal).train(model.training)
