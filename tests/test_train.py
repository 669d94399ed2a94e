"""The recipe at toy scale: every phase runs, learns, leaves alone what it should, and a killed run goes on as
if uninterrupted."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from functools import partial

import pytest
import torch
from conftest import loosen
from data.goldens import DATA

from cogvideo import CogVideo
from cogvideo.data.loader import Batch
from cogvideo.layout import Layout
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.model.superres import SuperResConfig
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.train import inherit, inputs, loop, losses, objectives, recipes
from cogvideo.train.losses import LossWeights
from cogvideo.train.optim import learning_rate, optimizers
from cogvideo.train.preview import probe
from cogvideo.train.report import Report, draw_curve
from cogvideo.train.run import Options, Run

PHASES = ["tokenizer", "image", "stage1", "stage2", "decoder", "mistakes"]


def nano_phase(name: str, **changes) -> recipes.Phase:
    """A phase of the tiny recipe for the nano model: two clips a step, 16 px, float32."""
    phase = recipes.find("tiny").phase(name)
    sizes = (16,) if len(phase.clips.sizes) == 1 else (16, 32)
    cut = dataclasses.replace(
        phase.clips, sizes=sizes, cover=4 if phase.clips.cover else 0, crop=8 if phase.clips.crop else 0
    )
    defaults = dict(steps=6, batch=2, warmup=1, precision="float32", clips=cut)
    return dataclasses.replace(phase, **{**defaults, **changes})


def run(out, world, *phases, **options) -> ModelFolder:
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=phases)
    return loop.train(
        Run(recipe, out, world, presets.find("nano"), list(phases), Options(quiet=True, **options))
    )


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Fewer captions for the text model, and a codebook filled at once: seconds instead of minutes."""
    before = inherit.CAPTIONS, objectives.UNQUANTISED
    inherit.CAPTIONS, objectives.UNQUANTISED = 1000, 2
    yield
    inherit.CAPTIONS, objectives.UNQUANTISED = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    out = tmp_path_factory.mktemp("run")
    phases = [nano_phase(name) for name in PHASES]
    run(out, world, *phases, log_every=2, save_every=3, probe_every=6, probe=probe)
    return out


def test_all_phases_make_a_model_that_generates(trained):
    clips = CogVideo.from_pretrained(trained / "model")("a dog runs to the right", seed=1, progress=False)
    assert clips[0].frames.shape == (33, 16, 16, 3)
    config = ModelFolder(trained / "model").config
    assert list(config.trained) == PHASES
    assert "dog" in config.words


@pytest.mark.skipif(
    "COGVIDEO_SLOW" not in os.environ, reason="compiles for half a minute; set COGVIDEO_SLOW=1"
)
def test_warnings_of_the_compiler_are_not_shown(tmp_path, world, recwarn):
    """It warns of a cache that it sees through. Warnings of the other kind are errors of the log."""
    run(tmp_path, world, nano_phase("tokenizer"), nano_phase("image"), compile=True)
    assert not [str(warning.message) for warning in recwarn if "Dynamo" in str(warning.message)]
    assert logging.getLogger("torch._dynamo").getEffectiveLevel() == logging.ERROR


