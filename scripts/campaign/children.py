"""Cases in child processes. One that hangs or dies takes its child with it; a new child takes the next."""

import multiprocessing
import re
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

A_CHILD = 100  # cases of a process

# runs the cases of these numbers, and sends the flags and the story of each
Work = Callable[[list[int], Connection], None]
# is told the number, the flags and the story of a flagged case
Flagged = Callable[[int, list[str], str], None]


def run_cases(count: int, work: Work, flagged: Flagged, seconds: float, starting: float) -> Counter[str]:
    """Run cases 0 to `count`; the flags, and how often they came. A case may take `seconds`, the first of a
    child `starting` more."""
    found: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    first = 0
    while first < count:
        numbers = [*range(first, min(first + A_CHILD, count))]
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(numbers, theirs))
        child.start()
        theirs.close()
        for number in numbers:
            flags, story = _wait(ours, seconds + (starting if number == numbers[0] else 0))
            first = number + 1
            found.update(flags)
            if flags:
                flagged(number, flags, story)
            if {"hang", "crash"} & set(flags):
                break
        child.kill()
        child.join()
    return found


def _wait(pipe: Connection, seconds: float) -> tuple[list[str], str]:
    try:
        if pipe.poll(seconds):
            flags, story = pipe.recv()
            return flags, story
        return ["hang"], f"no end after {seconds} s"
    except EOFError:
        return ["crash"], "the process died"


def status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
