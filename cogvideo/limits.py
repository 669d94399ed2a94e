"""Bounds of what one call may ask for: far above any use, and below what takes the whole machine."""

import math
import reprlib

MOST_THREADS = 1024
MOST_PROCESSES = 256
MOST_VIDEOS = 100_000  # of a call
MOST_PROMPT = 100_000  # characters
MOST_SEED = 2**32 - 1
MOST_NUMBER = 1e9  # of whatever else is counted or measured


def check_range(name: str, value: float | None, least: float = 1, most: float = MOST_NUMBER) -> None:
    """Raise ValueError unless a number is from `least` to `most`; None, an option that is not given, is
    right."""
    if value is not None and not least <= value <= most:
        raise ValueError(f"{name} must be from {_number(least)} to {_number(most)}; got {_number(value)}")


def check_threads(threads: int | None) -> None:
    check_range("--threads", threads, 1, MOST_THREADS)


def check_workers(workers: int | None) -> None:
    """Raise ValueError unless so many processes can be meant; 0: the work is done in this one."""
    check_range("--workers", workers, 0, MOST_PROCESSES)


def _number(value: float) -> str:
    """A number for a message, in a few characters."""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"
    return reprlib.repr(value)
