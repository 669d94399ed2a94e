"""Measures of clips: pure arithmetic on features and images.

Two sets of features, of any network: `frechet_distance`, `kernel_distance`, `precision_recall`,
`density_coverage`. One set of class probabilities: `inception_score`. Images one by one: `psnr`, `ssim`. A
single clip: `sharpness`, `flicker`, `motion`, `warping_error`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Features = Tensor | np.ndarray  # [n, D]
NEIGHBOURS = 5  # that a neighbourhood reaches to
FLOW_WARPS = 4  # refinements of the optical flow; ten, the library's default, take twice as long


def frechet_distance(a: Features, b: Features) -> float:
    """Squared Frechet distance of the Gaussians fitted to features a [n, D] and b [m, D] (Heusel et al. 2017;
    of video features Unterthiner et al. 2018).

    |mean a - mean b|^2 + trace(A + B - 2 sqrt(A B)) with the covariances A and B, in float64. The trace of
    the root is computed from the symmetric sqrt(A) B sqrt(A), which has the eigenvalues of A B, so it also
    works with fewer samples than dimensions. The number of samples biases the distance: compare sets of equal
    size only. Raise ValueError for sets of different width, with fewer than 2 rows, or not finite.
    """
    a, b = _checked(a, b)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a = _covariance(a)  # [D, D]
    cov_b = _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # [D, D]
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return max(float(shift + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def _checked(a: Features, b: Features) -> tuple[Tensor, Tensor]:
    """Two sets of features as float64."""
    x = torch.as_tensor(a).to(torch.float64)
    y = torch.as_tensor(b).to(torch.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"features must be [n, D] and [m, D] with n, m >= 2; got {shapes}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features must be finite")
    return x, y


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def kernel_distance(a: Features, b: Features) -> float:
    """Squared maximum mean discrepancy of features a [n, D] and b [m, D] with the kernel (x.y / D + 1)^3, by
    the unbiased estimate (KID: Binkowski et al. 2018). Its mean does not depend on the number of samples, and
    it is negative by chance for sets that are alike. ValueError as for `frechet_distance`."""
    x, y = _checked(a, b)
    n = len(x)
    m = len(y)
    within_x = _cubic(x, x)
    within_y = _cubic(y, y)
    inside = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    inside = inside + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(inside - 2 * _cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Neighbourhood:
    """How generated features lie among real ones, each as a share."""

    precision: float  # generated ones within the neighbourhood of some real one
    recall: float  # real ones within the neighbourhood of some generated one
    density: float  # real neighbourhoods that hold a generated one, on average, over k; may exceed 1
    coverage: float  # real ones whose neighbourhood holds a generated one


def neighbourhood(generated: Features, real: Features, k: int = NEIGHBOURS) -> Neighbourhood:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The neighbourhood of a sample is the ball up to its k-th neighbour in its own set. ValueError as for
    `frechet_distance`, or if a set has k samples or fewer.
    """
    fake, true = _checked(generated, real)
    if min(len(fake), len(true)) <= k:
        raise ValueError(f"neighbourhoods of {k} need more than {k} samples on both sides")
    between = torch.cdist(true, fake)  # [m, n]
    true_radius = _radius(true, k)  # [m]
    fake_radius = _radius(fake, k)  # [n]
    inside = between < true_radius[:, None]
    return Neighbourhood(
        precision=float(inside.any(0).double().mean()),
        recall=float((between < fake_radius[None, :]).any(1).double().mean()),
        density=float(inside.sum(0).double().mean() / k),
        coverage=float((between.amin(1) < true_radius).double().mean()),
    )


def _radius(x: Tensor, k: int) -> Tensor:
    """The distance of each sample to its k-th neighbour."""
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values


