"""Measures of clips: pure arithmetic on features and images.

`frechet_distance` compares two sets of features of any network (FID, FVD: Heusel et al. 2017, Unterthiner et
al. 2018); `psnr` and `ssim` compare images one by one; `sharpness` and `flicker` describe a single clip.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to features a [n, D] and b [m, D].

    |mean a - mean b|^2 + trace(A + B - 2 sqrt(A B)) with the covariances A and B, in float64. The trace of
    the root is computed from the symmetric sqrt(A) B sqrt(A), which has the eigenvalues of A B, so it also
    works with fewer samples than dimensions. The number of samples biases the distance: compare sets of equal
    size only. Raise ValueError for sets of different width, with fewer than 2 rows, or not finite.
    """
    a = torch.as_tensor(a).to(torch.float64)
    b = torch.as_tensor(b).to(torch.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"features must be [n, D] and [m, D] with n, m >= 2; got {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite")

    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a = _covariance(a)  # [D, D]
    cov_b = _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # [D, D]
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return max(float(shift + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


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
