"""Several processes take the same steps as one: real processes on one machine, two clips a step."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

from cogvideo.data.loader import batches
from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import Codebook
from cogvideo.train import footprint, inherit, inputs, loop, mesh, objectives, parallel, peers, recipes
from cogvideo.train.checkpoint import Checkpoint
from cogvideo.train.mesh import MeshShape
from cogvideo.train.run import Options, Run

STEPS = 6
WHOLE = None
SHARDS = MeshShape(shard=2)
SLICES = MeshShape(tensor=2)


def together(ranks: int, work, *arguments) -> None:
    """Call `work(*arguments)` in `ranks` processes that know of each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["cogvideo.train.loop", "cogvideo.data.tinyworld"])
    mp.start_processes(_join, (ranks, port, work, arguments), ranks, start_method="forkserver")


def _join(rank: int, ranks: int, port: int, work, arguments: tuple) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    work(*arguments)
    os._exit(0)  # gloo's threads outlive their group, and may abort a Python that is shutting down


def nano_phase(name: str, recipe: str = "tiny", **changes) -> recipes.Phase:
    phase = recipes.find(recipe).phase(name)
    cut = dataclasses.replace(phase.clips, sizes=(16,), cover=4 if phase.clips.cover else 0)
    if name == "tokenizer":
        cut = dataclasses.replace(cut, frames=3)  # more vectors than codes, so that no two codes are the same
    plain = dict(steps=STEPS, batch=2, warmup=1, optimizer="adamw", precision="float32", lr=1e-3, clips=cut)
    return dataclasses.replace(phase, **{**plain, **changes})


def run(out: Path, phase: recipes.Phase, preset: str = "nano", **options) -> None:
    inherit.CAPTIONS = 500
    objectives.UNQUANTISED = 2  # the tokenizer's codebook is filled after two steps
    recipe = dataclasses.replace(recipes.find("tiny"), preset=preset, phases=(phase,))
    world = Noise() if phase.name == "tokenizer" else TinyWorld(sprites(8), seed=1)
    options = {"save_every": 3, "probe_every": 3, "probe": check_parts, "quiet": True, **options}
    loop.train(Run(recipe, out, world, presets.find(preset), [phase], Options(**options)))


@dataclasses.dataclass
class Noise:
    """Recordings in which no two patches are alike: rounding never decides which code is nearest."""

    count: int | None = None
    seconds: float = 4.0
    fps: float = 8.0
    index: int = 0
    skipped: ClassVar[dict] = {}

    def __getitem__(self, index: int) -> "Noise":
        return Noise(index=index)

    def caption(self, rng: np.random.Generator) -> str:
        return "noise"

    def frames(self, times, size: int) -> np.ndarray:
        return np.random.default_rng(self.index).integers(0, 256, (len(times), size, size, 3), dtype=np.uint8)


def run_until(step: int, out: Path, phase: recipes.Phase, **options) -> None:
    """A run that is killed after it has saved a step."""
    save = Checkpoint.save

    def save_and_end(checkpoint: Checkpoint, at: int) -> None:
        save(checkpoint, at)
        if at == step:
            checkpoint.close()
            checkpoint.distributed.wait()
            os._exit(0)

    Checkpoint.save = save_and_end
    run(out, phase, **options)


def check_parts(folder, parts, phase, batch, out: Path) -> None:
    """A probe that finds parts that work by themselves."""
    assert not any(isinstance(p, DTensor) for part in parts.values() for p in part.parameters())
    codes = inputs.encode_clips(parts["vqvae"], batch.frames[0])
    assert codes.shape[:2] == batch.frames[0].shape[:2]


def begin(out: Path, nano: Path) -> Path:
    shutil.copytree(nano, out / "model")
    config = ModelFolder(out / "model").config
    ModelFolder(out / "model").write_config(dataclasses.replace(config, trained={}))
    return out


def trained(model: Path, phase: recipes.Phase) -> torch.Tensor:
    """All numbers of the part that a phase trains. Not counted are the biases of keys: they shift all
    scores of a query alike, so their gradient is rounding alone, which Adam brings to full size."""
    state = ModelFolder(model).load(phase.trains[0]).state_dict()
    for key in state:
        if key.endswith(("qkv.bias", "in_proj_bias")):
            state[key].unflatten(0, (3, -1))[1].zero_()
    return torch.cat([value.float().flatten() for value in state.values()])


