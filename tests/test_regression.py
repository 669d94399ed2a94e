"""The regression family: what its model is, how it is trained from phase to phase, what it inherits, and its
face."""

import contextlib
import dataclasses
import json
import shutil
import sys
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from cogvideo import CogVideo, cli
from cogvideo.data.cut import ClipSpec
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import TinyWorld
from cogvideo.model import presets
from cogvideo.model.folder import FolderConfig, ModelFolder
from cogvideo.model.regression import RegressionConfig, RegressionTransformer
from cogvideo.text import GPT2Tokenizer, train_text
from cogvideo.train import inherit, loop, recipes
from cogvideo.train.losses import LossWeights
from cogvideo.train.preview import probe
from cogvideo.train.run import Options, Run
from cogvideo.video import Clip

NANO = presets.find("direct-nano")
TEXT = torch.tensor([[3, 3, 3, 20, 30, 40], [3, 50, 60, 70, 80, 90]])


@pytest.fixture
def model() -> RegressionTransformer:
    part = inherit.new_part(NANO, "regression", 1)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return part.eval()


def nano_phase(name: str, **changes) -> recipes.Phase:
    phase = recipes.find("direct-tiny").phase(name)
    sizes = (16,) if len(phase.clips.sizes) == 1 else (16, 32)
    defaults = dict(
        steps=4, batch=2, warmup=1, precision="float32", clips=dataclasses.replace(phase.clips, sizes=sizes)
    )
    return dataclasses.replace(phase, **{**defaults, **changes})


def run(out, world, *phases, **options) -> ModelFolder:
    recipe = dataclasses.replace(recipes.find("direct-tiny"), preset="direct-nano", pieces=500, phases=phases)
    return loop.train(Run(recipe, out, world, NANO, list(phases), Options(quiet=True, **options)))


@dataclasses.dataclass
class Two:
    """Two scenes of a world, and no more."""

    world: TinyWorld
    count = 2
    skipped: ClassVar[dict] = {}

    def __getitem__(self, index):
        return self.world[index]

    def name(self, index):
        return self.world.name(index)

    def caption(self, index, rng):
        return self.world[index].caption(np.random.default_rng(index))


@pytest.fixture(scope="module", autouse=True)
def _small():
    before, inherit.CAPTIONS = inherit.CAPTIONS, 1000
    yield
    inherit.CAPTIONS = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    out = tmp_path_factory.mktemp("direct")
    run(
        out,
        world,
        *(nano_phase(name) for name in ("image", "low", "high", "refiner")),
        log_every=2,
        probe_every=4,
        probe=probe,
    )
    return out


# -- the model


def test_the_reference_model_has_its_published_sizes():
    c = presets.find("direct").regression
    assert (c.width, c.layers, c.heads, c.resolution, c.frames, c.text_len, c.vocab) == (
        2560,
        32,
        32,
        64,
        32,
        256,
        50257,
    )
    d, model = c.width, presets.find("direct").outline("regression")
    encoder = c.layers * (12 * d**2 + 13 * d) + 2 * d
    decoder = c.layers * (16 * d**2 + 19 * d) + 2 * d
    tables = (c.vocab + len(c.rates) + c.text_len + c.frames + 1) * d
    generation = (d + 1) * 3 * 64**2
    others = sum(p.numel() for p in model.parameters()) - encoder - decoder - tables - generation
    assert others == sum(p.numel() for p in model.refinement.parameters()) < 100_000
    assert all(p.device.type == "meta" for p in model.parameters())


def test_frames_are_bounded_and_of_the_rate(model):
    for rate, frames in ((1.0, 5), (8.0, 33)):
        made = model(TEXT, rate)
        assert made.shape == (2, frames, 3, 16, 16) and made.min() >= 0 and made.max() <= 1


def test_padding_is_seen_by_nobody(model):
    """A caption alone equals the same caption beside a longer one, with more padding in front of it."""
    alone = model(TEXT[:1, 3:], 1.0)
    assert torch.allclose(model(TEXT, 1.0)[:1], alone, atol=1e-5)


