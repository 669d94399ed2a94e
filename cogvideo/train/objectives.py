"""What a phase is: one object for each kind, with its check, its loss, its preview and its cost.

A loss function takes a batch of clips and the number of the step, and returns a loss and numbers for the log.
An objective builds it once for a run, from the parts of the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cogvideo.data.loader import Batch
from cogvideo.layout import SECONDS
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.lora import inactive, layers_of
from cogvideo.model.refiner import Refiner, resize
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import PLAIN, TEMPLATE, TextTokenizer
from cogvideo.train.cost import token_flops
from cogvideo.train.discriminator import Discriminator, adversarial_losses, new_discriminator
from cogvideo.train.inputs import (
    Parts,
    Resampler,
    corrupt,
    crop_codes,
    crop_corners,
    encode_clips,
    is_cropped,
    object_weights,
    part,
    prepare_text,
    seeded,
)
from cogvideo.train.losses import HierarchicalLoss, Result, frames_loss, token_loss, tokenizer_loss
from cogvideo.train.preview import PREVIEW_CLIPS, preview_text, rows_of, samples, shown_clips
from cogvideo.video import Frames

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

LossFunction = Callable[[Batch, int], Result]  # of a batch and the number of the step

UNQUANTISED = 200  # steps of the tokenizer before its codebook is initialised


class Objective(ABC):
    """A kind of phase: what it checks, what it minimises, how it shows its progress and what a step costs.

    An objective has no state: all that a run sets is in the `Phase`.
    """

    recurs: ClassVar[bool] = False  # whether clips may recur as codes (`Phase.reuse`)
    has_crops: ClassVar[bool] = False  # whether it can train on crops (`Phase.crop_share`)
    has_adversary: ClassVar[bool] = False  # whether it can train against a discriminator (`Phase.adversary`)
    adapts: ClassVar[bool] = False  # whether low-rank adapters can be trained by it
    accumulates: ClassVar[bool] = True  # whether the clips of a step may come one share after another

    def check(self, phase: "Phase", spec: Spec) -> None:
        """Raise ValueError if this objective cannot use the steps, the clips or the fields of a phase."""
        if phase.crop_share and not self.has_crops:
            raise ValueError(f"{phase.name}.crop_share must be 0: only models of codes train on crops")
        if phase.adversary and not self.has_adversary:
            raise ValueError(f"{phase.name}.adversary must be 0: only decoders of clips have a discriminator")
        if phase.reuse > 1 and not self.recurs:
            raise ValueError(
                f"{phase.name}.reuse must be 1: clips recur as codes, and {phase.name} needs frames"
            )

    def prepare(self, module: nn.Module, phase: "Phase") -> None:
        """Change a part that the phase trains, before its first step."""
        return None

    def extra_parts(self, phase: "Phase", seed: int) -> dict[str, nn.Module]:
        """Modules that are trained along with the parts; the checkpoint keeps them, the model folder does
        not."""
        return {}

    @abstractmethod
    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        """Build the function that computes the loss of a step."""

    @abstractmethod
    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """An image of the model's progress on a batch: uint8 [H, W, 3]."""

    def clip_flops(self, phase: "Phase", parts: Parts) -> float | None:
        """Floating-point operations for one clip, forward and backward; None if they are not known."""
        return None


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@dataclass(frozen=True)
class TokenizerObjective(Objective):
    """Frames to codes and back."""

    accumulates = False  # the codebook follows all vectors of a step

    def check(self, phase: "Phase", spec: Spec) -> None:
        super().check(phase, spec)
        if phase.steps <= UNQUANTISED:
            raise ValueError(
                f"{phase.name}: there are no codes before step {UNQUANTISED}; give it more steps"
            )

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        vqvae = part(parts, "vqvae", VQVAE)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(vqvae))

        def loss(batch: Batch, step: int) -> Result:
            clips = batch.frames[0]
            generator = seeded(batch.numbers[0])  # for the codes that are chosen at random
            if step >= UNQUANTISED and not vqvae.codebook.filled:
                with torch.no_grad():
                    z = vqvae.latents(clips.flatten(0, 1)).float()
                vqvae.codebook.init_codes(z.permute(0, 2, 3, 1).flatten(0, 2), generator)
            weights = object_weights(batch, phase)
            return tokenizer_loss(
                vqvae, hierarchical, clips, generator, phase.perturb, batch.numbers, weights
            )

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """The frames, and their reconstructions."""
        vqvae = part(parts, "vqvae", VQVAE)
        clips = shown_clips(batch)
        images = clips.flatten(0, 1)
        if vqvae.codebook.filled:
            coded = vqvae.decode(vqvae.encode(images))
        else:
            coded = vqvae(images)[0]
        return rows_of(clips, coded.view_as(clips))


