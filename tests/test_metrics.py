"""Metrics equal what is known in closed form, and what scikit-image computes."""

import numpy as np
import pytest
import torch

from cogvideo.eval.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    motion,
    neighbourhood,
    psnr,
    ssim,
    warping_error,
)


def _exact(mean: list[float], cov: np.ndarray, n: int = 400, seed: int = 0) -> np.ndarray:
    """n points whose sample mean and sample covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(cov).T + np.array(mean)


def test_a_set_is_at_no_distance_from_itself():
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x.flip(0)) < 1e-9


def test_gaussians_that_commute_are_at_the_distance_of_the_closed_form():
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    found = frechet_distance(_exact([0, 0, 0], a), _exact([1, -2, 0.5], b, seed=1))
    shift, spread = 1 + 4 + 0.25, (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert found == pytest.approx(shift + spread, rel=1e-9)


def test_gaussians_that_do_not_commute_agree_with_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(2)
    a, b = (m @ m.T + 0.1 * np.eye(6) for m in rng.standard_normal((2, 6, 6)))
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(_exact([0] * 6, a), _exact([0] * 6, b, seed=3)) == pytest.approx(
        expected, rel=1e-8
    )


def test_a_shift_costs_its_square_also_with_fewer_samples_than_dimensions():
    x = np.random.default_rng(4).standard_normal((20, 64)).astype(np.float32)
    assert frechet_distance(x, x + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)
    assert frechet_distance(x, x) < 1e-5


@pytest.mark.parametrize("other", [np.zeros((5, 3)), np.zeros((1, 4)), np.zeros(4), np.full((5, 4), np.nan)])
def test_features_that_cannot_be_compared_are_refused(other):
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(np.zeros((5, 4)), other)


def _pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    a = torch.nn.functional.interpolate(
        torch.rand(3, 3, 6, 5, generator=generator), (40, 31), mode="bilinear"
    )
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 12, 12)
    assert torch.allclose(psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-4)
    assert psnr(a, a).isinf().all()


def test_psnr_and_ssim_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    a, b = _pictures()
    for i in range(len(a)):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        expected = skimage.structural_similarity(
            x, y, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a.double(), b.double())[i].item() == pytest.approx(expected, abs=1e-9)
        assert psnr(a, b)[i].item() == pytest.approx(
            skimage.peak_signal_noise_ratio(x, y, data_range=1), abs=1e-4
        )


def test_ssim_is_one_for_equal_pictures_and_needs_room_for_its_window():
    a, b = _pictures()
    assert torch.allclose(ssim(a, a), torch.ones(3)) and (ssim(a, b) < 0.99).all()
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :10], b[..., :10])


def _two_sets(n: int = 12, m: int = 9, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.standard_normal((n, width)), rng.standard_normal((m, width)) + 0.3


def test_the_kernel_distance_is_the_sum_over_pairs_of_different_samples():
    a, b = _two_sets()

    def kernel(x, y):
        return (x @ y / 5 + 1) ** 3

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_of_halves_is_the_same_on_average_and_a_frechet_distance_is_not():
    rng = np.random.default_rng(8)
    kernel, frechet = [], []
    for n in (50, 400):
        pairs = [(rng.standard_normal((n, 8)), rng.standard_normal((n, 8))) for _ in range(60)]
        kernel.append(np.mean([kernel_distance(x, y) for x, y in pairs]))
        frechet.append(np.mean([frechet_distance(x, y) for x, y in pairs]))
    assert abs(kernel[0] - kernel[1]) < 0.05 and frechet[0] > 4 * frechet[1]


def test_neighbourhoods_are_those_of_the_definition():
    fake, real = _two_sets(15, 14)
    k = 3

    def radius(points):
        return [sorted(np.linalg.norm(points - x, axis=1))[k] for x in points]

    distance = np.array([[np.linalg.norm(x - y) for y in fake] for x in real])  # [real, fake]
    inside = distance < np.array(radius(real))[:, None]
    found = neighbourhood(fake, real, k)
    assert found.precision == pytest.approx(inside.any(0).mean())
    assert found.recall == pytest.approx((distance < np.array(radius(fake))[None]).any(1).mean())
    assert found.density == pytest.approx(inside.sum() / (k * len(fake)))
    assert found.coverage == pytest.approx((distance.min(1) < np.array(radius(real))).mean())
    with pytest.raises(ValueError, match="neighbourhoods of 20 need more than 20 samples"):
        neighbourhood(fake, real, 20)


def test_the_inception_score_counts_classes_that_are_certain():
    assert inception_score(np.eye(7)) == pytest.approx(7)
    assert inception_score(np.full((5, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.eye(7)[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2)


def test_a_moved_image_has_motion_and_little_warping_error_and_noise_has_much_of_both():
    pytest.importorskip("skimage")
    generator = torch.Generator().manual_seed(3)
    large = torch.nn.functional.interpolate(
        torch.rand(1, 3, 10, 10, generator=generator), (60, 60), mode="bicubic"
    ).clamp(0, 1)[0]
    moving = torch.stack([large[:, 5:53, t : t + 48] for t in range(6)])
    noise = torch.rand(moving.shape, generator=generator)
    still = moving[:1].expand(6, -1, -1, -1)
    assert motion(still) == 0 and warping_error(still) < 1e-4
    assert motion(moving) > 3 * warping_error(moving)
    assert warping_error(noise) > 10 * warping_error(moving)
