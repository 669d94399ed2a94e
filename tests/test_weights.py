import json
import shutil

import pytest
import torch

from cogvideo.weights import ModelError, ModelFolder, find_model, replacing


@pytest.fixture
def copy(nano, tmp_path) -> ModelFolder:
    return ModelFolder(shutil.copytree(nano, tmp_path / "copy"))


def test_a_part_comes_back_as_it_was_saved(copy):
    base = copy.load("base")
    copy.save("base", base)
    again = copy.load("base")
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), again.state_dict().values()))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_half_precision_is_a_rounding(copy):
    exact = copy.load("base").embed.weight
    copy.save("base", copy.load("base"), torch.float16)
    rounded = copy.load("base").embed.weight
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.equal(rounded, exact.half().float())


def test_unknown_models_are_named():
    with pytest.raises(ModelError, match="unknown model 'nonesuch'; choose one of"):
        find_model("nonesuch")


def break_config(folder):
    (folder / "config.json").write_text("{")


def break_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
    data = (folder / "base.safetensors").read_bytes()
    (folder / "base.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (break_config, "config.json is damaged"),
        (break_layers, "base.safetensors does not fit"),
        (truncate, "base.safetensors is damaged"),
        (lambda f: (f / "base.safetensors").unlink(), "base.safetensors is missing"),
    ],
)
def test_damage_names_the_file(copy, harm, named):
    harm(copy.path)
    with pytest.raises(ModelError, match=named):
        copy.load("base")


def test_damaged_text_model(copy):
    (copy.path / "text.model").write_bytes(b"no")
    with pytest.raises(ModelError, match="text.model is damaged"):
        copy.text()


def test_nothing_half_written_stays(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as file:
        file.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
