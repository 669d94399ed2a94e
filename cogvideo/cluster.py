"""A function of many values: computed here, in several processes, or on a Ray cluster, with the same results.

A function that draws random numbers takes its seed from its value, so neither the number of workers nor a
lost machine changes a result. What a lost machine had begun is computed again elsewhere.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

V = TypeVar("V")
R = TypeVar("R")

MOST_WORKERS = 256
BLOCKS = 1000  # of a cluster's work, at most: what a lost machine loses


def check_workers(workers: int) -> None:
    """Raise ValueError unless so many processes can be meant."""
    if not 0 <= workers <= MOST_WORKERS:
        raise ValueError(f"workers must be from 0 to {MOST_WORKERS}; got {workers}")


def spread(
    function: Callable[[V], R], values: Sequence[V], workers: int = 0, address: str | None = None
) -> Iterator[R]:
    """The results for all values, in order: computed here, in `workers` processes with a thread each, or on
    the Ray cluster at `address` ("local" starts one). Elsewhere than here the function must be importable."""
    if address is not None:
        yield from _on_ray(function, values, address)
    elif workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            yield from pool.map(function, values)
    else:
        yield from map(function, values)


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
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    blocks = max(1, min(len(values), BLOCKS))
    dataset = ray.data.from_items([{"value": value} for value in values], override_num_blocks=blocks)
    for row in dataset.map(partial(_call, function)).iter_rows():
        yield row["result"]


def _call(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    _one_thread()
    return {"result": function(row["value"])}