def inception_score(probabilities: Features) -> float:
    """exp of the mean Kullback-Leibler divergence of class probabilities p(y|x) [n, classes] from their mean
    (Salimans et al. 2016). It names no reference: a set of one good clip a class scores as high as one of
    many."""
    p = torch.as_tensor(probabilities).to(torch.float64).clamp_min(1e-16)
    divergence = (p * (p.log() - p.mean(0, keepdim=True).log())).sum(1)
    return float(divergence.mean().exp())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images [B, C, H, W] in [0, 1], one by one: [B] dB; equal ones: inf."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images [B, C, H, W] in [0, 1], one by one: [B], 1 for equal ones.

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5; mean over channels and over windows inside
    the image. Raise ValueError for images smaller than the window.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of 11 pixels or more a side, got {list(a.shape[-2:])}")
    x = a.flatten(0, 1)[:, None]  # [B * C, 1, H, W]
    y = b.flatten(0, 1)[:, None]
    window = torch.exp(-((torch.arange(11, device=a.device, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mx = mean(x)
    my = mean(y)
    xx = mean(x * x) - mx * mx
    yy = mean(y * y) - my * my
    xy = mean(x * y) - mx * my
    c1 = 0.01**2
    c2 = 0.03**2
    maps = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    return maps.view(len(a), -1).mean(1)


def sharpness(clip: Tensor) -> Tensor:
    """Variance of the Laplacian of the grey frames of a clip [F, 3, H, W] in [0, 1], averaged, times 1000:
    the usual measure of blur; higher is sharper."""
    grey = clip.mean(1, keepdim=True)  # [F, 1, H, W]
    kernel = clip.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return 1000 * F.conv2d(grey, kernel.view(1, 1, 3, 3)).flatten(1).var(1).mean()


def flicker(clip: Tensor) -> Tensor:
    """How much the pixels of a clip [F, 3, H, W] in [0, 1], F >= 3, jump back and forth: mean of
    |x[t-1] - 2 x[t] + x[t+1]|, in levels of 255. It is 0 if all pixels change steadily."""
    return 255 * (clip[2:] - 2 * clip[1:-1] + clip[:-2]).abs().mean()


def motion(clip: Tensor) -> Tensor:
    """How much the pixels of a clip [F, 3, H, W] in [0, 1], F >= 2, change: mean of |x[t] - x[t-1]|, in
    levels of 255. It is 0 for a frozen clip; noise counts as well as motion."""
    return 255 * (clip[1:] - clip[:-1]).abs().mean()


def flow_function() -> Callable[..., np.ndarray]:
    """The optical flow of scikit-image; ValueError if that is not installed."""
    try:
        from skimage.registration import optical_flow_ilk
    except ImportError:
        raise ValueError('the optical flow needs scikit-image: pip install "cogvideo[eval]"') from None
    find_flow: Callable[..., np.ndarray] = optical_flow_ilk
    return find_flow


def warping_error(clip: Tensor) -> Tensor:
    """How badly each frame of a clip [F, 3, H, W] in [0, 1], F >= 2, is predicted from the one before: mean
    of |x[t](p + flow(p)) - x[t-1](p)| in levels of 255 (Lai et al. 2018, without their mask of occlusions).

    The flow is `optical_flow_ilk` of scikit-image, between grey frames. A frozen clip has no error.
    """
    find_flow = flow_function()
    errors = []
    grey = clip.mean(1).numpy()  # [F, H, W]
    height, width = clip.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for t in range(1, len(clip)):
        found = find_flow(grey[t - 1], grey[t], num_warp=FLOW_WARPS)
        flow = torch.from_numpy(found.astype(np.float32))  # [2, H, W]
        y = 2 * (rows + flow[0]) / max(height - 1, 1) - 1
        x = 2 * (columns + flow[1]) / max(width - 1, 1) - 1
        grid = torch.stack((x, y), -1)[None]
        warped = F.grid_sample(clip[t][None], grid, padding_mode="border", align_corners=True)[0]
        errors.append((warped - clip[t - 1]).abs().mean())
    return 255 * torch.stack(errors).mean()
