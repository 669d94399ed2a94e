"""Muon on several processes: it updates whole matrices, so each process updates some of them.

Where weights are whole in every process, each orthogonalises an N-th of the matrices and sends the result to
the others. Where they are cut into shards, every process gathers the gradients and updates all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from cogvideo.train.peers import Distributed


def share_muon(optimizers: list[torch.optim.Optimizer], distributed: Distributed) -> None:
    """Let Muon work on several processes as on one."""
    for optimizer in optimizers:
        if type(optimizer).__name__ == "Muon" and distributed.ranks > 1:
            if distributed.mesh is None:
                split_muon(optimizer, distributed)
            else:
                optimizer.register_step_pre_hook(_gather)


def split_muon(optimizer: torch.optim.Optimizer, distributed: Distributed) -> None:
    """Each process updates its share of the matrices and sends the result to the others.

    Only the process that `owners` names for a matrix keeps its momentum up to date; `gather_momentum` brings
    all of them together.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    owner = owners(params, distributed.ranks)
    for p in params:  # Muon's initial state, on every process
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def leave_to_others(*_: Any) -> None:
        for p in params:
            if owner[p] != distributed.rank:
                p.grad = None

    def exchange(*_: Any) -> None:
        _send_from_owners({p: p.detach() for p in params}, owner, distributed)

    optimizer.register_step_pre_hook(leave_to_others)
    optimizer.register_step_post_hook(exchange)


def gather_momentum(optimizers: list[torch.optim.Optimizer], distributed: Distributed) -> None:
    """Bring the momentum of all matrices of a split Muon to every process; all of them call this."""
    for optimizer in optimizers:
        if type(optimizer).__name__ == "Muon" and distributed.ranks > 1 and distributed.mesh is None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            momentum = {p: optimizer.state[p]["momentum_buffer"] for p in params}
            _send_from_owners(momentum, owners(params, distributed.ranks), distributed)


def _send_from_owners(
    values: dict[Tensor, Tensor], owner: dict[Tensor, int], distributed: Distributed
) -> None:
    """Overwrite the value of every parameter by that of its owner, one message an owner."""
    for rank in range(distributed.ranks):
        owned = [value for p, value in values.items() if owner[p] == rank]
        if owned:
            flat = torch.cat([value.flatten() for value in owned])
            dist.broadcast(flat, rank)
            for value, new in zip(owned, flat.split([value.numel() for value in owned])):
                value.copy_(new.view_as(value))


def owners(params: list[Tensor], ranks: int) -> dict[Tensor, int]:
    """Assign each matrix to the process that updates it: the most expensive ones first, each to the process
    with the least work."""
    cost = {p: p.numel() * min(p.shape) for p in params}
    owner: dict[Tensor, int] = {}
    load = [0] * ranks
    for p in sorted(params, key=lambda p: -cost[p]):
        owner[p] = load.index(min(load))
        load[owner[p]] += cost[p]
    return owner


def _gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gather the gradients of sharded matrices for Muon, whose update cannot be computed row by row.

    `torch.optim.Muon` takes shards as well, but then gathers in each of its iterations, and rounds otherwise.
    Between steps its momentum is whole too: 4 bytes a hidden weight on every device.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(p.grad, DTensor):
            p.grad = p.grad.redistribute(placements=[Replicate()])
            for key, value in optimizer.state[p].items():
                optimizer.state[p][key] = value.redistribute(placements=[Replicate()])