def test_every_phase_reports(trained):
    for name in PHASES:
        rows = [json.loads(line) for line in (trained / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(row["clips_per_second"] > 0 and row["lr"] > 0 and row["loss"] > 0 for row in rows)
        assert (trained / name / "loss.png").exists()
        assert (trained / name / "strips" / "0000006.png").exists()


@pytest.mark.parametrize(
    "name, changes",
    [
        ("tokenizer", {}),
        ("image", {}),
        ("image", {"reuse": 3}),
        ("image", {"crop_share": 0.5}),
        ("stage1", {"reuse": 2}),
        ("stage2", {"crop_share": 0.5}),
        ("decoder", {"adversary": 0.1}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, world, name, changes):
    """Also if clips recur whose codes are no longer remembered, and with a discriminator."""
    whole = nano_phase(name, steps=7, **changes)
    results = []
    for stops in ((7,), (3, 5, 7)):
        out = tmp_path / f"{len(stops)}"
        shutil.copytree(trained / "model", out / "model")
        for stop in stops:
            probe_at = Stop(stop) if stop != 7 else None
            with contextlib.suppress(KeyboardInterrupt):
                run(out, world, whole, save_every=1, probe_every=1, probe=probe_at)
        results.append(ModelFolder(out / "model").load(whole.trains[0]).state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_log_that_a_full_disk_cut_off_goes_on(tmp_path):
    whole = Report(tmp_path, "image", 4, 1, every=1, quiet=True)
    for step in range(3):
        whole.step(step, 0.1, {"loss": 1.0 / (step + 1)})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    again = Report(tmp_path, "image", 4, 1, every=1, quiet=True)
    again.forget(2)
    for step in (2, 3):
        again.step(step, 0.1, {"loss": 0.1})
    draw_curve(log, tmp_path / "loss.png")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.1), (4, 0.1)]


class Stop:
    """A probe that kills the run after some steps, as a user would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, folder, parts, phase, batch, out) -> None:
        if int(out.stem) >= self.step:
            raise KeyboardInterrupt


def test_a_window_is_cut_out_of_a_frame():
    maps = torch.arange(2 * 3 * 25).view(2, 3, 25)
    found = inputs.crop_codes(maps, torch.tensor([[1, 2], [3, 0]]), 2).view(2, 3, 2, 2)
    assert torch.equal(found[0], maps.view(2, 3, 5, 5)[0, :, 1:3, 2:4])
    assert torch.equal(found[1], maps.view(2, 3, 5, 5)[1, :, 3:5, 0:2])


def test_a_window_holds_the_object():
    """What fits of it; a clip without one has its window anywhere, and each clip has its own."""
    cover = torch.zeros(4, 2, 6, 6)
    cover[0, 0, 4, 1] = cover[0, 1, 5, 2] = 1.0  # in its two frames
    cover[1, :, 1:6, 2] = 1.0  # too long
    cover[2, :, 0, 5] = 1.0
    corners = []
    for number in range(0, 400, 4):
        batch = Batch([*range(number, number + 4)], [""] * 4, [1.0] * 4, (), cover)
        corners.append(inputs.crop_corners(batch, 3))
        alone = Batch([number + 3], [""], [1.0], (), cover[3:])
        assert torch.equal(inputs.crop_corners(alone, 3)[0], corners[-1][3])
    found = torch.stack(corners, 1)  # [4, 100, 2]
    seen = [{tuple(corner) for corner in rows.tolist()} for rows in found]
    assert seen[0] == {(3, 0), (3, 1)}
    assert seen[1] == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2)}
    assert seen[2] == {(0, 3)}
    assert len(seen[3]) == 16


def test_windows_keep_the_tiles_of_the_temporal_channel():
    """At a multiple of the tile's side a window sees what the whole frame sees there."""
    whole = Layout.interpolation(2, 16, 5, skew=2)
    small = dataclasses.replace(whole, grid=8)
    cover = torch.zeros(1, 5, 16, 16)
    cover[..., 5:9, 7:14] = 1.0
    corners = {
        tuple(inputs.crop_corners(Batch([n], [""], [1.0], (), cover), 8, 4)[0].tolist()) for n in range(50)
    }
    assert corners == {(0, 8), (4, 8)}
    for corner in corners:
        inside = inputs.crop_codes(torch.arange(256).view(1, 1, 256), torch.tensor([corner]), 8)[0, 0]
        places = (torch.arange(5)[:, None] * 256 + inside).flatten()
        for shifted in (False, True):
            sees = whole.sees("temporal", 4, shifted)[places][:, places]
            assert torch.equal(small.sees("temporal", 4, shifted), sees)
        sees = whole.sees("spatial")[places][:, places]
        assert torch.equal(small.sees("spatial"), sees)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_a_share_of_clips_is_learnt_in_windows(share):
    """The same share of any clips that follow each other: each process has as many as the others."""
    for first in (0, 5, 1000):
        assert sum(inputs.is_cropped(first + i, share) for i in range(8)) == 8 * share


def test_a_window_is_read_where_it_was_cut_out(nano):
    """Its codes stand at the places of the frame: the window of all is the frame, and of two windows each has
    the loss that it has alone."""
    base = ModelFolder(nano).load("base").eval()
    model, c = DualChannelTransformer(base), base.config
    layout, generator = c.layout("image"), torch.Generator().manual_seed(3)
    codes = torch.randint(c.codes, (2, 1, c.frame_tokens), generator=generator)
    text = torch.randint(c.codes, c.start, (2, c.text_len), generator=generator)
    loss = partial(losses.token_loss, model)
    whole = loss(layout, text, codes)[0]
    assert torch.allclose(loss(layout, text, codes, corners=torch.zeros(2, 2).long())[0], whole)
    small, corners = dataclasses.replace(layout, grid=2), torch.tensor([[1, 2], [0, 1]])
    cut = inputs.crop_codes(codes, corners, 2)
    both = loss(small, text, cut, corners=corners)[0]
    alone = [loss(small, text[i:][:1], cut[i:][:1], corners=corners[i:][:1])[0] for i in range(2)]
    assert torch.allclose(both, sum(alone) / 2)
    assert not torch.allclose(both, loss(small, text, cut, corners=corners.flip(0))[0])


def test_parts_that_a_phase_does_not_train_stay_as_they_are(trained, tmp_path, world):
    shutil.copytree(trained / "model", tmp_path / "model")
    before = {
        part: (tmp_path / "model" / f"{part}.safetensors").read_bytes()
        for part in ("vqvae", "base", "stage2")
    }
    stage1 = (tmp_path / "model" / "stage1.safetensors").read_bytes()
    run(tmp_path, world, nano_phase("stage1", steps=2, lr=1e-2))
    for part, data in before.items():
        assert (tmp_path / "model" / f"{part}.safetensors").read_bytes() == data
    assert (tmp_path / "model" / "stage1.safetensors").read_bytes() != stage1


@pytest.mark.parametrize("name", ["image", "stage1", "stage2"])
def test_a_few_clips_can_be_learnt_by_heart(trained, world, name):
    """The loss of one batch, seen again and again, falls far: gradients reach what the phase trains."""
    folder, phase = ModelFolder(trained / "model"), nano_phase(name, lr=1e-2, optimizer="adamw")
    parts = {part: folder.load(part) for part in ("vqvae", "base", "stage1", "stage2")}
    for part in phase.trains:
        parts[part].requires_grad_(True)
    model = torch.nn.ModuleDict({part: parts[part] for part in phase.trains})
    (optimizer,) = optimizers(model, "adamw", 0.0, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = phase.lr
    step = phase.objective.build_loss(parts, folder.text(), phase)
    batch = next(loop.batches(world, phase.clips, 2, seed=0))
    curve = []
    for number in range(80):
        loss, _ = step(batch, number)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        curve.append(float(loss.detach()))
    assert curve[-1] < curve[0] - 0.3  # nats a token; embeddings and head of a frozen base stay random


def test_a_share_of_captions_is_dropped_and_keeps_its_duration(trained, world):
    text = ModelFolder(trained / "model").text()
    batch = next(loop.batches(world, nano_phase("image").clips, 200, seed=0, drop=0.25))
    rows = inputs.prepare_text(text, batch, 64).tolist()
    plain = [text.pad_left(text.prompt("", seconds), 64) for seconds in batch.durations]
    share = sum(row == empty for row, empty in zip(rows, plain)) / 200
    assert 0.15 < share < 0.35


def test_a_preview_needs_no_caption(trained, tmp_path, world):
    """Where all were dropped, it shows what the model generates without one."""
    shutil.copytree(trained / "model", tmp_path / "model")
    run(tmp_path, world, nano_phase("stage1", steps=1, drop=1.0), probe=probe)
    assert (tmp_path / "stage1" / "strips" / "0000001.png").exists()


def test_the_learning_rate_of_the_released_models():
    golden = json.loads((DATA / "lr_schedule.json").read_text())["lr"]
    rates = {i: learning_rate(int(i) - 1, 500_000, 2e-4, 500, 0.0, "cosine") for i in golden}
    assert rates == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("schedule", "linear", "one of trapezoid, cosine"),
        ("precision", "half", "one of auto, float32, bfloat16"),
        ("batch", 0, "image.batch must be from 1 to"),
        ("lr", float("nan"), "image.lr must be from 0 to"),
        ("reuse", 0, "image.reuse must be from 1 to"),
        ("drop", 1.5, "image.drop is a share and must be 1 or less"),
        ("decay", 7, "image.decay is a share"),
    ],
)
def test_what_a_phase_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        nano_phase("image", **{field: value})


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"perceptual": float("nan")}, "loss.perceptual must be from 0 to 1000000000; got nan"),
        ({"pixel": -1.0}, "loss.pixel must be from 0 to"),
        ({"pixel": 0, "perceptual": 0, "temporal": 0}, "one of loss.pixel, loss.perceptual"),
    ],
)
def test_what_a_loss_cannot_be_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**weights)


