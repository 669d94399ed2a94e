"""The original's image tokenizer computes what the original computed."""

import json
from dataclasses import replace

import pytest
import torch
from data.goldens import DATA, read

from cogvideo.convert import icetk as convert
from cogvideo.model import presets
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE, HierarchicalVQVAE

SPEC = presets.find("cogvideo-9b")
RATES = (4, 8, 16)


@pytest.fixture(scope="module")
def vqvae() -> HierarchicalVQVAE:
    states = read("weights_vqvae_tiny")
    spec = replace(SPEC, vqvae=convert._vqvae_config(states, SPEC))
    made = spec.build("vqvae")
    made.load_state_dict({key: piece.build() for key, piece in convert._vqvae_pieces(states, spec).items()})
    return made.eval()


@pytest.mark.parametrize("rate", RATES)
def test_codes_and_pictures_are_the_original_ones(vqvae, rate):
    golden = read("vqvae_tiny")
    ids = golden[f"out.ids_compress{rate}"].flatten(1)
    assert torch.equal(vqvae.encode(golden["in.image01"], rate), ids)
    made, expected = vqvae.decode(ids, rate), golden[f"out.decoded01_compress{rate}"]
    assert (made - expected.clamp(0, 1)).abs().max() < 1e-5
    side = golden[f"out.ids_compress{rate}"].shape[1]
    z = vqvae.codebook.vectors[ids].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (vqvae.rebuild(z, rate) - expected).abs().max() < 1e-5  # the original does not clamp


def test_rates_differ_in_size_and_share_the_codebook(vqvae):
    pictures = torch.rand(2, 3, 32, 32)
    for rate in RATES:
        ids = vqvae.encode(pictures, rate)
        assert ids.shape == (2, (32 // rate) ** 2) and vqvae.decode(ids, rate).shape == pictures.shape
    assert torch.equal(vqvae.encode(pictures), vqvae.encode(pictures, vqvae.config.rate))
    assert vqvae.decode(torch.zeros(1, 36, dtype=torch.long)).shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match="choose one of 4, 8, 16"):
        vqvae.encode(pictures, 32)


def test_pictures_of_a_batch_are_decoded_as_if_alone(vqvae):
    ids = torch.randint(0, vqvae.config.codes, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vqvae.decode(ids)[1:2], vqvae.decode(ids[1:2]))


def test_the_full_size_has_the_original_names_and_shapes():
    shapes = json.loads((DATA / "icetk_hvqvae_full_shapes.json").read_text())
    states = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert convert._vqvae_config(states, SPEC) == SPEC.vqvae and SPEC.vqvae.grid == 20
    pieces = convert._vqvae_pieces(states, SPEC)  # all of theirs is used, all shapes are ours
    with torch.device("meta"):
        mine = SPEC.build("vqvae").state_dict()
    assert {key: piece.shape for key, piece in pieces.items()} == {key: t.shape for key, t in mine.items()}
    counted = sum(t.numel() for key, t in mine.items() if key not in ("codebook.uses", "codebook.sums"))
    assert round(counted / 1e6, 1) == 97.4  # docs/reference.md, "icetk"


def test_a_tensor_too_many_or_too_few_is_named():
    shapes = json.loads((DATA / "icetk_hvqvae_full_shapes.json").read_text())
    states = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    del states["decs.1.mid.attn_1.k.bias"]
    states["loss.weight"] = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match="decs.1.mid.attn_1.k.bias is missing, loss.weight is unknown"):
        convert._vqvae_pieces(states, SPEC)


def test_systems_choose_the_tokenizer_by_its_rates(nano):
    assert type(ModelFolder(nano).load("vqvae")) is VQVAE
    with torch.device("meta"):
        assert isinstance(SPEC.build("vqvae"), HierarchicalVQVAE)


def test_it_can_learn_at_its_rate(vqvae):
    made, commitment, ids = vqvae(torch.rand(1, 3, 16, 16))
    assert made.shape == (1, 3, 16, 16) and len(ids) == 4 and float(commitment.detach()) > 0
