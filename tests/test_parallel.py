"""Several processes take the same steps as one: real processes on one machine, two clips a step."""

import dataclasses
import json
import os
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
from cogvideo.train import checkpoint, inputs, loop, objectives, parallel, recipes
from cogvideo.train.run import Options, Run

STEPS = 6


def together(ranks: int, work, *arguments) -> None:
    """Call `work(*arguments)` in `ranks` processes that know of each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_join, (ranks, port, work, arguments), ranks)


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
    objectives.UNQUANTISED = 2  # the tokenizer's codebook is filled after two steps
    recipe = dataclasses.replace(recipes.find("tiny"), preset=preset, phases=(phase,))
    world = Noise() if phase.name == "tokenizer" else TinyWorld(sprites(8), seed=1)
    options = {"save_every": 3, "probe_every": 3, "probe": keep_state, "quiet": True, **options}
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


def keep_state(folder, parts, phase, batch, out: Path) -> None:
    """A probe that keeps the checkpoint of its step, and finds parts that work by themselves."""
    assert not any(isinstance(p, DTensor) for part in parts.values() for p in part.parameters())
    codes = inputs.encode_clips(parts["vqvae"], batch.frames[0])
    assert codes.shape[:2] == batch.frames[0].shape[:2]
    shutil.copy(out.parent.parent / "state.pt", out.parent / f"{out.stem}.pt")


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
        parallel.share(phase, 2, shard=True)
    assert parallel.share(nano_phase("image", batch=8), 2, shard=True) == 4


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
from cogvideo.train.parallel import launch

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
    phase = nano_phase("low", "direct-tiny")
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
    "first, second, optimizer, shard, tolerance",
    [
        (1, 2, "adamw", False, 1e-5),
        (2, 1, "adamw", True, 1e-5),
        (2, 2, "muon", False, 0),
        (2, 2, "muon", True, 0),
    ],
)
def test_a_run_goes_on_with_any_number_of_processes(
    nano, tmp_path, first, second, optimizer, shard, tolerance
):
    phase = nano_phase("stage1", optimizer=optimizer)
    whole, changed = begin(tmp_path / "whole", nano), begin(tmp_path / "changed", nano)
    for ranks, out in ((first, whole), (second, changed)):
        if out is changed:
            (changed / "stage1").mkdir()
            shutil.copy(whole / "stage1" / "strips" / "0000003.pt", changed / "stage1" / "state.pt")
        run(out, phase) if ranks == 1 else together(ranks, partial(run, shard=shard), out, phase)
    assert difference(whole, changed, phase) <= tolerance
    assert not (changed / "stage1" / "strips" / "0000003.png").exists()


def test_shards_have_the_gradients_of_whole_parts(nano):
    together(2, _compare_gradients, nano)


def _compare_gradients(nano: Path) -> None:
    """Of stage 1 with all parts learning; with and without recomputing; each process holds half."""
    folder, phase = ModelFolder(nano), nano_phase("stage1")
    distributed = parallel.start("cpu", shard=True)
    batch = next(batches(TinyWorld(sprites(8), seed=1), phase.clips, 1, seed=0))
    found = []
    for one in (
        parallel.Distributed(distributed.device),
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
        gradients = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name.replace("_checkpoint_wrapped_module.", "")] = parallel.whole(p.grad)
        found.append(gradients)
    plain, sharded, recomputed = found
    assert plain.keys() == sharded.keys(), plain.keys() ^ sharded.keys()
    assert len(plain) > 40
    for key in plain:
        assert torch.allclose(plain[key], sharded[key], atol=1e-6), key
        assert torch.equal(sharded[key], recomputed[key]), key
    parallel.stop(distributed)


def test_processes_share_one_codebook():
    together(2, _compare_codebooks)


def _compare_codebooks() -> None:
    """Filled, followed and revived by the vectors of all processes as by those of one that sees them all."""
    distributed = parallel.start("cpu")
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
    parallel.stop(distributed)


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
        parallel.to_devices(model, parallel.Distributed(torch.device("cpu"), recompute=recompute), "float32")
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
        parallel.share(nano_phase("image"), 3)
    assert parallel.share(nano_phase("image", batch=12), 3) == 4


def test_a_checkpoint_without_shards_is_a_plain_file(tmp_path):
    """What a single process wrote before there were several still resumes."""
    part, distributed = nn.Linear(3, 2), parallel.Distributed(torch.device("cpu"))
    optimizer = torch.optim.AdamW(part.parameters())
    part(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "state.pt", 5, {"part": part}, [optimizer], distributed)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(t) is torch.Tensor for t in saved["parts"]["part"].values())
    fresh = nn.Linear(3, 2)
    other = torch.optim.AdamW(fresh.parameters())
    assert checkpoint.resume(tmp_path / "state.pt", {"part": fresh}, [other], distributed) == 5
    assert torch.equal(fresh.weight, part.weight)
    assert torch.equal(other.state[fresh.weight]["exp_avg"], optimizer.state[part.weight]["exp_avg"])
