"""What each model is trained for.

The first half are losses: pure functions of models and tensors. The second half are objectives, one object
for each kind of phase: its check, its step (a batch of clips to a loss and the numbers for the log), its
preview, its cost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.data.loader import Batch
from cogvideo.layout import SECONDS, Layout
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.refiner import enlarge
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.model.vqvae import VQVAE, Codebook
from cogvideo.text import PLAIN, TEMPLATE, TextTokenizer
from cogvideo.train.cost import token_flops
from cogvideo.train.discriminator import new_discriminator, opinion
from cogvideo.train.losses import HierarchicalLoss
from cogvideo.train.preview import PREVIEW_CLIPS, preview_text, rows_of, samples, shown_clips

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

Parts = dict[str, Any]  # modules by name
Result = tuple[Tensor, dict[str, float]]
Step = Callable[[Batch, int], Result]  # of a batch and the number of the step

UNQUANTISED = 200  # steps of the tokenizer before its codebook starts


def tokenizer_loss(
    vqvae: VQVAE,
    hierarchical: HierarchicalLoss,
    clips: Tensor,
    generator: torch.Generator,
    perturb: float = 0.0,
    seeds: Sequence[int] = (),
    weights: Tensor | None = None,
) -> Result:
    """Reconstruction of clips [B, F, 3, R, R] by the hierarchical loss, and commitment to the codes; a share
    `perturb` of the codes is replaced by near ones, drawn from the clips' seeds. weights [B, F, h, w]: how
    much a place counts."""
    count = clips.shape[1]
    each = [count * seed + frame for seed in seeds for frame in range(count)]
    rebuilt, commitment, ids = vqvae(clips.flatten(0, 1), generator, perturb, each)
    loss, numbers = frames_loss(rebuilt.unflatten(0, (-1, count)), hierarchical, clips, weights)
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
    """Cross-entropy of the frames that the layout trains (SPEC B.3). text [B, T], codes [B, F, N] in time
    order; context [B, F, N]: codes to be read instead, so that a model learns to continue from wrong ones;
    weights [B, F, N]: how much a code counts among those of its clip; corners [B, 2]: first row and column of
    what the codes are a window of, if they are not whole frames.

    Logged: the mean for each frame, by its place in time, unweighted; frames that are given count only in the
    log.
    """
    laid = layout.lay(codes)
    read = layout.lay(codes if context is None else context)
    inputs = torch.cat((text, layout.inputs(read, model.config.start)), 1)
    hidden = model.body(inputs, layout, corners=corners)  # [B, S, D]
    first = int(layout.loss_mask().argmax())  # what is not trained comes first

    def cost(places: slice) -> Tensor:  # [B, S']
        logits = model.head(hidden[:, places])
        right = laid.flatten(1)[:, places]
        return F.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none").view_as(right)

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
    generated: Tensor, hierarchical: HierarchicalLoss, clips: Tensor, weights: Tensor | None = None
) -> Result:
    """The hierarchical loss of a model's clips against the true ones, both [B, F, 3, H, W]."""
    loss, numbers = hierarchical(generated, clips, weights)
    numbers["psnr"] = float(-10 * F.mse_loss(generated.detach().clamp(0, 1), clips).log10())
    return loss, numbers


def prepare_text(tokenizer: TextTokenizer, batch: Batch, text_len: int, template: str = TEMPLATE) -> Tensor:
    """Ids [B, text_len] of the captions of a batch. A caption that was dropped is empty and keeps its
    duration."""
    rows = [tokenizer.prompt(c, d, template) for c, d in zip(batch.captions, batch.durations)]
    return torch.tensor([tokenizer.pad_left(row[:text_len], text_len) for row in rows])


@torch.no_grad()
def encode_clips(vqvae: VQVAE, clips: Tensor) -> Tensor:
    """[B, F, 3, R, R] to codes [B, F, N]."""
    codes = vqvae.encode(clips.flatten(0, 1))  # [B * F, N]
    return codes.view(len(clips), -1, codes.shape[-1])


def object_weights(batch: Batch, phase: Phase) -> Tensor | None:
    """How much each cell of the clips counts, [B, F, cells, cells]: 1, and more where the object is."""
    if not phase.object_weight or batch.cover is None:
        return None
    return 1 + phase.object_weight * batch.cover.to(batch.device)


def in_window(number: int, share: float) -> bool:
    """Whether only a window of the clip of this number is learnt; of consecutive clips, a `share` is."""
    return int((number + 1) * share) > int(number * share)