def test_what_a_phase_cannot_do_is_known_before_the_first(tmp_path, world, monkeypatch):
    recipe = recipes.find("tiny")
    short = dataclasses.replace(recipe.phase("tokenizer"), steps=objectives.UNQUANTISED)
    with pytest.raises(ValueError, match="tokenizer: there are no codes before step"):
        loop.train(Run(recipe, tmp_path, world, presets.find("tiny"), [short]))
    again = dataclasses.replace(recipe.phase("tokenizer"), reuse=2)
    with pytest.raises(ValueError, match="tokenizer.reuse must be 1"):
        loop.train(Run(recipe, tmp_path, world, presets.find("tiny"), [again]))
    with pytest.raises(ValueError, match="cannot be shared by 3"):
        loop.train(
            Run(recipe, tmp_path, world, presets.find("tiny"), [recipe.phase("image")], Options(processes=3))
        )
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="'muon' needs torch 2.9 or later"):
        loop.train(Run(recipe, tmp_path, world, presets.find("tiny"), list(recipe.phases)))
    assert not list(tmp_path.iterdir())


def test_a_part_is_the_same_for_the_same_seed():
    for preset, name in (("nano", "refiner"), ("direct-nano", "regression")):
        one, two, other = (
            inherit.new_part(presets.find(preset), name, seed).state_dict() for seed in (1, 1, 2)
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)


