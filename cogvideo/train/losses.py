"""Losses: what the models minimise.

Tokens are learnt by cross-entropy. Frames are learnt by the hierarchical loss, of pixels, features, motion:

    loss = L1(pixels) + a * perceptual(features) + b * L1(optical flow of consecutive frames)

Flow is pyramidal Lucas-Kanade in plain torch. It is differentiable, so a model learns that its motion differs
even where each single frame looks right. Shapes: clips are float [B, F, 3, H, W] in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant
from cogvideo.layout import Layout
from cogvideo.limits import check_range
from cogvideo.model.features import ImageFeatures, perceptual_distance, weighted
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.model.vqvae import VQVAE

Result = tuple[Tensor, dict[str, float]]  # a loss, and numbers worth a line in the log


def tokenizer_loss(
    vqvae: VQVAE,
    hierarchical: "HierarchicalLoss",
    clips: Tensor,
    generator: torch.Generator,
    perturb: float = 0.0,
    seeds: Sequence[int] = (),
    weights: Tensor | None = None,
) -> Result:
    """Reconstruction of clips [B, F, 3, R, R] by the hierarchical loss, and commitment to the codes.

    A share `perturb` of the codes is replaced by near ones, drawn from the clips' seeds. weights
    [B, F, h, w]: how much each place of an image counts. The generator is for the codebook's updates.
    """
    count = clips.shape[1]
    image_seeds = [count * seed + frame for seed in seeds for frame in range(count)]
    images, commitment, ids = vqvae(clips.flatten(0, 1), generator, perturb, image_seeds)
    loss, numbers = frames_loss(images.unflatten(0, (-1, count)), hierarchical, clips, weights)
    if vqvae.codebook.filled:
        shares = torch.bincount(ids, minlength=vqvae.config.codes).float() / len(ids)
        numbers["perplexity"] = float(torch.exp(-(shares * shares.clamp_min(1e-9).log()).sum()))
    return loss + 0.25 * commitment, numbers


def token_loss(
    model: DualChannelTransformer,
    layout: Layout,
    text: Tensor,
    codes: Tensor,
    context: Tensor | None = None,
    weights: Tensor | None = None,
    corners: Tensor | None = None,
) -> Result:
    """Cross-entropy of the frames that the layout trains (docs/reference.md, "Loss").

    text [B, T]; codes [B, F, N] in time order; context [B, F, N]: codes to read instead, so that a model
    learns to continue from wrong ones; weights [B, F, N]: how much a code counts among those of its clip;
    corners [B, 2]: first row and column of what the codes are a window of, if they are not whole frames.

    Logged: the unweighted mean of each frame, by its number in time. Given frames count only in the log.
    """
    laid = layout.lay(codes)
    read = laid if context is None else layout.lay(context)
    inputs = torch.cat((text, layout.inputs(read, model.config.start)), 1)
    hidden = model.hidden(inputs, layout, corners=corners)  # [B, S, D]
    first = int(layout.loss_mask().argmax())  # what is not trained comes first

    def cost(positions: slice) -> Tensor:  # [B, S']
        logits = model.head(hidden[:, positions])
        target = laid.flatten(1)[:, positions]
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)

    with torch.no_grad():
        given = cost(slice(0, first))
    learnt = cost(slice(first, None))

    each = torch.cat((given, learnt.detach()), 1)
    per_frame = each.view(len(codes), layout.frames, -1).mean((0, 2))
    numbers = {f"frame{frame}": float(value) for frame, value in zip(layout.order, per_frame)}
    if weights is None:
        return learnt.mean(), numbers
    counts = layout.lay(weights).flatten(1)[:, first:]
    return ((learnt * counts).sum(1) / counts.sum(1)).mean(), numbers  # a clip does not depend on the others


def frames_loss(
    prediction: Tensor, hierarchical: "HierarchicalLoss", clips: Tensor, weights: Tensor | None = None
) -> Result:
    """Hierarchical loss of predicted clips against true ones, both [B, F, 3, H, W]; PSNR is logged."""
    loss, numbers = hierarchical(prediction, clips, weights)
    numbers["psnr"] = float(-10 * F.mse_loss(prediction.detach().clamp(0, 1), clips).log10())
    return loss, numbers


@dataclass(frozen=True)
class LossWeights:
    """How much each level counts. Weights are 0 or more and not all 0 (else ValueError); a level with weight
    0 is left out."""

    pixel: float = 1.0
    perceptual: float = 0.1
    temporal: float = 0.05
    features: str = "efficientnet-lite0"
    weights: str = ""  # a file for the feature network; empty: its own

    def __post_init__(self) -> None:
        levels = {name: getattr(self, name) for name in ("pixel", "perceptual", "temporal")}
        for name, value in levels.items():
            check_range(f"loss.{name}", value, 0)
        if not any(levels.values()):
            raise ValueError(f"one of loss.{', loss.'.join(levels)} must be over 0")


class HierarchicalLoss(nn.Module):
    """`loss(prediction, target)` of two clips [B, F, 3, H, W]: (scalar, {level: number}).

    `weights` [B, F, h, w], of any size, say how much a cell counts in pixels and features, relative to the
    other cells of its clip.
    """

    def __init__(self, weights: LossWeights):
        super().__init__()
        self.weights = weights
        self.net = ImageFeatures(weights.features, weights.weights or None) if weights.perceptual else None

    def forward(
        self, prediction: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        w = self.weights
        if weights is not None:
            weights = (weights / weights.mean((1, 2, 3), keepdim=True)).flatten(0, 1)
        generated = prediction.flatten(0, 1)
        true = target.flatten(0, 1)
        terms = {"pixel": weighted((generated - true).abs().mean(1), weights).mean()}
        if self.net is not None:
            terms["perceptual"] = perceptual_distance(self.net, generated, true, weights).mean()
        if w.temporal and prediction.shape[1] > 1:
            terms["temporal"] = temporal_distance(prediction, target).mean()
        loss = sum(getattr(w, name) * value for name, value in terms.items())
        return loss, {name: float(value.detach()) for name, value in terms.items()}


def temporal_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, in pixels a frame, of the optical flows of two clips [B, F, 3, H, W]: [B]."""
    flows = []
    for clip in (prediction, target):
        luma = constant((0.299, 0.587, 0.114), clip).view(3, 1, 1)
        gray = (clip * luma).sum(2, keepdim=True)  # [B, F, 1, H, W]
        flow = optical_flow(gray[:, :-1].flatten(0, 1), gray[:, 1:].flatten(0, 1))
        flows.append(flow.view(len(clip), -1, *flow.shape[1:]))
    return (flows[0] - flows[1]).abs().mean((1, 2, 3, 4))


