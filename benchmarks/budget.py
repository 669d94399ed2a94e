"""How many steps of a phase fit into a time: equal budgets for systems of different speed."""

import json
import time
from dataclasses import replace
from pathlib import Path

from cogvideo.files import write_json
from cogvideo.train import loop
from cogvideo.train.run import Run


def steps_within(minutes: float, run: Run, measured: int, file: Path, least: int = 1) -> int:
    """The steps of the one phase of a run that take so many minutes of processor time, `least` at the fewest.

    They are measured once by `measured` steps, in the run's folder, and kept in `file`.
    """
    if not file.exists():
        short = [replace(phase, steps=measured) for phase in run.phases]
        started = time.process_time()
        loop.train(replace(run, phases=short))
        seconds = (time.process_time() - started) / measured
        write_json(file, max(least, int(60 * minutes / seconds)))
    steps: int = json.loads(file.read_text(encoding="utf-8"))
    return steps