def difference(a: Path, b: Path, phase: recipes.Phase) -> float:
    """Of all weights, relative to their size.

    Not the largest of any weight: Adam brings a gradient to full size that is all but rounding, and rounding
    depends on the processor. Runs on other clips differ by 1e-2.
    """
    one, other = trained(a / "model", phase), trained(b / "model", phase)
    return float((one - other).norm() / one.norm())


@pytest.fixture(autouse=True)
def _quick():
    before = objectives.UNQUANTISED
    yield
    objectives.UNQUANTISED = before


@pytest.mark.parametrize(
    "name, shard",
    [
        ("tokenizer", False),
        ("tokenizer", True),
        ("image", False),
        ("image", True),
        ("stage1", False),
        ("stage1", True),
    ],
)
def test_two_processes_take_the_steps_of_one(nano, tmp_path, name, shard):
    """With whole weights and with shards; also with captions left out, and with a codebook that is filled
    and follows."""
    phase = nano_phase(name, drop=0.5)
    one, two = begin(tmp_path / "1", nano), begin(tmp_path / "2", nano)
    for out in (one, two):  # begin with new weights
        ModelFolder(out / "model").file(phase.trains[0]).unlink()
    run(one, phase)
    together(2, partial(run, shard=shard), two, phase)
    assert difference(one, two, phase) < 1e-5
    logs = [json.loads((out / name / "log.jsonl").read_text()) for out in (one, two)]
    assert logs[0].keys() == logs[1].keys() and logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)


def test_processes_may_have_windows_and_whole_frames_in_other_shares(nano, tmp_path):
    """The first of two processes has a whole frame and a window, the second has two windows."""
    phase = nano_phase("image", batch=4)
    one, two = begin(tmp_path / "1", nano), begin(tmp_path / "2", nano)
    run(one, phase)
    together(2, run, two, phase)
    logs = [json.loads((out / "image" / "log.jsonl").read_text()) for out in (one, two)]
    assert logs[0].keys() == logs[1].keys() >= {"crops", "frame0"}
    assert logs[0]["frame0"] == pytest.approx(logs[1]["frame0"], abs=1e-5)
    with pytest.raises(ValueError, match="choose another --image.batch"):
        mesh.local_batch(phase, 2, equally=True)
    assert mesh.local_batch(nano_phase("image", batch=8), 2, equally=True) == 4


