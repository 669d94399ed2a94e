"""Training on several devices, applied from outside: models and objectives know nothing of it.

Together N processes (`peers.py`) take the steps that one process would take:
- Each process takes an N-th of a batch, in order; losses and gradients are averaged over the processes.
- Every process holds all weights. One flat all-reduce averages the gradients (`average_gradients`); Muon's
  matrices are divided among them (`muon.py`).
- Where that does not fit, the processes form a mesh (`MeshShape`): weights, gradients and optimizer states
  are cut into shards (FSDP2, `fully_shard`), matrices into slices (`slices.py`), and copies of all that share
  the batches. A block, or a matrix of a temporal channel, is gathered from its shards when it is needed and
  freed again. The rest (embeddings, positions, norms, gates) stays gathered for the whole step: `TrainStep`
  is the module around everything, so that models may use their tables as they like.
- The tokenizer's codebook is updated by the vectors of all processes.
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cogvideo.data.loader import Batch
from cogvideo.hardware import chosen_precision
from cogvideo.model.transformer import Block
from cogvideo.model.vqvae import Codebook
from cogvideo.train.inputs import Parts
from cogvideo.train.losses import Result
from cogvideo.train.objectives import LossFunction
from cogvideo.train.optim import by_mesh
from cogvideo.train.peers import Distributed
from cogvideo.train.slices import slice_matrices, split_projections

BLOCKS = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class TrainStep(nn.Module):
    """A loss function and the parts that it uses, as one module: `forward` computes the loss of a step.

    The loss function is built in the first forward, when FSDP has gathered all but the matrices: models keep
    the tensors that they find in their parts.
    """

    def __init__(self, parts: Parts, build_loss: Callable[[], LossFunction]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.build_loss = build_loss
        self.loss: LossFunction | None = None

    def forward(self, batch: Batch, step: int) -> Result:
        if self.loss is None:
            self.loss = self.build_loss()
        return self.loss(batch, step)


def to_devices(
    step: TrainStep, distributed: Distributed, precision: str, whole_matrices: bool = False
) -> None:
    """Move all parts of a step to the device of this process, or cut them over the mesh.

    Recomputing goes inside compiling, compiling inside sharding. With bfloat16 on cuda the shards travel as
    bfloat16 and gradients are summed in float32; autocast decides which operation computes in which. In a
    mesh the projections of attentions are three matrices, also where they are not cut, so that its
    checkpoints open in every other; `whole_matrices` keeps them for Muon, which updates them as one.
    """
    if distributed.slices > 1:
        assert distributed.mesh is not None
        slice_matrices(step, distributed.mesh["tensor"])
    elif distributed.mesh is not None and not whole_matrices:
        split_projections(step)
    if distributed.recompute:
        _recompute_blocks(step)
    blocks = [module for module in step.modules() if isinstance(module, _wrapped(distributed))]
    if distributed.compile:
        # caches and changing shapes are meant
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        for block in blocks:
            block.compile()
    if distributed.ranks > 1:
        for module in step.modules():
            if isinstance(module, Codebook):
                module.peers = CodebookPeers(distributed)
    if distributed.mesh is None:
        step.to(distributed.device)
        return

    precision = chosen_precision(precision, distributed.device)
    half = torch.bfloat16 if distributed.device.type == "cuda" and precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is changed
    copies = distributed.mesh["data"].size() > 1
    mesh = distributed.mesh["data", "shard"] if copies else distributed.mesh["shard"]
    within = {module for block in blocks for module in block.modules()}
    matrices = [m for m in step.modules() if isinstance(m, nn.Linear) and m not in within]
    for module in blocks + matrices:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(step, mesh=mesh, mp_policy=policy)


def send_gradients(step: TrainStep, last: bool) -> None:
    """Whether the backward pass that follows sends gradients to the other processes of a mesh: the last one
    of a step does."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(last)


def clip_gradients(weights: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit` in all, if it is larger; return the norm before. Slices
    and shards lie in different meshes, whose norms are summed up one by one."""
    learnt = [p for p in weights if p.grad is not None]
    if not any(isinstance(p, DTensor) for p in learnt):
        total: Tensor = nn.utils.clip_grad_norm_(learnt, limit)
        return total
    norms = []
    for group in by_mesh(learnt):
        norms.append(whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for p in learnt:
        grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        assert grad is not None
        grad.mul_(scale)
    return norm


def _recompute_blocks(module: nn.Module) -> None:
    """Put a wrapper around every block below a module that computes its activations again in the backward
    pass. State dicts keep their names."""
    for name, child in module.named_children():
        if isinstance(child, BLOCKS):
            module.register_module(name, checkpoint_wrapper(child))
        else:
            _recompute_blocks(child)


def _wrapped(distributed: Distributed) -> tuple[type[nn.Module], ...]:
    """The classes of whole blocks as they stand in the tree now."""
    return (CheckpointWrapper,) if distributed.recompute else BLOCKS


@dataclass(frozen=True)
class CodebookPeers:
    """The other processes, for the codebook's update."""

    distributed: Distributed

    @property
    def first(self) -> bool:
        return self.distributed.first

    def gather(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = [torch.empty_like(rows) for _ in range(self.distributed.ranks)]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered[:: self.distributed.slices])  # each clip's vectors once

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from its shards; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
