"""How fast does training go, and where does the time go?

    python -m benchmarks.train_step
    python -m benchmarks.train_step --phases stage1 --rounds 3 --profile

Each phase of the token models of a recipe takes real steps of `cogvideo train` (drawing, encoding, model,
optimizer) with random weights, in two ways, in turn: `before` is one process with a thread a core, attention
by `scaled_dot_product_attention`, every clip new; `now` is one process a core, `MatrixAttention`, and clips
that recur. Clips a second are of the fastest steps of all rounds, as other work only slows; clips a CPU
second (of the first process, times processes) stand beside them, which a busy machine disturbs less. MFU: the
operations that must be computed (`train/cost.py`) against the best rate of bfloat16 matrix products measured
in the same run, with all cores.

--profile: kernels of one step, by their own time, in one thread.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cogvideo.data import loader, tokens
from cogvideo.data.sources import open_source
from cogvideo.hardware import gemm_rate
from cogvideo.model import attention, presets
from cogvideo.model.folder import ModelFolder
from cogvideo.train import loop, pace, peers, recipes
from cogvideo.train.run import Options, Run

WAYS = ("before", "now")
KERNELS = {  # of the table of --profile
    "matrices": ("aten::mm", "aten::addmm", "aten::_addmm_activation"),
    "attention's products": ("aten::bmm", "aten::baddbmm_", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::_safe_softmax"),
    "cross-entropy": (
        "aten::_log_softmax",
        "aten::_log_softmax_backward_data",
        "aten::nll_loss_forward",
        "aten::nll_loss_backward",
    ),
    "norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::native_group_norm"),
    "copies": (
        "aten::copy_",
        "aten::cat",
        "aten::index",
        "aten::index_select",
        "aten::fill_",
        "aten::_index_put_impl_",
    ),
}


class Clock:
    """A probe that notes when each step of the first process ended, and what it had cost that process."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, *_: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def take_steps(
    way: str,
    recipe: recipes.Recipe,
    phase: recipes.Phase,
    model: Path,
    steps: int,
    cores: int,
    reuse: int,
    worker: peers.Worker | None = None,
    clock: Clock | None = None,
) -> None:
    """A short run of a phase, one way or the other, in the folder that `model` is in."""
    if way == "before":
        attention.uses_matrices = lambda x: False
    loop.Reuse = partial(tokens.Reuse, pool=1)  # a small pool is soon full
    torch.set_num_threads(cores if way == "before" else 1)
    phase = replace(phase, steps=steps, warmup=0, reuse=1 if way == "before" else reuse)
    source = open_source("tinyworld", seed=1, sprites=recipe.sprites)
    options = Options(quiet=True, save_every=10**9, log_every=10**9, probe_every=1, probe=clock)
    short = replace(recipe, phases=(phase,))
    run = Run(short, model.parent, source, presets.find(recipe.preset), [phase], options)
    loop.run_phases(run, worker)


def one_round(
    way: str, recipe: recipes.Recipe, phase: recipes.Phase, model: Path, steps: int, cores: int, reuse: int
) -> None:
    """Print, as JSON, seconds and the first process's CPU seconds of each step, once the pool is full."""
    clock, first = Clock(), reuse + 1
    ranks = cores if way == "now" else 1
    work: Any = partial(take_steps, way, recipe, phase, model, first + steps, cores, reuse)
    with peers.launch(ranks, work) as worker:
        work(worker, clock=clock)
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(clock.times[first - 1 :], clock.times[first:])]
    print(json.dumps(spans))