# -- what a run begins with


def every_part() -> list:
    """(spec, part) for each kind of part of both families."""
    nano, direct = presets.find("nano"), presets.find("direct-nano")
    large = SuperResConfig(grid=4, scale=2, text_len=64, pad=nano.model.pad, window=(3, 3), cross=(3, 3))
    tokenizer = dataclasses.replace(nano.vqvae, resolution=32, rates=(4, 8), rate=8)
    absolute = dataclasses.replace(nano.model, rotary=False)
    spec = dataclasses.replace(
        nano,
        model=absolute,
        superres=large,
        bases=("superres_base", "itersr_base"),
        itersr=dataclasses.replace(large, cross=None),
    )
    rows = [(one, name) for one in (nano, spec, direct) for name in one.parts]
    return [*rows, (dataclasses.replace(nano, vqvae=tokenizer), "vqvae")]


@pytest.mark.parametrize("spec, name", every_part(), ids=lambda value: str(value)[:12])
def test_a_part_takes_all_of_one_of_its_sizes(spec, name):
    mine, theirs = (inherit.new_part(spec, name, seed) for seed in (1, 2))
    loosen(theirs, torch.Generator().manual_seed(3))
    told = inherit.take(mine, theirs)
    taken, given = mine.state_dict(), theirs.state_dict()
    assert all(torch.equal(taken[key], given[key]) for key in given)
    assert (
        told
        == f"{len(given) - (name == 'regression')} of {len(taken) - (name == 'regression')} tensors taken; "
        "nothing is new"
    )


