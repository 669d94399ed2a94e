"""Training on several devices, applied from outside: models and objectives know nothing of it.

`cogvideo train` starts one process a CPU core (`launch`); torchrun starts one a device, also on several
machines. Together N processes take the steps that one process would take:
- Each process takes an N-th of a batch, in order; losses and gradients are averaged over the processes.
- Every process holds all weights. One flat all-reduce averages the gradients (`average_gradients`); each
  process orthogonalises an N-th of Muon's matrices and sends the result to the others (`split_muon`).
- Where that does not fit, the processes form a mesh (`MeshShape`): weights, gradients and optimizer states
  are cut into shards (FSDP2, `fully_shard`), matrices into slices (`slices.py`), and copies of all that share
  the batches. A block, or a matrix of a temporal channel, is gathered from its shards when it is needed and
  freed again. The rest (embeddings, positions, norms, gates) stays gathered for the whole step: `TrainStep`
  is the module around everything, so that models may use their tables as they like.
- The tokenizer's codebook is updated by the vectors of all processes.
"""

import ctypes
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideo.data.loader import Batch
from cogvideo.hardware import chosen_precision, find_device, idle_cores
from cogvideo.model.families import Spec
from cogvideo.model.transformer import Block
from cogvideo.model.vqvae import Codebook
from cogvideo.train.inputs import Parts
from cogvideo.train.losses import Result
from cogvideo.train.objectives import LossFunction
from cogvideo.train.optim import by_mesh
from cogvideo.train.phase import Phase
from cogvideo.train.slices import check_slices, slice_matrices, split_projections