def compare(
    recipe: recipes.Recipe, names: list[str], rounds: int, steps: int, cores: int, reuse: int
) -> None:
    print(f"{cores} cores, recipe {recipe.name}, {rounds} rounds of {steps} steps, clips used {reuse} times")
    print(f"{'phase':<8}{'way':<8}{'s/step':>8}{'clips/s':>9}{'clips/CPU s':>13}{'MFU':>6}{'by CPU s':>10}")
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        source = open_source("tinyworld", seed=1, sprites=recipe.sprites)
        pace.random_model(ModelFolder(model), recipe, presets.find(recipe.preset), source)
        for name in names:
            phase = recipe.phase(name)
            parts = {part: ModelFolder(model).load(part) for part in ("base", name) if part != "image"}
            flops = phase.objective.clip_flops(phase, parts)
            peak, spans = 0.0, {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    torch.set_num_threads(1)
                    peak = max(peak, gemm_rate(torch.device("cpu"), "bfloat16"))
                    shutil.rmtree(Path(place) / name, ignore_errors=True)
                    options = [
                        "--way",
                        way,
                        "--model",
                        model,
                        "--phases",
                        name,
                        "--steps",
                        steps,
                        "--cores",
                        cores,
                        "--reuse",
                        reuse,
                        "--recipe",
                        recipe.name,
                        "--batch",
                        phase.batch,
                    ]
                    command = [sys.executable, "-m", "benchmarks.train_step", *map(str, options)]
                    quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as cogvideo train sets it
                    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
                    spans[way] += json.loads(found.stdout.splitlines()[-1])
            best = {}
            for way in WAYS:
                # a process that draws new clips in one step and none in the next: whole turns count
                seconds, cpu = (_best(column, 1 if way == "before" else reuse) for column in zip(*spans[way]))
                cpu *= cores if way == "now" else 1
                best[way] = (phase.batch / seconds, phase.batch / cpu)
                mfu = [flops * rate / peak / n for rate, n in zip(best[way], (cores, 1))]
                print(
                    f"{name:<8}{way:<8}{seconds:>8.2f}{best[way][0]:>9.1f}{best[way][1]:>13.2f}{mfu[0]:>6.0%}"
                    f"{mfu[1]:>10.0%}",
                    flush=True,
                )
            ratios = [now / before for now, before in zip(best["now"], best["before"])]
            print(f"{name:<8}{'ratio':<8}{'':>8}{ratios[0]:>9.2f}{ratios[1]:>13.2f}", flush=True)


def _best(values: tuple[float, ...], turn: int) -> float:
    """The least mean of `turn` neighbouring values."""
    return min(statistics.mean(values[i : i + turn]) for i in range(max(1, len(values) - turn + 1)))


def show_kernels(recipe: recipes.Recipe, names: list[str]) -> None:
    """Shares of kernels in forward and backward of a quarter of a batch, in one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = ModelFolder(Path(place) / "model")
        source = open_source("tinyworld", seed=1, sprites=recipe.sprites)
        pace.random_model(folder, recipe, presets.find(recipe.preset), source)
        for name in names:
            phase = recipe.phase(name)
            parts = {part: folder.load(part) for part in (*phase.uses, *phase.trains)}
            for part in phase.trains:
                parts[part].requires_grad_(True).train()
            machine = peers.Distributed(torch.device("cpu"))
            step = phase.objective.build_loss(parts, folder.text(), phase)
            batch = next(loader.batches(source, phase.clips, max(1, phase.batch // 4), seed=0))
            for number in range(2):
                with profile(activities=[ProfilerActivity.CPU]) as seen, machine.arithmetic(phase.precision):
                    loss, _ = step(batch, number)
                    loss.backward()
            _print_kernels(name, seen)


def _print_kernels(name: str, seen: profile) -> None:
    groups: Counter[str] = Counter()
    kinds = {kernel: group for group, kernels in KERNELS.items() for kernel in kernels}
    for row in seen.key_averages():
        groups[kinds.get(row.key, "all else")] += row.self_cpu_time_total
    whole = sum(groups.values())
    shares = "  ".join(f"{group} {100 * spent / whole:.1f} %" for group, spent in groups.most_common())
    print(f"{name}: {whole / 1e6:.2f} s: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--phases", nargs="+", default=["image", "stage1", "stage2"])
    parser.add_argument("--batch", type=int, help="clips a step; default: that of the recipe")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps measured in each round")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--reuse", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    recipe = recipes.find(a.recipe)
    if a.batch:
        recipe = recipe.changed({f"{name}.batch": str(a.batch) for name in a.phases})
    if a.way:
        return one_round(a.way, recipe, recipe.phase(a.phases[0]), a.model, a.steps, a.cores, a.reuse)
    if a.profile:
        return show_kernels(recipe, a.phases)
    compare(recipe, a.phases, a.rounds, a.steps, a.cores, a.reuse)


if __name__ == "__main__":
    main()
