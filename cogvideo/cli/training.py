"""cogvideo train, and cogvideo estimate: what a model costs, before it is trained or generates."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cogvideo.cli.parsing import Fields, Positional


def train(
    recipe: Positional[str] = "tiny",
    /,
    data: str = "tinyworld",
    subset: Literal["training", "validation"] | None = None,
    out: Path | None = None,
    init: str | None = None,
    lora: int | None = None,
    rehearse: str | None = None,
    init_embedding: str | None = None,
    phases: tuple[str, ...] = (),
    device: str = "auto",
    processes: int | None = None,
    shard: bool = False,
    mesh: str | None = None,
    accumulate: int = 1,
    recompute: bool = False,
    compile: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    save_every: int = 250,
    log_every: int = 25,
    probe_every: int = 1000,
    fields: Fields = None,
) -> None:
    """Train a model by a recipe, phase after phase; an interrupted run resumes.

    A field of a phase is set by --PHASE.FIELD VALUE, as in --image.steps 20000 --stage1.batch 16.
    On a CPU, several processes with a thread each share every batch of a phase; their number must divide
    --PHASE.batch. On several devices: --processes N, or torchrun --nproc-per-node N -m cogvideo train ...

    Args:
        recipe: A row of the table in cogvideo/train/recipes.py.
        data: "tinyworld", a folder that cogvideo data world wrote, a folder of captioned videos, a .csv or
            .jsonl, YouCook2's .json, or webdataset shards.
        subset: Of YouCook2. Default: training.
        out: The folder of the run. Default: runs/RECIPE.
        init: A shipped model, a model folder, or a hub id whose parts a new run starts from.
        lora: Train adapters of this rank, a few megabytes, instead of the model that --init names. Its phases
            are those of transformers, and short; the adapter is written to OUT/lora.
        rehearse: Data that the model of --init knows, as for --data: half of each batch, so that it forgets
            less of them.
        init_embedding: GPT-2's weights (a safetensors file or a hub id), for their embedding.
        phases: Only these phases, in the order of the recipe. Default: all.
        device: Where to compute: cpu, cuda, mps; auto is cuda if there is one, else cpu.
        processes: Processes that share the work. Default: one an idle core on a CPU, else one.
        shard: Split the weights over the processes instead of keeping all in each. Default if they would not
            fit otherwise.
        mesh: Processes as DATAxSHARDxTENSOR, as in 2x4x8: copies of the model, shards of its weights, slices
            of its matrices; or SHARDxTENSOR, as in 4x8. Default: copies, or with --shard shards.
        accumulate: Parts in which each process computes its clips of a step, one after another, to save
            memory.
        recompute: Recompute the transformer's activations in the backward pass, to save memory.
        compile: Compile the transformer's blocks.
        workers: Processes that read or render clips in advance, for each training process. Default: 0 on a
            CPU, else the number of cores divided by the processes.
        threads: CPU threads of each process. Default: the idle cores divided by the processes.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of the log.
        probe_every: Steps between previews.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve each other

    from cogvideo.data.sources import open_source
    from cogvideo.limits import check_range
    from cogvideo.model import presets
    from cogvideo.model.folder import ModelFolder, find_model
    from cogvideo.train import loop, recipes
    from cogvideo.train.mesh import MeshShape
    from cogvideo.train.preview import probe
    from cogvideo.train.run import MOST_RANK, Options, Run

    base = recipes.find(recipe)
    if lora is not None:
        check_range("--lora", lora, 1, MOST_RANK)
        base = recipes.of_adapters(base)
    chosen = base.changed(fields or {})
    some = chosen.some(phases)
    options = Options(
        device=device,
        processes=processes,
        shard=shard,
        mesh=MeshShape.parse(mesh) if mesh else None,
        accumulate=accumulate,
        recompute=recompute,
        compile=compile,
        workers=workers,
        threads=threads,
        save_every=save_every,
        log_every=log_every,
        probe_every=probe_every,
        probe=probe,
        lora=0 if lora is None else lora,
        init_embedding=init_embedding,
    ).with_defaults(some)
    source = open_source(data, seed=chosen.seed, sprites=chosen.sprites, subset=subset)
    known = None if rehearse is None else open_source(rehearse, seed=chosen.seed, sprites=chosen.sprites)
    if init:
        options = replace(options, init=ModelFolder(find_model(init)))
    where = out or Path("runs") / chosen.name
    run = Run(chosen, where, source, presets.find(chosen.preset), some, options, known)
    folder = loop.train(run)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
        print(f"model folder: {folder.path}" if lora is None else f"adapter: {where / 'lora'}")


