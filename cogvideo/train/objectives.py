"""What a phase is: one object for each kind, with its check, its loss, its cost and its preview.

A loss takes a batch of clips and the number of the step, and returns a scalar and numbers worth a line in the
log. It is built once, from the parts of the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from cogvideo.data.loader import Batch
from cogvideo.layout import SECONDS
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.refiner import Refiner, resize
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import PLAIN, TextTokenizer
from cogvideo.train import preview
from cogvideo.train.cost import clip_flops
from cogvideo.train.discriminator import Discriminator, opinion
from cogvideo.train.inputs import (
    Parts,
    Resampler,
    corrupt,
    encode_clips,
    in_window,
    object_weights,
    part,
    seeded,
    text_ids,
    window_corners,
    windows,
)
from cogvideo.train.losses import HierarchicalLoss, Result, frames_loss, token_loss, tokenizer_loss
from cogvideo.video import Frames

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

Loss = Callable[[Batch, int], Result]  # a batch and the number of the step

UNQUANTISED = 200  # steps of the tokenizer before its codebook is initialised


class Objective(ABC):
    """A kind of phase."""

    learns_codes: ClassVar[bool] = False  # so clips may recur as codes, and windows of codes be learnt
    has_adversary: ClassVar[bool] = False  # a discriminator may judge what it decodes

    def check(self, phase: "Phase", spec: Spec) -> None:
        """Raise ValueError if the phase can do nothing with its steps or its clips."""
        if phase.windowed and not self.learns_codes:
            raise ValueError(f"{phase.name}.windowed must be 0: only models of codes learn windows of them")
        if phase.adversary and not self.has_adversary:
            raise ValueError(f"{phase.name}.adversary must be 0: only decoders of clips have a discriminator")
        if phase.reuse > 1 and not self.learns_codes:
            raise ValueError(
                f"{phase.name}.reuse must be 1: clips recur as codes, and {phase.name} needs frames"
            )

    def prepare(self, module: nn.Module, phase: "Phase") -> None:  # noqa: B027
        """Prepare a part that learns, before its optimizer is built; most need nothing."""

    @abstractmethod
    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
        """The loss of the phase for these parts."""

    def flops(self, phase: "Phase", parts: Parts) -> float | None:
        """Floating-point operations for one clip; None if they are not known."""
        return None

    @abstractmethod
    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """An image [H, W, 3] that shows how the phase is doing."""


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@dataclass(frozen=True)
class TokenizerObjective(Objective):
    """Frames to codes and back."""

    def check(self, phase: "Phase", spec: Spec) -> None:
        super().check(phase, spec)
        if phase.steps <= UNQUANTISED:
            raise ValueError(
                f"{phase.name}: there are no codes before step {UNQUANTISED}; give it more steps"
            )

    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
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
        """The frames, and what is left of them."""
        vqvae = part(parts, "vqvae", VQVAE)
        clips = batch.frames[0][: preview.CLIPS]
        images = clips.flatten(0, 1)
        if vqvae.codebook.filled:
            coded = vqvae.decode(vqvae.encode(images))
        else:
            coded = vqvae(images)[0]
        return preview.rows(clips, coded.view_as(clips))


@dataclass(frozen=True)
class TokenObjective(Objective):
    """A caption to codes, by the model of a stage: "image", "stage1" or "stage2"."""

    stage: str

    learns_codes: ClassVar[bool] = True

    def check(self, phase: "Phase", spec: Spec) -> None:
        super().check(phase, spec)
        if not isinstance(spec, CogVideoSpec):
            return
        grid = spec.model.grid
        if phase.cut.cover not in (0, grid):
            raise ValueError(
                f"{phase.name}: cut.cover is {phase.cut.cover}, but a frame has {grid} codes a side"
            )
        if phase.windowed and not phase.cut.cover:
            raise ValueError(f"{phase.name}: windows over the object need a cut.cover of {grid}")

    def model(self, parts: Parts) -> DualChannelTransformer:
        """The model of the stage."""
        temporal = None if self.stage == "image" else part(parts, self.stage, TemporalChannel)
        return DualChannelTransformer(part(parts, "base", Base), temporal)

    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
        vqvae = part(parts, "vqvae", VQVAE)
        model = self.model(parts)
        layout = model.config.layout(self.stage)
        side = layout.grid // 2  # of a window
        small = replace(layout, grid=side)

        def loss(batch: Batch, step: int) -> Result:
            ids = text_ids(text, batch.captions, batch.durations, layout.text_len).to(batch.device)
            codes = encode_clips(vqvae, batch.frames[0]) if batch.codes is None else batch.codes
            context = codes
            if phase.corrupt:
                context = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
            cells = object_weights(batch, phase)
            weights = torch.ones_like(codes, dtype=torch.float32) if cells is None else cells.flatten(2)

            cut = torch.tensor([in_window(number, phase.windowed) for number in batch.numbers])
            if not cut.any():
                return token_loss(model, layout, ids, codes, context, weights)
            corners = window_corners(batch, side, model.window or 1)[cut].to(codes.device)
            maps = [windows(one[cut], corners, side) for one in (codes, context, weights)]
            windowed, _ = token_loss(model, small, ids[cut], *maps, corners)
            numbers = {"window": float(windowed.detach())}
            if cut.all():
                return windowed, numbers
            whole, found = token_loss(model, layout, ids[~cut], codes[~cut], context[~cut], weights[~cut])
            share = float(cut.float().mean())
            return share * windowed + (1 - share) * whole, {**found, **numbers}

        return loss

    def flops(self, phase: "Phase", parts: Parts) -> float | None:
        return clip_flops(self.stage, phase, parts)

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """Samples for captions of the batch."""
        return preview.samples(folder, parts, batch.captions)


@dataclass(frozen=True)
class DecoderObjective(Objective):
    """Codes of a clip to its frames.

    Some codes are wrong, as the decoder will meet them: replaced by near ones (`Phase.corrupt`), or sampled
    by the stages from all codes before them (`Phase.resample`). With an `adversary` the frames must pass a
    discriminator, too.
    """

    has_adversary: ClassVar[bool] = True

    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
        vqvae = part(parts, "vqvae", VQVAE)
        model = part(parts, "decoder", VideoDecoder)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))
        resampler = Resampler(parts) if phase.resample else None

        def loss(batch: Batch, step: int) -> Result:
            (clips,) = batch.frames
            ids = text_ids(text, batch.captions, batch.durations, model.config.text_len).to(clips.device)
            codes = encode_clips(vqvae, clips)
            if phase.corrupt:
                codes = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
            if resampler is not None:
                codes = resampler(codes, ids, batch, phase.resample)

            decoded = model(code_vectors(vqvae, codes), ids)
            weights = object_weights(batch, phase)
            total, numbers = frames_loss(decoded, hierarchical, clips, weights)
            if phase.adversary:
                judge = part(parts, "discriminator", Discriminator)
                found = opinion(judge, decoded, clips, batch.numbers, weights)
                total = total + phase.adversary * found.decoder + found.own
                numbers = {**numbers, **found.numbers}
            return total, numbers

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """The frames, decoded one by one, and decoded together."""
        vqvae = part(parts, "vqvae", VQVAE)
        model = part(parts, "decoder", VideoDecoder)
        clips = batch.frames[0][: preview.CLIPS]
        ids = text_ids(
            folder.text(),
            batch.captions[: preview.CLIPS],
            [SECONDS] * len(clips),
            model.config.text_len,
        ).to(clips.device)
        codes = encode_clips(vqvae, clips)
        apart = vqvae.decode(codes.flatten(0, 1)).view_as(clips)
        return preview.rows(clips, apart, model(code_vectors(vqvae, codes), ids))


def code_vectors(vqvae: VQVAE, codes: Tensor) -> Tensor:
    """Codes [B, F, N] to the vectors of the codebook [B, F, C, grid, grid]."""
    z = vqvae.vectors(codes.flatten(0, 1))
    return z.view(*codes.shape[:2], *z.shape[1:])


@dataclass(frozen=True)
class RefinerObjective(Objective):
    """Small clips to large ones: those that the tokenizer decodes, or, without a tokenizer, the true ones."""

    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
        model = part(parts, "refiner", Refiner)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))

        def loss(batch: Batch, step: int) -> Result:
            low, high = batch.frames
            return frames_loss(model(self._coded(low, parts)), hierarchical, high)

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """Resized, refined, true."""
        model = part(parts, "refiner", Refiner)
        low, high = (clips[: preview.CLIPS] for clips in batch.frames)
        low = self._coded(low, parts)
        return preview.rows(resize(low, model.config.scale), model(low), high)

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
            return
        (fps,) = phase.cut.rates
        frames = len(spec.regression.slots(fps)[: phase.cut.keep])
        due = phase.cut.keep or phase.cut.frames
        if frames != due:
            raise ValueError(
                f"{phase.name} cuts {due} frames, but the model has {frames} at {fps:g} frames a second"
            )

    def prepare(self, module: nn.Module, phase: "Phase") -> None:
        """Let the model know which frames it learns."""
        assert isinstance(module, RegressionTransformer)
        (fps,) = phase.cut.rates
        module.get_ready(fps, module.config.slots(fps)[: phase.cut.keep])

    def loss(self, parts: Parts, text: TextTokenizer, phase: "Phase") -> Loss:
        model = part(parts, "regression", RegressionTransformer)
        hierarchical = HierarchicalLoss(phase.loss).to(device_of(model))

        def loss(batch: Batch, step: int) -> Result:
            (clips,) = batch.frames
            frames = self._frames(model, text, batch, phase)
            return frames_loss(frames, hierarchical, clips)

        return loss

    def preview(self, folder: ModelFolder, parts: Parts, phase: "Phase", batch: Batch) -> Frames:
        """The regressed frames above the true ones."""
        model = part(parts, "regression", RegressionTransformer)
        some = replace(
            batch,
            captions=batch.captions[: preview.CLIPS],
            durations=batch.durations[: preview.CLIPS],
            frames=(batch.frames[0][: preview.CLIPS],),
        )
        return preview.rows(self._frames(model, folder.text(), some, phase), some.frames[0])

    def _frames(
        self, model: RegressionTransformer, text: TextTokenizer, batch: Batch, phase: "Phase"
    ) -> Tensor:
        (fps,) = phase.cut.rates
        slots = model.config.slots(fps)[: phase.cut.keep]
        ids = text_ids(text, batch.captions, batch.durations, model.config.text_len, PLAIN)
        frames: Tensor = model(ids.to(batch.device), fps, slots)
        return frames


TOKENIZER = TokenizerObjective()
IMAGE = TokenObjective("image")
STAGE1 = TokenObjective("stage1")
STAGE2 = TokenObjective("stage2")
DECODER = DecoderObjective()
REFINER = RefinerObjective()
REGRESSION = RegressionObjective()
