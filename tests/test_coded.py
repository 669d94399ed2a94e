"""Videos as codes in shards: each once, resumable, and training sees what it would see of the frames."""

import dataclasses
import os
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lora import phase
from test_survey import video

from cogvideo import cli
from cogvideo.data import coded
from cogvideo.data.coded import CodedVideos, digest, encode_frames, open_coded, write_shards
from cogvideo.data.cut import ClipSpec, cut_clip
from cogvideo.data.loader import batches
from cogvideo.data.sources import open_source
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.train import inherit, loop, recipes
from cogvideo.train.run import Options, Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of two rates, portrait, with several captions; one is too short for anything, one is broken."""
    place = tmp_path_factory.mktemp("videos")
    video(place / "a.mp4")
    video(place / "b.mp4", height=64, width=36, caption="a zyx dog runs to the right\na dog")
    video(place / "fast.mp4", frames=61, fps=30.0)
    video(place / "slow.mp4", frames=9, fps=2.0)
    video(place / "long.mp4", frames=100, fps=8.0)
    (place / "broken.mp4").write_bytes((place / "a.mp4").read_bytes()[:200])
    (place / "broken.txt").write_text("a dog")
    return place


@pytest.fixture(scope="module")
def vqvae(nano) -> VQVAE:
    return ModelFolder(nano).load_as(VQVAE, "vqvae")


def tokenize(folder, vqvae, out, encode=None):
    how = encode or (lambda frames: encode_frames(vqvae, frames))
    return write_shards(open_source(folder), how, digest(vqvae), 16, out)


@pytest.fixture(scope="module")
def shards(folder, vqvae, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "tokens"
    tokenize(folder, vqvae, out)
    return out


def by_name(source: CodedVideos):
    return {source.name(i).rpartition("/")[2]: source[i] for i in range(source.count)}


def test_every_video_is_encoded_at_its_rate_or_named_with_the_reason(shards, folder, vqvae):
    source = open_source(shards)
    assert isinstance(source, CodedVideos)
    rows = by_name(source)
    assert set(rows) == {"a.mp4", "b.mp4", "fast.mp4", "slow.mp4", "long.mp4"}
    assert {name: row.fps for name, row in rows.items()} == {
        "a.mp4": 8, "b.mp4": 8, "fast.mp4": 8, "slow.mp4": 2, "long.mp4": 8
    }  # fmt: skip
    assert rows["a.mp4"].codes_at_fps.shape == (33, 16) and rows["long.mp4"].codes_at_fps.shape == (100, 16)
    assert rows["b.mp4"].captions == ("a zyx dog runs to the right", "a dog")
    (skipped,) = source.skipped
    assert "broken.mp4" in skipped
    videos = open_source(folder)
    for i in range(videos.count):
        name = videos.name(i).rpartition("/")[2]
        if name in rows:
            row = rows[name]
            frames = videos[i].frames(np.arange(len(row.codes_at_fps)) / row.fps, 16)
            assert (encode_frames(vqvae, frames) == row.codes_at_fps).all()


def test_clips_of_codes_are_those_of_the_frames(shards, folder, vqvae):
    """The same rate and, on the grid of stored frames, the same codes."""
    rows = by_name(open_source(shards))
    videos = {open_source(folder).name(i).rpartition("/")[2]: i for i in range(open_source(folder).count)}
    real = open_source(folder)[videos["a.mp4"]]
    for spec in (ClipSpec(5, (1,), sizes=(16,)), ClipSpec(33, (8,), sizes=(16,))):  # start at 0
        stored = cut_clip(rows["a.mp4"], spec, np.random.default_rng(1))
        drawn = cut_clip(real, spec, np.random.default_rng(1))
        assert stored.duration == drawn.duration and stored.caption == drawn.caption
        assert (encode_frames(vqvae, drawn.frames[0]) == stored.codes).all()
    with pytest.raises(ValueError, match="too few for 5 frames at 4, 8"):
        cut_clip(rows["slow.mp4"], ClipSpec(5, (4, 8)), np.random.default_rng(0))


@pytest.mark.parametrize("reuse", [1, 2])
def test_training_on_codes_is_training_on_frames(shards, folder, world, nano, tmp_path, reuse):
    """Of clips that span the whole video: the weights are equal to the bit."""
    states = []
    for data, out in ((shards, tmp_path / "codes"), (folder, tmp_path / "frames")):
        source = open_source(data)
        row = phase("image", lr=1e-3, reuse=reuse)
        assert row.crop_share > 0
        row = dataclasses.replace(row, clips=ClipSpec(33, (8,), keep=1, sizes=(16,), cover=4))
        recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=(row,))
        if not isinstance(source, CodedVideos):  # the same videos in the same order
            entries = tuple(e for e in source.entries if e.path.stem in ("a", "b"))
            source = dataclasses.replace(source, entries=entries)
        else:
            rows = tuple(r for r in source.rows if r.stored.name[-5:] in ("a.mp4", "b.mp4"))
            source = dataclasses.replace(source, rows=rows)
        options = Options(quiet=True, init=ModelFolder(nano))
        before, inherit.CAPTIONS = inherit.CAPTIONS, 100
        loop.train(Run(recipe, out, source, presets.find("nano"), [row], options))
        inherit.CAPTIONS = before
        states.append(ModelFolder(out / "model").load("base").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_batches_of_codes_are_the_same_with_workers(shards):
    source = open_source(shards)
    spec = ClipSpec(5, (1, 2), sizes=(16,))
    here = next(batches(source, spec, 3, seed=1))
    there = next(batches(source, spec, 3, seed=1, workers=1))
    assert here.codes.shape == (3, 5, 16) and here.frames == () and here.captions == there.captions
    assert torch.equal(here.codes, there.codes)


def test_an_interrupted_call_goes_on_and_encodes_each_video_once(folder, vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(coded, "VIDEOS_A_SHARD", 2)
    calls = []

    def encode(frames):
        calls.append(len(frames))
        if len(calls) == 5:  # in the second shard
            raise KeyboardInterrupt
        return encode_frames(vqvae, frames)

    out = tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt):
        tokenize(folder, vqvae, out, encode)
    done = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert done and not (out / "tokens.json").exists()
    assert not list(out.glob(".part*"))
    table = tokenize(folder, vqvae, out)
    assert table.videos == 5
    assert done.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}.items()
    names = [open_coded(out).name(i) for i in range(5)]
    assert len(set(names)) == 5


def test_other_videos_and_other_tokenizers_are_refused(shards, folder, vqvae, nano, tmp_path):
    with pytest.raises(ValueError, match="another tokenizer; choose another -o"):
        write_shards(open_source(folder), lambda frames: frames, "other", 16, shards)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds something else"):
        tokenize(folder, vqvae, tmp_path)

    source = open_source(shards)
    row = phase("image")
    recipe = dataclasses.replace(recipes.find("tiny"), preset="nano", pieces=500, phases=(row,))
    with pytest.raises(ValueError, match="needs the part vqvae"):
        Run(recipe, tmp_path / "a", source, presets.find("nano"), [row], Options(quiet=True)).preflight()
    wrong = dataclasses.replace(source, table=dataclasses.replace(source.table, tokenizer="other"))
    options = Options(quiet=True, init=ModelFolder(nano))
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        Run(recipe, tmp_path / "b", wrong, presets.find("nano"), [row], options).preflight()
    frames = recipes.find("tiny").phase("decoder")
    clips = dataclasses.replace(frames.clips, sizes=(16,), crop=8, cover=4)
    frames = dataclasses.replace(frames, clips=clips)
    recipe = dataclasses.replace(recipe, phases=(row, frames))
    with pytest.raises(ValueError, match="decoder needs frames"):
        Run(recipe, tmp_path / "c", source, presets.find("nano"), [frames], options).preflight()


def test_damaged_shards_are_named(shards, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    (tar,) = broken.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"000000.tar|a shard is missing"):
        open_source(broken)
    tar.unlink()
    with pytest.raises(ValueError, match="a shard is missing"):
        open_source(broken)


def test_the_command_writes_shards_that_train_takes(folder, nano, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tokens"
    command = ["cogvideo", "data", "tokenize", str(folder), "-o", str(out), "--model", str(nano)]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    assert "5 videos in" in capsys.readouterr().out
    with tarfile.open(out / "000000.tar") as tar:
        names = tar.getnames()
    assert sum(name.endswith(".codes.npy") for name in names) == 5


def in_parts(folder, vqvae, place):
    """A function that writes the shards, one for each video, and returns their content."""
    encode = partial(encode_frames, vqvae)

    def write(name, **how):
        out = place / name
        write_shards(open_source(folder), encode, digest(vqvae), 16, out, **how)
        return {file.name: file.read_bytes() for file in sorted(out.glob("*.tar"))}

    return write


def test_processes_write_the_same_shards(folder, vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(coded, "VIDEOS_A_SHARD", 1)
    write = in_parts(folder, vqvae, tmp_path)
    alone = write("alone")
    assert len(alone) == 6 and write("processes", workers=2) == alone


@pytest.mark.skipif("COGVIDEO_SLOW" not in os.environ, reason="takes four minutes; set COGVIDEO_SLOW=1")
def test_a_cluster_that_loses_a_machine_writes_the_same_shards(folder, vqvae, tmp_path, monkeypatch):
    """Ray on two raylets of this machine, of which one is killed in the middle."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "cogvideo[cluster]"')
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(coded, "VIDEOS_A_SHARD", 1)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    write = in_parts(folder, vqvae, tmp_path)
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}  # to notice a lost machine
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)

        def lose(task, done, total):
            if done == 1:
                cluster.remove_node(other, allow_graceful=False)

        assert write("cluster", ray=cluster.address, progress=lose) == write("alone")
    finally:
        ray.shutdown()
        cluster.shutdown()
