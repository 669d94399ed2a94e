import torch

from cogvideo.model import presets
from cogvideo.model.vqvae import VQVAE, Codebook, to_frames, to_images

CONFIG = presets.find("nano").vqvae


def make() -> tuple[VQVAE, torch.Tensor]:
    torch.manual_seed(0)
    vqvae = VQVAE(CONFIG)
    pictures = torch.rand(6, 3, 16, 16)
    z = vqvae.latents(pictures).detach().permute(0, 2, 3, 1).flatten(0, 2)
    vqvae.codebook.init_codes(z, torch.Generator().manual_seed(0))
    return vqvae.eval(), pictures


def test_shapes_and_ranges():
    vqvae, pictures = make()
    ids = vqvae.encode(pictures)
    assert ids.shape == (6, CONFIG.grid**2) and ids.dtype == torch.long
    assert int(ids.min()) >= 0 and int(ids.max()) < CONFIG.codes
    made = vqvae.decode(ids)
    assert made.shape == pictures.shape and float(made.min()) >= 0 and float(made.max()) <= 1


def test_decoding_codes_equals_the_training_reconstruction():
    vqvae, pictures = make()
    made, _, ids = vqvae(pictures)
    assert torch.equal(ids.view(6, -1), vqvae.encode(pictures))
    assert (vqvae.decode(vqvae.encode(pictures)) - made.clamp(0, 1)).abs().max() < 1e-5


def test_gradients_pass_the_quantiser_straight_through():
    """The encoder's gradient is the one that the decoder's input has."""
    vqvae, pictures = make()
    seen: list[torch.Tensor] = []
    vqvae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    z: list[torch.Tensor] = []
    vqvae.encoder.register_forward_hook(lambda module, inputs, output: z.append(output))
    made, commitment, _ = vqvae(pictures)
    at_decoder, at_encoder = torch.autograd.grad(made.square().sum(), (seen[0], z[0]))
    assert torch.equal(at_decoder, at_encoder) and at_encoder.abs().sum() > 0


def test_codes_follow_the_mean_of_what_chooses_them():
    book = Codebook(2, 2, decay=0.5, dead=0.0)
    book.vectors.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    book.sums.copy_(book.vectors)
    z = torch.tensor([[1.0, 1.0], [3.0, 1.0], [10.0, 12.0]])
    ids = book.nearest(z)
    assert ids.tolist() == [0, 0, 1]
    for _ in range(30):
        book.update(z, ids)
    assert torch.allclose(book.vectors, torch.tensor([[2.0, 1.0], [10.0, 12.0]]), atol=1e-3)


def test_dead_codes_are_revived_from_the_batch():
    book = Codebook(8, 2, decay=0.5, dead=0.05)
    book.vectors.copy_(torch.cat((torch.zeros(1, 2), torch.full((7, 2), 1e3))))
    book.sums.copy_(book.vectors)
    generator = torch.Generator().manual_seed(0)
    used = []
    for _ in range(12):
        z = torch.randn(64, 2, generator=generator)
        ids = book.nearest(z)
        used.append(len(ids.unique()))
        book.update(z, ids, generator)
    assert used[0] == 1 and used[-1] == 8


def test_unfilled_codebook_passes_latents_through():
    torch.manual_seed(0)
    vqvae, pictures = VQVAE(CONFIG), torch.rand(2, 3, 16, 16)
    made, commitment, _ = vqvae(pictures)
    direct = vqvae._denormalise(vqvae.decoder(vqvae.latents(pictures)))
    assert torch.equal(made, direct) and float(commitment) == 0


def test_frames_and_pictures_are_inverse():
    frames = torch.randint(0, 256, (2, 5, 4, 4, 3), dtype=torch.uint8).numpy()
    assert (to_frames(to_images(frames)) == frames).all()
    assert to_images(frames).shape == (2, 5, 3, 4, 4)