@pytest.mark.parametrize(
    "part, changes, new",
    [
        ("stage1", {"frames": 7}, ["positions.weight"]),
        ("base", {"vocab": 600}, ["embed.weight but for 564 of 600 rows"]),
        ("base", {"codes": 32}, ["embed.weight but for 0 of 564 rows"]),
        ("vqvae", {"codes": 32}, [f"codebook.{name}" for name in ("vectors", "uses", "sums", "filled")]),
    ],
)
def test_a_part_of_another_size_takes_what_fits(part, changes, new):
    nano, field = presets.find("nano"), "vqvae" if part == "vqvae" else "model"
    other = dataclasses.replace(nano, **{field: dataclasses.replace(getattr(nano, field), **changes)})
    mine, theirs = inherit.new_part(other, part, 1), inherit.new_part(nano, part, 2)
    if part == "vqvae":
        theirs.codebook.filled.fill_(True)
    before, given = {key: value.clone() for key, value in mine.state_dict().items()}, theirs.state_dict()
    told = inherit.take(mine, theirs)
    assert told.endswith(f"; new: {', '.join(new)}")
    for key, value in mine.state_dict().items():
        if key not in (one.split()[0] for one in new):
            assert torch.equal(value, given[key]), key
        elif "but for" not in told:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "spec, name, tables",
    [
        ("nano", "base", {"embed.weight": 64}),
        ("nano", "decoder", {"words.weight": 0}),
        ("direct-nano", "regression", {"embed.weight": 2}),
    ],
)
def test_of_other_words_no_embedding_is_taken(spec, name, tables):
    """But those of image codes, and of frame rates."""
    mine, theirs = (inherit.new_part(presets.find(spec), name, seed) for seed in (1, 2))
    inherit.take(mine, theirs, same_words=False)
    for key, value in mine.state_dict().items():
        equal = (value == theirs.state_dict()[key]).flatten(1).all(1) if key in tables else None
        assert torch.equal(value, theirs.state_dict()[key]) if equal is None else equal.sum() == tables[key]


def test_a_run_begins_with_another_model(nano, tmp_path, world, capsys):
    """All parts and words of a model of the same sizes: the line of the README that once failed."""
    folder = run(tmp_path, world, nano_phase("stage1", steps=1, lr=0.0), init=ModelFolder(nano))
    told = capsys.readouterr().out
    for part in folder.spec().parts:
        assert f"{part} from {nano}: " in told
        mine, theirs = (one.load(part).state_dict() for one in (folder, ModelFolder(nano)))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), part
    assert folder.text().model == ModelFolder(nano).text().model and "words: the same" in told
    clips = CogVideo.from_pretrained(folder.path)("a dog", num_frames=9, seed=1, progress=False)
    same = CogVideo.from_pretrained(nano)("a dog", num_frames=9, seed=1, progress=False)
    assert (clips[0].frames == same[0].frames).all()


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=0.3) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2.0 / 30)


def test_muon_takes_hidden_matrices_only():
    base = presets.find("nano").build("base")
    adamw, muon = optimizers(base, "muon", 0.1, (0.9, 0.95))
    taken = [p for group in muon.param_groups for p in group["params"]]
    assert taken and all(p.ndim == 2 for p in taken)
    assert not any(p is base.embed.weight or p is base.positions.weight for p in taken)
    count = len(taken) + sum(len(group["params"]) for group in adamw.param_groups)
    assert count == len(list(base.parameters()))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of tiny"):
        recipes.find("huge")
    with pytest.raises(ValueError, match="tokenizer, image, stage1, stage2, decoder"):
        recipes.find("tiny").phase("stage3")
    with pytest.raises(ValueError, match="choose one of adamw, muon"):
        optimizers(torch.nn.Linear(2, 2), "sgd", 0.0, (0.9, 0.95))
