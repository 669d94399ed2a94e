import torch
import torch.nn.functional as F

from cogvideo.train.discriminator import adversarial_losses, new_discriminator


def clips(seed: int, sharp: bool) -> torch.Tensor:
    """Four clips of stripes [4, 3, 3, 16, 16], sharp or blurred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 3, 3, 4, 4, generator=generator).round().flatten(0, 1)
    mode = {"mode": "nearest"} if sharp else {"mode": "bilinear"}
    return F.interpolate(x, scale_factor=4, **mode).unflatten(0, (4, 3))


def test_there_is_a_score_for_each_patch_of_a_frame():
    assert new_discriminator(0)(torch.rand(2, 5, 3, 32, 48)).shape == (2, 5, 4, 6)
    assert new_discriminator(0)(torch.rand(2, 1, 3, 16, 16)).shape == (2, 1, 2, 2)


def test_each_side_has_its_own_loss():
    """That of the decoder moves the clips alone, that of the discriminator itself alone."""
    net, made = new_discriminator(0), clips(0, False).requires_grad_()
    found = adversarial_losses(net, made, clips(0, True), range(4))
    found.decoder.backward(retain_graph=True)
    assert made.grad.abs().max() > 0 and all(p.grad is None for p in net.parameters())
    made.grad = None
    found.discriminator.backward()
    assert made.grad is None and all(p.grad.abs().max() > 0 for p in net.parameters())


def test_a_clip_is_scored_alike_alone_and_in_a_batch():
    """Noise included: each clip has that of its seed."""
    net, made, right = new_discriminator(0), clips(0, False), clips(0, True)
    together = adversarial_losses(net, made, right, range(4))
    alone = [adversarial_losses(net, made[i:][:1], right[i:][:1], [i]) for i in range(4)]
    for name in ("decoder", "discriminator"):
        assert torch.allclose(getattr(together, name), sum(getattr(one, name) for one in alone) / 4)
    assert adversarial_losses(net, made, right, range(4, 8)).discriminator != together.discriminator


def test_places_count_by_their_weights():
    net, made, right = new_discriminator(0), clips(0, False), clips(0, True)
    weights = torch.zeros(4, 3, 2, 2)
    weights[..., 0, 0] = 1
    scores = net(made)[..., 0, 0]
    assert torch.allclose(
        adversarial_losses(net, made, right, range(4), weights).decoder, F.softplus(-scores).mean()
    )


def test_it_learns_what_is_blurred_and_asks_for_sharpness():
    torch.manual_seed(0)
    net = new_discriminator(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(60):
        optimizer.zero_grad()
        adversarial_losses(net, clips(step, False), clips(step, True), range(4)).discriminator.backward()
        optimizer.step()
    blurred, sharp = clips(1000, False), clips(1000, True)
    assert net(sharp).mean() > net(blurred).mean() + 1

    made = blurred.clone().requires_grad_()
    adversarial_losses(net, made, sharp, range(4)).decoder.backward()
    towards = F.cosine_similarity(-made.grad.flatten(), (sharp - blurred).flatten(), 0)
    assert towards > 0.05
