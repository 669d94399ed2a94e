"""Tensor parallelism: matrices cut into slices, one a device, applied from outside.

`PLANS` is the table: for each class of module, which of its matrices give outputs of their own to each device
(`ColwiseParallel`) and which add up the devices' shares (`RowwiseParallel`; Megatron-LM, Shoeybi 2019). Heads
are whole on one device, so queries, keys and values must be three matrices (`SplitProjection`). All that the
table does not name is computed on every device alike.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cogvideo.model.attention import Attention
from cogvideo.model.transformer import Block

THIRDS = ("q", "k", "v")


class SplitProjection(nn.Module):
    """The projection of an attention, [q | k | v] of one matrix, as three matrices."""

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        for name, weight, bias in zip(THIRDS, qkv.weight.chunk(3), qkv.bias.chunk(3)):
            linear = nn.Linear(qkv.in_features, len(weight), device="meta")
            linear.weight = nn.Parameter(weight.detach(), qkv.weight.requires_grad)
            linear.bias = nn.Parameter(bias.detach(), qkv.bias.requires_grad)
            self.register_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, 3 * D / devices]: the thirds of this device's heads."""
        return torch.cat([self.get_submodule(name)(x) for name in THIRDS], -1)


def split_projections(module: nn.Module) -> None:
    """Give every attention below a module three separate matrices instead of one."""
    for attention in module.modules():
        if isinstance(attention, Attention) and isinstance(attention.qkv, nn.Linear):
            attention.register_module("qkv", SplitProjection(attention.qkv))


def split_names(name: str) -> list[str]:
    """The names of the three tensors that a tensor of a projection is split into; none of another tensor."""
    head, dot, kind = name.rpartition(".")
    if not head.endswith("qkv") or kind.partition("/")[0] not in ("weight", "bias"):
        return []
    return [f"{head}.{third}.{kind}" for third in THIRDS]


def _same_input() -> ParallelStyle:
    return PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())


def _by_heads() -> ParallelStyle:
    return SequenceParallel(sequence_dim=1, use_local_output=True)  # of [B, H, S, d]


Plan = dict[str, Callable[[], ParallelStyle]]

PLANS: dict[type[nn.Module], Plan] = {
    Attention: {
        "qkv": _same_input,
        "qkv.q": ColwiseParallel,
        "qkv.k": ColwiseParallel,
        "qkv.v": ColwiseParallel,
        "norms.0": _by_heads,
        "norms.1": _by_heads,
        "out": RowwiseParallel,
    },
    Block: {"up": ColwiseParallel, "down": RowwiseParallel},
    nn.TransformerEncoderLayer: {"linear1": ColwiseParallel, "linear2": RowwiseParallel},
    nn.TransformerDecoderLayer: {"linear1": ColwiseParallel, "linear2": RowwiseParallel},
}


def check_slices(module: nn.Module, count: int) -> None:
    """Raise ValueError unless `count` devices can have equally many heads and rows of each matrix."""
    for inner in module.modules():
        if isinstance(inner, Attention) and inner.heads % count:
            raise ValueError(f"{inner.heads} heads cannot be shared by {count} slices; choose another --mesh")
        if isinstance(inner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            rows = inner.linear1.out_features
            if rows % count:
                raise ValueError(f"{rows} rows cannot be shared by {count} slices; choose another --mesh")


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has a part of this name; normalised queries and keys are a choice of the model."""
    return any(name == known for known, _ in module.named_modules())


def slice_matrices(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the matrices below a module into slices over a mesh of one dimension."""
    split_projections(module)
    # torch warns that a slice of a shard is gathered in two messages: so it is
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for inner in list(module.modules()):
        for name, style in PLANS.get(type(inner), {}).items():
            if _has(inner, name):
                parallelize_module(inner.get_submodule(name), mesh, style())
        if isinstance(inner, Attention):
            inner.heads //= mesh.size()