@dataclass(frozen=True)
class TokenObjective(Objective):
    """A caption to codes, by the model of a stage: "image", "stage1" or "stage2"."""

    stage: str

    recurs: ClassVar[bool] = True
    has_crops: ClassVar[bool] = True
    adapts: ClassVar[bool] = True

    def check(self, phase: "Phase", spec: Spec) -> None:
        super().check(phase, spec)
        if not isinstance(spec, CogVideoSpec):
            raise ValueError(f"{phase.name} trains a model of codes, but this model has none")
        grid = spec.model.grid
        if phase.clips.cover not in (0, grid):
            raise ValueError(
                f"{phase.name}: clips.cover is {phase.clips.cover}, but a frame has {grid} codes a side"
            )
        if phase.crop_share and not phase.clips.cover:
            raise ValueError(f"{phase.name}: crops over the object need a clips.cover of {grid}")

    def model(self, parts: Parts) -> DualChannelTransformer:
        """The model of the stage."""
        temporal = None if self.stage == "image" else part(parts, self.stage, TemporalChannel)
        return DualChannelTransformer(part(parts, "base", Base), temporal)

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        vqvae = part(parts, "vqvae", VQVAE)
        model = self.model(parts)
        layout = model.config.layout(self.stage)
        side = layout.grid // 2  # of a crop
        small = replace(layout, grid=side)

        def loss(batch: Batch, step: int) -> Result:
            ids = prepare_text(text, batch, layout.text_len).to(batch.device)
            codes = encode_clips(vqvae, batch.frames[0]) if batch.codes is None else batch.codes
            context = codes
            if phase.corrupt:
                context = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
            cells = object_weights(batch, phase)
            weights = torch.ones_like(codes, dtype=torch.float32) if cells is None else cells.flatten(2)

            cropped = torch.tensor([is_cropped(number, phase.crop_share) for number in batch.numbers])
            if not cropped.any():
                return token_loss(model, layout, ids, codes, context, weights)

            corners = crop_corners(batch, side, model.window or 1)[cropped].to(codes.device)
            crop_loss, _ = token_loss(
                model,
                small,
                ids[cropped],
                crop_codes(codes[cropped], corners, side),
                crop_codes(context[cropped], corners, side),
                crop_codes(weights[cropped], corners, side),
                corners,
            )
            numbers = {"crops": float(crop_loss.detach())}
            if cropped.all():
                return crop_loss, numbers

            rest = [tensor[~cropped] for tensor in (ids, codes, context, weights)]
            whole_loss, whole_numbers = token_loss(model, layout, *rest)
            share = float(cropped.float().mean())
            return share * crop_loss + (1 - share) * whole_loss, {**whole_numbers, **numbers}

        return loss

    def clip_flops(self, phase: "Phase", parts: Parts) -> float | None:
        """The average over whole clips and crops."""
        layout = part(parts, "base", Base).config.layout(self.stage)
        whole = token_flops(layout, self.stage, phase.trains, parts)
        if not phase.crop_share:
            return whole
        small = token_flops(replace(layout, grid=layout.grid // 2), self.stage, phase.trains, parts)
        return (1 - phase.crop_share) * whole + phase.crop_share * small

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """Samples for captions of the batch; of adapted parts, without the adapters and with them."""
        prompts = batch.captions[:PREVIEW_CLIPS]
        now = samples(folder, parts, prompts)
        if not any(layers_of(module) for module in parts.values()):
            return now
        with inactive(parts.values()):
            without = samples(folder, parts, prompts)
        gap = np.full((len(now), 8, 3), 255, np.uint8)
        return np.concatenate((without, gap, now), 1)


@dataclass(frozen=True)
class DecoderObjective(Objective):
    """Codes of a clip to its frames.

    Some codes are wrong, as in generated clips: replaced by similar ones (`Phase.corrupt`), or sampled by the
    stages from all codes before them (`Phase.resample`). With `Phase.adversary` a discriminator adds its
    loss.
    """

    has_adversary: ClassVar[bool] = True

    def extra_parts(self, phase: "Phase", seed: int) -> dict[str, nn.Module]:
        return {"discriminator": new_discriminator(seed)} if phase.adversary else {}

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        vqvae = part(parts, "vqvae", VQVAE)
        model = part(parts, "decoder", VideoDecoder)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))
        resampler = Resampler(parts) if phase.resample else None

        def loss(batch: Batch, step: int) -> Result:
            (clips,) = batch.frames
            ids = prepare_text(text, batch, model.config.text_len).to(clips.device)
            codes = encode_clips(vqvae, clips)
            if phase.corrupt:
                codes = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
            if resampler is not None:
                codes = resampler(codes, ids, batch, phase.resample)

            decoded = model(code_vectors(vqvae, codes), ids)
            weights = object_weights(batch, phase)
            total, numbers = frames_loss(decoded, hierarchical, clips, weights)
            if phase.adversary:
                discriminator = part(parts, "discriminator", Discriminator)
                losses = adversarial_losses(discriminator, decoded, clips, batch.numbers, weights)
                total = total + phase.adversary * losses.decoder + losses.discriminator
                numbers = {**numbers, **losses.numbers}
            return total, numbers

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """The frames, decoded one by one, and decoded together."""
        vqvae = part(parts, "vqvae", VQVAE)
        model = part(parts, "decoder", VideoDecoder)
        clips = shown_clips(batch)
        ids = preview_text(folder.text(), batch, model.config.text_len, SECONDS, TEMPLATE).to(clips.device)
        codes = encode_clips(vqvae, clips)
        apart = vqvae.decode(codes.flatten(0, 1)).view_as(clips)
        return rows_of(clips, apart, model(code_vectors(vqvae, codes), ids))


