"""The verbs on a random model: shapes, rates, what is kept, what is refused."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from cogvideo import Clip, CogVideo
from cogvideo.generate.draft import Draft
from cogvideo.generate.prompts import Prompts
from cogvideo.generate.sampling import Sampling
from cogvideo.model.folder import ModelError


@pytest.fixture(scope="module")
def pipe(nano) -> CogVideo:
    return CogVideo.from_pretrained(nano, dtype="float32")


PROMPTS, SEEDS = ["a dog runs to the right", "a cat in the snow"], [3, 4]


@pytest.fixture(scope="module")
def draft(pipe) -> Draft:
    return pipe.keyframes(PROMPTS, SEEDS)


def test_the_schedule_of_the_paper(pipe, draft):
    shapes = [(draft.codes.shape[1], draft.fps)]
    while draft.fps < 8:
        draft = pipe.interpolate(draft)
        shapes.append((draft.codes.shape[1], draft.fps))
    assert shapes == [(5, 1), (9, 2), (17, 4), (33, 8)]
    assert pipe.frame_counts == {1: 1} | dict(shapes)


def test_interpolation_keeps_the_frames_it_was_given(pipe, draft):
    finer = pipe.interpolate(pipe.interpolate(draft))
    assert torch.equal(finer.codes[:, ::4], draft.codes)


def test_a_clip_alone_equals_the_same_clip_in_a_batch(pipe, draft):
    alone = pipe.interpolate(pipe.keyframes(PROMPTS[1:], SEEDS[1:]))
    assert torch.equal(pipe.interpolate(draft).codes[1], alone.codes[0])


def test_the_whole_way(pipe):
    clips = pipe(PROMPTS, num_frames=9, num_videos_per_prompt=2, seed=3, progress=False)
    assert [clip.caption for clip in clips] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert all(clip.frames.shape == (9, 32, 32, 3) and clip.fps == 2 for clip in clips)
    again = pipe(PROMPTS[0], num_frames=9, seed=4, progress=False)
    assert (again[0].frames == clips[1].frames).all()
    assert not (clips[0].frames == clips[1].frames).all()


def test_one_frame_is_the_picture_that_a_video_begins_with(pipe):
    picture = pipe(PROMPTS, num_frames=1, seed=3, progress=False)
    assert [clip.frames.shape for clip in picture] == [(1, 32, 32, 3)] * 2
    first = pipe.first_frames(PROMPTS, SEEDS)
    for clip, whole in zip(picture, pipe.upscale(pipe.decode(first))):
        assert (clip.frames == whole.frames).all()
    assert torch.equal(pipe.keyframes(PROMPTS, SEEDS).codes[:, :1], first.codes)


def test_one_frame_needs_no_stages(nano, tmp_path):
    folder = shutil.copytree(nano, tmp_path / "model")
    for stage in ("stage1", "stage2"):
        (folder / f"{stage}.safetensors").unlink()
    pipe = CogVideo.from_pretrained(folder, dtype="float32")
    assert pipe("a dog", num_frames=1, seed=0, progress=False)[0].frames.shape == (1, 32, 32, 3)
    with pytest.raises(ModelError, match="stage1"):
        pipe("a dog", num_frames=5, seed=0, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("together", [1, 4, 32])
def test_codes_do_not_depend_on_how_many_windows_are_filled_at_once(nano, monkeypatch, dtype, together):
    pipe = CogVideo.from_pretrained(nano, dtype=dtype)
    draft = pipe.interpolate(pipe.keyframes(PROMPTS, SEEDS))
    free = pipe.interpolate(draft)
    monkeypatch.setattr(CogVideo, "_samples_at_once", lambda *_: together)
    assert torch.equal(pipe.interpolate(draft).codes, free.codes)


def test_image_to_video_begins_with_the_image(pipe):
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    seen = pipe.encode([Clip(image[None], 1.0)], PROMPTS[:1], [0])
    made = pipe.keyframes(PROMPTS[:1], [0], begin=seen)
    assert torch.equal(made.codes[:, 0], seen.codes[:, 0])
    clip = pipe(PROMPTS[0], image=image, num_frames=5, seed=0, progress=False)[0]
    assert (clip.frames == pipe.upscale(pipe.decode(made))[0].frames).all()


def test_continuation_begins_with_the_last_seconds(pipe):
    frames = np.random.default_rng(0).integers(0, 256, (25, 16, 16, 3), dtype=np.uint8)
    begin = pipe._beginning(None, Clip(frames, 8.0), PROMPTS[:1], [0])
    expected = pipe.encode([Clip(frames[[0, 8, 16, 24]], 1.0)], PROMPTS[:1], [0])
    assert torch.equal(begin.codes, expected.codes)


def test_in_betweening_of_a_users_frames(pipe):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    seen = pipe.encode([Clip(frames, 2.0)], PROMPTS[:1], [0])
    made = pipe.interpolate(seen)
    assert made.codes.shape[1] == 5 and made.fps == 4
    assert torch.equal(made.codes[:, ::2], seen.codes)


def test_progress_tells_every_step(pipe):
    told = []
    pipe(PROMPTS[0], num_frames=9, seed=1, progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "first frame",
        "key frames",
        "to 2 fps",
        "upscale",
    ]
    for what in ("first frame", "key frames", "to 2 fps"):
        done, total = [(d, t) for w, d, t in told if w == what][-1]
        assert done == total


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt=" "), "the prompt is empty"),
        (dict(prompt="a dog " * 200), r"the text has \d+ tokens, \d+ more than the 64 that fit"),
        (dict(prompt="a dog", num_frames=7), "choose one of 1, 5, 9, 17, 33"),
        (dict(prompt="a dog", seed=-1), "seed -1 is out of range"),
        (dict(prompt="a dog", num_videos_per_prompt=0), "must be 1 or more"),
        (dict(prompt="a dog", guidance_scale=0.1), "guidance_scale must be from 1 to 1000"),
        (dict(prompt="a dog", guidance_scale=float("nan")), "guidance_scale must be from 1 to 1000"),
        (dict(prompt="a dog", num_frames=0), "choose one of 1, 5, 9, 17, 33"),
        (dict(prompt="a dog", num_frames=1, image=np.zeros((8, 8, 3), np.uint8)), "num_frames 1 is the"),
        (dict(prompt=[]), "there is no prompt"),
        (dict(prompt="a dog", image=np.zeros((8, 8, 4), np.uint8)), r"an image is uint8 \[H, W, 3\]"),
        (dict(prompt="a dog", image="nothing.png"), "nothing.png"),
        (dict(prompt="a dog", image="a.png", video="b.mp4"), "not both"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(pipe, arguments, message):
    def no_work(*step):
        raise AssertionError("work was begun")

    with pytest.raises(ValueError, match=message):
        pipe(**arguments, progress=no_work)


def test_a_part_that_is_missing_or_damaged_is_found_before_any_work(nano, tmp_path):
    folder = shutil.copytree(nano, tmp_path / "nano")
    pipe = CogVideo.from_pretrained(folder)
    for part in ("stage2", "refiner"):
        file = folder / f"{part}.safetensors"
        before = file.read_bytes()
        for left, message in ((before[:-9], f"{part}.* is damaged"), (None, f"is incomplete: {part}")):
            file.unlink() if left is None else file.write_bytes(left)
            with pytest.raises(ModelError, match=message):
                pipe("a dog", progress=lambda *step: pytest.fail("work was begun"))
        file.write_bytes(before)
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"sampling": {"image": {"heat": 1}}},
        {"prompts": {"stage1": "{x}"}},
        {"sampling": []},
        {"model": config["model"] | {"layers": "six"}},
        {"model": config["model"] | {"heads": 3}},
        {"vqvae": config["vqvae"] | {"resolution": 96}},
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match="config.json"):
            CogVideo.from_pretrained(folder)


@pytest.mark.parametrize(
    "device, dtype, message",
    [
        ("quantum", None, "no device 'quantum' here; choose one of cpu"),
        ("meta", None, "no device 'meta' here; choose one of cpu"),
        ("cpu", "float8", "choose one of int8, bfloat16, float32"),
    ],
)
def test_devices_and_dtypes_that_are_not_there(nano, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        CogVideo.from_pretrained(nano, device, dtype)


def test_the_shipped_model_makes_what_its_own_tokens_say():
    """It is whole, small enough, and first frames of two prompts differ where the prompts do."""
    pipe = CogVideo.from_pretrained("tiny")
    assert sum(file.stat().st_size for file in pipe.folder.path.iterdir()) < 45e6
    prompts = ["a dog runs to the right across a green field", "a rocket flies in space"]
    clips = pipe.upscale(pipe.decode(pipe.first_frames(prompts, [1, 1])))
    assert [clip.frames.shape for clip in clips] == [(1, 192, 192, 3)] * 2
    red, green, blue = clips[0].frames[0, -40:].reshape(-1, 3).mean(0)  # the ground
    assert green > red and green > blue
    assert clips[1].frames.mean() < 0.5 * clips[0].frames.mean()  # space is dark
    assert pipe.hints(prompts) == []


def test_the_shipped_regression_model_makes_what_was_asked_for():
    """It is whole, small enough, moves to the side that the prompt names, and its ground is that of the
    place."""
    pipe = CogVideo.from_pretrained("direct-tiny")
    assert sum(file.stat().st_size for file in pipe.folder.path.iterdir()) < 12e6
    prompts = [f"a red car drives to the {side} in the desert" for side in ("left", "right")]
    left, right = pipe.regress(prompts, 33)
    assert left.frames.shape == (33, 48, 48, 3)
    [large] = pipe.upscale([left])
    assert large.frames.shape == (33, 192, 192, 3) and large.fps == 8
    for clip, towards in ((left, -1), (right, 1)):
        changed = np.abs(clip.frames.astype(float) - clip.frames.mean(0)).sum((1, 3))  # [F, columns]
        where = (changed * np.arange(48)).sum(1) / changed.sum(1)
        assert towards * (where[-1] - where[0]) > 4  # pixels, of all that changes
    red, green, blue = left.frames[0, -10:].reshape(-1, 3).mean(0)
    assert red > green > blue  # sand


@pytest.mark.parametrize("killed", ["interpolate", "larger", "decode"])
def test_a_killed_call_goes_on_where_it_was(nano_large, tmp_path, monkeypatch, killed):
    """Only what was under way is made again, and the clip is that of a call that was left alone."""
    pipe = CogVideo.from_pretrained(nano_large, dtype="float32")
    call = {"prompt": PROMPTS, "seed": 5, "num_frames": 9}
    whole = pipe(**call, progress=False)
    assert whole[0].frames.shape == (9, 64, 64, 3) and (whole[0].frames != whole[1].frames).any()

    def kill(*step, **options):
        raise KeyboardInterrupt

    def kill_at_the_fifth(what, done, total):
        if (what, done) == ("larger frames", 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed != "larger":
            patch.setattr(pipe, killed, kill)
        pipe(**call, progress=kill_at_the_fifth if killed == "larger" else False, keep=tmp_path)
    made = []
    again = pipe(**call, progress=lambda what, done, total: made.append((what, done)), keep=tmp_path)
    assert all((a.frames == b.frames).all() for a, b in zip(again, whole))
    expected = {"interpolate": {"to 2 fps": 8, "larger frames": 9}, "larger": {"larger frames": 4}}
    assert Counter(what for what, _ in made) == expected.get(killed, {})
    made.clear()
    pipe(**call | {"seed": 6}, progress=lambda what, done, total: made.append(what), keep=tmp_path)
    assert "key frames" in made  # another call begins at the beginning


def test_unknown_words_come_with_the_nearest_known(pipe):
    assert pipe.prompts.unknown_words("a dog runs") == {}
    hints = pipe.prompts.unknown_words("a dogg runs 龘")
    assert "dog" in hints["dogg"] and "龘" in hints


def test_hints_are_given_before_the_work(nano):
    pipe = CogVideo.from_pretrained(nano)
    assert pipe.hints(["a dog runs"]) == []
    pipe.prompts = Prompts(pipe.text, languages=["zh"])
    pipe.sampling |= {"stage1": Sampling(1.05, 12, token_temperature=0.89)}
    (chinese, plain) = pipe.hints(["a dog runs"])
    assert "in Chinese" in chinese and "cluster_labels.npy" in plain
    assert pipe.hints(["一只小狗"]) == [plain]