def estimate(
    model: Positional[str] = "tiny",
    /,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    num_videos: int = 1,
    train: str | None = None,
    data: str = "tinyworld",
    device: str = "auto",
    processes: int | None = None,
    mesh: str | None = None,
    fields: Fields = None,
) -> None:
    """Estimate what generation costs, without loading anything: memory, steps, bytes to read, seconds.

    With --train RECIPE, hours of training on this machine, measured by a few steps of each phase; fields of
    phases are set as for `cogvideo train`. With --mesh, the bytes of each process of such a mesh instead,
    laid out without memory.

    Args:
        model: A shipped model, a model folder, a hub id, or a row of the table in cogvideo/model/presets.py.
        dtype: Data type of the computation. Default: the fastest on a CPU.
        num_videos: Videos at a time.
        train: A recipe to be measured, instead of generation.
        data: What it would be trained on, as for cogvideo train.
        device: Where to train: cpu, cuda, mps; auto is cuda if there is one, else cpu.
        processes: Processes that train together. Default: as `cogvideo train` chooses.
        mesh: Processes that a training would use, as DATAxSHARDxTENSOR or SHARDxTENSOR.
    """
    if mesh is not None:
        return _estimate_mesh(train, mesh, fields or {})
    if train is not None:
        return _estimate_training(train, data, device, processes, fields or {})
    if fields:
        raise ValueError(f"--{next(iter(fields))} is a field of a phase, for --train RECIPE")
    from cogvideo.generate.estimate import Estimate, Speed
    from cogvideo.generate.sampling import stages
    from cogvideo.limits import MOST_VIDEOS, check_range
    from cogvideo.model import presets
    from cogvideo.model.folder import ModelFolder, find_model, shipped

    check_range("--num-videos", num_videos, 1, MOST_VIDEOS)
    folder = None if model in presets.PRESETS and model not in shipped() else ModelFolder(find_model(model))
    spec = folder.spec() if folder else presets.find(model)
    chosen = folder.config.sampling if folder else presets.SAMPLING.get(model, {})
    kind = dtype or spec.dtypes[0]
    spec.check_dtype(kind)
    print(Estimate(spec, stages(chosen), kind, num_videos).table(Speed.measure(kind)))


def _estimate_mesh(recipe: str | None, mesh: str, fields: dict[str, str]) -> None:
    from cogvideo.model import presets
    from cogvideo.train import footprint, recipes
    from cogvideo.train.mesh import MeshShape

    if recipe is None:
        raise ValueError("--mesh is for --train RECIPE")
    shape = MeshShape.parse(mesh)
    chosen = recipes.find(recipe).changed(fields)
    spec = presets.find(chosen.preset)
    rows = [footprint.lay_out(spec, phase, shape) for phase in chosen.phases]
    print(footprint.table(rows, shape))


def _estimate_training(
    recipe: str, data: str, device: str, processes: int | None, fields: dict[str, str]
) -> None:
    import torch

    from cogvideo.data.sources import open_source
    from cogvideo.hardware import idle_cores
    from cogvideo.model import presets
    from cogvideo.train import pace, recipes
    from cogvideo.train.run import Options

    chosen = recipes.find(recipe).changed(fields)
    phases = [*chosen.phases]
    options = Options(device=device, processes=processes, workers=None).with_defaults(phases)
    count = options.processes or 1
    torch.set_num_threads(max(1, idle_cores() // count))
    source = open_source(data, seed=chosen.seed, sprites=chosen.sprites)
    print(f"measured by a few steps of each phase, {count} processes on {options.device}")
    paces = pace.measure(
        chosen,
        source,
        presets.find(chosen.preset),
        phases,
        device=torch.device(options.device),
        processes=count,
        workers=options.workers or 0,
    )
    print(pace.table([*paces]))
