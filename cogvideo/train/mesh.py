"""How the processes of a training divide its work: clips, weights and matrices."""

import re
from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cogvideo.model.families import Spec
from cogvideo.train.phase import Phase
from cogvideo.train.slices import check_slices


class MeshShape(NamedTuple):
    """Processes as a box of data x shard x tensor: copies of the model, each with its own clips; shards of
    its weights, each with its own clips; and slices of its matrices, which see the same clips. Processes
    that are neighbours by number are slices of the same shard."""

    data: int = 1
    shard: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def ranks(self) -> int:
        return self.data * self.shard * self.tensor

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Read DATAxSHARDxTENSOR, or SHARDxTENSOR of one copy."""
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", text):
            raise ValueError(
                f"--mesh must be DATAxSHARDxTENSOR, as in 2x4x8, or SHARDxTENSOR of one copy, as in 4x8; "
                f"got {text!r}"
            )
        sizes = [int(size) for size in text.split("x")]
        return cls(*sizes) if len(sizes) == 3 else cls(1, *sizes)


def open_mesh(device: str, shape: MeshShape) -> DeviceMesh:
    return init_device_mesh(device, tuple(shape), mesh_dim_names=shape._fields)


def local_batch(phase: Phase, takers: int, equally: bool = False) -> int:
    """Return the clips of a batch for each of `takers`: the processes with their own clips, as often as
    each takes clips in a step. ValueError if the batch cannot be shared. `equally`: where weights are cut
    into shards, every process must gather the model equally often, for crops and for whole frames."""
    if phase.batch % takers:
        raise ValueError(
            f"a batch of {phase.batch} clips cannot be shared by {takers}; choose a multiple of "
            f"{takers} for --{phase.name}.batch, or other --processes, --mesh or --accumulate"
        )
    local = phase.batch // takers
    if equally and takers > 1 and local > 1 and local * phase.crop_share % 1:
        raise ValueError(
            f"{phase.name}.crop_share is {phase.crop_share}, but where weights are cut into shards a whole "
            f"number of the {local} clips of each process must be crops; choose another "
            f"--{phase.name}.batch"
        )
    return local


def check_slices_of(phase: Phase, spec: Spec, shape: MeshShape) -> None:
    """Raise ValueError unless the matrices of a phase's parts can be cut into the slices of a mesh."""
    if shape.tensor == 1:
        return
    if phase.optimizer == "muon":
        raise ValueError(
            f"muon updates whole matrices, which --mesh {shape} cuts into slices; choose "
            f"--{phase.name}.optimizer adamw"
        )
    for part in (*phase.uses, *phase.trains):
        check_slices(spec.outline(part), shape.tensor)
