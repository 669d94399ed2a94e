"""What this machine has: devices, free memory, idle cores."""

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def find_device(name: str | torch.device) -> torch.device:
    """Return the device; raise ValueError listing the available ones if no tensor can be created on it.

    "auto" is cuda if available, else the cpu.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.zeros(1, device=device)
            return device
    except (RuntimeError, AssertionError, ImportError):  # of a missing backend, in the words of each
        pass

    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    raise ValueError(f"no device {str(name)!r} here; choose one of {', '.join(available)}")


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers [n] as a tensor with dtype and device of `like`, cached: a GPU waits for every copy."""
    return _constant(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the result is cached, and training must be able to use it
        return torch.tensor(values, dtype=dtype, device=device)


def gemm_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Operations per second of large matrix products, the best of several: an upper bound for a training step
    with the current number of threads. A CPU is measured in CPU time, so other processes hardly matter."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    clock = time.perf_counter
    threads = 1
    if device.type == "cpu":
        clock = time.process_time
        threads = torch.get_num_threads()

    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return 2 * size**3 * threads / best


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that emulates it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def chosen_precision(precision: str, device: torch.device) -> str:
    """float32 or bfloat16; for "auto" what the device multiplies faster."""
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def free_memory(device: torch.device | str = "cpu") -> float | None:
    """Bytes available without swapping; None if the operating system does not say."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            free = next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min(free, _free_of_container())


def _free_of_container() -> float:
    """Bytes below the memory limit of the container (cgroup v2); cached files count as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = float((group / "memory.max").read_text())
        used = float((group / "memory.current").read_text())
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + float(rows["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, or "max": no limit
        return float("inf")


def idle_cores() -> int:
    """Cores on which nothing else runs at this moment, at least 1.

    A thread that waits for its core stalls all the others at every layer: one thread too many makes a small
    model many times slower.
    """
    cores = os.cpu_count() or 1
    try:
        with open("/proc/loadavg") as file:
            running = int(file.read().split()[3].split("/")[0])  # this thread is one of them
    except (OSError, ValueError, IndexError):
        return cores
    return max(1, cores - running + 1)


def threads_of_each(processes: int) -> int:
    """Threads with which so many processes, or this one alone, take all idle cores."""
    return max(1, idle_cores() // max(1, processes))
