"""What this machine has: devices, memory, cores that are idle."""

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def find_device(name: str | torch.device) -> torch.device:
    """ValueError, with those that are there, unless tensors can be made on the device. "auto" is cuda where
    there is one, else the cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.zeros(1, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError):
        pass
    found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found += ["mps"] if torch.backends.mps.is_available() else []
    raise ValueError(f"no device {str(name)!r} here; choose one of {', '.join(found)}")


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers [n] as a tensor of the type and the device of another. They are kept, because a GPU waits for
    all that is copied to it."""
    return _constant(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return torch.tensor(values, dtype=dtype, device=device)


def gemm_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Operations a second of large matrix products, the best of some: what a step can at most reach, with as
    many threads as are set. On a CPU that is by CPU time, so other work on the machine hardly changes it."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    clock, threads = time.perf_counter, 1
    if device.type == "cpu":
        clock, threads = time.process_time, torch.get_num_threads()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        one = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - one)
    return 2 * size**3 * threads / best


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that only imitates it is slower than in
    float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_memory(device: torch.device | str = "cpu") -> float | None:
    """Bytes that can be had without swapping; None where the operating system does not say."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            free = next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min(free, _free_of_container())


def _free_of_container() -> float:
    """Bytes that the limit of a container (cgroup v2) leaves; files that it read can be let go of."""
    place = Path("/sys/fs/cgroup")
    try:
        limit = float((place / "memory.max").read_text())
        used = float((place / "memory.current").read_text())
        rows = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return limit - used + float(rows["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, or "max": no limit
        return float("inf")


def idle_cores() -> int:
    """Cores on which nothing else runs at this moment, at least 1. A thread that has to wait for its core
    lets all others wait at every layer: one thread too many makes a small model many times slower."""
    cores = os.cpu_count() or 1
    try:
        with open("/proc/loadavg") as file:
            running = int(file.read().split()[3].split("/")[0])  # this thread is one of them
    except (OSError, ValueError, IndexError):
        return cores
    return max(1, cores - running + 1)