def optical_flow(a: Tensor, b: Tensor, levels: int = 3, rounds: int = 2, window: int = 7) -> Tensor:
    """Flow in pixels from image a to image b, both [B, 1, H, W] in [0, 1]: [B, 2, H, W] as (x, y).

    Pyramidal Lucas-Kanade (Lucas 1981, Bouguet 2001): on each level, coarse to fine, b is warped back by the
    flow so far and the remaining shift solves a 2 x 2 least-squares system over a window. The damping keeps
    flat regions at rest.
    """
    pyramid = [(a, b)]
    for _ in range(levels - 1):
        pyramid.append((F.avg_pool2d(pyramid[-1][0], 2), F.avg_pool2d(pyramid[-1][1], 2)))
    flow = a.new_zeros(len(a), 2, *pyramid[-1][0].shape[-2:])
    for a, b in reversed(pyramid):
        if flow.shape[-2:] != a.shape[-2:]:
            flow = 2 * F.interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(rounds):
            flow = flow + _shift(a, warp(b, flow), window)
    return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample image [B, C, H, W] at each pixel moved by flow [B, 2, H, W] pixels; the border repeats
    beyond itself."""
    h, w = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=flow.device), torch.arange(w, device=flow.device), indexing="ij"
    )
    x, y = x + flow[:, 0], y + flow[:, 1]  # [B, H, W]
    grid = torch.stack((2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1), -1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _shift(a: Tensor, b: Tensor, window: int, damping: float = 1e-3) -> Tensor:
    """One Lucas-Kanade step: the small shift from a to b, [B, 2, H, W]."""
    mean = F.pad((a + b) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (mean[..., 1:-1, 2:] - mean[..., 1:-1, :-2]) / 2
    dy = (mean[..., 2:, 1:-1] - mean[..., :-2, 1:-1]) / 2
    dt = b - a
    products = torch.cat((dx * dx, dx * dy, dy * dy, dx * dt, dy * dt), 1)  # [B, 5, H, W]
    xx, xy, yy, xt, yt = F.avg_pool2d(products, window, 1, window // 2, count_include_pad=False).unbind(1)
    xx, yy = xx + damping, yy + damping
    determinant = xx * yy - xy * xy
    shift = torch.stack((xy * yt - yy * xt, xy * xt - xx * yt), 1) / determinant.unsqueeze(1)
    return shift.clamp(-2, 2)  # linearisation holds for about a pixel
