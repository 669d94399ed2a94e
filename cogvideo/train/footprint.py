"""What training holds in each process of a mesh: the parts of a phase laid out as in training, but without
memory, by a mesh whose other processes do not exist."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cogvideo.model.families import Spec
from cogvideo.train.mesh import MeshShape, check_slices_of, open_mesh
from cogvideo.train.objectives import LossFunction
from cogvideo.train.parallel import TrainStep, to_devices
from cogvideo.train.peers import Distributed
from cogvideo.train.phase import Phase

NUMBER = 4  # bytes; weights, gradients and averages are float32


@dataclass(frozen=True)
class Footprint:
    """Bytes of the first process, which has no fewer than any other; `gathered` is what FSDP brings together
    at most at a time: what is used throughout a step, and the largest block. Activations come on top."""

    phase: str
    weights: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def lay_out(spec: Spec, phase: Phase, shape: MeshShape) -> Footprint:
    """The bytes of a phase in a mesh. ValueError if the matrices cannot be cut so."""
    check_slices_of(phase, spec, shape)
    parts = {}
    for name in dict.fromkeys((*phase.uses, *phase.trains)):
        parts[name] = spec.outline(name)
        parts[name].requires_grad_(name in phase.trains)
    step = TrainStep(parts, _never)
    averages = 2 if phase.optimizer == "adamw" else 1
    with _imaginary_processes(shape.ranks):
        mesh = open_mesh("cpu", shape) if shape.ranks > 1 else None
        distributed = Distributed(torch.device("meta"), mesh, ranks=shape.ranks)
        to_devices(step, distributed, "float32", whole_matrices=phase.optimizer == "muon")
        held = NUMBER * sum(_local(p) for p in step.parameters())
        learnt = NUMBER * sum(_local(p) for p in step.parameters() if p.requires_grad)
        gathered = NUMBER * _gathered(step) if shape.shard > 1 else 0
    return Footprint(phase.name, held, learnt, averages * learnt, gathered)


def _never() -> LossFunction:
    raise AssertionError("a step that is only laid out has no loss")


@contextmanager
def _imaginary_processes(ranks: int) -> Iterator[None]:
    """A group of so many processes, of which this one is the first and the others do not exist."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _local(p: torch.Tensor) -> int:
    return p.to_local().numel() if isinstance(p, DTensor) else p.numel()


def _gathered(step: TrainStep) -> int:
    """Numbers of the weights that the step itself gathers, and of the largest block or matrix."""
    groups = [
        module for child in step.children() for module in child.modules() if isinstance(module, FSDPModule)
    ]
    within = {p for module in groups for p in module.parameters()}
    rest = [p for p in step.parameters() if p not in within]
    return _of_slices(rest) + max((_of_slices(module.parameters()) for module in groups), default=0)


def _of_slices(weights: Iterable[nn.Parameter]) -> int:
    """Numbers that a process has of these weights once they are gathered from their shards."""
    return sum(p.numel() // _slices(p) for p in weights)


def _slices(p: nn.Parameter) -> int:
    """Slices that a weight is cut into."""
    if isinstance(p, DTensor):
        for name, placement in zip(p.device_mesh.mesh_dim_names or (), p.placements):
            if name == "tensor" and placement.is_shard():
                return p.device_mesh[name].size()
    return 1


def table(footprints: Iterable[Footprint], shape: MeshShape) -> str:
    """A line for each phase, in GB of a process."""
    head = ("phase", "weights", "gradients", "optimizer", "gathered", "GB a process")
    lines = [f"{head[0]:<12}" + "".join(f"{name:>14}" for name in head[1:])]
    for row in footprints:
        numbers = (row.weights, row.gradients, row.optimizer, row.gathered, row.total)
        lines.append(f"{row.phase:<12}" + "".join(f"{number / 1e9:>14.2f}" for number in numbers))
    lines.append(f"{shape.ranks} processes; activations come on top: --recompute keeps those of one block")
    return "\n".join(lines)
