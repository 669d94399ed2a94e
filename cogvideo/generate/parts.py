"""The parts of a model folder as generation computes with them: each read when it is first needed, then kept.

The image model, both stages and super-resolution are made of one base, which is in memory once. What each
adds to it is let go of where there is no room for the next beside it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from cogvideo.generate.cost import BYTES, CHANNELS, memory
from cogvideo.generate.int8 import join, pack
from cogvideo.hardware import free_memory
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.folder import ModelFolder
from cogvideo.model.refiner import Refiner
from cogvideo.model.superres import SuperRes
from cogvideo.model.transformer import Base, DualChannelTransformer
from cogvideo.model.vqvae import VQVAE, to_frames, to_pictures
from cogvideo.progress import Progress
from cogvideo.video import Clip


class Parts:
    """Parts by name, on one device. `dtype` is what the transformers compute with; int8 is for CPUs."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: str):
        if dtype not in BYTES:
            raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(BYTES)}")
        if dtype == "int8" and device.type != "cpu":
            raise ValueError(f"int8 is for CPUs; choose bfloat16 or float32 on {device.type}")
        self.folder, self.device, self.dtype, self.spec = folder, device, dtype, folder.spec()

    @cached_property
    def vqvae(self) -> VQVAE:
        return self.folder.load("vqvae", self.device)

    @cached_property
    def decoder(self) -> VideoDecoder:
        return self.folder.load("decoder", self.device).to(memory_format=torch.channels_last)

    @cached_property
    def refiner(self) -> Refiner:
        return self.folder.load("refiner", self.device)

    @cached_property
    def base(self) -> Base:
        return self._load("base")

    @cached_property
    def image(self) -> DualChannelTransformer:
        return DualChannelTransformer(self.base).eval()

    @cached_property
    def stage1(self) -> DualChannelTransformer:
        return self._stage("stage1")

    @cached_property
    def stage2(self) -> DualChannelTransformer:
        return self._stage("stage2")

    @cached_property
    def superres(self) -> SuperRes:
        self._make_room("superres")
        own = "superres_base" in self.spec.parts
        return SuperRes(self._load("superres_base") if own else self.base, self._load("superres")).eval()

    def _stage(self, name: str) -> DualChannelTransformer:
        self._make_room(name)
        model = DualChannelTransformer(self.base, self._load(name)).eval()
        return join(model) if self.dtype == "int8" else model

    def _make_room(self, name: str) -> None:
        """Let go of the other channels, which are read again when they are needed, if memory asks for it: for
        twice the caches that must fit, since windows are filled as many at a time as there is room."""
        free, due = free_memory(self.device), memory(self.spec, self.dtype, 2, self.device.type == "cpu")
        if free is not None and free < due[name] + due.get(f"{name}_base", 0) + 2 * due["caches"]:
            for other in CHANNELS:
                vars(self).pop(other, None)

    def _load(self, name: str) -> Any:
        if self.device.type == "cpu":  # layer by layer, out of the mapped file
            return pack(self.folder.load(name, self.device, None), self.dtype)
        return self.folder.load(name, self.device, getattr(torch, self.dtype))


@torch.inference_mode()
def refine(refiner: Refiner, clips: Sequence[Clip], progress: Progress | None = None) -> list[Clip]:
    """Clips in the refiner's larger size, one after the other."""
    larger, device = [], next(refiner.parameters()).device
    for i, clip in enumerate(clips):
        small = to_pictures(clip.frames).to(device)
        larger.append(replace(clip, frames=to_frames(refiner(small[None])[0])))
        if progress is not None:
            progress("upscale", i + 1, len(clips))
    return larger
