"""Options, prompts, variables and model folders that cannot be meant end in one line that names them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideo.cluster import place_of_torchrun, spread
from cogvideo.generate.cogvideo import load
from cogvideo.hardware import find_device
from cogvideo.limits import MOST_PROMPT, check_range
from cogvideo.model.folder import ModelError, ModelFolder
from cogvideo.model.hub import is_hub_id
from scripts.campaign.loss import usual_signals

TRAIN = ["train", "tiny", "--out", "new", "--phases", "image"]
SERVE = ["serve", "--models", "nano", "--results", "x", "--database", "sqlite://"]
STUDY = ["judge", "new", "study", "--systems", "a", "b"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "a dog", "--num-videos", "1000000000"],
         "--num-videos must be from 1 to 100000; got 1000"),
        (["generate", "a dog", "--num-videos", "9" * 400], "--num-videos must be from 1 to 100000; got 999"),
        (["generate", "a dog", "--guidance-scale", "1e300"], "guidance_scale must be from 1 to 1000"),
        (["generate", "a dog", "--threads", "0"], "--threads must be from 1 to 1024; got 0"),
        (["generate", "a dog", "--threads", "1000000"], "--threads must be from 1 to 1024"),
        (["generate", "a dog", "--workers", "-1"], "--workers must be from 0 to 256; got -1"),
        (["estimate", "tiny", "--num-videos", "0"], "--num-videos must be from 1"),
        (["estimate", "tiny", "--num-videos", "9" * 30], "--num-videos must be from 1"),
        (["data", "tokenize", "videos", "-o", "codes", "--threads", "-1"], "--threads must be from 1"),
        (["data", "tokenize", "videos", "-o", "codes", "--workers", "9999"],
         "--workers must be from 0 to 256"),
        ([*TRAIN, "--threads", "0"], "--threads must be from 1"),
        ([*TRAIN, "--workers", "1000000"], "--workers must be from 0 to 256"),
        ([*TRAIN, "--processes", "1000000"], "--processes must be from 1 to 256"),
        ([*TRAIN, "--mesh", "99999x99999x1"], "the processes of --mesh 99999x99999x1 must be from 1 to 256"),
        ([*TRAIN, "--lora", "0"], "--lora must be from 1 to 1024; got 0"),
        ([*TRAIN, "--image.steps", "9" * 20], "image.steps must be from 1 to 1000000000"),
        ([*TRAIN, "--image.batch", "1000000000"], "image.batch is too large: the frames of 1000000000 clips"),
        ([*TRAIN, "--image.lr", "1e999"], "image.lr must be from 0 to"),
        ([*TRAIN, "--image.loss.temporal", "nan"], "loss.temporal must be from 0 to"),
        (["estimate", "--train", "tiny", "--crops.batch", "10000000"], "crops.batch is too large"),
        ([*SERVE, "--keep-days", "nan"], "--keep-days must be from 0 to"),
        ([*SERVE, "--memory=-inf"], "--memory must be from 0 to"),
        ([*SERVE, "--quota", "1e999"], "--quota must be from 0 to"),
        ([*SERVE, "--threads", "0"], "--threads must be from 1"),
        ([*SERVE, "--workers", "1000000"], "--workers must be from 0 to 256"),
        ([*SERVE, "--max-queue", "0"], "--max-queue must be from 1"),
        ([*SERVE, "--max-upload", "-1"], "--max-upload must be from 1"),
        ([*SERVE, "--first-frame-seconds", "nan"], "--first-frame-seconds must be from 0"),
        ([*SERVE, "--device", "hpu"], "no device 'hpu' here; choose one of cpu"),
        (["worker", *SERVE[1:], "--keep-days", "inf"], "--keep-days must be from 0 to"),
        (["worker", *SERVE[1:], "--threads", "9" * 30], "--threads must be from 1"),
        (["worker", "--models", "tiny", "--database", "sqlite://", "--results", "no://x"],
         "results cannot be kept"),
        ([*STUDY, "--least-seconds", "inf"], "least_seconds must be from 0"),
        ([*STUDY, "--least-agreement", "2"], "least_agreement must be from 0 to 1"),
        ([*STUDY, "--per-rater", "9" * 20], "per_rater must be from 1"),
        ([*STUDY, "--seed", "-1"], "seed must be from 0"),
        (["evaluate", "a", "b", "--seed", "-1"], "seed must be from 0"),
        (["evaluate", "a", "b", "--count", "1"], "count must be from 2"),
        (["models", "~nosuchuser/x"],
         "there is no model folder '~nosuchuser/x'; choose one of direct-tiny, tiny"),
        (["models", "./nowhere"], "there is no model folder './nowhere'; choose one of direct-tiny, tiny"),
        (["models", "/proc/nowhere"], "there is no model folder '/proc/nowhere'"),
        (["models", "a/b/c"], "there is no model folder 'a/b/c'"),
        (["models", "\x1b[31mred"], r"unknown model '\x1b[31mred'"),
        (["train", "\x1b[31m\u202e\udcff"], "unknown recipe '"),
        (["generate", "a dog \udcff"], "the prompt is not text in UTF-8: 'a dog \\udcff'"),
        (["generate", "a dog \ud800", "--model", "direct-tiny"], "the prompt is not text in UTF-8"),
        (["generate", "x" * (MOST_PROMPT + 1)], f"{MOST_PROMPT + 1} characters; at most {MOST_PROMPT}"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_named(complaint, arguments, message):
    told = complaint(*arguments)
    assert message in told and told[:-1].isprintable() and len(told) < 1000


def test_a_long_error_loses_its_middle(complaint):
    told = complaint("models", "x/" * 3000)
    assert len(told) < 1000 and told.startswith("cogvideo: ") and " ... " in told
    told = complaint("evaluate", "x/" * 3000 + "end", "y")
    assert len(told) < 1000 and "File name too long" in told and "end" in told


def test_a_bound_is_shown_in_a_few_characters():
    check_range("n", None)
    check_range("n", 1)
    check_range("n", 1e9)
    for value, shown in ((0, "0"), (float("nan"), "nan"), (10**400, "1000"), (-1.5, "-1.5")):
        with pytest.raises(ValueError, match=rf"n must be from 1 to 1000000000; got {shown}") as error:
            check_range("n", value)
        assert len(str(error.value)) < 100


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("owner/name") and is_hub_id("THUDM/CogVideo.v1@main")
    for name in ("./nowhere", "../x", "/a/b", "a/b/c", "runs/mine", "~/x", "name", "owner/", "é/x"):
        assert not is_hub_id(name), name


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cogvideo", "models", "owner/name"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = "cogvideo: owner/name is no folder here, and the hub did not give it: it cannot be reached\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize("device", ["hpu", "xla", "privateuseone", "meta", "cuda:99", "", "\ud800", "cpu:-7"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match="here; choose one of cpu"):
        find_device(device)


@pytest.mark.parametrize(
    "rank, world, message",
    [
        ("/", "2", "RANK is set to '/'"),
        ("0", None, "WORLD_SIZE is set to ''"),
        ("0", "9" * 400, "WORLD_SIZE is set to '999"),
        ("2", "2", "RANK 2 must be less than WORLD_SIZE 2"),
    ],
)
def test_variables_of_torchrun_are_checked(monkeypatch, rank, world, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        place_of_torchrun()


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_told_at_once(address):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=f"no Ray cluster at '{address}'.*give HOST:PORT"):
        list(spread(len, ["a"], address=address))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_during_the_imports_ends_in_one_line(tmp_path, name):
    """A module that is imported early, and sends a signal."""
    (tmp_path / "tyro.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(9)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "cogvideo", "models"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=usual_signals)
    code = 128 + signal.Signals[name]
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"cogvideo: stopped by {name}\n")


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As SIGHUP is by nohup."""
    (tmp_path / "tyro.py").write_text(
        "import os, signal, sys\nos.kill(os.getpid(), signal.SIGHUP)\nsys.exit(7)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = ["nohup", sys.executable, "-m", "cogvideo", "models"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).returncode == 7


# -- model folders


@pytest.fixture
def copy(nano, tmp_path):
    return ModelFolder(shutil.copytree(nano, tmp_path / "copy"))


def change(file, name, tensor):
    """Replace a tensor of a safetensors file; None removes it."""
    state = load_file(file)
    state.pop(name, None)
    save_file(state if tensor is None else state | {name: tensor}, file)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "part, name, number",
    [
        ("base", "blocks.1.up.weight", float("nan")),
        ("base", "norm.bias", float("nan")),
        ("stage1", "positions.weight", float("inf")),
        ("stage2", "attention.0.qkv.bias", float("-inf")),
        ("vqvae", "encoder.0.bias", float("nan")),
        ("decoder", "frame.0.weight", float("nan")),
        ("refiner", "leave.bias", float("inf")),
    ],
)
def test_weights_that_are_not_finite_are_named(copy, dtype, part, name, number):
    """Those of transformers when they give a logit that is not finite, all others when they are read."""
    state = load_file(copy.file(part))
    change(copy.file(part), name, torch.full_like(state[name], number))
    with pytest.raises(
        ModelError, match=rf"{part}.safetensors is damaged: {name} holds numbers that are not"
    ):
        load(copy.path, dtype=dtype)("a dog", num_frames=9, seed=1, progress=False)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("blocks.1.up.bias", None, "blocks.1.up.bias is missing"),
        ("blocks.1.up.bias", torch.zeros(3), r"blocks.1.up.bias is \[3\], not \["),
        ("blocks.1.up.bias", torch.zeros(()), r"blocks.1.up.bias is \[\], not \["),
        ("new" * 100, torch.zeros(3), "unknown tensor 'newnew"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(copy, name, tensor, message):
    change(copy.file("base"), name, tensor)
    with pytest.raises(ModelError, match=rf"base.safetensors does not fit .*config.json: {message}") as error:
        copy.load("base")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_type_is_named(copy, dtype):
    bias = load_file(copy.file("base"))["blocks.1.up.bias"]
    change(copy.file("base"), "blocks.1.up.bias", torch.zeros_like(bias).to(dtype))
    for wanted in (None, torch.float32):
        with pytest.raises(
            ModelError, match="blocks.1.up.bias is stored as .*, not as a floating-point type"
        ):
            copy.load("base", dtype=wanted)


@pytest.mark.parametrize("length", [0, 2**31, 2**60, 2**64 - 1])
def test_the_length_of_a_header_is_not_trusted(copy, length):
    file = copy.file("base")
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ModelError, match="base.safetensors is damaged"):
        copy.load("base")


