"""The processes that train together: how they start, find each other, and exchange values.

`cogvideo train` starts one process a CPU core (`launch`); torchrun starts one a device, also on several
machines. Each of them joins the others (`start`).
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideo.cluster import end_with_parent
from cogvideo.hardware import chosen_precision, find_device, idle_cores
from cogvideo.train.mesh import MeshShape, open_mesh
from cogvideo.train.phase import Phase


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
        """The number of this process among those with their own clips."""
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
        products, above all in the backward pass. Frames have their own attention for that
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
    """Join the other processes, each with its own device: those that torchrun started, or `launch`;
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
    end_with_parent(parent)  # elsewhere than on Linux the broken connection ends it
    torch.set_num_threads(threads)
    code = 0
    try:
        work(worker)
    except (ValueError, OSError) as error:
        print(f"process {worker.rank}: {error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if "peer" not in str(error):
            raise
        code = 2  # the connection broke, since another process ended: that one says why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads outlive their group, and may abort a Python that is shutting down
