"""Generation by processes that torchrun started."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cogvideo import cli
from cogvideo.generate.torchrun import Slices, cut
from cogvideo.model.folder import ModelFolder

PROMPTS = ["a dog runs", "a cat jumps", "a ball falls"]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*start, str(processes), "-m", "cogvideo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone(nano, tmp_path_factory) -> Path:
    """Videos of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    cli.generate(
        prompts=folder / "prompts.txt",
        out=folder / "out.png",
        model=str(nano),
        seed=3,
        dtype="float32",
        quiet=True,
    )
    return folder


@pytest.mark.parametrize("processes, slices", [(2, 1), (2, 2), (4, 2)])
def test_processes_generate_the_videos_of_one(nano, alone, tmp_path, processes, slices):
    done = torchrun(
        processes,
        "generate",
        *("--prompts", alone / "prompts.txt", "-o", tmp_path / "out.png", "--model", nano),
        *("--seed", "3", "--dtype", "float32", "--slices", slices),
    )
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("*.png"))
    assert [file.name for file in files] == [f"out-{i}.png" for i in range(3)]
    for file in files:
        assert file.read_bytes() == (alone / file.name).read_bytes()
    assert done.stdout.count("seed") == 3


def test_a_slice_has_a_share_of_the_matrices(nano):
    whole = ModelFolder(nano).load("base")
    here = ModelFolder(nano).load("base")
    cut(here, Slices(1, 2, None))
    for name, linear in whole.named_modules():
        if isinstance(linear, nn.Linear):
            part = here.get_submodule(name)
            share = getattr(part, "share", part).weight
            assert share.numel() == linear.weight.numel() // 2, name
    width = whole.config.width
    thirds = whole.blocks[0].attention.qkv.weight.unflatten(0, (3, width))[:, width // 2 :]
    assert torch.equal(here.blocks[0].attention.qkv.weight, thirds.flatten(0, 1))


def test_what_cannot_be_shared_is_refused(nano, tmp_path):
    for options, message in (
        ({"slices": 2}, "--slices must divide the number of processes, 1"),
        ({"slices": 0}, "--slices must divide"),
        ({"slices": 2, "keep": tmp_path / "kept"}, "leave out --keep"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.generate("a dog", out=tmp_path / "out.mp4", model=str(nano), **options)
    done = torchrun(2, "generate", "a dog", "--model", nano, "-o", tmp_path / "out.mp4")
    assert done.returncode and "several processes need --seed" in done.stderr
