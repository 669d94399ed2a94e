"""Save and resume a phase. A run that is killed resumes from its last save as if uninterrupted.

A checkpoint holds the step, the parts that learn, and the optimizers' state. The data needs no state: sample
k is a function of the seed and k, and so is the randomness of step k. Shards are gathered before they are
written, so a run can resume with another number of processes.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cogvideo.files import atomic_path
from cogvideo.model.families import Spec
from cogvideo.model.folder import FORMER
from cogvideo.train.parallel import Distributed, gather_momentum, whole


def save(
    path: Path,
    step: int,
    parts: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    distributed: Distributed,
) -> None:
    """Write a checkpoint. All processes call this; the first one writes."""
    gather_momentum(optimizers, distributed)

    def collect(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, gathered one by one; only the first process keeps them."""
        collected = {}
        for key, value in values.items():
            full = whole(value)
            if distributed.first:
                collected[key] = full.cpu() if full is not value else full
        return collected

    state = {
        "step": step,
        "parts": {name: collect(part.state_dict()) for name, part in parts.items()},
        "optimizers": [
            {**saved, "state": {i: collect(row) for i, row in saved["state"].items()}}
            for saved in (optimizer.state_dict() for optimizer in optimizers)
        ],
    }
    if distributed.first:
        with atomic_path(path) as file:
            torch.save(state, file)


def resume(
    path: Path, parts: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], distributed: Distributed
) -> int:
    """Load a checkpoint into parts and optimizers, if there is one; return the next step. Every process reads
    the file and takes its shards. ValueError if the file is damaged or belongs to another optimizer."""
    if not path.exists():
        return 0
    state = read(path, distributed.ranks > 1)
    for name, part in parts.items():
        like = part.state_dict()
        part.load_state_dict({k: _like(v, like[k]) for k, v in state["parts"][name].items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, row in saved["state"].items():
            saved["state"][i] = {k: _like(v, params[i]) for k, v in row.items()}
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            raise ValueError(
                f"{path} belongs to another optimizer ({error}); delete it to begin again"
            ) from None
    return int(state["step"])


def read(path: Path, mapped: bool = True) -> dict[str, Any]:
    """What `save` wrote; ValueError if it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, UnpicklingError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin this phase again") from None
    now = {former: name for name, former in FORMER.items()}
    state["parts"] = {now.get(name, name): part for name, part in state["parts"].items()}
    return state


def _like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded like `like`; scalars, such as a count of steps, stay whole."""
    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def unshard(parts: dict[str, nn.Module], distributed: Distributed, spec: Spec) -> dict[str, nn.Module]:
    """Parts that work without the other processes: whole copies of sharded parts on the first process, none
    on the others. All processes call this."""
    if distributed.mesh is None:
        return dict(parts) if distributed.first else {}
    whole_parts = {}
    for name, part in parts.items():
        state = {key: whole(value.detach()) for key, value in part.state_dict().items()}
        if distributed.first:
            whole_parts[name] = spec.outline(name)
            whole_parts[name].load_state_dict(state, assign=True)
            whole_parts[name].eval().requires_grad_(False)
    return whole_parts
