import pytest
import torch
import torch.nn.functional as F

from cogvideo.model.features import ImageFeatures, perceptual_distance
from cogvideo.train.losses import HierarchicalLoss, LossWeights, optical_flow, temporal_distance, warp


def texture(size: int = 96) -> torch.Tensor:
    coarse = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("dx, dy", [(0, 0), (1, 0), (0, -1), (2, -1), (3.5, 2), (5, 0), (-4, 4)])
def test_flow_of_known_translations(dx, dy):
    picture = texture()
    shift = torch.tensor([-dx, -dy], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, 96, 96)
    moved = warp(picture, shift)
    flow = optical_flow(picture[..., 16:80, 16:80], moved[..., 16:80, 16:80])[..., 8:-8, 8:-8]
    error = (flow - torch.tensor([dx, dy]).view(1, 2, 1, 1)).abs()
    assert error.mean() < 0.02 + 0.03 * (abs(dx) + abs(dy))


def test_flat_regions_stay_at_rest():
    noise = 0.5 + 0.002 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert optical_flow(noise[:1], noise[1:]).abs().max() < 0.2


def clip_of(shifts: list[float]) -> torch.Tensor:
    picture = texture()
    frames = [warp(picture, torch.tensor([-s, 0.0]).view(1, 2, 1, 1).expand(1, 2, 96, 96)) for s in shifts]
    return torch.stack(frames, 1)[..., 24:72, 24:72].expand(-1, -1, 3, -1, -1)


def test_temporal_distance_tells_motion_apart_where_frames_agree():
    right, also_right, left = clip_of([0, 2, 4]), clip_of([0, 2, 4]), clip_of([4, 2, 0])
    assert float(temporal_distance(right, also_right)) == 0
    assert float(temporal_distance(left, right)) > 1.0
    frozen = right[:, :1].expand_as(right)
    assert float(temporal_distance(frozen, right)) > 0.5


def test_temporal_gradient_points_the_right_way():
    """Following the gradient of the temporal level alone brings a wrong motion nearer to the right one."""
    target = clip_of([0, 1.0])
    clip = clip_of([0, 0.4]).clone().requires_grad_(True)
    before = temporal_distance(clip, target).sum()
    (gradient,) = torch.autograd.grad(before, clip)
    step = 0.02 * gradient / gradient.abs().max()
    assert float(temporal_distance(clip.detach() - step, target)) < float(before.detach())


def test_perceptual_distance():
    net = ImageFeatures("efficientnet-lite0")
    picture = texture(64).expand(1, 3, -1, -1)
    blurred = F.interpolate(F.avg_pool2d(picture, 4), scale_factor=4)
    brighter = (picture + (blurred - picture).square().mean().sqrt()).clamp(0, 1)  # the same squared error
    assert float(perceptual_distance(net, picture, picture)) == 0
    assert perceptual_distance(net, picture, blurred) > perceptual_distance(net, picture, brighter)
    assert not any(p.requires_grad for p in net.parameters())


def test_levels_are_weighted_and_left_out():
    a, b = clip_of([0, 1]), clip_of([0, 2])
    loss, terms = HierarchicalLoss(LossWeights(pixel=2.0, perceptual=0.0, temporal=0.5))(a, b)
    assert set(terms) == {"pixel", "temporal"}
    assert float(loss) == pytest.approx(2 * terms["pixel"] + 0.5 * terms["temporal"], rel=1e-5)


def test_unknown_feature_network_is_refused():
    with pytest.raises(ValueError, match="efficientnet-lite0, vgg16"):
        ImageFeatures("resnet")