def window_corners(batch: Batch, side: int, step: int = 1) -> Tensor:
    """[B, 2] first row and column of a window of side x side codes for each clip, drawn from the clip's own
    seed: it holds what the object covers in any frame, or as much as fits. Both are multiples of `step`,
    which keeps the tiles of the temporal channel whole. ValueError if the clips do not say where their object
    is."""
    if batch.cover is None:
        raise ValueError("the clips do not say where their object is")
    found = []
    for cover, seed in zip(batch.cover.amax(1).cpu(), batch.numbers):
        last = torch.full((2,), cover.shape[-1] - side)  # corner
        low, high = torch.zeros_like(last), last
        if len(covered := (cover > 0.05).nonzero()):
            ends = torch.stack((covered.amax(0) - side + 1, covered.amin(0)))  # it is held between these
            low, high = ends.amin(0).clamp(0).minimum(last), ends.amax(0).clamp(0).minimum(last)
        corner = low + (torch.rand(2, generator=seeded(seed)) * (high - low + 1)).long()
        found.append((corner + step // 2) // step * step)
    return torch.stack(found)


def windows(maps: Tensor, corners: Tensor, side: int) -> Tensor:
    """[B, F, N] to the window of each clip [B, F, side * side]."""
    grid = math.isqrt(maps.shape[-1])
    rows, columns = corners[:, :, None].add(torch.arange(side, device=maps.device)).unbind(1)  # [B, side]
    places = (rows[:, :, None] * grid + columns[:, None]).flatten(1)  # [B, side * side]
    return maps.gather(2, places[:, None].expand(-1, maps.shape[1], -1))


def corrupt(codebook: Codebook, codes: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Codes [B, F, N] with about `share` of them replaced by near ones, chosen by each clip's own seed."""
    return codebook.perturbed(codes.flatten(1), share, seeds).view_as(codes)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Resampler:
    """Replaces codes of clips by what the trained stages would sample there, given all previous codes."""

    def __init__(self, parts: Parts):
        c = parts["base"].config
        models = {one: DualChannelTransformer(parts["base"], parts[one]) for one in ("stage1", "stage2")}
        self.stages = [(c.layout(stage), model) for stage, model in models.items()]

    @torch.no_grad()
    def __call__(self, codes: Tensor, text: Tensor, batch: Batch, share: float) -> Tensor:
        """codes [B, F, N], text [B, T]; windows that span the whole clip are key frames, others between."""
        slow = torch.tensor([duration >= SECONDS for duration in batch.durations], device=codes.device)
        found = codes.clone()
        numbers = torch.stack([torch.rand(2, *codes.shape[1:], generator=seeded(n)) for n in batch.numbers])
        chances, uniform = numbers.to(codes.device).unbind(1)  # each [B, F, N]
        for (layout, model), mine in zip(self.stages, (slow, ~slow)):
            if mine.any():
                found[mine] = self._resample(layout, model, codes[mine], text[mine], uniform[mine])
        return torch.where(chances < share, found, codes)

    def _resample(
        self, layout: Layout, model: DualChannelTransformer, codes: Tensor, text: Tensor, uniform: Tensor
    ) -> Tensor:
        laid = layout.lay(codes)
        logits = model(torch.cat((text, layout.inputs(laid, model.config.start)), 1), layout)
        shares = logits.softmax(-1).cumsum(-1)  # [B, F * N, V]
        sampled = torch.searchsorted(shares, layout.lay(uniform).flatten(1)[..., None]).squeeze(-1)
        return layout.unlay(sampled.clamp_max(shares.shape[-1] - 1).view_as(laid))


# -- objectives: one kind of phase each
# ---------------------------------------------------------------------------------------------------


class Objective(ABC):
    """A kind of phase: what it checks, what it minimises, how it shows its progress and what a step costs.

    An objective has no state: all that a run sets is in the `Phase`.
    """

    recurs = False  # whether clips may recur as codes
    has_windows = False  # whether windows of clips may be learnt
    has_adversary = False  # whether a discriminator may judge the output

    def check(self, phase: Phase, spec: Spec) -> None:
        """Raise ValueError if this objective cannot use the steps, the clips or the fields of a phase."""
        if phase.windowed and not self.has_windows:
            raise ValueError(f"{phase.name}.windowed must be 0: only models of codes learn windows of them")
        if phase.adversary and not self.has_adversary:
            raise ValueError(f"{phase.name}.adversary must be 0: only decoders of clips have a discriminator")
        if phase.reuse > 1 and not self.recurs:
            raise ValueError(
                f"{phase.name}.reuse must be 1: clips recur as codes, and {phase.name} needs frames"
            )

    def prepare(self, part: nn.Module, phase: Phase) -> None:
        """Change a part that is about to learn, before its first step."""
        return None

    def extra_parts(self, phase: Phase, seed: int) -> dict[str, nn.Module]:
        """Modules that learn next to the parts, and that the checkpoint keeps but the model folder does
        not."""
        return {}

    @abstractmethod
    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        """The function that turns a batch and its number into a loss and the numbers for the log."""

    @abstractmethod
    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """A picture of the model's progress on a batch: uint8 [H, W, 3]."""

    def clip_flops(self, phase: Phase, parts: Parts) -> float | None:
        """Floating-point operations for one clip, forward and backward; None if they are not known."""
        return None


class TokenizerObjective(Objective):
    """Frames to codes and back."""

    def check(self, phase: Phase, spec: Spec) -> None:
        super().check(phase, spec)
        if phase.steps <= UNQUANTISED:
            raise ValueError(
                f"{phase.name}: there are no codes before step {UNQUANTISED}; give it more steps"
            )

    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        vqvae = parts["vqvae"]
        hierarchical = HierarchicalLoss(phase.loss).to(next(vqvae.parameters()).device)

        def step(batch: Batch, number: int) -> Result:
            (clips,) = batch.frames
            generator = seeded(batch.numbers[0])  # of the codebook, which the first process changes for all
            if number >= UNQUANTISED and not vqvae.codebook.filled:
                with torch.no_grad():
                    z = vqvae.latents(clips.flatten(0, 1)).float()
                vqvae.codebook.fill(z.permute(0, 2, 3, 1).flatten(0, 2), generator)
            weights = object_weights(batch, phase)
            return tokenizer_loss(
                vqvae, hierarchical, clips, generator, phase.perturb, batch.numbers, weights
            )

        return step

    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """The frames, and their reconstruction below them."""
        vqvae = parts["vqvae"]
        clips = shown_clips(batch)
        flat = clips.flatten(0, 1)
        if vqvae.codebook.filled:
            rebuilt = vqvae.decode(vqvae.encode(flat))
        else:
            rebuilt, _, _ = vqvae(flat)
        return rows_of(clips, rebuilt.unflatten(0, clips.shape[:2]))


@dataclass(frozen=True)
class TokenObjective(Objective):
    """Text and codes to the next codes: the stage "image" trains the base, "stage1" and "stage2" their
    temporal channels."""

    stage: str
    recurs = True
    has_windows = True

    def check(self, phase: Phase, spec: Spec) -> None:
        super().check(phase, spec)
        if not isinstance(spec, CogVideoSpec):
            raise ValueError(f"{phase.name} trains a model of codes, but this model has none")
        grid = spec.model.grid
        cover = phase.cut.cover
        if cover not in (0, grid):
            raise ValueError(f"{phase.name}: cut.cover is {cover}, but a frame has {grid} codes a side")
        if phase.windowed and not cover:
            raise ValueError(f"{phase.name}: windows over the object need a cut.cover of {grid}")

    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        model = DualChannelTransformer(parts["base"], parts.get(self.stage))
        layout = parts["base"].config.layout(self.stage)
        side = layout.grid // 2  # of a window
        small = replace(layout, grid=side)

        def step(batch: Batch, number: int) -> Result:
            ids = prepare_text(text, batch, layout.text_len).to(batch.device)
            codes = encode_clips(parts["vqvae"], batch.frames[0]) if batch.codes is None else batch.codes
            context = codes
            if phase.corrupt:
                context = corrupt(parts["vqvae"].codebook, codes, phase.corrupt, batch.numbers)
            weights = object_weights(batch, phase)
            weights = torch.ones_like(codes, dtype=torch.float32) if weights is None else weights.flatten(2)

            cut = torch.tensor([in_window(number, phase.windowed) for number in batch.numbers])
            if not cut.any():
                return token_loss(model, layout, ids, codes, context, weights)

            corners = window_corners(batch, side, model.window or 1)[cut].to(codes.device)
            learnt, read, counts = (windows(x[cut], corners, side) for x in (codes, context, weights))
            loss, _ = token_loss(model, small, ids[cut], learnt, read, counts, corners)
            numbers = {"window": float(loss.detach())}
            if cut.all():
                return loss, numbers

            share = float(cut.float().mean())
            whole, found = token_loss(model, layout, ids[~cut], codes[~cut], context[~cut], weights[~cut])
            return share * loss + (1 - share) * whole, {**found, **numbers}

        return step

    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """Samples for the captions of the batch, generated with the present weights."""
        return samples(folder, parts, batch.captions[:PREVIEW_CLIPS])

    def clip_flops(self, phase: Phase, parts: Parts) -> float | None:
        """The average over whole clips and windows."""
        layout = parts["base"].config.layout(self.stage)
        whole = token_flops(layout, self.stage, phase.trains, parts)
        if not phase.windowed:
            return whole
        small = token_flops(replace(layout, grid=layout.grid // 2), self.stage, phase.trains, parts)
        return (1 - phase.windowed) * whole + phase.windowed * small


class DecoderObjective(Objective):
    """Codes of a clip to its frames.

    Some codes are wrong, as in use: replaced by near ones (`corrupt`), or sampled by the stages from all
    previous codes (`resample`). With an `adversary` the frames must also convince a discriminator.
    """

    has_adversary = True

    def extra_parts(self, phase: Phase, seed: int) -> dict[str, nn.Module]:
        return {"discriminator": new_discriminator(seed)} if phase.adversary else {}

    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        vqvae = parts["vqvae"]
        model = parts["decoder"]
        hierarchical = HierarchicalLoss(phase.loss).to(next(model.parameters()).device)
        resampler = Resampler(parts) if phase.resample else None

        def step(batch: Batch, number: int) -> Result:
            (clips,) = batch.frames
            ids = prepare_text(text, batch, model.config.text_len).to(clips.device)
            codes = encode_clips(vqvae, clips)
            if phase.corrupt:
                codes = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
            if resampler is not None:
                codes = resampler(codes, ids, batch, phase.resample)

            z = vqvae.vectors(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
            decoded = model(z, ids)
            weights = object_weights(batch, phase)
            loss, numbers = frames_loss(decoded, hierarchical, clips, weights)
            if phase.adversary:
                found = opinion(parts["discriminator"], decoded, clips, batch.numbers, weights)
                loss = loss + phase.adversary * found.decoder + found.own
                numbers |= found.numbers
            return loss, numbers

        return step

    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """The frames, the tokenizer's reconstruction, and the decoder's."""
        vqvae = parts["vqvae"]
        decoder = parts["decoder"]
        clips = shown_clips(batch)
        ids = preview_text(folder.text(), batch, decoder.config.text_len, SECONDS, TEMPLATE)
        codes = vqvae.encode(clips.flatten(0, 1))
        apart = vqvae.decode(codes).unflatten(0, clips.shape[:2])
        z = vqvae.vectors(codes).unflatten(0, clips.shape[:2])
        return rows_of(clips, apart, decoder(z, ids.to(clips.device)))


class RefinerObjective(Objective):
    """Small clips to large ones: the tokenizer's output for them or, without a tokenizer, the clips
    themselves."""

    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        refiner = parts["refiner"]
        hierarchical = HierarchicalLoss(phase.loss).to(next(refiner.parameters()).device)

        def step(batch: Batch, number: int) -> Result:
            low, high = batch.frames
            return frames_loss(refiner(self._decoded(parts, low)), hierarchical, high)

        return step

    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """The small frames resized, refined, and the true large ones."""
        refiner = parts["refiner"]
        low = self._decoded(parts, shown_clips(batch))
        return rows_of(enlarge(low, refiner.config.scale), refiner(low), batch.frames[1][:PREVIEW_CLIPS])

    def _decoded(self, parts: Parts, clips: Tensor) -> Tensor:
        if "vqvae" not in parts:
            return clips
        codes = encode_clips(parts["vqvae"], clips)
        decoded: Tensor = parts["vqvae"].decode(codes.flatten(0, 1))
        return decoded.view(*codes.shape[:2], *decoded.shape[1:])


class RegressionObjective(Objective):
    """Captions to frames, at the one frame rate of the phase."""

    def check(self, phase: Phase, spec: Spec) -> None:
        super().check(phase, spec)
        if not isinstance(spec, RegressionSpec):
            raise ValueError(f"{phase.name} trains a regression model, and this is another")
        (fps,) = phase.cut.rates
        have = len(spec.regression.slots(fps)[: phase.cut.keep])
        due = phase.cut.keep or phase.cut.frames
        if have != due:
            raise ValueError(
                f"{phase.name} cuts {due} frames, but the model has {have} at {fps:g} frames a second"
            )

    def prepare(self, part: nn.Module, phase: Phase) -> None:
        """Mark the frames of the phase as trained, and start new ones from those that were."""
        model: Any = part
        (fps,) = phase.cut.rates
        model.get_ready(fps, model.config.slots(fps)[: phase.cut.keep])

    def step(self, parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
        model = parts["regression"]
        (fps,) = phase.cut.rates
        slots = model.config.slots(fps)[: phase.cut.keep]
        hierarchical = HierarchicalLoss(phase.loss).to(next(model.parameters()).device)

        def step(batch: Batch, number: int) -> Result:
            (clips,) = batch.frames
            ids = prepare_text(text, batch, model.config.text_len, PLAIN).to(clips.device)
            return frames_loss(model(ids, fps, slots), hierarchical, clips)

        return step

    def preview(self, folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch) -> np.ndarray:
        """The model's frames for the captions, and the true ones."""
        model = parts["regression"]
        clips = shown_clips(batch)
        (fps,) = phase.cut.rates
        ids = preview_text(folder.text(), batch, model.config.text_len, 0.0, PLAIN)
        generated = model(ids.to(clips.device), fps, model.config.slots(fps)[: phase.cut.keep])
        return rows_of(generated, clips)
