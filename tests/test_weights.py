import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideo.files import atomic_folder, atomic_path
from cogvideo.generate.int8 import Int8Linear
from cogvideo.model.folder import ModelError, ModelFolder, Piece, find_model


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


def test_int8_is_stored_as_it_is_computed_with(copy):
    """Half the bytes of float16, and the int8 layers of both are the same up to the last bit of a scale."""
    exact = copy.load("base")
    copy.save("base", exact, torch.int8)
    stored = load_file(copy.file("base"))
    name = "blocks.0.up.weight"
    assert stored[name].dtype == torch.int8 and stored["embed.weight"].dtype == torch.float16
    restored = copy.load("base").blocks[0].up
    assert not torch.equal(restored.weight, exact.blocks[0].up.weight)
    x = torch.randn(3, restored.in_features, generator=torch.Generator().manual_seed(0))
    made = [Int8Linear(layer.weight, None)(x) for layer in (exact.blocks[0].up, restored)]
    assert (made[0] - made[1]).abs().max() < 1e-5 * made[0].abs().max()


def test_int8_rounds_convolutions_but_not_the_encoder(copy):
    """Codes must stay what they are; pixels differ by less than a level on average."""
    exact = copy.load("vqvae")
    copy.save("vqvae", exact, torch.int8)
    stored, rounded = load_file(copy.file("vqvae")), copy.load("vqvae")
    kinds = {name.split(".")[0]: value.dtype for name, value in stored.items() if value.ndim == 4}
    assert kinds == {"encoder": torch.float16, "decoder": torch.int8}
    for name, weight in exact.encoder.state_dict().items():
        assert torch.equal(rounded.encoder.state_dict()[name], weight.half().float())
    codes = torch.arange(16).view(1, 16)
    before, after = exact.decode(codes), rounded.decode(codes)
    assert not torch.equal(before, after) and (before - after).abs().mean() < 1 / 255


def test_scales_that_fit_no_matrix_are_named(copy):
    copy.save("base", copy.load("base"), torch.int8)
    stored = load_file(copy.file("base"))
    stored["blocks.0.up.weight:scale"] = stored["blocks.0.up.weight:scale"][:-1].clone()
    save_file(stored, copy.file("base"))
    with pytest.raises(ModelError, match="blocks.0.up.weight:scale"):
        copy.load("base")


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
    truncate_part(folder / "base.safetensors")


def truncate_part(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


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
    with pytest.raises(RuntimeError), atomic_path(target) as file:
        file.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# -- parts that are larger than memory


def pieces(tensors: dict[str, torch.Tensor]) -> dict[str, Piece]:
    return {name: Piece(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def test_a_part_written_in_pieces_is_the_part(copy):
    state = copy.load("vqvae").state_dict()
    state |= {"half": torch.randn(3, 5).T.bfloat16(), "none": torch.zeros(0, 2)}
    size = copy.write("vqvae", pieces(state))
    assert size == sum(t.nbytes for t in state.values())
    loaded = load_file(copy.file("vqvae"))
    assert loaded.keys() == state.keys() and all(torch.equal(state[key], loaded[key]) for key in state)
    changed = {**state, "half": state["half"] + 1, "codebook.filled": ~state["codebook.filled"]}
    assert list(copy.differing("vqvae", pieces(state))) == []
    assert set(copy.differing("vqvae", pieces(changed))) == {"half", "codebook.filled"}
    truncate_part(copy.file("vqvae"))
    with pytest.raises(ModelError, match="vqvae.safetensors is damaged"):
        list(copy.differing("vqvae", pieces(state)))


def test_pieces_are_made_one_by_one(tmp_path):
    """While one is made, those before it are on the disk already and in memory no more."""
    places: list[int] = []

    def make() -> torch.Tensor:
        tensor = torch.zeros(1000)
        places.append(tensor.data_ptr())
        return tensor

    piece = Piece(torch.Size([1000]), torch.float32, make)
    ModelFolder(tmp_path).write("a", {f"t{i}": piece for i in range(50)})
    assert len(places) == 50 and len(set(places)) < 10  # the same memory again and again


def test_too_large_a_part_is_not_begun(tmp_path):
    piece = Piece(torch.Size([1 << 50]), torch.float32, lambda: torch.zeros(1))
    with pytest.raises(ModelError, match="a needs .* GB, but"):
        ModelFolder(tmp_path).write("a", {"t": piece})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, {}, {"a": "old", "c": "old"}])
def test_a_folder_is_replaced_at_the_end(tmp_path, before):
    target = tmp_path / "folder"
    if before is not None:
        target.mkdir()
        for name, text in before.items():
            (target / name).write_text(text)
    there = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError), atomic_folder(target) as work:
        (work / "a").write_text("new")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*")) == there
    with atomic_folder(target) as work:
        (work / "a").write_text("new")
        assert sorted(path.name for path in target.rglob("*")) == sorted(before or ())
    expected = {**(before or {}), "a": "new"}
    assert {path.name: path.read_text() for path in target.iterdir()} == expected
    assert list(tmp_path.iterdir()) == [target]


def test_a_part_is_as_readable_as_its_folder(tmp_path):
    """safetensors writes files that only their owner can read."""
    folder = ModelFolder(tmp_path)
    for mode, due in ((0o755, 0o644), (0o700, 0o600)):
        tmp_path.chmod(mode)
        folder.save("vqvae", torch.nn.Linear(2, 2))
        assert (tmp_path / "vqvae.safetensors").stat().st_mode & 0o777 == due
