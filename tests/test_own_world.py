"""Worlds of a user's own artwork: what becomes of the files, scenes, captions, a judge."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogvideo import cli
from cogvideo.data.cut import ClipSpec
from cogvideo.data.loader import batches
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import MOTIONS, PLACES, TinyWorld, draw_place, render
from cogvideo.data.tinyworld.artwork import make_world
from cogvideo.data.tinyworld.cast import find, loop_of
from cogvideo.data.tinyworld.gallery import scenes, write_held_out
from cogvideo.data.tinyworld.own import make_key, open_world, plain
from cogvideo.data.tinyworld.reading import read
from cogvideo.data.tinyworld.scene import Scene, allowed, possible_motions
from cogvideo.eval import judge_training
from cogvideo.eval.tinyworld import Classes
from cogvideo.video import Clip

TOML = """
[sprites.blob]
zh = "团子"
synonyms = ["dumpling"]
lives = ["ground"]
moves = ["roll", "hop"]

[backgrounds.kitchen]
zh = "厨房"

[backgrounds.cave]
said = ["inside the dark cave"]
ground = false
"""


def ellipse(colour, size=(200, 100)):
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((20, 20, size[0] - 20, size[1] - 20), fill=colour)
    return image


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    """What people have: a picture, pixel art that moves, backgrounds; and files that are of no use."""
    folder = tmp_path_factory.mktemp("art")
    ellipse((255, 0, 0, 255)).save(folder / "red-fish_2.png")
    ellipse((0, 128, 0, 255)).save(folder / "blob.png")
    frames = []
    for k in range(6):
        frame = Image.new("RGBA", (16, 16))
        ImageDraw.Draw(frame).rectangle((2 + k, 4, 8 + k, 12), fill=(0, 0, 255, 255))
        frames.append(frame)
    frames[0].save(
        folder / "box.gif", save_all=True, append_images=frames[1:], duration=120, loop=0, disposal=2
    )
    Image.new("RGB", (100, 100), "red").save(folder / "opaque.png")
    Image.new("RGBA", (50, 50)).save(folder / "empty.png")
    ellipse((9, 9, 9, 255), (44, 44)).resize((11, 11)).save(folder / "dust.webp")
    (folder / "broken.png").write_bytes((folder / "blob.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("no picture")
    (folder / "backgrounds").mkdir()
    Image.effect_noise((300, 200), 50).convert("RGB").save(folder / "backgrounds" / "kitchen.jpg")
    Image.new("RGB", (120, 120), "navy").save(folder / "backgrounds" / "cave.png")
    Image.new("RGB", (20, 20), "navy").save(folder / "backgrounds" / "small.png")
    (folder / "world.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def world(art, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "world"
    make_world(art, out)
    return open_world(out)


def test_every_file_becomes_something_or_is_named_with_the_reason(art, tmp_path):
    made = make_world(art, tmp_path / "world")
    assert made.sprites == ["blob", "box", "red fish"] and made.backgrounds == ["cave", "kitchen"]
    assert made.languages == ("en", "zh")
    assert set(made.skipped) == {
        "opaque.png", "empty.png", "dust.webp", "broken.png", "backgrounds/small.png"
    }  # fmt: skip
    for file, why in (("opaque", "transparent"), ("empty", "visible"), ("dust", "pixels"), ("broken", "")):
        assert why in next(text for name, text in made.skipped.items() if file in name)
    assert "not used: opaque.png" in made.text() and "3 sprites" in made.text()


def test_a_repeated_call_keeps_the_world_and_another_is_refused(art, tmp_path):
    out = tmp_path / "world"
    make_world(art, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    make_world(art, out)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    other = tmp_path / "art"
    shutil.copytree(art, other)
    (other / "box.gif").unlink()
    with pytest.raises(ValueError, match="holds something else"):
        make_world(other, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="holds something else"):
        make_world(art, tmp_path / "full")


def test_an_animation_becomes_a_loop_that_repeats_a_whole_number_of_times(world):
    """Six frames of 120 ms: 0.72 s, four times in three seconds; so the loop has a period of six frames."""
    loop = loop_of(make_key("box", world.folder))
    assert loop.shape == (24, 96, 96, 4) and loop.dtype == np.uint8
    assert (loop[:6] == loop[6:12]).all() and (loop[:6] == loop[18:]).all()
    left = [int(np.flatnonzero(frame[..., 3].any(0))[0]) for frame in loop[:6]]
    assert left == sorted(left) and len(set(left)) == 6  # the box moves to the right
    assert set(np.unique(loop[..., 3])) == {0, 255}  # pixel art stays sharp


def test_a_still_picture_fills_the_frame_in_its_proportions(world):
    row = find(make_key("red fish", world.folder))
    left, top, right, bottom = row["bbox"]
    assert abs((right - left) - 90) <= 2 and abs((right - left) / (bottom - top) - 160 / 60) < 0.2
    loop = loop_of(make_key("red fish", world.folder))
    assert (loop == loop[0]).all() and tuple(loop[0, 48, 48]) == (255, 0, 0, 255)


def test_scenes_are_those_of_the_names_wherever_the_folder_is(world, tmp_path):
    """A moved world has the same scenes, captions and held-out triples."""
    shutil.copytree(world.folder, tmp_path / "moved")
    moved = open_world(tmp_path / "moved")
    for i in range(20):
        here, there = (scenes(one, 3)[i] for one in (world, moved))
        assert plain(here.scene.sprite) == plain(there.scene.sprite)
        assert here.scene.sprite != there.scene.sprite
        assert here.scene.held_out is there.scene.held_out is False
        rng = (np.random.default_rng(i) for _ in range(2))
        assert here.caption(next(rng)) == there.caption(next(rng))
        assert (here.frames([0, 1], 48) == there.frames([0, 1], 48)).all()


def test_captions_say_what_is_seen(world):
    """The reader finds sprite and motion of every caption, in both languages, and nearly all places: "stars"
    may be of the night or of space."""
    source = scenes(world, 5)
    languages = set()
    places = 0
    for i in range(400):
        video = source[i]
        caption = video.caption(np.random.default_rng(i))
        reading = read(caption, world)
        assert (reading.sprite, reading.motion) == (video.scene.sprite, video.scene.motion), caption
        places += reading.place == video.scene.place
        languages.add(caption.isascii())
        if not caption.isascii():  # only things with a Chinese name
            assert "团子" in caption and "cave" not in video.scene.place
    assert languages == {True, False} and places >= 396


def test_things_live_where_they_should(world):
    blob = make_key("blob", world.folder)
    box = make_key("box", world.folder)
    kitchen = make_key("kitchen", world.folder)
    cave = make_key("cave", world.folder)
    assert Scene(blob, "right", kitchen).stands and Scene(box, "right", kitchen).stands
    assert not Scene(box, "right", cave).stands
    assert not allowed(blob, "right", cave) and allowed(box, "right", cave)
    assert not allowed(blob, "up", kitchen) and allowed(box, "up", kitchen)
    assert world.places == (*PLACES, cave, kitchen)
    assert "up" not in possible_motions((blob,), None)
    assert possible_motions(tuple(world.sprites), None) == MOTIONS


def test_a_world_in_which_nothing_flies_has_motions_for_all(world):
    source = TinyWorld((make_key("blob", world.folder),), 1, even=True)
    assert {source[i].scene.motion for i in range(60)} == set(possible_motions(source.names, False))


def test_backgrounds_vary_and_keep_their_content(world):
    cave = make_key("cave", world.folder)
    kitchen = make_key("kitchen", world.folder)
    first, second = (draw_place(kitchen, look, 48) for look in (0, 1))
    assert first.shape == (48, 48, 3) and not np.allclose(first, second)
    navy = draw_place(cave, 0, 48)
    assert navy[..., 2].mean() > 100 and navy[..., :2].mean() == 0
    box = Scene(make_key("box", world.folder), "stays", cave, x=0.5, y=0.5)
    assert (render(box, [0.0], 48)[0, 24, 24] == (0, 0, 255)).all()


def test_it_is_a_source_to_train_on(world):
    source = open_source(world.folder, seed=4)
    spec = ClipSpec(5, (1, 2), sizes=(48,), cover=8)
    here = next(batches(source, spec, 3, seed=1))
    there = next(batches(source, spec, 3, seed=1, workers=1))
    assert here.captions == there.captions and (here.frames[0] == there.frames[0]).all()
    assert here.frames[0].shape == (3, 5, 3, 48, 48) and here.cover is not None and here.cover.amax() > 0


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[sprites.blob]\ncolour = 'red'", "unknown key sprites.blob.colour; choose from name, zh"),
        ("[sprites.blob]\nmoves = ['teleport']", "sprites.blob.moves: unknown verb 'teleport'"),
        ("[sprites.blob]\nlives = ['moon']", "sprites.blob.lives.0 must be one of ground, water"),
        ("[sprites.bolb]\nzh = '团子'", "sprites.bolb names no file; the files are blob, box"),
        ("[sprites.blob]\nname = 'box'", "both blob and box are called 'box'"),
        ("[sprites.blob]\nname = 'a very long name indeed'", "captions have room for 3"),
        ("[sprites.blob]\nname = 'x@y'", "no name that captions can use"),
        ("languages = ['zh']", "needs zh"),
        ("languages = ['de']", "languages.0 must be one of en, zh"),
        ("places = ['mars']", "there is no 'mars'; choose from field"),
        ("[backgrounds.kitchen]\nname = 'sea'", "called like a place of the tiny world"),
        ("[sprites", "cannot read .*world.toml"),
    ],
)
def test_a_wrong_world_toml_names_the_key(art, tmp_path, toml, message):
    mine = tmp_path / "art"
    shutil.copytree(art, mine)
    (mine / "world.toml").write_text(toml)
    with pytest.raises(ValueError, match=message):
        make_world(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_picture_is_an_error(tmp_path):
    Image.new("RGB", (100, 100), "red").save(tmp_path / "opaque.png")
    with pytest.raises(ValueError, match="no picture that can be used .*opaque.png: nothing in it is trans"):
        make_world(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder"):
        make_world(tmp_path / "nowhere", tmp_path / "out")


def test_a_damaged_world_is_an_error_with_its_key(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world.folder, folder)
    table = json.loads((folder / "world.json").read_text())
    del table["sprites"][0]["zh"]
    (folder / "world.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"world.json: sprites.0.zh is missing"):
        open_source(folder)


def test_held_out_clips_are_of_held_out_scenes_and_carry_their_captions(world):
    folder = write_held_out(world, 3)
    source = scenes(world, 777, held_out=True)
    prompts = (world.folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    for i, prompt in enumerate(prompts):
        assert source[i].scene.held_out
        clip = Clip.load(folder / f"{i:04d}.mp4")
        assert clip.caption == prompt and clip.frames.shape == (33, 192, 192, 3) and clip.fps == 8
    assert len(prompts) == 3


def test_a_judge_learns_the_sprites_of_a_world(world):
    """A few steps from the shipped judge suffice for a red, a green and a blue one."""
    classes = Classes.of(world.folder)
    net = judge_training.new_judge(classes)
    judge_training.train(net, classes, steps=16, lr=2e-3, batch=12, fresh=12)
    assert judge_training.test(net, classes, count=32, held_out=True).sprite > 0.9
    source = scenes(world, 9)
    videos = [source[i] for i in range(20)]
    captions = [video.caption(np.random.default_rng(i)) for i, video in enumerate(videos)]
    labels = classes.labels([video.scene for video in videos])
    assert (classes.asked(captions).classes == labels).all()


def test_the_command_makes_a_world_that_evaluate_takes(art, tmp_path, monkeypatch, capsys):
    out = tmp_path / "world"
    command = ["cogvideo", "data", "world", str(art), "-o", str(out), "--held-out", "4", "--judge-steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    told = capsys.readouterr().out
    assert "3 sprites" in told and "sheet.png" in told and "judge, on held-out clips: sprite" in told
    assert Image.open(out / "sheet.png").size[0] == 9 * 96
    before = (out / "judge.safetensors").stat().st_mtime_ns
    cli.main()  # nothing is left to do
    assert (out / "judge.safetensors").stat().st_mtime_ns == before

    report = tmp_path / "report.json"
    clips = str(out / "held_out")
    command = ["cogvideo", "evaluate", clips, "-o", str(report), "--scorer", f"{out}/", "--few", "--quiet"]
    command += ["--preset", "tinyworld"]
    command += ["--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    first = json.loads(report.read_text())
    assert "sprite right (%)" in report.read_text()
    cli.main()  # from the cache
    again = json.loads(report.read_text())
    assert again["adherence"] == first["adherence"] and again["clips"] == first["clips"]
    (out / "judge.safetensors").unlink()
    with pytest.raises(SystemExit):
        cli.main()
    assert "cogvideo data world trains it" in capsys.readouterr().err
