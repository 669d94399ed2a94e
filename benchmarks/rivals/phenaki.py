"""Phenaki (C-ViViT and MaskGIT), by the package `phenaki-pytorch`.

C-ViViT makes one code of 12 x 12 pixels and 4 frames: 9 x 8 x 8 codes a clip of 96 pixels; MaskGIT fills them
in 18 rounds. As the tokenizer of the others, C-ViViT is trained apart, for half of the time besides. Its
perceptual and adversarial losses stay out: the weights of VGG cannot be had here, and half an hour does not
carry an adversary.

Shapes: B clips, F = 33 frames.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rivals.contest import FPS, TIMES, Size
from benchmarks.rivals.stepwise import CaptionEncoder, Stepwise
from cogvideo.hardware import has_fast_bfloat16
from cogvideo.video import Clip

if TYPE_CHECKING:
    from pathlib import Path

FRAMES = len(TIMES)
RESOLUTION = 96
PATCH = 12  # pixels
TEMPORAL_PATCH = 4  # frames


def as_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [F, R, R, 3] to [3, F, R, R]; as small as they come, to be kept."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


class Tokenizer(Stepwise[nn.Module]):
    """C-ViViT."""

    name = "phenaki-tokenizer"
    lr = 5e-4
    optimizer = "adamw"
    batch = 2
    resolution = RESOLUTION

    def new(self, seed: int) -> Any:
        from phenaki_pytorch import CViViT

        torch.manual_seed(seed)
        return CViViT(
            dim=self.size.width,
            codebook_size=1024,
            image_size=RESOLUTION,
            patch_size=PATCH,
            temporal_patch_size=TEMPORAL_PATCH,
            spatial_depth=self.size.layers,
            temporal_depth=self.size.layers,
            heads=max(1, self.size.width // 64),
            use_vgg_and_gan=False,
            lookup_free_quantization=False,
        )

    def prepare(self, frames: np.ndarray) -> Tensor:
        return as_pixels(frames)

    def loss(self, model: nn.Module, captions: list[str], clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            error: Tensor = model(clips / 255)
        return error

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        raise NotImplementedError("it makes no videos")


class Filler(nn.Module):
    """MaskGIT inside Phenaki, with words that are learnt along."""

    def __init__(self, size: Size, cvivit: Any, words: CaptionEncoder):
        super().__init__()
        from phenaki_pytorch import MaskGit, Phenaki
        from phenaki_pytorch.phenaki_pytorch import DEFAULT_T5_NAME
        from phenaki_pytorch.t5 import T5_CONFIGS
        from transformers import T5Config

        T5_CONFIGS[DEFAULT_T5_NAME] = {"config": T5Config(d_model=size.width)}  # else it is downloaded
        self.words = words
        maskgit = MaskGit(
            dim=size.width,
            num_tokens=1024,
            max_seq_len=cvivit.num_tokens_per_frames(FRAMES),
            heads=max(1, size.width // 64),
            depth=size.layers,
            dim_context=size.width,
        )
        self.phenaki = Phenaki(maskgit=maskgit, cvivit=cvivit, text_embed_dim=size.width)


class Phenaki(Stepwise[Filler]):
    name = "phenaki"
    lr = 5e-4
    optimizer = "adamw"
    resolution = RESOLUTION

    def __init__(self, size: Size, out: "Path"):
        super().__init__(size, out)
        self.tokenizer = Tokenizer(size, out / "tokenizer")

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        self.tokenizer.train(minutes / 2, None, seed)
        super().train(minutes, lr, seed)

    def new(self, seed: int) -> Filler:
        torch.manual_seed(seed)
        c = self.size.spec.model
        words = CaptionEncoder(c.vocab, c.pad, c.text_len, self.size.width)
        filler = Filler(self.size, self.tokenizer.new(seed), words)
        if self.tokenizer.minutes:
            filler.phenaki.cvivit.load_state_dict(self.tokenizer.trained.state_dict())
        filler.phenaki.cvivit.requires_grad_(False)
        return filler

    @torch.no_grad()
    def prepare(self, frames: np.ndarray) -> Tensor:
        pixels = as_pixels(frames).unsqueeze(0) / 255
        codes: Tensor = self.tokenizer.trained(pixels, return_only_codebook_ids=True)[0]
        return codes

    def loss(self, model: Filler, captions: list[str], clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            states = model.words(self.ids(captions))
            loss: Tensor = model.phenaki(video_codebook_ids=clips, text_embeds=states)
        return loss

    @torch.inference_mode()
    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        """Each alone: the package draws from torch's own generator."""
        phenaki = self.trained.phenaki

        def encode(texts: list[str], output_device: torch.device) -> Tensor:
            return self.trained.words(self.ids(texts))

        phenaki.encode_texts = encode
        clips = []
        for caption, seed in zip(captions, seeds):
            torch.manual_seed(seed)
            pixels = phenaki.sample(texts=[caption], num_frames=FRAMES)[0]
            frames = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).numpy()
            clips.append(Clip(frames, FPS, caption))
        return clips

    @property
    def parameters(self) -> int:
        model = self.new(0)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
