"""The ladder and its judge: what is measured is what is meant, and every rung takes what it says."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import frame_judge, ladder
from benchmarks.frame_judge import SIZE, TIMES, FrameJudge, Sight
from cogvideo.data.tinyworld import Scene, cover, draw_place, render, sprites
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.model.features import ImageFeatures
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAEConfig, to_images


@pytest.fixture(scope="module")
def judge() -> FrameJudge:
    torch.manual_seed(0)
    return FrameJudge(width=4).eval()


@pytest.fixture(scope="module")
def pipe(nano) -> CogVideo:
    return CogVideo.from_pretrained(nano, dtype="float32")


class Lossless(torch.nn.Module):
    """A tokenizer with a code for each colour and a token for each pixel."""

    config = VQVAEConfig(resolution=SIZE, codes=256**3)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        levels = (255 * pictures).round().long().flatten(2)
        return 65536 * levels[:, 0] + 256 * levels[:, 1] + levels[:, 2]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        levels = torch.stack((codes // 65536, codes // 256 % 256, codes % 256), 1)
        return levels.unflatten(2, (SIZE, SIZE)) / 255


# -- where the object is --


def test_outside_its_cover_the_frame_is_the_empty_place():
    scene = Scene("rocket", "diagonal", "space", x=0.4, y=0.6, extent=0.2)
    frames, covered = render(scene, TIMES[::8], 96), cover(scene, TIMES[::8], 96)
    assert covered.min() == 0 and covered.max() > 0.99
    empty = np.clip(draw_place("space", 0, 96) + 0.5, 0, 255).astype(np.uint8)
    changed = (frames != empty).any(-1)
    assert not changed[covered == 0].any()
    assert changed[covered > 0.5].mean() > 0.99


def test_inside_its_cover_the_place_does_not_matter():
    scene = Scene("dog", "right", "field", x=0.3, y=0.85, extent=0.3)
    full = cover(scene, TIMES[::8], 96) == 1
    assert full.mean() > 0.02
    frames = render(scene, TIMES[::8], 96)
    assert (frames[full] == render(replace(scene, place="city", look=3), TIMES[::8], 96)[full]).all()


@pytest.mark.parametrize("motion", ["right", "spins", "grows", "circles"])
def test_followed_object_stands_still(motion):
    scene = Scene("owl", motion, "night sky", x=0.4, y=0.6, extent=0.15)
    inside = ladder.follow(torch.from_numpy(cover(scene, TIMES, SIZE))[:, None], scene) > 0.98
    inside = inside[0] & inside[24]  # a sprite's loop has 24 frames
    assert inside.float().mean() > 0.2
    raw = to_images(render(scene, TIMES, SIZE))
    followed = ladder.follow(raw, scene)
    moved = (followed[24] - followed[0]).abs().mean(0, keepdim=True)[inside].mean()
    assert moved < 0.02
    assert (raw[24] - raw[0]).abs().mean() > 0.02


# -- flicker and sharpness --


def test_frozen_clip_does_not_flicker_and_a_blinking_one_does():
    scene = Scene("owl", "stays", "night sky")
    frozen = to_images(render(scene, TIMES[:1], SIZE)).repeat(9, 1, 1, 1)
    assert ladder.object_flicker(frozen, scene) == 0
    blinking = frozen.clone()
    blinking[1::2] += 0.1
    assert ladder.object_flicker(blinking, scene) == pytest.approx(255 * 0.2, rel=1e-3)


def test_blinking_outside_the_object_is_no_flicker_of_the_object():
    scene = Scene("owl", "stays", "night sky")
    clip = to_images(render(scene, TIMES[:1], SIZE)).repeat(9, 1, 1, 1)
    outside = torch.from_numpy(cover(scene, TIMES[:9], SIZE))[:, None] == 0
    near = torch.nn.functional.max_pool2d((~outside).float(), 9, 1, 4) > 0  # bicubic reaches a little further
    clip[1::2] += 0.1 * (~near[1::2])
    assert ladder.object_flicker(clip, scene) == 0


def test_blurred_object_is_less_sharp():
    scene = Scene("owl", "stays", "night sky")
    clip = to_images(render(scene, TIMES[:3], SIZE))
    blurred = torch.nn.functional.avg_pool2d(clip, 5, 1, 2)
    assert ladder.object_sharpness(blurred, scene) < 0.5 * ladder.object_sharpness(clip, scene)
    background = torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))
    outside = torch.from_numpy(cover(scene, TIMES[:3], SIZE))[:, None] == 0
    near = torch.nn.functional.max_pool2d((~outside).float(), 5, 1, 2) > 0
    noisy = torch.where(near, clip, background)
    assert ladder.object_sharpness(noisy, scene) == pytest.approx(ladder.object_sharpness(clip, scene))


# -- the judge --


def test_sight_counts_frames_clips_and_neighbours():
    classes = torch.full((2, 10), 3)
    classes[0, 4] = 5  # nine of ten right
    classes[1, :2] = 7
    sight = Sight(classes, torch.tensor([3, 3]), torch.zeros(2, 10, 1))
    assert sight.frames_right == pytest.approx(0.85)
    assert sight.clips_right == 0.5
    assert sight.neighbours_alike == pytest.approx(15 / 18)


def test_judge_sees_no_colour(judge):
    frames = render(Scene("panda", "stays", "snow"), TIMES[:3], SIZE)
    grey = np.repeat(frame_judge.to_grey(frames)[..., None], 3, -1)
    assert torch.equal(frame_judge.look(judge, frames)[1], frame_judge.look(judge, grey)[1])


def test_judge_sees_each_frame_alone(judge):
    frames = render(Scene("panda", "right", "snow", extent=0.2), TIMES[:4], SIZE)
    alone = torch.cat([frame_judge.look(judge, frames[i : i + 1])[1] for i in range(4)])
    torch.testing.assert_close(frame_judge.look(judge, frames)[1], alone)


def test_frames_of_training_are_labelled_and_vary_in_size():
    frames, labels, centres = frame_judge.draw_frames(np.random.default_rng(0), sprites(), 8)
    assert frames.shape == (8, SIZE, SIZE) and frames.dtype == np.uint8
    assert len(set(labels)) > 4
    grey = torch.from_numpy(frames)[:, None].float() / 255
    changed = frame_judge.augment(grey, torch.Generator().manual_seed(0))
    assert changed.shape == grey.shape and changed.min() >= 0 and changed.max() <= 1
    assert not torch.equal(changed, grey)
    cropped = frame_judge.augment(grey, torch.Generator().manual_seed(0), torch.from_numpy(centres).float())
    assert cropped.shape[-2:] == (frame_judge.CROP, frame_judge.CROP)


def test_missing_judge_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="--judge frame"):
        frame_judge.load(tmp_path / "frame.safetensors")


# -- the rungs --


def test_perfect_reconstruction_is_the_rendered_row(judge):
    row = ladder.reconstruction_rungs(Lossless(), judge, 1, net=ImageFeatures())
    assert list(row.rows) == ["rendered", "codes", "replaced"]  # nothing is coded small
    real, codes = row.rows["rendered"], row.rows["codes"]
    assert {key: codes[key] for key in real} == real
    assert codes["psnr"] == float("inf") and codes["ssim"] == pytest.approx(1)
    assert codes["perceptual"] == pytest.approx(0, abs=1e-6)
    worse = row.rows["replaced"]
    assert worse["psnr"] < 20 and worse["object flicker"] > 2 * real["object flicker"]
    assert worse["frechet"] > real["frechet"]


def test_a_tenth_of_the_codes_is_replaced_by_others():
    codes = torch.randint(64, (33, 144), generator=torch.Generator().manual_seed(1))
    changed = ladder.replace_codes(codes, 64, seed=5)
    assert 0.08 < (changed != codes).float().mean() < 0.12
    assert changed.min() >= 0 and changed.max() < 64
    assert torch.equal(changed, ladder.replace_codes(codes, 64, seed=5))
    assert torch.equal(codes, ladder.replace_codes(codes, 64, seed=5, share=0.0))


def test_scenes_are_held_out_and_do_not_depend_on_their_number():
    few, many = (ladder.draw_batch(sprites(), count, seed=3) for count in (2, 4))
    assert many.part(0, 2) == few
    assert all(scene.held_out for scene in many.scenes)


def test_generated_rungs_keep_the_true_frames(pipe):
    batch = ladder.draw_batch(sprites(8), 1, seed=3)
    true = ladder.coded(pipe, batch).codes
    draft = ladder.from_keyframes(pipe, batch)
    assert draft.codes.shape == true.shape
    assert torch.equal(draft.codes[:, ::8], true[:, ::8])
    assert not torch.equal(draft.codes, true)
    first = ladder.from_first(pipe, batch).codes
    assert torch.equal(first[:, 0], true[:, 0])
    assert not torch.equal(first[:, 8], true[:, 8])


def test_every_rung_of_a_model_is_measured(pipe, judge, tmp_path):
    batch = ladder.draw_batch(sprites(8), 1, seed=3)
    rungs = ladder.climb(pipe, batch, ladder.rungs_of(pipe), judge, keep=tmp_path / "codes")
    assert list(rungs.rows) == [row for rung in ladder.RUNGS for row in ladder.rows_of(pipe, rung)]
    assert "generated, by frame" in rungs.rows
    assert "object flicker" in rungs.rows["keyframes"] and "object flicker" not in rungs.rows["first"]
    assert len(list((tmp_path / "codes").iterdir())) == len(ladder.GENERATED)
    kept = ladder.show(pipe, ladder.take(pipe, "generated", batch, tmp_path / "codes"))
    for way, (clip,) in kept.items():
        assert np.array_equal(ladder.to_size(clip.frames)[::4], rungs.shown["generated" + way][0])
    ladder.save(rungs, tmp_path, {"model": "nano"})
    assert (tmp_path / "report.json").exists() and (tmp_path / "sheet-0.png").exists()
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rungs.rows)


def test_a_tokenizer_stored_in_int8_is_loaded(nano, tmp_path):
    folder = ModelFolder(shutil.copytree(nano, tmp_path / "model"))
    exact = folder.load("vqvae")
    folder.save("vqvae", exact, torch.int8)
    loaded = ladder.load_tokenizer(folder.file("vqvae"))
    rounded = folder.load("vqvae").state_dict()
    assert all(torch.equal(value, rounded[name].float()) for name, value in loaded.state_dict().items())


def test_unknown_rung_is_refused_before_any_work(judge):
    with pytest.raises(ValueError, match="choose from rendered"):
        ladder.climb(None, ladder.draw_batch(sprites(), 1, 0), ["perfect"], judge)