def test_each_pixel_hears_the_caption_and_the_rate_token(model):
    model.requires_grad_(True)
    model(TEXT[1:], 1.0, [0, 8])[0, 1, :, -1, -1].sum().backward()
    rows = model.embed.weight.grad.abs().sum(1) > 0
    assert (
        rows[[50, 60, 70, 80, 90]].all()
        and rows[NANO.regression.vocab]
        and not rows[NANO.regression.vocab + 1]
    )
    positions = model.frame_positions.weight.grad.abs().sum(1) > 0
    assert positions.nonzero().flatten().tolist() == [0, 8]  # frames of a clip see one another


def test_a_frame_keeps_its_number_at_every_rate():
    c = NANO.regression
    assert list(c.slots(1.0)) == [0, 8, 16, 24, 32] and list(c.slots(8.0)) == list(range(33))
    with pytest.raises(ValueError, match="no frame-rate token for 3 .* choose one of 1, 8"):
        c.slots(3.0)


def test_new_frames_begin_between_those_that_were_trained(model):
    table = model.frame_positions.weight
    first = table[0].clone()
    model.prepare(1.0, [0])
    model.prepare(1.0, range(0, 33, 8))  # after one picture all frames begin as it
    assert torch.equal(table[1:], first.expand(32, -1)) and model.trained.sum() == 5
    with torch.no_grad():
        table[8] += 1.0
    model.prepare(8.0, range(33))
    assert torch.allclose(table[2], first + 0.25) and torch.allclose(table[12], first + 0.5)
    assert model.trained[1].all() and model.trained[0].sum() == 5
    before = table.clone()
    model.prepare(8.0, range(33))  # nothing is left to begin
    assert torch.equal(table, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch": 7}, "patch must divide the 16 pixels of a frame .resolution.; got 7"),
        ({"heads": 3}, "heads must divide the width 16; got 3"),
        ({"rates": (3.0, 8.0)}, "rates must divide the last one, the full rate 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NANO.regression, **changes)


def test_the_refinement_layer_looks_at_the_pixels_of_neighbouring_frames(model):
    """What the generation layer makes of a place changes the next frame too, and no frame after that."""

    def frames(push: float) -> torch.Tensor:
        def change(module, inputs, patches):
            patches = patches.clone()
            patches[:, 4 * 10] += push  # the first of four patches of frame 10
            return patches

        hook = model.generation.register_forward_hook(change)
        made = model(TEXT, 8.0)
        hook.remove()
        return made

    changed = (frames(3.0) - frames(0.0)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [9, 10, 11]


def test_a_narrow_reference_model_learns(world):
    """Steps of the reference recipe's `high` phase, narrow, on GPT-2's words: every weight learns, those of
    the refinement layer too as soon as its last one has left zero."""
    from cogvideo.data.loader import batches

    config = dataclasses.replace(presets.find("direct").regression, width=32, layers=1, heads=2)
    phase = dataclasses.replace(recipes.find("direct").phase("high"), steps=1)
    spec = dataclasses.replace(presets.find("direct"), regression=config)
    model = inherit.new_part(spec, "regression", 0)
    step = phase.objective.build_loss({"regression": model}, GPT2Tokenizer(), phase)
    batch, losses = next(batches(world, phase.clips, 1, seed=0)), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for number in range(3):
        optimizer.zero_grad()
        loss, numbers = step(batch, number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert numbers.keys() == {"pixel", "perceptual", "temporal", "psnr"} and losses[2] < losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# -- training


def test_the_phases_make_a_model_that_generates(trained):
    pipe = CogVideo.from_pretrained(trained / "model")
    clip, small = pipe("a dog runs", progress=False)[0], pipe.regress(["a dog runs"], 5)[0]
    assert clip.frames.shape == (33, 32, 32, 3) and clip.fps == 8 and clip.caption == "a dog runs"
    assert small.frames.shape == (5, 16, 16, 3) and small.fps == 1
    config = ModelFolder(trained / "model").config
    assert config.spec.family == "regression" and list(config.trained) == ["image", "low", "high", "refiner"]
    assert (trained / "high" / "strips" / "0000004.png").exists()


def test_a_phase_begins_with_what_the_one_before_it_made(tmp_path, world):
    folder = run(tmp_path, world, nano_phase("image"))
    image = folder.load("regression")
    assert image.trained.nonzero().tolist() == [[0, 0]]
    assert CogVideo.from_pretrained(tmp_path / "model").frame_counts == {1: 1.0}
    stopped = nano_phase("low", lr=0.0)  # nothing is learnt
    low = run(tmp_path, world, nano_phase("image"), stopped).load("regression")
    assert torch.equal(low.embed.weight, image.embed.weight)
    assert torch.equal(low.frame_positions.weight[8], image.frame_positions.weight[0])


def test_a_finished_phase_is_left_alone(tmp_path, world):
    """It neither comes back over what went on from it, nor goes on under it."""
    image, low = nano_phase("image", steps=2), nano_phase("low", steps=2)
    folder = run(tmp_path, world, image, low)
    made, recipe = folder.file("regression").read_bytes(), recipes.find("direct-tiny")
    recipe = dataclasses.replace(recipe, preset="direct-nano", phases=(image, low))
    loop.train(Run(recipe, tmp_path, world, NANO, [image], Options(quiet=True)))
    assert folder.file("regression").read_bytes() == made
    with pytest.raises(
        ValueError, match=r"cannot resume image: low was already trained from it; delete .*low to"
    ):
        loop.train(
            Run(recipe, tmp_path, world, NANO, [dataclasses.replace(image, steps=4)], Options(quiet=True))
        )
    shutil.rmtree(tmp_path / "low")  # trained again, it begins with what `image` made, not with itself
    loop.train(Run(recipe, tmp_path, world, NANO, [image, low], Options(quiet=True)))
    again, before = folder.load("regression").state_dict(), load(made)
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_a_phase_does_not_go_on_from_one_that_was_stopped(tmp_path, world):
    image, low = nano_phase("image", steps=4), nano_phase("low", steps=2)
    folder = run(tmp_path, world, dataclasses.replace(image, steps=2))
    config = folder.config
    del config.trained["image"]  # as if it had been killed at step 2
    folder.write_config(config)
    recipe = dataclasses.replace(recipes.find("direct-tiny"), preset="direct-nano", phases=(image, low))
    with pytest.raises(ValueError, match="low starts from image, which was stopped before its end"):
        loop.train(Run(recipe, tmp_path, world, NANO, [low], Options(quiet=True)))
    loop.train(Run(recipe, tmp_path, world, NANO, [image, low], Options(quiet=True)))
    assert {name: row.steps for name, row in folder.config.trained.items()} == {"image": 4, "low": 2}


def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, world):
    class Stop:
        def __call__(self, *_):
            raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        out = tmp_path / str(interrupted)
        run(out, world, nano_phase("image"))
        low = nano_phase("low")
        if interrupted:
            with contextlib.suppress(KeyboardInterrupt):
                run(out, world, low, save_every=1, probe_every=2, probe=Stop())
        results.append(run(out, world, low, save_every=1).load("regression").state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_two_clips_can_be_learnt_by_heart(world, tmp_path):
    run(tmp_path, Two(world), nano_phase("low", steps=120, lr=1e-2), log_every=30)
    rows = [json.loads(line) for line in (tmp_path / "low" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_epochs_are_steps_of_data_that_has_an_end():
    phase = recipes.find("direct").phase("low")
    assert phase.over(80).steps == 10 * 80 // 16
    with pytest.raises(ValueError, match="the data has no end; give --low.steps"):
        phase.over(None)
    assert recipes.find("direct").changed({"low.steps": "7"}).phase("low").over(None).steps == 7


# -- what a run begins with


def test_another_model_is_inherited_by_what_fits(trained, nano, tmp_path, world, capsys):
    """All of a model of the same shape; of one for pictures all but the later frames; of another family what
    the two have in common."""
    folder = ModelFolder(trained / "model")
    stopped = nano_phase("low", steps=1, lr=0.0)
    same = run(tmp_path / "same", world, stopped, init=folder)
    assert torch.equal(same.load("regression").embed.weight, folder.load("regression").embed.weight)
    assert same.text().model == folder.text().model
    assert "tensors taken; nothing is new" in capsys.readouterr().out

    single = dataclasses.replace(NANO.regression, frames=1, rates=(1.0,))
    spec = dataclasses.replace(NANO, regression=single, refiner=None)
    picture = ModelFolder(tmp_path / "picture")
    picture.path.mkdir()
    part = inherit.new_part(spec, "regression", 7)
    part.prepare(1.0, [0])
    picture.save("regression", part)
    picture.write_config(FolderConfig(spec, trained={}))
    picture.write_text(folder.text().model)
    grown = run(tmp_path / "grown", world, stopped, init=picture).load("regression")
    assert torch.equal(grown.generation.weight, part.generation.weight)
    assert torch.equal(grown.frame_positions.weight[16], part.frame_positions.weight[0])
    assert torch.equal(grown.embed.weight[:501], part.embed.weight)  # all words, and the token of 1 a second
    assert "but for 501 of 502 rows, frame_positions.weight but for 1 of 33 rows" in capsys.readouterr().out

    other = run(tmp_path / "other", world, nano_phase("low", steps=1), init=ModelFolder(nano))
    assert torch.equal(other.load("refiner").enter.weight, ModelFolder(nano).load("refiner").enter.weight)
    assert "refiner from" in capsys.readouterr().out


def test_words_are_inherited_with_their_text_model_or_not_at_all(trained, tmp_path, world, capsys):
    folder = ModelFolder(trained / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "text.model").write_bytes(train_text(["other words here"] * 9, 290))
    mine = run(tmp_path, world, nano_phase("low", steps=1, lr=0.0), init=folder)
    assert mine.text().model != folder.text().model and "captions here" in capsys.readouterr().out
    theirs, taken = folder.load("regression"), mine.load("regression")
    assert not torch.equal(taken.embed.weight[:500], theirs.embed.weight[:500])
    assert torch.equal(taken.embed.weight[500:], theirs.embed.weight[500:])  # the tokens of rates
    assert torch.equal(taken.generation.weight, theirs.generation.weight)
    assert not taken.trained[1].any()  # what it could make, it cannot make of these words
    theirs.trained[:] = torch.arange(33) == 0  # had it been a model of pictures
    inherit.take(grown := inherit.new_part(NANO, "regression", 3), theirs, same_words=False)
    assert torch.equal(grown.frame_positions.weight, theirs.frame_positions.weight[:1].expand(33, -1))


def test_rates_are_inherited_by_their_number(trained):
    part = ModelFolder(trained / "model").load("regression")
    config = dataclasses.replace(NANO.regression, rates=(4.0, 8.0))
    other = inherit.new_part(dataclasses.replace(NANO, regression=config), "regression", 3)
    inherit.take(other, part)
    assert not other.trained[0].any() and other.trained[1].all()
    assert torch.equal(other.embed.weight[501], part.embed.weight[501])
    assert not torch.equal(other.embed.weight[500], part.embed.weight[500])
    wide = dataclasses.replace(NANO.regression, width=32)
    inherit.take(large := inherit.new_part(dataclasses.replace(NANO, regression=wide), "regression", 3), part)
    assert not large.trained.any()


def test_a_run_that_has_begun_does_not_begin_otherwise(trained, tmp_path, world):
    folder = ModelFolder(trained / "model")
    run(tmp_path, world, nano_phase("low", steps=1), init=folder)
    run(tmp_path, world, nano_phase("low", steps=2), init=folder)  # the same command goes on
    with pytest.raises(ValueError, match="has begun with {'init': .*choose another --out"):
        run(tmp_path, world, nano_phase("low", steps=3), init=ModelFolder(tmp_path / "model"))
    recipe = dataclasses.replace(recipes.find("tiny"), phases=())
    with pytest.raises(ValueError, match="another model, direct-nano, than the recipe tiny trains, tiny"):
        loop.train(Run(recipe, tmp_path, world, presets.find("tiny"), []))
    with pytest.raises(ValueError, match="low cuts frames of 48 pixels, but the model's are of 16"):
        run(tmp_path / "sizes", world, recipes.find("direct-tiny").phase("low"))
    with pytest.raises(ValueError, match="unknown feature network 'vgg61'; choose one of"):
        run(tmp_path / "sizes", world, nano_phase("low", loss=LossWeights(features="vgg61")))
    with pytest.raises(ValueError, match="high cuts 65 frames, but the model has 33 at 8 frames a second"):
        run(
            tmp_path / "sizes",
            world,
            nano_phase("low"),
            nano_phase("high", clips=ClipSpec(65, (8,), sizes=(16,))),
        )
    Clip(np.zeros((9, 16, 16, 3), np.uint8), 8).save(tmp_path / "short.mp4")
    (tmp_path / "short.txt").write_text("a second")
    with pytest.raises(ValueError, match="high finds no clip to train on: .* too few for 33 frames"):
        run(tmp_path / "sizes", open_source(tmp_path), nano_phase("high"))
    assert not (tmp_path / "sizes").exists()


def test_what_cannot_fit_is_refused_before_it_is_built(tmp_path, world, monkeypatch):
    """6 billion weights, with gradients and two averages in float32: 96 GB."""
    monkeypatch.setattr("cogvideo.train.run.free_memory", lambda device=None: 24e9)
    recipe = dataclasses.replace(recipes.find("direct"), pieces=500)
    low = dataclasses.replace(recipe.phase("low"), steps=1, epochs=0)
    with pytest.raises(ValueError, match=r"low needs 96\.\d GB .* 24\.0 GB are free; choose"):
        loop.train(Run(recipe, tmp_path, world, presets.find("direct"), [low]))
    assert not list(tmp_path.iterdir())


def test_nothing_in_common_is_an_error(tmp_path, world, nano_large):
    with pytest.raises(ValueError, match="has no part of this model; its parts are vqvae, base"):
        run(tmp_path, world, nano_phase("low"), init=ModelFolder(nano_large))


def test_gpt2_gives_its_embedding(tmp_path, world, capsys):
    config = dataclasses.replace(presets.find("direct").regression, width=8, layers=1, heads=2, patch=32)
    spec = dataclasses.replace(presets.find("direct"), regression=config)
    table = torch.randn(50257, 8)
    save_file({"transformer.wte.weight": table}, tmp_path / "gpt2.safetensors")
    recipe = dataclasses.replace(recipes.find("direct"), phases=())
    folder = loop.train(
        Run(
            recipe,
            tmp_path / "run",
            world,
            spec,
            [],
            Options(quiet=True, init_embedding=str(tmp_path / "gpt2.safetensors")),
        )
    )
    assert torch.equal(folder.load("regression").embed.weight[:50257], table)
    assert isinstance(folder.text(), GPT2Tokenizer)
    both = (
        loop.train(
            Run(
                recipe,
                tmp_path / "both",
                world,
                spec,
                [],
                Options(quiet=True, init=folder, init_embedding=str(tmp_path / "gpt2.safetensors")),
            )
        )
        .load("regression")
        .state_dict()
    )
    assert all(torch.equal(both[key], value) for key, value in folder.load("regression").state_dict().items())
    save_file({"wte.weight": table[:, :4].contiguous()}, tmp_path / "narrow.safetensors")
    save_file({"x": table[:2]}, tmp_path / "none.safetensors")
    for name, message in (
        ("narrow", "is 50257 ids x 4, this model's is 50257 x 8"),
        ("none", "has no tensor wte.weight"),
        ("missing", "cannot read an embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(
                Run(
                    recipe,
                    tmp_path / name,
                    world,
                    spec,
                    [],
                    Options(init_embedding=str(tmp_path / f"{name}.safetensors")),
                )
            )
    with pytest.raises(ValueError, match="the recipe direct-tiny has words of its own"):
        loop.train(
            Run(recipes.find("direct-tiny"), tmp_path / "three", world, NANO, [], Options(init_embedding="x"))
        )


# -- the face


@pytest.mark.parametrize(
    "name, value",
    [
        ("guidance_scale", 3.0),
        ("image", "cat.png"),
        ("image", np.zeros((8, 8, 3), np.uint8)),
        ("video", "cat.mp4"),
        ("video", Clip(np.zeros((2, 8, 8, 3), np.uint8), 1.0)),
        ("keep", "made"),
        ("num_videos_per_prompt", 2),
    ],
)
def test_what_is_not_supported_is_refused_by_name(trained, name, value):
    with pytest.raises(ValueError, match=f"{name} is not supported: this model is deterministic"):
        CogVideo.from_pretrained(trained / "model")("a dog", progress=False, **{name: value})


def test_bad_prompts_and_frames_are_refused(trained):
    pipe = CogVideo.from_pretrained(trained / "model")
    for prompt, message in (
        ("  ", "the prompt is empty"),
        ("\u200b", "the prompt is empty"),
        ("dog " * 90, "more than the 64 that fit"),
        ([], "there is no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompt, progress=False)
    for make in (partial(pipe, num_frames=7), partial(pipe.regress, num_frames=7)):
        with pytest.raises(ValueError, match="num_frames 7 is not possible; choose one of 5, 33"):
            make(["a dog"])
    with pytest.raises(ValueError, match="leave it out for a regression model"):
        CogVideo.from_pretrained(trained / "model", reference_quirks=True)
    with pytest.raises(ValueError, match="family regression; choose one of float32, bfloat16"):
        CogVideo.from_pretrained(trained / "model", dtype="int8")


def test_a_seed_is_accepted_and_changes_nothing(trained):
    pipe = CogVideo.from_pretrained(trained / "model")
    one, other = (pipe("a dog runs", seed=seed, progress=False)[0].frames for seed in (1, 2))
    assert np.array_equal(one, other)


def test_a_prompt_is_the_same_clip_alone_or_among_others(trained):
    pipe = CogVideo.from_pretrained(trained / "model")
    alone, beside = pipe("a dog runs", progress=False), pipe(["a cat", "a dog runs"], progress=False)
    assert np.array_equal(alone[0].frames, beside[1].frames)


def test_the_command_line_makes_and_describes_it(trained, tmp_path, monkeypatch, capsys):
    def cogvideo(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["cogvideo", *arguments])
        with pytest.raises(SystemExit, match="2") if fails else contextlib.nullcontext():
            cli.main()
        told = capsys.readouterr()
        return told.out + told.err

    make = ("generate", "a dog runs", "--model", model := str(trained / "model"), "-o")
    told = cogvideo(*make, str(tmp_path / "dog.gif"))
    assert "33 frames, 32x32, 8 fps" in told and "seed" not in told and (tmp_path / "dog.gif").exists()
    assert "1 and 1 layers" in cogvideo("models", model)
    estimated = cogvideo("estimate", model)
    assert all(row in estimated for row in ("\nregression ", "\nrefiner ", "\nframes ", "\nupscale "))
    seeded = cogvideo(*make, str(tmp_path / "seeded.gif"), "--seed", "2")  # accepted and ignored
    assert ", seed" not in seeded
    assert (tmp_path / "seeded.gif").read_bytes() == (tmp_path / "dog.gif").read_bytes()
    why = cogvideo(*make, str(tmp_path / "no.gif"), "--num-videos", "2", fails=True)
    assert "num_videos_per_prompt is not supported: this model is deterministic" in why
    assert not (tmp_path / "no.gif").exists()


def test_regression_config_reads_back():
    from cogvideo.model.families import read_spec

    assert read_spec(json.loads(json.dumps(NANO.to_dict()))) == NANO
    assert isinstance(NANO.regression, RegressionConfig)
    with pytest.raises(ValueError, match="unknown family 'x'; choose one of cogvideo, regression"):
        read_spec({"family": "x"})