@pytest.mark.parametrize("mesh", [None, SHARDS])
def test_clips_may_come_one_share_after_another(nano, tmp_path, mesh):
    phase = nano_phase("image", drop=0.5, batch=4, crop_share=0.0)
    one, parts = begin(tmp_path / "1", nano), begin(tmp_path / "parts", nano)
    run(one, phase, log_every=1)
    together(2, partial(run, mesh=mesh, accumulate=2, log_every=1), parts, phase)
    assert difference(one, parts, phase) < 1e-5
    logs = [[json.loads(line) for line in (out / "image" / "log.jsonl").open()] for out in (one, parts)]
    for row, other in zip(*logs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    with pytest.raises(ValueError, match="--accumulate must be 1 for tokenizer"):
        run(tmp_path / "tokenizer", nano_phase("tokenizer", steps=300), accumulate=2)


def test_a_mesh_that_does_not_fit_is_refused(nano, tmp_path):
    for text in ("", "8", "2x", "0x2", "1x1x1x1", "2X2", "-1x2", "a"):
        with pytest.raises(ValueError, match="--mesh must be DATAxSHARDxTENSOR"):
            MeshShape.parse(text)
    assert MeshShape.parse("4x8") == MeshShape(1, 4, 8) and str(MeshShape(2, 4, 8)) == "2x4x8"
    with pytest.raises(ValueError, match="2x1x2 is 4 processes; --processes says 2"):
        Options(mesh=MeshShape(2, 1, 2), processes=2)
    phase = nano_phase("image")
    with pytest.raises(ValueError, match="is 3 processes, and there are 1"):
        run(tmp_path / "run", phase, mesh=MeshShape(tensor=3))
    with pytest.raises(ValueError, match="heads cannot be shared by 3 slices"):
        run(begin(tmp_path / "3", nano), nano_phase("image", batch=3), mesh=MeshShape(tensor=3), processes=3)
    with pytest.raises(ValueError, match="choose --image.optimizer adamw"):
        run(tmp_path / "run", nano_phase("image", optimizer="muon"), mesh=SLICES, processes=2)


def test_a_run_starts_its_processes_itself(nano, tmp_path):
    """Clips that recur, too: each process meets its own again."""
    phase = nano_phase("image", drop=0.5, reuse=2)
    one, two, half = (begin(tmp_path / name, nano) for name in ("1", "2", "half"))
    run(one, phase, probe=None)
    run(two, phase, probe=None, processes=2)
    run(half, dataclasses.replace(phase, batch=1), probe=None)
    assert difference(one, two, phase) < 1e-5
    assert difference(one, half, phase) > 1e-3  # what a process that is not listened to would leave
    assert not torch.distributed.is_initialized()


PARENT = """
import sys, time
from cogvideo.train.peers import launch

def work(member):
    print(__import__("os").getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with launch(2, work):
        time.sleep(600)
"""


def test_processes_end_with_the_first(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} outlived the one that started it")


def test_memory_decides_on_shards(monkeypatch):
    spec, phase = presets.find("nano"), nano_phase("image", optimizer="muon")
    two = Run(recipes.find("tiny"), Path("run"), Noise(), spec, [phase], Options(processes=2))
    whole = 12 * sum(shape.numel() for shape in spec.shapes("base").values())
    for free, shard in ((2.1 * whole, False), (1.9 * whole, True)):
        monkeypatch.setattr("cogvideo.train.run.free_memory", lambda device, free=free: free)
        assert two.with_shards().options.shard is shard
    monkeypatch.setattr("cogvideo.train.run.free_memory", lambda device: 0.9 * whole)
    with pytest.raises(ValueError, match="image needs"):
        two.with_shards()


def test_two_processes_take_the_steps_of_one_in_the_regression_family(nano, tmp_path):
    phase = nano_phase("low", "direct-tiny", steps=3)
    one, two = tmp_path / "1", tmp_path / "2"
    for out in (one, two):
        (out / "model").mkdir(parents=True)
        shutil.copy(nano / "text.model", out / "model")
    run(one, phase, "direct-nano", probe=None)
    together(2, partial(run, probe=None), two, phase, "direct-nano")
    assert difference(one, two, phase) < 1e-5


@pytest.mark.parametrize("shard", [False, True])
def test_muon_goes_the_same_way_with_two_processes(nano, tmp_path, shard):
    """It rounds to bfloat16, which makes much of little: a share of the way is what may differ, 0.3 to 0.6 %.
    Of shards, not of whole matrices, it is 1.5 % or more."""
    phase = nano_phase("image", optimizer="muon")
    start = trained(nano, phase)
    one, two = begin(tmp_path / "1", nano), begin(tmp_path / "2", nano)
    run(one, phase)
    together(2, partial(run, shard=shard), two, phase)
    way = trained(one / "model", phase) - start
    apart = trained(one / "model", phase) - trained(two / "model", phase)
    share = float(apart.norm() / way.norm())
    assert way.norm() > 0.1 and share < 0.01


@pytest.mark.parametrize(
    "first, second, optimizer, tolerance",
    [
        ((1, WHOLE), (2, WHOLE), "adamw", 1e-5),
        ((1, WHOLE), (2, SLICES), "adamw", 1e-5),
        ((2, SHARDS), (1, WHOLE), "adamw", 1e-5),
        ((2, WHOLE), (2, WHOLE), "muon", 0),
        ((2, SHARDS), (2, SHARDS), "muon", 0),
        ((4, MeshShape(2, 1, 2)), (2, SHARDS), "adamw", 1e-5),
        ((2, SHARDS), (4, MeshShape(1, 2, 2)), "adamw", 1e-5),
    ],
)
def test_a_run_goes_on_in_any_mesh(nano, tmp_path, first, second, optimizer, tolerance):
    """Killed after half of its steps, resumed by other processes, it ends at the same model folder."""
    phase = nano_phase("stage1", optimizer=optimizer)
    whole, changed = begin(tmp_path / "whole", nano), begin(tmp_path / "changed", nano)
    together(first[0], partial(run, mesh=first[1]), whole, phase)
    together(first[0], partial(run_until, mesh=first[1]), 3, changed, phase)
    assert ModelFolder(changed / "model").config.trained == {}
    together(second[0], partial(run, mesh=second[1]), changed, phase)
    assert difference(whole, changed, phase) <= tolerance
    left = {path.name for path in (changed / "stage1").iterdir()}
    assert left & {"state.pt", "shards"} == {"state.pt" if second[1] is None else "shards"}


@pytest.mark.parametrize(
    "name, shape",
    [
        ("image", "1x2x2"),
        ("stage1", "1x2x2"),
        ("stage1", "2x1x2"),
        ("stage1", "2x2x1"),
    ],
)
def test_every_mesh_takes_the_steps_of_one_process(nano, tmp_path, name, shape):
    mesh = MeshShape.parse(shape)
    phase = nano_phase(name, drop=0.5, batch=4, crop_share=0.0)
    one, many = begin(tmp_path / "1", nano), begin(tmp_path / "many", nano)
    for out in (one, many):  # begin with new weights
        ModelFolder(out / "model").file(phase.trains[0]).unlink()
    run(one, phase, log_every=1)
    together(mesh.ranks, partial(run, mesh=mesh, log_every=1), many, phase)
    assert difference(one, many, phase) < 1e-5
    logs = [[json.loads(line) for line in (out / name / "log.jsonl").open()] for out in (one, many)]
    for row, other in zip(*logs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["norm"] == pytest.approx(other["norm"], rel=1e-4)


ELASTIC = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_parallel import Checkpoint, MeshShape, nano_phase, run

save = Checkpoint.save

def save_and_die(checkpoint, step):
    save(checkpoint, step)
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        checkpoint.close()
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save = save_and_die
with open({out!r} + "/attempts", "a") as attempts:
    attempts.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
run(Path({out!r}), nano_phase("stage1"), mesh=MeshShape(shard=2))
sys.stdout.flush()
os._exit(0)
"""


def test_torchrun_starts_a_killed_process_again(nano, tmp_path):
    phase = nano_phase("stage1")
    whole, killed = begin(tmp_path / "whole", nano), begin(tmp_path / "killed", nano)
    together(2, partial(run, mesh=SHARDS), whole, phase)
    script = tmp_path / "train.py"
    script.write_text(ELASTIC.format(tests=str(Path(__file__).parent), out=str(killed)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted((killed / "attempts").read_text()) == ["0", "0", "1", "1"]
    assert difference(whole, killed, phase) == 0


def test_a_mesh_is_laid_out_without_memory():
    """Bytes of a process, by arithmetic where it is simple: everything in shards, no slices."""
    spec, phase = presets.find("nano"), nano_phase("stage1")
    count = {part: sum(shape.numel() for shape in spec.shapes(part).values()) for part in ("base", "stage1")}
    alone = footprint.lay_out(spec, phase, MeshShape())
    assert alone.gradients == 4 * count["stage1"] and alone.optimizer == 8 * count["stage1"]
    assert alone.gathered == 0
    two = footprint.lay_out(spec, phase, MeshShape(shard=2))
    assert two.gradients == pytest.approx(alone.gradients / 2, rel=0.01)
    assert two.weights == pytest.approx(alone.weights / 2, rel=0.01)
    assert 0 < two.gathered < alone.weights
    slices = footprint.lay_out(spec, phase, MeshShape(tensor=2))
    assert alone.weights / 2 < slices.weights < alone.weights
    with pytest.raises(ValueError, match="choose --image.optimizer adamw"):
        footprint.lay_out(spec, nano_phase("image", optimizer="muon"), MeshShape(tensor=2))


def test_the_original_fits_into_64_devices():
    recipe = recipes.find("cogvideo-9b")
    spec = presets.find(recipe.preset)
    for phase in recipe.phases:
        phase.check(spec)
        row = footprint.lay_out(spec, phase, MeshShape.parse("8x8"))
        assert row.total < 4e9


def test_shards_have_the_gradients_of_whole_parts(nano):
    together(2, _compare_gradients, nano)


def _compare_gradients(nano: Path) -> None:
    """Of stage 1 with all parts learning; with and without recomputing; each process holds half."""
    folder, phase = ModelFolder(nano), nano_phase("stage1")
    distributed = peers.start("cpu", shape=SHARDS)
    batch = next(batches(TinyWorld(sprites(8), seed=1), phase.clips, 1, seed=0))
    found = []
    for one in (
        peers.Distributed(distributed.device),
        distributed,
        dataclasses.replace(distributed, recompute=True),
    ):
        parts = {name: folder.load(name) for name in ("vqvae", "base", "stage1")}
        for name in ("base", "stage1"):
            parts[name].requires_grad_(True).train()
        model = parallel.TrainStep(parts, partial(phase.objective.build_loss, parts, folder.text(), phase))
        parallel.to_devices(model, one, "float32")
        for _ in range(2):  # the second time everything is in shards again
            model.zero_grad()
            loss, _ = model(batch, 0)
            loss.backward()
        if one.mesh is not None:
            weight = parts["base"].blocks[0].up.weight
            assert isinstance(weight, DTensor) and weight.to_local().shape[0] == weight.shape[0] // 2
            assert all(isinstance(p, DTensor) for p in model.parameters())
        gradients: dict[str, list] = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                name = re.sub(r"_checkpoint_wrapped_module\.|(?<=qkv\.)[qkv]\.", "", name)
                gradients.setdefault(name, []).append(parallel.whole(p.grad))
        found.append({name: torch.cat(values) for name, values in gradients.items()})
    plain, sharded, recomputed = found
    assert plain.keys() == sharded.keys(), plain.keys() ^ sharded.keys()
    assert len(plain) > 40
    for key in plain:
        assert torch.allclose(plain[key], sharded[key], atol=1e-6), key
        assert torch.equal(sharded[key], recomputed[key]), key
    peers.stop(distributed)


def test_processes_share_one_codebook():
    together(2, _compare_codebooks)


def _compare_codebooks() -> None:
    """Filled, followed and revived by the vectors of all processes as by those of one that sees them all."""
    distributed = peers.start("cpu")
    alone, shared = Codebook(16, 2, decay=0.5, dead=0.2), Codebook(16, 2, decay=0.5, dead=0.2)
    step = parallel.TrainStep({"book": nn.ModuleList([nn.Linear(2, 2), shared])}, lambda: None)
    parallel.to_devices(step, distributed, "float32")
    revived = 0
    for number in range(8):
        z = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(number))  # [ranks, M, C]
        mine, generators = z[distributed.rank], [torch.Generator().manual_seed(number) for _ in range(2)]
        if distributed.rank:
            generators[1].manual_seed(99)  # of no consequence
        if number == 0:
            alone.init_codes(z.flatten(0, 1), generators[0])
            shared.init_codes(mine, generators[1])
        before = alone.uses.lerp(torch.bincount(alone.nearest(z.flatten(0, 1)), minlength=16).float(), 0.5)
        revived += int((before < 0.2).sum())
        alone.update(z.flatten(0, 1), alone.nearest(z.flatten(0, 1)), generators[0])
        shared.update(mine, shared.nearest(mine), generators[1])
        for key, value in alone.state_dict().items():
            assert torch.equal(value, shared.state_dict()[key]), key
    assert revived > 0 and bool(shared.filled)
    peers.stop(distributed)


@pytest.mark.parametrize("name", ["image", "stage1"])
def test_recomputing_changes_no_bit(nano, tmp_path, name):
    phase = nano_phase(name, steps=3)
    kept, recomputed = begin(tmp_path / "kept", nano), begin(tmp_path / "recomputed", nano)
    run(kept, phase)
    run(recomputed, phase, recompute=True)
    assert difference(kept, recomputed, phase) == 0


def test_recomputing_keeps_fewer_activations(nano):
    folder, phase = ModelFolder(nano), nano_phase("stage1")
    batch, kept = next(batches(TinyWorld(sprites(8), seed=1), phase.clips, 2, seed=0)), []
    for recompute in (False, True):
        parts = {name: folder.load(name) for name in ("vqvae", "base", "stage1")}
        parts["stage1"].requires_grad_(True)
        model = parallel.TrainStep(parts, partial(phase.objective.build_loss, parts, folder.text(), phase))
        parallel.to_devices(model, peers.Distributed(torch.device("cpu"), recompute=recompute), "float32")
        sizes: dict[int, int] = {}

        def note(t: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(batch, 0)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.95 * kept[0]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a multiple of 3 for --image.batch"):
        mesh.local_batch(nano_phase("image"), 3)
    assert mesh.local_batch(nano_phase("image", batch=12), 3) == 4


def test_a_checkpoint_without_shards_is_a_plain_file(tmp_path):
    """Also one that a version before 0.2 wrote, with numbered parameters."""
    part, distributed = nn.Linear(3, 2), peers.Distributed(torch.device("cpu"))
    optimizer = torch.optim.AdamW(part.parameters())
    part(torch.ones(3)).sum().backward()
    optimizer.step()
    Checkpoint(tmp_path, {"part": part}, [optimizer], distributed).save(5)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(t) is torch.Tensor for t in saved["tensors"].values())
    before = {"step": 5, "parts": {"part": part.state_dict()}, "optimizers": [optimizer.state_dict()]}
    (tmp_path / "before").mkdir()
    torch.save(before, tmp_path / "before" / "state.pt")
    for folder in (tmp_path, tmp_path / "before"):
        fresh = nn.Linear(3, 2)
        other = torch.optim.AdamW(fresh.parameters())
        assert Checkpoint(folder, {"part": fresh}, [other], distributed).resume() == 5
        assert torch.equal(fresh.weight, part.weight)
        for key, value in optimizer.state[part.weight].items():
            assert torch.equal(other.state[fresh.weight][key], value)
