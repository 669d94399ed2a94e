"""How many steps of a phase fit into a time: equal budgets for systems of different speed."""

import json
import time
from dataclasses import replace
from pathlib import Path

from cogvideo.files import write_json
from cogvideo.train import loop
from cogvideo.train.run import Run


def steps_within(minutes: float, run: Run, measured: int, file: Path, least: int = 1) -> int:
    """The steps of the one phase of a run that take so many minutes of processor time, start included, and
    `least` at the fewest.

    They are measured once, in the run's folder, and kept in `file`: a run of a few steps, then the same run
    for `measured` more. Both have a start, so their difference is that of the steps.
    """
    if not file.exists():
        few = max(least, measured // 4)
        spent = []
        for steps in (few, few + measured):
            short = [replace(phase, steps=steps) for phase in run.phases]
            started = time.process_time()
            loop.train(replace(run, phases=short))
            spent.append(time.process_time() - started)
        seconds = (spent[1] - spent[0]) / max(1, measured - few)
        seconds = max(seconds, spent[1] / (4 * measured))  # the start may vary more than the steps take
        start = max(0.0, spent[0] - few * seconds)
        write_json(file, max(least, int((60 * minutes - start) / seconds)))
    steps: int = json.loads(file.read_text(encoding="utf-8"))
    return steps