BLOCKS = (Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class MeshShape(NamedTuple):
    """Processes as a box of data x shard x tensor: copies of the model, each with clips of its own; shards of
    its weights, each with clips of its own; and slices of its matrices, which see the same clips. Processes
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


def share(phase: Phase, takers: int, equally: bool = False) -> int:
    """Return the clips of a batch for each of `takers`: the processes with clips of their own, as often as
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


@dataclass(frozen=True)
class Distributed:
    """The processes that train together, as one of them sees them: its device, its rank, and how weights are
    cut. Alone it has rank 0 of 1."""

    device: torch.device
    mesh: DeviceMesh | None = None  # data x shard x tensor; without one, each process has all weights
    rank: int = 0
    ranks: int = 1
    recompute: bool = False  # activations of the blocks in the backward pass, instead of keeping them
    compile: bool = False  # the blocks

    @property
    def first(self) -> bool:
        """The one process that writes files and reports."""
        return self.rank == 0

    @property
    def slices(self) -> int:
        """Processes that compute the same clips together."""
        return 1 if self.mesh is None else self.mesh["tensor"].size()

    @property
    def data_rank(self) -> int:
        """The number of this process among those with clips of their own."""
        return self.rank // self.slices

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.slices

    def mean(self, *rows: dict[str, float]) -> dict[str, float]:
        """Each number averaged over the rows of all processes that have it; all of them call this."""
        gathered: list[Any] = [rows]
        if self.ranks > 1:
            gathered = [None] * self.ranks
            dist.all_gather_object(gathered, rows)
        values: dict[str, list[float]] = {}
        for given in gathered:
            for row in given:
                for name, value in row.items():
                    values.setdefault(name, []).append(value)
        return {name: sum(row) / len(row) for name, row in values.items()}

    def total(self, number: float) -> float:
        """The sum over the processes; all of them call this."""
        return self.mean({"": number})[""] * self.ranks

    def union(self, local: dict[str, str]) -> dict[str, str]:
        """What all processes found; all of them call this."""
        if self.ranks == 1:
            return local
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, local)
        union = {}
        for row in gathered:
            union.update(row)
        return union

    def arithmetic(self, precision: str) -> ExitStack:
        """A context for a step, with matrix products in `precision`: float32, bfloat16 or auto.

        On a CPU in bfloat16, fused attention of short rows takes three times as long as plain matrix
        products, above all in the backward pass. Frames have an attention of their own for that
        (`model/attention.py`); this context is for all other attention.
        """
        stack = ExitStack()
        half = chosen_precision(precision, self.device) == "bfloat16"
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=half))
        if self.device.type == "cpu" and half:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of any device, despite its name
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def average_gradients(self, weights: list[nn.Parameter]) -> None:
        """Average the gradients of whole weights over the processes, all in one message."""
        if self.ranks == 1 or self.mesh is not None:  # a mesh averages them in the backward pass
            return
        learnt = [p for p in weights if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in learnt if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.ranks
        for p, grad in zip(learnt, flat.split([p.numel() for p in learnt])):
            p.grad = grad.view_as(p)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.ranks > 1:
            dist.barrier()


@dataclass(frozen=True)
class Worker:
    """One of the processes that `launch` started, and the file by which they find each other."""

    rank: int
    ranks: int
    rendezvous: Path


def start(
    device: torch.device | str,
    recompute: bool = False,
    compile: bool = False,
    shape: MeshShape | None = None,
    worker: Worker | None = None,
) -> Distributed:
    """Join the other processes, each with a device of its own: those that torchrun started, or `launch`;
    alone when there are none. They form a mesh of this shape; without one, each has all weights."""
    device = find_device(device)
    if worker is None and "RANK" not in os.environ:
        return Distributed(device, recompute=recompute, compile=compile)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes train on cpu or cuda, not on {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", worker.rank if worker else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if worker is None:
        dist.init_process_group(backend, **_meeting())
    else:
        where = f"file://{worker.rendezvous}"
        dist.init_process_group(backend, init_method=where, rank=worker.rank, world_size=worker.ranks)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = None if shape is None or ranks == 1 else open_mesh(device.type, shape)
    return Distributed(device, mesh, rank, ranks, recompute, compile)


def _meeting() -> dict[str, Any]:
    """Where the processes that torchrun started on one machine find each other. It keeps one store for all of
    its attempts (torch 2.13), in which those it starts again would find the addresses of the dead."""
    here = os.environ
    on_one_machine = here.get("LOCAL_WORLD_SIZE") == here["WORLD_SIZE"]
    if here.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not on_one_machine:
        return {}
    ranks = int(here["WORLD_SIZE"])
    store = TCPStore(here["MASTER_ADDR"], int(here["MASTER_PORT"]), ranks, is_master=False)
    attempt = PrefixStore(f"attempt {here['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": attempt, "rank": int(here["RANK"]), "world_size": ranks}


def open_mesh(device: str, shape: MeshShape) -> DeviceMesh:
    return init_device_mesh(device, tuple(shape), mesh_dim_names=shape._fields)


def stop(distributed: Distributed) -> None:
    if dist.is_initialized() and distributed.ranks > 1:
        dist.destroy_process_group()


def fitting_processes(phases: list[Phase], device: torch.device) -> int:
    """How many processes suit: one an idle core of a CPU, as long as they can share every batch."""
    if device.type != "cpu" or "RANK" in os.environ:
        return 1
    fits = (n for n in range(idle_cores(), 0, -1) if all(phase.batch % n == 0 for phase in phases))
    return next(fits)


@contextmanager
def launch(ranks: int, work: Callable[[Worker], object]) -> Iterator[Worker | None]:
    """Start `work(worker)` in `ranks` - 1 new processes; this one is the first and works in the body of the
    `with`. OSError if one of them ended too early. They end when this process ends, for whatever reason.

    `work` is pickled: a function of a module, or a `partial` of one.
    """
    if ranks == 1:
        yield None
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(rank, ranks, Path(folder) / "meeting") for rank in range(ranks)]
        new = mp.get_context("spawn").Process
        processes = []
        for worker in workers[1:]:
            processes.append(new(target=_run_worker, args=(work, worker, threads, os.getpid())))
        for process in processes:
            process.start()
        try:
            yield workers[0]
            for process in processes:
                process.join()
        except RuntimeError as error:  # the connection breaks where a process ends
            for process in processes:
                process.join(1)
            codes = [str(process.exitcode) for process in processes if process.exitcode]
            if not codes:
                raise
            raise OSError(
                f"a training process ended (exit code {', '.join(codes)}); the same command "
                f"resumes the run at its last save"
            ) from error
        finally:
            for process in processes:
                process.kill()


def _run_worker(work: Callable[[Worker], object], worker: Worker, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    if sys.platform == "linux":  # elsewhere the broken connection ends it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    torch.set_num_threads(threads)
    code = 0
    try:
        work(worker)
    except (ValueError, OSError) as error:
        print(f"process {worker.rank}: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads outlive their group, and may abort a Python that is shutting down


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
