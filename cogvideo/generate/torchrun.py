"""Generation by several processes that torchrun started: each its own prompts, or a slice of the matrices.

Slices are for a model that no device holds alone. Each process has some heads of every attention and some
rows of every MLP; it adds its share of an output to those of the others, and so all sample the same codes.
Weights are cut while they are read, so no process holds a whole part.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideo.cluster import place_of_torchrun
from cogvideo.model.attention import Attention
from cogvideo.model.transformer import Block


@dataclass(frozen=True)
class Slices:
    """The processes that hold slices of the same matrices, as one of them sees them."""

    number: int
    count: int
    group: dist.ProcessGroup

    def rows(self, linear: nn.Linear, thirds: int = 1) -> nn.Linear:
        """Some outputs of a layer, the same of each of its `thirds`."""
        weight = linear.weight.unflatten(0, (thirds, -1)).chunk(self.count, 1)[self.number].flatten(0, 1)
        bias = linear.bias.unflatten(0, (thirds, -1)).chunk(self.count, 1)[self.number].flatten()
        return _linear(weight, bias)

    def columns(self, linear: nn.Linear) -> "SummedLinear":
        """Some inputs of a layer."""
        weight = linear.weight.chunk(self.count, 1)[self.number]
        return SummedLinear(_linear(weight, None), linear.bias, self.group)


class SummedLinear(nn.Module):
    """A linear layer of whose inputs each process has some: [..., inputs / count] to [..., outputs]."""

    def __init__(self, share: nn.Linear, bias: Tensor, group: dist.ProcessGroup):
        super().__init__()
        self.share = share
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.share(x)
        dist.all_reduce(y, group=self.group)
        return y + self.bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    return linear


def cut(part: nn.Module, slices: Slices) -> None:
    """Keep this process's slice of the matrices of a part, in place. ValueError if its heads cannot be
    shared."""
    for module in list(part.modules()):
        if isinstance(module, Attention):
            if module.heads % slices.count:
                raise ValueError(f"{module.heads} heads cannot be shared by {slices.count} slices")
            module.qkv = slices.rows(module.qkv, 3)
            module.out = slices.columns(module.out)  # type: ignore[assignment]
            module.heads //= slices.count
        elif isinstance(module, Block):
            module.up = slices.rows(module.up)
            module.down = slices.columns(module.down)  # type: ignore[assignment]


@dataclass(frozen=True)
class Place:
    """This process among those that torchrun started: `number` of `count` that generate their own prompts,
    and its slices. Without torchrun it is alone."""

    number: int = 0
    count: int = 1
    slices: Slices | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes its videos; of several slices the first does."""
        return self.slices is None or self.slices.number == 0


def join(device: str, slices: int) -> tuple[Place, str]:
    """This process's place, and its device. ValueError if the processes cannot form groups of `slices`."""
    rank, ranks = place_of_torchrun() or (0, 1)
    if slices < 1 or ranks % slices:
        raise ValueError(
            f"--slices must divide the number of processes, {ranks}; got {slices}. Start them by torchrun "
            f"--nproc-per-node N -m cogvideo generate"
        )
    if device == "cuda" and ranks > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if slices == 1:
        return Place(rank, ranks), device
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    groups = [dist.new_group([*range(first, first + slices)]) for first in range(0, ranks, slices)]
    number = rank // slices
    return Place(number, ranks // slices, Slices(rank % slices, slices, groups[number])), device
