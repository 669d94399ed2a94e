"""A function of many values: computed here, in several processes, or on a Ray cluster, with the same results.

A function that draws random numbers takes its seed from its value, so neither the number of workers nor a
lost machine changes a result. What a lost machine had begun is computed again elsewhere.
"""

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

V = TypeVar("V")
R = TypeVar("R")

BLOCKS = 1000  # of a cluster's work, at most: what a lost machine loses


def place_of_torchrun() -> tuple[int, int] | None:
    """The number of this process and how many there are, if torchrun started it. ValueError if the variables
    that tell are not as torchrun sets them."""
    if "RANK" not in os.environ:
        return None
    place = []
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "")
        if not re.fullmatch("[0-9]{1,6}", value):
            raise ValueError(f"{name} is set to {value!r}; unset RANK, or start the processes by torchrun")
        place.append(int(value))
    rank, count = place
    if rank >= count:
        raise ValueError(f"RANK {rank} must be less than WORLD_SIZE {count}; torchrun sets both")
    return rank, count


def spread(
    function: Callable[[V], R], values: Sequence[V], workers: int = 0, address: str | None = None
) -> Iterator[R]:
    """The results for all values, in order: computed here, in `workers` processes with a thread each, or on
    the Ray cluster at `address` ("local" starts one). Elsewhere than here the function must be importable."""
    if address is not None:
        yield from _on_ray(function, values, address)
    elif workers > 1:
        yield from _in_processes(function, values, workers)
    else:
        yield from map(function, values)


def _in_processes(function: Callable[[V], R], values: Sequence[V], workers: int) -> Iterator[R]:
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
    )
    try:
        yield from pool.map(function, values)
    except BrokenProcessPool:
        raise OSError(f"one of {workers} processes was ended, as where the memory does not suffice") from None
    except BaseException:
        for process in active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    end_with_parent(parent)
    _one_thread()


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, for whatever reason; on Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _on_ray(function: Callable[[V], R], values: Sequence[V], address: str) -> Iterator[R]:
    try:
        import ray
    except ImportError:
        raise ValueError('a cluster needs Ray: pip install "cogvideo[cluster]"') from None
    if not ray.is_initialized():
        _join(address)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    blocks = max(1, min(len(values), BLOCKS))
    dataset = ray.data.from_items([{"value": value} for value in values], override_num_blocks=blocks)
    for row in dataset.map(partial(_call, function)).iter_rows():
        yield row["result"]


def _join(address: str) -> None:
    """Connect to the Ray cluster at `address`, or start one; ValueError if there is none."""
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if address not in ("local", "auto"):  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    except Exception as error:  # of the network, and what Ray raises
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"no Ray cluster at {address!r}: {why}; give HOST:PORT, ray://HOST:PORT, auto or local"
        ) from None


def _call(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    _one_thread()
    return {"result": function(row["value"])}