def code_vectors(vqvae: VQVAE, codes: Tensor) -> Tensor:
    """Codes [B, F, N] to the vectors of the codebook [B, F, C, grid, grid]."""
    z = vqvae.vectors(codes.flatten(0, 1))
    return z.view(*codes.shape[:2], *z.shape[1:])


@dataclass(frozen=True)
class RefinerObjective(Objective):
    """Small clips to large ones: those that the tokenizer decodes, or, without a tokenizer, the true ones."""

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        model = part(parts, "refiner", Refiner)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))

        def loss(batch: Batch, step: int) -> Result:
            low, high = batch.frames
            return frames_loss(model(self._coded(low, parts)), hierarchical, high)

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """Resized, refined, true."""
        model = part(parts, "refiner", Refiner)
        low = self._coded(shown_clips(batch), parts)
        return rows_of(resize(low, model.config.scale), model(low), batch.frames[1][:PREVIEW_CLIPS])

    def _coded(self, clips: Tensor, parts: Parts) -> Tensor:
        if "vqvae" not in parts:
            return clips
        vqvae = part(parts, "vqvae", VQVAE)
        return vqvae.decode(encode_clips(vqvae, clips).flatten(0, 1)).view_as(clips)


@dataclass(frozen=True)
class RegressionObjective(Objective):
    """A caption to frames, at the one frame rate of the phase."""

    def check(self, phase: "Phase", spec: Spec) -> None:
        super().check(phase, spec)
        if not isinstance(spec, RegressionSpec):
            raise ValueError(f"{phase.name} trains a regression model, and this is another")
        (fps,) = phase.clips.fps
        frames = len(spec.regression.slots(fps)[: phase.clips.keep])
        due = phase.clips.keep or phase.clips.frames
        if frames != due:
            raise ValueError(
                f"{phase.name} cuts {due} frames, but the model has {frames} at {fps:g} frames a second"
            )

    def prepare(self, module: nn.Module, phase: "Phase") -> None:
        """Mark the frames of the phase as trained, and start new ones from those that were."""
        assert isinstance(module, RegressionTransformer)
        (fps,) = phase.clips.fps
        module.prepare(fps, module.config.slots(fps)[: phase.clips.keep])

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> LossFunction:
        model = part(parts, "regression", RegressionTransformer)
        (fps,) = phase.clips.fps
        slots = model.config.slots(fps)[: phase.clips.keep]
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))

        def loss(batch: Batch, step: int) -> Result:
            (clips,) = batch.frames
            ids = prepare_text(text, batch, model.config.text_len, PLAIN).to(clips.device)
            return frames_loss(model(ids, fps, slots), hierarchical, clips)

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """The model's frames for the captions, and the true ones."""
        model = part(parts, "regression", RegressionTransformer)
        clips = shown_clips(batch)
        (fps,) = phase.clips.fps
        ids = preview_text(folder.text(), batch, model.config.text_len, 0.0, PLAIN)
        frames = model(ids.to(clips.device), fps, model.config.slots(fps)[: phase.clips.keep])
        return rows_of(frames, clips)
