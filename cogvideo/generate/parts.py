"""The parts of a model, each loaded when it is first needed and packed for generation.

The image model, both stages and super-resolution share one base, which is in memory once. The channel that
one of them adds is freed when the next would not fit alongside it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from cogvideo.generate.cost import CHANNELS, memory
from cogvideo.generate.int8 import join, pack
from cogvideo.generate.torchrun import Slices, cut
from cogvideo.hardware import free_memory
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.folder import ModelFolder
from cogvideo.model.lora import Adapter, merge, weighted
from cogvideo.model.refiner import Refiner
from cogvideo.model.superres import SuperRes, SuperResChannel
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE, to_frames, to_images
from cogvideo.progress import Progress
from cogvideo.video import Clip

M = TypeVar("M", bound=nn.Module)


class LoadedParts:
    """Parts by name, on one device. `dtype` is what the transformers compute with; int8 is for CPUs. With
    `slices` this process has one of several slices of the transformers."""

    adapters: tuple[tuple[Adapter, float], ...] = ()  # each with its weight

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: str, slices: Slices | None = None):
        if dtype == "int8" and slices is not None:
            raise ValueError("int8 matrices are not cut into slices; choose --dtype bfloat16 or float32")
        if dtype == "int8" and device.type != "cpu":
            raise ValueError(f"int8 is for CPUs; choose bfloat16 or float32 on {device.type}")
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.slices = slices
        self.spec = folder.spec()

    @cached_property
    def vqvae(self) -> VQVAE:
        return self.folder.load_as(VQVAE, "vqvae", self.device)

    @cached_property
    def decoder(self) -> VideoDecoder:
        decoder = self.folder.load_as(VideoDecoder, "decoder", self.device)
        decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return decoder

    @cached_property
    def refiner(self) -> Refiner:
        return self.folder.load_as(Refiner, "refiner", self.device)

    @cached_property
    def base(self) -> Base:
        return self._load(Base, "base")

    @cached_property
    def image(self) -> DualChannelTransformer:
        return DualChannelTransformer(self.base).eval()

    @cached_property
    def stage1(self) -> DualChannelTransformer:
        return self._stage("stage1")

    @cached_property
    def stage2(self) -> DualChannelTransformer:
        return self._stage("stage2")

    def stage(self, name: str) -> DualChannelTransformer:
        """The model of a stage: image, stage1 or stage2."""
        model: DualChannelTransformer = getattr(self, name)
        return model

    @cached_property
    def superres(self) -> SuperRes:
        self._make_room("superres")
        base = self.base
        if "superres_base" in self.spec.parts:
            base = self._load(Base, "superres_base")
        return SuperRes(base, self._load(SuperResChannel, "superres")).eval()

    def _stage(self, name: str) -> DualChannelTransformer:
        self._make_room(name)
        model = DualChannelTransformer(self.base, self._load(TemporalChannel, name)).eval()
        return join(model) if self.dtype == "int8" else model

    def _make_room(self, name: str) -> None:
        """Free the other channels, which are loaded again when they are needed, if this one does not fit next
        to them with twice the caches that must fit: as many windows are filled at a time as there is room."""
        free = free_memory(self.device)
        due = memory(self.spec, self.dtype, 2, self.device.type == "cpu")
        if free is not None and free < due[name] + due.get(f"{name}_base", 0) + 2 * due["caches"]:
            for other in CHANNELS:
                vars(self).pop(other, None)

    def adapt(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Generate with these adapters, each times its weight; the parts that change are loaded again."""
        if tuple(adapters) == self.adapters:
            return
        changed = {part for adapter, _ in (*self.adapters, *adapters) for part in adapter.parts}
        self.adapters = tuple(adapters)
        if "base" in changed:
            changed |= {"image", *CHANNELS}  # which are built on the base
        for part in changed:
            vars(self).pop(part, None)

    def _load(self, kind: type[M], name: str) -> M:
        adapters = weighted(self.adapters, name)
        on_cpu = self.device.type == "cpu"
        if not on_cpu and self.slices is None:
            part = self.folder.load_as(kind, name, self.device, getattr(torch, self.dtype))
            merge(part, adapters)
            return part
        part = self.folder.load_as(kind, name, "cpu", None)
        if self.slices is not None:
            merge(part, adapters)
            adapters = {}
            cut(part, self.slices)
        if on_cpu:
            pack(part, self.dtype, adapters)  # layer by layer, out of the mapped file
            return part
        return part.to(self.device, getattr(torch, self.dtype))


@torch.inference_mode()
def refine(refiner: Refiner, clips: Sequence[Clip], progress: Progress | None = None) -> list[Clip]:
    """Clips in the refiner's larger size, one after the other."""
    larger = []
    device = next(refiner.parameters()).device
    for i, clip in enumerate(clips):
        small = to_images(clip.frames).to(device)
        larger.append(replace(clip, frames=to_frames(refiner(small[None])[0])))
        if progress is not None:
            progress("upscale", i + 1, len(clips))
    return larger