def test_a_text_model_that_is_larger_than_the_vocab(copy):
    """Its last pieces would be read beyond the end of the embedding."""
    file = copy.path / "text.model"
    piece = b"\x0a\x0c\x0a\x05extra\x15\0\0\0\0"
    room = copy.spec().text_config.vocab - copy.spec().first_text - len(copy.text())
    file.write_bytes(file.read_bytes() + b"".join(piece.replace(b"extra", b"%05d" % i) for i in range(room)))
    assert len(copy.text()) == copy.spec().text_config.vocab - copy.spec().first_text
    file.write_bytes(file.read_bytes() + piece)
    with pytest.raises(
        ModelError, match=r"text.model does not fit .*config.json: it has \d+ pieces, and the vocab"
    ):
        copy.text()


def test_a_text_model_that_is_a_device(copy):
    (copy.path / "text.model").unlink()
    (copy.path / "text.model").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="text.model"):
        copy.text()


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        ('{"a": 1}'.encode("utf-16"), "not text in UTF-8"),
        (b'{"about": "\\ud800"}', "half of a character"),
        (b'{"about": "a", "about": "b"}', "the key 'about' is there twice"),
        (b"", "not JSON"),
    ],
)
def test_a_config_that_is_no_json(copy, text, message):
    (copy.path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=f"config.json.*{message}"):
        copy.spec()


def test_a_part_that_another_family_has(copy):
    with pytest.raises(ModelError, match="copy has no regression; its parts are vqvae, base"):
        copy.load("regression")
