"""Training on several devices, applied from outside: models and objectives know nothing of it.

`torchrun --nproc-per-node N -m cogvideo train ...` starts N processes, each with a device. Together they take
the steps that one process would take:
- A batch is shared out, N-th parts in order; losses and gradients are averaged over the processes.
- Weights, gradients and optimizer states are cut into N shards (FSDP2, `fully_shard`). A block, or a
  matrix of a temporal channel, is put together when it is needed and let go again. What is left (embeddings,
  positions, norms, gates) is there for the whole step: `Step` is the module around everything, so that models
  may use their tables as they like.
- The tokenizer's codebook follows the vectors of all processes.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from cogvideo.data.loader import Batch
from cogvideo.hardware import find_device
from cogvideo.model.transformer import Block
from cogvideo.train.objectives import Result
from cogvideo.train.objectives import Step as Objective
from cogvideo.train.recipes import Phase
from cogvideo.vqvae import Codebook

BLOCKS = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Machine:
    """What a run computes on: this process's device and, with a mesh, its place among others."""

    device: torch.device
    mesh: DeviceMesh | None = None
    rank: int = 0
    ranks: int = 1
    recompute: bool = False  # activations of the blocks in the backward pass, instead of keeping them
    compile: bool = False  # the blocks

    @property
    def first(self) -> bool:
        """The one process that writes files and reports."""
        return self.rank == 0

    def share(self, phase: Phase) -> int:
        """Clips of a batch that fall to this process."""
        if phase.batch % self.ranks:
            raise ValueError(
                f"a batch of {phase.batch} clips cannot be shared by {self.ranks} processes; choose a "
                f"multiple of {self.ranks} for --{phase.name}.batch"
            )
        return phase.batch // self.ranks

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number averaged over the processes; all of them call this with the same names."""
        if self.mesh is None:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(numbers, (values / self.ranks).tolist()))

    def union(self, mine: dict[str, str]) -> dict[str, str]:
        """What all processes found; all of them call this."""
        if self.mesh is None:
            return mine
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, mine)
        return {key: value for one in found for key, value in one.items()}

    def arithmetic(self, precision: str) -> ExitStack:
        """A context for a step: matrix products in `precision`. On a CPU, the fused attention of short rows
        takes three times as long as plain matrix products in bfloat16, above all on the way back."""
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"))
        if self.device.type == "cpu" and precision == "bfloat16":
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of any device, despite its name
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def wait(self) -> None:
        """Until all processes are here."""
        if self.mesh is not None:
            dist.barrier()


def start(device: torch.device | str, recompute: bool = False, compile: bool = False) -> Machine:
    """Join the processes that torchrun started, each with a device of its own; alone when there are none."""
    device = find_device(device)
    if "RANK" not in os.environ:
        return Machine(device, recompute=recompute, compile=compile)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes train on cpu or cuda, not on {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shards",))
    return Machine(device, mesh, dist.get_rank(), dist.get_world_size(), recompute, compile)


def stop(machine: Machine) -> None:
    if machine.mesh is not None:
        dist.destroy_process_group()


class Step(nn.Module):
    """An objective and the parts that it uses, as one module: `forward` is a whole step up to the loss.

    The objective is made in the first forward, when all but the matrices is whole: models keep the tensors
    that they find in their parts.
    """

    def __init__(self, parts: dict[str, nn.Module], make: Callable[[], Objective]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.make = make
        self.objective: Objective | None = None

    def forward(self, batch: Batch, number: int, generator: torch.Generator) -> Result:
        self.objective = self.objective or self.make()
        return self.objective(batch, number, generator)


def place(step: Step, machine: Machine, precision: str) -> None:
    """Bring all parts of a step to the machine: on its device, or in shards over its mesh.

    Recomputing goes inside compiling, compiling inside sharding. With bfloat16 on cuda the shards travel as
    bfloat16 and gradients are summed in float32; autocast decides what is computed in which, as ever.
    """
    blocks: list[Any] = [m for m in step.modules() if isinstance(m, BLOCKS)]
    for block in blocks:
        if machine.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore
        if machine.compile:
            block.forward = torch.compile(block.forward)  # type: ignore
    if machine.mesh is None:
        step.to(machine.device)
        return
    half = torch.bfloat16 if machine.device.type == "cuda" and precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)
    within = {m for block in blocks for m in block.modules()}
    matrices = [m for m in step.modules() if isinstance(m, nn.Linear) and m not in within]
    for module in blocks + matrices:
        fully_shard(module, mesh=machine.mesh, mp_policy=policy)
    fully_shard(step, mesh=machine.mesh, mp_policy=policy)
    for module in step.modules():
        if isinstance(module, Codebook):
            _follow_together(module, machine)


def _follow_together(book: Codebook, machine: Machine) -> None:
    """Let a codebook change by what all processes saw: the first one does so as if the whole batch were its
    own, and hands the others the outcome. So all hold the same codes, and revive the same."""

    def gather(rows: Tensor) -> Tensor:  # [M, ...] of every process, in their order
        rows = rows.contiguous()
        found = [torch.empty_like(rows) for _ in range(machine.ranks)]
        dist.all_gather(found, rows)
        return torch.cat(found)

    def together(change: Callable[..., None], *arguments: Any) -> None:
        arguments = tuple(gather(a) if isinstance(a, Tensor) else a for a in arguments)
        if machine.first:
            change(*arguments)
        for buffer in book.buffers():
            dist.broadcast(buffer, 0)

    book.follow = partial(together, book.follow)  # type: ignore[method-assign]
    book.fill = partial(together, book.fill)  # type: ignore[method-assign]


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_for_muon(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let Muon see whole gradients of sharded matrices: what it makes of a matrix is no matter of its rows.

    `torch.optim.Muon` takes shards as well, but then gathers in each of its iterations, and rounds otherwise.
    Between steps its momentum is whole too: 4 bytes a hidden weight on every device.
    """

    def gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if isinstance(p.grad, DTensor):
                p.grad = p.grad.redistribute(placements=[Replicate()])
                for key, value in optimizer.state[p].items():
                    optimizer.state[p][key] = value.redistribute(placements=[Replicate()])

    for optimizer in optimizers:
        if type(optimizer).__name__ == "Muon":
            optimizer.register_step_pre_hook(gather)
