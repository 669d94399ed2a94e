"""How fast a recipe trains here: measured by a few real steps of each phase, in a run that is thrown away.

Weights are random and codes meaningless, which costs the same. Clips that recur are measured as if all were
new; what drawing and encoding take of that is measured by itself, and the share that is remembered is left
out.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvideo.data.cut import Source
from cogvideo.data.loader import batches
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.train import inherit, loop, objectives, parallel
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe
from cogvideo.train.report import read_log

CAPTIONS = 5_000  # that the text model is trained on


@dataclass(frozen=True)
class Pace:
    """Of one phase on this machine."""

    phase: Phase
    step: float  # seconds
    mfu: float | None  # model FLOPs utilisation, of the token models

    @property
    def hours(self) -> float:
        return self.phase.steps * self.step / 3600

    @property
    def clips(self) -> float:
        """A second."""
        return self.phase.batch / self.step


def measure(
    recipe: Recipe,
    source: Source,
    spec: Spec,
    phases: list[Phase],
    *,
    device: torch.device,
    processes: int,
    steps: int = 3,
    workers: int = 0,
) -> Iterator[Pace]:
    """The pace of each phase, from `steps` steps after a first one; ValueError for what cannot be trained."""
    phases = [phase.over(source.count) for phase in phases]
    for phase in phases:
        parallel.share(phase, processes)
        phase.check(spec)
    loop.check_data(phases, source)
    with tempfile.TemporaryDirectory() as place:
        folder = ModelFolder(Path(place) / "model")
        random_model(folder, recipe, spec, source)
        for phase in phases:
            out = Path(place) / phase.name
            short = replace(phase, steps=steps + 1, reuse=1)
            _run(recipe, out.parent, source, spec, short, device, processes, workers)
            rows = read_log(out / "log.jsonl")[1:]
            middle = sorted(rows, key=lambda row: row["clips_per_second"])[len(rows) // 2]
            new = step = phase.batch / middle["clips_per_second"]
            if phase.reuse > 1:
                drawn = _new_clips(folder, phase, source, device) * phase.batch / processes
                step -= min(drawn, step) * (1 - 1 / phase.reuse)
            yield Pace(phase, step, middle["mfu"] * new / step if "mfu" in middle else None)


def random_model(folder: ModelFolder, recipe: Recipe, spec: Any, source: Source) -> None:
    """A model folder whose parts have random weights, and codes that are far from each other."""
    before, inherit.CAPTIONS = inherit.CAPTIONS, CAPTIONS
    try:
        inherit.prepare(folder, recipe, spec, source)
    finally:
        inherit.CAPTIONS = before
    for name in spec.parts:
        part = inherit.new_part(spec, name, recipe.seed)
        if name == "vqvae":
            generator = torch.Generator().manual_seed(recipe.seed)
            part.codebook.init_codes(
                torch.randn(len(part.codebook.vectors), part.config.code_width, generator=generator),
                generator,
            )
        folder.save(name, part)


def _run(
    recipe: Recipe,
    out: Path,
    source: Source,
    spec: Spec,
    phase: Phase,
    device: torch.device,
    processes: int,
    workers: int,
) -> None:
    """A short run without the checks of a real one."""
    options: dict[str, Any] = dict(
        device=device,
        recompute=False,
        compile=False,
        shard=False,
        quiet=True,
        init=None,
        init_embedding=None,
        workers=workers,
        save_every=10**9,
        log_every=1,
        probe_every=10**9,
        probe=None,
    )
    recipe = replace(recipe, phases=(phase,))
    work: Callable[[Any], None] = partial(loop.run, recipe, out, source, spec, [phase], **options)
    with parallel.launch(processes, work) as member:
        work(member)


def _new_clips(folder: ModelFolder, phase: Phase, source: Source, device: torch.device) -> float:
    """Seconds that it takes to draw and to encode one clip."""
    vqvae, clips = folder.load("vqvae").to(device), batches(source, phase.cut, 4, seed=0)
    machine, times = parallel.Machine(device), []
    for _ in range(3):
        begin = time.perf_counter()
        frames = next(clips).frames[0].to(device)
        with machine.arithmetic(phase.precision):
            objectives.encode_clips(vqvae, frames).cpu()
        times.append(time.perf_counter() - begin)
    return min(times) / 4


def table(paces: list[Pace]) -> str:
    lines = [f"{'phase':<12}{'steps':>8}{'s/step':>9}{'clips/s':>9}{'mfu':>6}{'hours':>8}"]
    for one in paces:
        mfu = f"{one.mfu:.0%}" if one.mfu else "-"
        lines.append(
            f"{one.phase.name:<12}{one.phase.steps:>8}{one.step:>9.2f}{one.clips:>9.1f}{mfu:>6}"
            f"{one.hours:>8.1f}"
        )
    lines.append(f"{'all':<44}{sum(one.hours for one in paces):>8.1f}")
    return "\n".join(lines)
