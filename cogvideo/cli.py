"""The command line: `cogvideo generate | train | convert | push | estimate | models | evaluate | judge |
data | serve | worker`.

Each command imports what it needs inside, so that `--help` answers at once. What a user can get wrong raises
ValueError or OSError somewhere below and ends here as one line and exit code 2.
"""

import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Fixed, Positional, Suppress, arg

from cogvideo import __version__
from cogvideo.stopping import Stopped, say_stopped, stopped_by_signals

if TYPE_CHECKING:
    from cogvideo.generate.bulk import Settings
    from cogvideo.generate.pipeline import Pipeline
    from cogvideo.generate.torchrun import Slices

BATCH = 16  # videos per batch, saved before the next
LONGEST_ERROR = 900  # characters; of a longer one the middle is left out
Short = Annotated[Path, arg(aliases=["-o"])]


def generate(
    prompt: Positional[str | None] = None,
    /,
    out: Short = Path("out.mp4"),
    model: str = "tiny",
    prompts: Path | None = None,
    num_videos: int = 1,
    num_frames: int | None = None,
    seed: int | None = None,
    guidance_scale: float | None = None,
    image: Path | None = None,
    video: Path | None = None,
    lora: tuple[str, ...] = (),
    device: str = "cpu",
    threads: int | None = None,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    reference_quirks: bool = False,
    ignore_memory: bool = False,
    keep: Path | None = None,
    workers: int = 0,
    ray: str | None = None,
    slices: int = 1,
    quiet: bool = False,
) -> None:
    """Generate videos from a sentence.

    Started by torchrun, each process generates some of the videos.

    Args:
        prompt: A sentence about the video, in English or Chinese.
        out: Where to write: .mp4, .gif, .webp or .png. Several videos get numbers: out-0.mp4, out-1.mp4.
        model: A shipped model, a model folder, or a hub id.
        prompts: A text file with a prompt on each line, instead of one prompt.
        num_videos: Videos for each prompt.
        num_frames: Frames of a video: fewer frames take fewer rounds of interpolation; 1 is an image, by the
            text-to-image model alone.
        seed: The same seed gives the same video. Default: a random one, which is printed. A deterministic
            model accepts it and ignores it.
        guidance_scale: Strength of classifier-free guidance, 1 (none) or more. Default: the model's own.
        image: An image that the video starts with.
        video: A video to continue.
        lora: Adapters that cogvideo train --lora made: files, their folders or hub ids, each with a weight if
            it is not 1, as in runs/mine/lora:0.8.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        dtype: Data type of the computation. Default: the fastest on the device.
        reference_quirks: Reproduce where the original's inference differs from its training.
        ignore_memory: Run even if the model does not seem to fit into memory.
        keep: A folder for the tokens after every step; rerun with the same seed to resume an interrupted run.
        workers: Processes that generate batches of 16 videos each. Default: this one.
        ray: The address of a Ray cluster that generates, or local; its machines must see the model.
        slices: Processes of torchrun that share every matrix of the model, and so its memory.
        quiet: Print nothing but errors.
    """
    from cogvideo.generate.bulk import Settings, with_adapters
    from cogvideo.generate.torchrun import join
    from cogvideo.limits import MOST_VIDEOS, check_range, check_threads, check_workers
    from cogvideo.video import check_folder

    check_workers(workers)
    check_threads(threads)
    lines = _read_prompts(prompt, prompts)
    check_range("--num-videos", num_videos, 1, MOST_VIDEOS // len(lines))
    asked = [line for line in lines for _ in range(num_videos)]
    paths = _output_files(out, len(asked))
    if keep is not None:
        check_folder(keep)
    elsewhere = workers > 1 or ray is not None
    if elsewhere and (keep is not None or not out.suffix):
        raise ValueError("--workers and --ray write whole files; leave out --keep, and give --out a file")

    if slices > 1 and keep is not None:
        raise ValueError("--slices compute in step and cannot resume alone; leave out --keep")
    place, device = join(device, slices)
    if place.count > 1 and seed is None:
        raise ValueError("several processes need --seed: each must know the numbers of all videos")
    pipe = _open_pipeline(model, device, dtype, reference_quirks, threads, place.slices)
    adapters = _read_adapters(lora)
    with_adapters(pipe, adapters)
    pipe.check_supported(keep=keep, num_videos_per_prompt=num_videos)
    _check_memory(pipe, model, len(asked), ignore_memory)
    _check_prompts(pipe, lines, prompts, quiet)
    seeds = pipe.new_seeds(seed, len(asked))
    if keep is not None and seed is None:
        raise ValueError("--keep needs --seed, for the same command must ask for the same videos")

    if elsewhere:
        settings = Settings(
            model=model,
            suffix=out.suffix,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            image=image,
            video=video,
            device=device,
            dtype=dtype,
            reference_quirks=reference_quirks,
            adapters=adapters,
        )
        _generate_elsewhere(settings, asked, seeds, paths, workers, ray, quiet)
        return

    batch = min(BATCH, -(-len(asked) // place.count))
    for first in range(place.number * batch, len(asked), place.count * batch):
        clips = pipe(
            asked[first : first + batch],
            image=image,
            video=video,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            seed=None if seeds is None else seeds[first],
            progress=not quiet and place.number == 0 and place.writes,
            keep=keep,
        )
        if not place.writes:
            continue
        for i, clip in enumerate(clips, first):
            clip.save(paths[i])
            if not quiet:
                frames, height, width, _ = clip.frames.shape
                used = "" if seeds is None else f", seed {seeds[i]}"
                print(f"{paths[i]}  {frames} frames, {width}x{height}, {clip.fps:g} fps{used}")


def _generate_elsewhere(
    settings: "Settings",
    prompts: list[str],
    seeds: list[int] | None,
    paths: list[Path],
    workers: int,
    ray: str | None,
    quiet: bool,
) -> None:
    """Generate in several processes or on a cluster; each file is written when its batch has come."""
    from cogvideo.files import atomic_path
    from cogvideo.generate.bulk import Batch, generate_all
    from cogvideo.progress import open_progress

    each = max(1, min(BATCH, -(-len(prompts) // max(1, workers))))
    batches = []
    for first in range(0, len(prompts), each):
        seed = None if seeds is None else seeds[first]
        batches.append(Batch(settings, tuple(prompts[first : first + each]), seed))
    done = 0
    with open_progress(not quiet) as report:
        for files in generate_all(batches, workers, ray):
            for content in files:
                with atomic_path(paths[done]) as part:
                    part.write_bytes(content)
                done += 1
            if report is not None:
                report("videos", done, len(prompts))
    if not quiet:
        used = "" if seeds is None else f", seeds {seeds[0]} to {seeds[-1]}"
        print(f"{paths[0]} to {paths[-1]}{used}")


def _output_files(out: Path, count: int) -> list[Path]:
    """The file of each video; ValueError or OSError if one cannot be written."""
    from cogvideo.video import check_output

    paths = [out]
    if count > 1:
        paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]
    for path in paths:
        check_output(path)
    return paths


def _open_pipeline(
    model: str,
    device: str,
    dtype: str | None,
    reference_quirks: bool,
    threads: int | None,
    slices: "Slices | None" = None,
) -> "Pipeline":
    """The model, on as many threads as there are idle cores."""
    import torch

    from cogvideo.generate.cogvideo import load
    from cogvideo.hardware import idle_cores

    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or min(torch.get_num_threads(), idle_cores()))
    return load(model, device, dtype, reference_quirks, slices=slices)


def _read_adapters(asked: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """Adapters and their weights, each given as WHERE or WHERE:WEIGHT."""
    adapters = []
    for text in asked:
        where, _, weight = text.rpartition(":")
        if not where or not re.fullmatch(r"-?\d*\.?\d+", weight):
            where, weight = text, "1"
        adapters.append((where, float(weight)))
    return tuple(adapters)


def _check_memory(pipe: "Pipeline", model: str, count: int, ignore_memory: bool) -> None:
    estimate = pipe.estimate(count)
    if not estimate.fits and not ignore_memory:
        print(estimate.table(), file=sys.stderr)
        raise ValueError(f"{model} needs more memory than there is; --ignore-memory tries nevertheless")


def _check_prompts(pipe: "Pipeline", lines: list[str], file: Path | None, quiet: bool) -> None:
    """Raise ValueError for a prompt that cannot be used, by its number; print hints."""
    for number, line in enumerate(lines, 1):
        try:
            pipe.check_prompt(line)
        except ValueError as error:
            raise ValueError(f"{file}, prompt {number}: {error}" if file else error) from None
    if not quiet:
        for hint in pipe.hints(lines):
            print(f"hint: {hint}", file=sys.stderr)


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The one prompt, or those of a file, one on each line."""
    from cogvideo.files import read_text

    if (prompt is None) == (file is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if file is None:
        return [prompt or ""]
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no prompt; write one on each line")
    return lines


def train(
    recipe: Positional[str] = "tiny",
    /,
    data: str = "tinyworld",
    subset: Literal["training", "validation"] | None = None,
    out: Path | None = None,
    init: str | None = None,
    lora: int | None = None,
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
    fields: Suppress[Fixed[dict[str, str] | None]] = None,
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
    if init:
        options = replace(options, init=ModelFolder(find_model(init)))
    where = out or Path("runs") / chosen.name
    folder = loop.train(Run(chosen, where, source, presets.find(chosen.preset), some, options))
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
    fields: Suppress[Fixed[dict[str, str] | None]] = None,
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


def models(model: Positional[str | None] = None, /) -> None:
    """List the shipped models, or describe one: its sizes, words and measured numbers."""
    from cogvideo.model.folder import ModelFolder, find_model, shipped

    if model is None:
        for name in shipped():
            print(f"{name:<12} {ModelFolder(find_model(name)).config.about}")
        return
    folder = ModelFolder(find_model(model))
    config = folder.config
    spec = config.spec
    size = spec.resolution
    refined = f", refined to {size * spec.refiner.scale} px" if spec.refiner else ""
    print(f"{folder.path}\n{config.about}\n")
    for name, value in spec.describe().items():
        print(f"{name:<13} {value}")
    print(f"pixels        {size} px{refined}")
    for part in spec.parts:
        weight = f"{folder.file(part).stat().st_size / 1e6:.1f} MB" if folder.has(part) else "missing"
        print(f"{part:<13} {weight}")
    for name, row in (config.trained or {}).items():
        print(f"trained       {name}: {row.steps} steps of {row.batch} clips")
    for name, value in config.measured.items():
        print(f"measured      {name}: {value}")
    if config.words:
        print(f"words         {' '.join(config.words)}")


def push(
    folder: Positional[Path],
    name: Positional[str],
    /,
    licence: str = "apache-2.0",
    prompt: str | None = None,
    private: bool = False,
    message: str = "cogvideo push",
) -> None:
    """Put a model folder, or an adapter, on the Hugging Face hub, with a card.

    Who you are is known by HF_TOKEN, or by hf auth login.

    Args:
        folder: A model folder, or the folder of an adapter.
        name: The repository, owner/name; owner/name@branch for another branch than main.
        licence: Of the weights, as the hub names it.
        prompt: A sentence of which a video is generated for the card. Default: the card has no picture.
        private: Whether only you can see the repository; when it is created.
        message: Of the commit.
    """
    from cogvideo.generate.publish import prepare
    from cogvideo.model.hub import MODEL_FILES, upload

    prepare(folder, name, licence, prompt)
    print(upload(folder, name, MODEL_FILES, private, message))


def convert(
    kind: Positional[
        Literal["sat", "cogvideo-stage1", "cogvideo-stage2", "cogview2-dsr", "cogview2-itersr", "icetk"]
    ],
    paths: Positional[tuple[Path, ...]],
    /,
    codes: int | None = None,
) -> None:
    """Convert the files of the original CogVideo to a model folder.

    cogvideo convert sat COGVIDEO-STAGE1 COGVIDEO-STAGE2 COGVIEW2-DSR OUT; then, into the same folder:
    cogvideo convert icetk ICETK_MODELS OUT.

    Args:
        kind: sat for checkpoint folders or the zips as downloaded, of any of the models; one of the others
            for those whose model_config.json is missing or does not tell the stage: cogvideo-stage1 and 2,
            CogView2's direct and iterative super-resolution; icetk for ice_text.model and ice_image.pt.
        paths: Folders or zips to read, then the model folder to write or to extend.
        codes: How many of the checkpoint's ids are image codes. Default: 20000, as icetk has.
    """
    from cogvideo.convert.cogvideo import convert_sat
    from cogvideo.convert.icetk import convert_icetk

    *sources, out = paths or (Path("."),)
    if not sources or (kind == "icetk" and len(sources) > 1):
        raise ValueError(
            f"give the files to read, then the folder to write: cogvideo convert {kind} SOURCE OUT"
        )
    if kind == "icetk":
        convert_icetk(sources[0], out)
    else:
        models = {f"cogvideo-stage{number}": f"CogVideoModel of stage {number}" for number in (1, 2)}
        models |= {"cogview2-dsr": "DsrModel", "cogview2-itersr": "ItersrModel"}
        convert_sat(sources, out, codes, model=models.get(kind))
    print(f"model folder: {out}")


def evaluate(
    generated: Positional[str],
    reference: Positional[str | None] = None,
    /,
    out: Short = Path("report.json"),
    preset: str | None = None,
    extractors: tuple[str, ...] = (),
    weights: tuple[str, ...] = (),
    frames: int | None = None,
    fps: float | None = None,
    size: int | None = None,
    start: Literal["first", "middle", "random"] | None = None,
    crop: Literal["centre", "none"] | None = None,
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "area"] | None = None,
    order: Literal["crop-resize", "resize-crop"] | None = None,
    short: Literal["refuse", "skip", "repeat"] | None = None,
    count: int | None = None,
    seed: int | None = None,
    few: bool = False,
    paired: bool = False,
    scorer: str | None = None,
    controls: bool = True,
    workers: int = 0,
    ray: str | None = None,
    cache: Path | None = None,
    quiet: bool = False,
) -> None:
    """Compare generated videos with a reference: distances, motion, captions, each with its protocol.

    Each side is a folder of videos, a .txt with a path on each line, a .csv or .jsonl with captions, or
    webdataset shards. Writes a JSON file and a page of HTML next to it. docs/evaluation.md explains the
    numbers.

    Args:
        generated: The videos to judge.
        reference: The videos to compare them with. Without: only measures of single clips and --scorer.
        out: The JSON file to write; the page gets the same name.
        preset: The protocol of a paper: tinyworld, ucf101, kinetics600, msrvtt. Other options override it.
        extractors: Networks: efficientnet-lite0, tinyworld; from files: i3d, c3d, inception, videomae, clip.
        weights: Files of networks, as in i3d=FILE.
        frames: Frames of a clip.
        fps: Frames per second at which a clip is taken, by time stamps.
        size: Pixels a side.
        start: Where a clip starts in its video.
        crop: The middle square, or none: the frame is squeezed.
        filter: How frames are resized.
        order: Whether frames are cropped or resized first.
        short: What happens to videos that are too short.
        count: Clips on both sides, chosen by the seed. Default: all, which must be as many.
        seed: Of the choice of clips and of the halves.
        few: Accept fewer than 256 clips.
        paired: Also compare videos of the same name, frame by frame.
        scorer: What judges whether clips show their captions: tinyworld, clip, or a folder that cogvideo data
            world wrote.
        controls: Test whether each network sees motion.
        workers: Processes. Default: this one.
        ray: The address of a Ray cluster that computes the features, or local.
        cache: Where features are stored. Default: ~/.cache/cogvideo/features.
        quiet: Print nothing but the table.
    """
    from cogvideo.eval import protocol as protocols
    from cogvideo.eval.evaluate import Request
    from cogvideo.eval.evaluate import evaluate as compare
    from cogvideo.eval.features import default_cache
    from cogvideo.eval.report import save, table
    from cogvideo.files import expand_user
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json; got {out}")
    check_folder(out.parent)
    chosen = protocols.find_preset(preset) if preset else None
    base = chosen.protocol if chosen else protocols.Protocol()
    given: dict[str, Any] = {
        "frames": frames,
        "fps": fps,
        "size": size,
        "start": start,
        "crop": crop,
        "filter": filter,
    }
    given |= {"order": order, "short": short, "count": count, "seed": seed}
    files = {}
    for pair in weights:
        name, separator, file = pair.partition("=")
        if not separator:
            raise ValueError(f"--weights needs NAME=FILE; got {pair}")
        files[name] = expand_user(file)
    request = Request(
        generated=generated,
        reference=reference,
        protocol=protocols.changed(base, given),
        extractors=extractors or (chosen.extractors if chosen else ("efficientnet-lite0",)),
        weights=files,
        few=few,
        paired=paired,
        scorer=scorer,
        controls=controls,
        workers=workers,
        ray=ray,
        cache=default_cache() if cache is None else cache,
    )
    with open_progress(not quiet) as report_progress:
        report = compare(request, report_progress)
    print(table(report))
    for path in save(report, out):
        if not quiet:
            print(path)


def judge() -> None:
    """Ask people, blindly: cogvideo judge new, serve, report."""
    raise ValueError(f"give one of {', '.join(GROUPS['judge'])} after cogvideo judge")


def judge_new(
    study: Positional[Path],
    /,
    systems: tuple[Path, ...] = (),
    prompts: Path | None = None,
    mode: Literal["pairs", "ratings", "best"] = "pairs",
    real: str | None = None,
    per_rater: int = 24,
    repeats: int = 3,
    least_seconds: float = 1.0,
    least_agreement: float = 0.0,
    frames: int = 33,
    fps: float = 8.0,
    size: int = 192,
    seed: int = 0,
) -> None:
    """Prepare a blind study of videos. docs/judge.md explains it.

    Args:
        study: The folder to write.
        systems: A folder of videos each, in the same order; the folder's name is the system's in the report.
        prompts: A text file with a line for each video. Default: the captions that the videos store.
        mode: pairs: which of two is better; best: which of all systems; ratings: four scores for each video.
        real: The system whose videos are real, as a ceiling.
        per_rater: Trials of one rater.
        repeats: Of these, how many are shown again, to see whether a rater agrees with themselves.
        least_seconds: Raters whose median answer is faster are left out.
        least_agreement: Raters who repeat a smaller share of their answers are left out.
        frames: Frames of every clip.
        fps: Frames per second of every clip.
        size: Pixels a side of every clip.
        seed: Of orders and sides.
    """
    from cogvideo.eval.protocol import Protocol
    from cogvideo.eval.study import Plan, Rules, create

    rules = Rules(least_seconds=least_seconds, least_agreement=least_agreement)
    protocol = Protocol(frames=frames, fps=fps, size=size)
    made = create(study, Plan(systems, mode, prompts, real, protocol, seed, per_rater, repeats, rules))
    print(f"{study}: {len(made.trials)} trials; start it with cogvideo judge serve {study}")


def judge_serve(study: Positional[Path], /, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the page of a study until interrupted; votes are kept.

    Args:
        study: The folder of the study.
        host: The address to listen at; 0.0.0.0 is all of this machine's.
        port: The port.
    """
    from cogvideo.eval.study_server import serve
    from cogvideo.limits import check_range

    check_range("--port", port, 1, 65535)
    serve(study, host, port)


def judge_report(study: Positional[Path], /) -> None:
    """Tally the votes of a study; writes report.json, report.csv and report.html into its folder.

    Args:
        study: The folder of the study.
    """
    from cogvideo.eval.study_report import save, tally, text

    report = tally(study)
    print(text(report))
    for path in save(report, study):
        print(path)


def data() -> None:
    """Prepare data before training: cogvideo data check, tokenize, world."""
    raise ValueError(f"give one of {', '.join(GROUPS['data'])} after cogvideo data")


def data_check(
    where: Positional[str],
    /,
    out: Short = Path("check"),
    recipe: str = "tiny",
    init: str | None = None,
    phases: tuple[str, ...] = (),
    subset: Literal["training", "validation"] | None = None,
    quiet: bool = False,
) -> None:
    """Say what a training would read: videos used and not, frame rates, sizes, captions, unknown words.

    Writes check.json, with a row for each video, and sheet.png: clips as training sees them.

    Args:
        where: What cogvideo train takes as --data: a folder of captioned videos, a table, shards.
        out: The folder for check.json and sheet.png.
        recipe: The recipe that would be trained.
        init: The model that training would start from; it tells which words are unknown.
        phases: Only these phases of the recipe. Default: all.
        subset: Of YouCook2. Default: training.
        quiet: Print nothing but errors.
    """
    from cogvideo.data.sources import open_source
    from cogvideo.data.survey import Words, sheet, survey
    from cogvideo.data.videos import Videos
    from cogvideo.generate.prompts import Prompts
    from cogvideo.layout import SECONDS
    from cogvideo.model import presets
    from cogvideo.model.folder import ModelFolder, find_model
    from cogvideo.progress import open_progress
    from cogvideo.train import recipes
    from cogvideo.video import check_folder

    chosen = recipes.find(recipe)
    check_folder(out)
    source = open_source(where, subset=subset)
    if not isinstance(source, Videos):
        raise ValueError(f"{where} is no folder, table or shard of videos; there is nothing to check")
    rows = chosen.some(phases)
    longest = presets.find(chosen.preset).text_config.text_len
    words = Words(lambda caption: len(caption.split()), longest, lambda caption: [])
    if init is not None:
        folder = ModelFolder(find_model(init))
        text = folder.text()
        prompts = Prompts(text, folder.config.words)
        words = Words(
            lambda caption: len(text.prompt(caption, SECONDS)),
            folder.spec().text_config.text_len,
            lambda caption: [*prompts.unknown_words(caption)],
        )
    with open_progress(not quiet) as report:
        found = survey(source, {phase.name: phase.clips for phase in rows}, words, report)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "check.json")
    sheet(source, found).save(out / "sheet.png")
    if not quiet:
        print(found.text())
        print(out / "sheet.png")


def data_tokenize(
    where: Positional[str],
    /,
    out: Short,
    model: str = "tiny",
    subset: Literal["training", "validation"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 0,
    ray: str | None = None,
    quiet: bool = False,
) -> None:
    """Encode captioned videos once, into webdataset shards of codes that cogvideo train takes as --data.

    An interrupted call resumes when it is repeated; each video is encoded once.

    Args:
        where: What cogvideo train takes as --data: a folder of captioned videos, a table, shards.
        out: The folder for the shards.
        model: The model whose tokenizer encodes, and that training will start from.
        subset: Of YouCook2. Default: training.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        workers: Processes that encode a shard of 64 videos each. Default: this one.
        ray: The address of a Ray cluster that encodes, or local; its machines must see the videos.
        quiet: Print nothing but errors.
    """
    import torch

    from cogvideo.data.coded import digest, encode_frames, write_shards
    from cogvideo.data.sources import open_source
    from cogvideo.data.videos import Videos
    from cogvideo.hardware import find_device
    from cogvideo.limits import check_threads, check_workers
    from cogvideo.model.folder import ModelFolder, find_model
    from cogvideo.model.vqvae import VQVAE
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    check_workers(workers)
    check_threads(threads)
    source = open_source(where, subset=subset)
    if not isinstance(source, Videos):
        raise ValueError(f"{where} is no folder, table or shard of videos; there is nothing to encode")
    folder = ModelFolder(find_model(model))
    check_folder(out)
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or _threads_of_each(1))
    vqvae = folder.load_as(VQVAE, "vqvae", find_device(device))
    size = folder.spec().resolution
    with open_progress(not quiet) as report:
        encode = partial(encode_frames, vqvae)
        table = write_shards(source, encode, digest(vqvae), size, out, report, workers, ray)
    if not quiet:
        print(f"{table.videos} videos in {out}, {len(table.skipped)} left out")
        for name, why in [*table.skipped.items()][:10]:
            print(f"  {name}: {why}")


def data_world(
    art: Positional[Path],
    /,
    out: Short,
    held_out: int = 256,
    judge_steps: int = 400,
    quiet: bool = False,
) -> None:
    """Make a world to train on from pictures with transparency. docs/own-world.md explains it.

    Writes the world, sheet.png to look at, clips and captions that training leaves out, and a judge of this
    world's clips. An interrupted call resumes when it is repeated.

    Args:
        art: A folder of pictures or animations (png, gif, webp, apng), with backgrounds/ and world.toml if
            there are any.
        out: The folder to write; cogvideo train takes it as --data.
        held_out: Clips to judge a model by.
        judge_steps: Steps of the judge's training, of about a second on one core; 0 for no judge.
        quiet: Print nothing but errors.
    """
    from cogvideo.data.tinyworld.artwork import make_world
    from cogvideo.data.tinyworld.gallery import sheet, write_held_out
    from cogvideo.data.tinyworld.own import JUDGE, open_world
    from cogvideo.files import atomic_path, only_writer
    from cogvideo.limits import check_range
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    check_range("--held-out", held_out, 0, 100_000)
    check_range("--judge-steps", judge_steps, 0, 100_000)
    check_folder(out)
    with only_writer(out):
        made = make_world(art, out)
    with only_writer(out):  # it is a new folder now
        world = open_world(out)
        with atomic_path(out / "sheet.png") as part:
            sheet(world).save(part)
        if not quiet:
            print(made.text())
            print(out / "sheet.png", flush=True)
        with open_progress(not quiet) as report:
            if held_out:
                write_held_out(world, held_out, report)
        if judge_steps and not (out / JUDGE).exists():
            accuracy = _train_judge(out, judge_steps, quiet)
            if not quiet:
                print(f"judge, on held-out clips: {accuracy}")


def _train_judge(world: Path, steps: int, quiet: bool) -> str:
    """Train a world's judge and store it; return how often it is right."""
    from cogvideo.eval import judge_training
    from cogvideo.eval.tinyworld import Classes
    from cogvideo.progress import open_progress

    classes = Classes.of(world)
    with open_progress(not quiet) as progress:
        net = judge_training.train_world_judge(classes, steps, progress)
    right = judge_training.test(net, classes, count=256, held_out=True)
    judge_training.save_judge(net, world)
    parts = {"sprite": right.sprite, "motion": right.motion, "place": right.place, "all": right.all_three}
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts.items())


DATA = Path("~/.cogvideo")
Gigabytes = float


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    models: tuple[str, ...] = ("tiny", "direct-tiny"),
    workers: int = 1,
    data: Path = DATA,
    database: str | None = None,
    results: str | None = None,
    api_keys: Path | None = None,
    no_auth: bool = False,
    origins: tuple[str, ...] = (),
    max_queue: int = 1000,
    max_upload: int = 50,
    keep_days: float = 7.0,
    quota: Gigabytes | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: Gigabytes | None = None,
    first_frame_seconds: float = 5.0,
) -> None:
    """Serve a page and the endpoints of /v1/videos, with workers. docs/serving.md explains it.

    Jobs are stored before they are acknowledged; after an interruption they resume.

    Args:
        host: The address to listen at. One that others can reach needs --api-keys or --no-auth.
        port: The port.
        models: Shipped models, model folders or hub ids; the first is the default.
        workers: Processes that generate. 0: workers run elsewhere (cogvideo worker).
        data: The folder of the queue and the videos.
        database: Another place for the queue: postgresql://... for several machines.
        results: Another place for the videos: a folder, or an URL of fsspec. Default: in --data.
        api_keys: A file with a key on each line. COGVIDEO_API_KEYS adds others, separated by commas.
        no_auth: Let everybody generate who can reach the address.
        origins: Other web pages that may call the endpoints, as in https://example.org.
        max_queue: Unfinished jobs; more are refused with 429.
        max_upload: Megabytes of a request.
        keep_days: Days until a video is forgotten.
        quota: Gigabytes of videos, of which the oldest are forgotten.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads of each worker. Default: the idle cores divided by the workers.
        memory: Gigabytes of loaded models. Default: 80 % of what is free.
        first_frame_seconds: How long the first frame may take where jobs are generated together.
    """
    _need_serve()
    from cogvideo.limits import check_range, check_workers
    from cogvideo.serve import doors as doors_
    from cogvideo.serve.server import Address
    from cogvideo.serve.server import serve as run

    check_range("--port", port, 1, 65535)
    check_workers(workers)
    check_range("--max-queue", max_queue)
    check_range("--max-upload", max_upload)
    _check_worker(keep_days, quota, device, threads, memory, first_frame_seconds)
    keys = doors_.read_keys(api_keys, os.environ.get(doors_.KEYS_VARIABLE, ""))
    doors_.check_address(host, keys, no_auth)
    options = ["--models", *models, "--device", device, "--first-frame-seconds", str(first_frame_seconds)]
    options += ["--threads", str(threads or _threads_of_each(workers))]
    for name, value in (("--memory", memory), ("--quota", quota)):
        options += [] if value is None else [name, str(value)]
    run(
        Address.of(data, database, results),
        models,
        doors_.Doors(keys, max_upload * 2**20, origins),
        host=host,
        port=port,
        workers=workers,
        worker_options=[*options, "--keep-days", str(keep_days)],
        max_queue=max_queue,
        keep_seconds=86400 * keep_days,
    )


def worker(
    models: tuple[str, ...] = ("tiny", "direct-tiny"),
    data: Path = DATA,
    database: str | None = None,
    results: str | None = None,
    keep_days: float = 7.0,
    quota: Gigabytes | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: Gigabytes | None = None,
    first_frame_seconds: float = 5.0,
) -> None:
    """Generate jobs of a queue until interrupted; the options are those of cogvideo serve.

    Args:
        models: Shipped models, model folders or hub ids, by the same names as at the server.
        data: The folder of the queue and the videos.
        database: Another place for the queue: postgresql://... for several machines.
        results: Another place for the videos: a folder, or an URL of fsspec.
        keep_days: Days until a video is forgotten.
        quota: Gigabytes of videos, of which the oldest are forgotten.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        memory: Gigabytes of loaded models. Default: 80 % of what is free.
        first_frame_seconds: How long the first frame may take where jobs are generated together.
    """
    _need_serve()
    import logging

    import torch

    from cogvideo.serve.jobs import JobStore
    from cogvideo.serve.results import Results
    from cogvideo.serve.server import Address
    from cogvideo.serve.worker import Settings, serve_jobs

    _check_worker(keep_days, quota, device, threads, memory, first_frame_seconds)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    torch.set_num_threads(threads or _threads_of_each(1))
    address = Address.of(data, database, results)
    settings = Settings(
        models=models,
        device=device,
        memory=None if memory is None else memory * 1e9,
        first_frame_seconds=first_frame_seconds,
        quota=None if quota is None else int(quota * 1e9),
    )
    store = JobStore(address.database, keep_seconds=86400 * keep_days)
    serve_jobs(store, Results(address.results), settings)


def _check_worker(
    keep_days: float,
    quota: Gigabytes | None,
    device: str,
    threads: int | None,
    memory: Gigabytes | None,
    first_frame_seconds: float,
) -> None:
    """Raise ValueError for options that no worker could work with."""
    from cogvideo.hardware import find_device
    from cogvideo.limits import check_range, check_threads

    check_range("--keep-days", keep_days, 0)
    check_range("--quota", quota, 0)
    check_range("--memory", memory, 0)
    check_range("--first-frame-seconds", first_frame_seconds, 0)
    check_threads(threads)
    find_device(device)


def _threads_of_each(workers: int) -> int:
    from cogvideo.hardware import idle_cores

    return max(1, idle_cores() // max(1, workers))


def _need_serve() -> None:
    """Raise ValueError unless what serving needs is installed."""
    for name in ("fastapi", "uvicorn", "sqlalchemy", "fsspec", "prometheus_client", "multipart"):
        if importlib.util.find_spec(name) is None:
            raise ValueError('serving needs more packages: pip install "cogvideo[serve]"')


COMMANDS: dict[str, Any] = {
    "generate": generate,
    "train": train,
    "convert": convert,
    "push": push,
    "estimate": estimate,
    "models": models,
    "evaluate": evaluate,
    "judge": judge,
    "data": data,
    "serve": serve,
    "worker": worker,
}
GROUPS: dict[str, dict[str, Any]] = {
    "data": {"check": data_check, "tokenize": data_tokenize, "world": data_world},
    "judge": {"new": judge_new, "serve": judge_serve, "report": judge_report},
}


def _take_fields(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split arguments into `--PHASE.FIELD VALUE`, as {"PHASE.FIELD": "VALUE"}, and the rest."""
    fields = {}
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r"--(\w+(?:\.\w+)+)(?:=(.*))?", argument)
        if match is None:
            rest.append(argument)
            continue
        value = match[2] if match[2] is not None else next(remaining, None)
        if value is None:
            raise ValueError(f"{argument} needs a value")
        fields[match[1]] = value
    return fields, rest


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"cogvideo {__version__}")
        return
    try:
        with stopped_by_signals():
            _parse(sys.argv[1:])()
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))
    except MemoryError as error:
        sys.exit(_complain(MemoryError(f"the memory does not suffice {error}")))
    except KeyboardInterrupt:
        sys.exit(say_stopped(signal.SIGINT, sys.argv[1:]))
    except Stopped as stopped:
        sys.exit(say_stopped(stopped.number, sys.argv[1:]))


def _parse(arguments: list[str]) -> Callable[[], None]:
    """Return the command with its arguments, to be called. Raise ValueError, as one line, for errors that
    tyro prints in a box."""
    training = arguments[:1] in (["train"], ["estimate"])
    fields: dict[str, str] = {}
    if training:
        fields, arguments = _take_fields(arguments)
    commands = COMMANDS
    program = "cogvideo"
    if len(arguments) > 1 and arguments[0] in GROUPS:
        commands = GROUPS[arguments[0]]
        program = f"cogvideo {arguments[0]}"
        arguments = arguments[1:]
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            command = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(command) for name, command in commands.items()},
                prog=program,
                description="Text to video by the method of CogVideo.",
                args=arguments,
            )
            return partial(command, fields=fields) if training else command
    except SystemExit as exit:
        if not exit.code:  # help was asked for
            raise
        lines = [line.strip("│─ ") for line in output.getvalue().splitlines() if line[:1] not in "╭╰"]
        raise ValueError(" ".join(lines)) from None


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command with the options and the help of `command` that returns the call instead of making it."""
    return wraps(command)(lambda *args, **options: partial(command, *args, **options))


def _complain(error: Exception) -> int:
    """Print an error as one line, without what would command a terminal."""
    line = " ".join(str(error).split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR // 2]} ... {line[-LONGEST_ERROR // 3 :]}"
    print(f"cogvideo: {line}", file=sys.stderr)
    return 2
