"""What each model is trained for.

The first half are losses: pure functions of models and tensors. The second half are objectives, one a phase:
given the parts of the model by name, each returns the step that turns a batch of clips into a loss and the
numbers worth a line in the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.data.loader import Batch
from cogvideo.layout import SECONDS, Layout
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.model.vqvae import VQVAE, Codebook
from cogvideo.text import PLAIN, TEMPLATE, TextTokenizer
from cogvideo.train.discriminator import opinion
from cogvideo.train.losses import HierarchicalLoss

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

Parts = dict[str, Any]  # modules by name
Result = tuple[Tensor, dict[str, float]]
Step = Callable[[Batch, int, torch.Generator], Result]  # batch, number of the step, randomness

UNQUANTISED = 200  # steps of the tokenizer before its codebook is filled


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
    made, commitment, ids = vqvae(clips.flatten(0, 1), generator, perturb, each)
    loss, numbers = frames_loss(made.unflatten(0, (-1, count)), hierarchical, clips, weights)
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
    """Cross-entropy of the frames that the layout trains (docs/reference.md, "Loss"). text [B, T],
    codes [B, F, N] in time order; context [B, F, N]: codes to be read instead, so
    that a model learns to go on from wrong ones;
    weights [B, F, N]: how much a code counts among those of its clip; corners [B, 2]: first row and column of
    what the codes are a window of, if they are not whole frames.

    Logged: the mean for each frame, by its place in time, unweighted; frames that are given count only in the
    log.
    """
    laid, read = layout.lay(codes), layout.lay(codes if context is None else context)
    inputs = torch.cat((text, layout.inputs(read, model.config.start)), 1)
    hidden = model.hidden(inputs, layout, corners=corners)  # [B, S, D]
    first = int(layout.loss_mask().argmax())  # what is not trained comes first

    def cost(places: slice) -> Tensor:  # [B, S']
        logits, right = model.head(hidden[:, places]), laid.flatten(1)[:, places]
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
    made: Tensor, hierarchical: HierarchicalLoss, clips: Tensor, weights: Tensor | None = None
) -> Result:
    """Clips that a model made against the right ones, both [B, F, 3, H, W], by the hierarchical loss."""
    loss, numbers = hierarchical(made, clips, weights)
    numbers["psnr"] = float(-10 * F.mse_loss(made.detach().clamp(0, 1), clips).log10())
    return loss, numbers


def prepare_text(
    tokenizer: TextTokenizer,
    batch: Batch,
    text_len: int,
    drop: float,
    generator: torch.Generator,
    template: str = TEMPLATE,
) -> Tensor:
    """Ids [B, T]; a share `drop` of the captions is left out (their duration stays), for classifier-free
    guidance."""
    dropped = torch.rand(len(batch.captions), generator=generator) < drop
    captions = ["" if gone else caption for gone, caption in zip(dropped.tolist(), batch.captions)]
    rows = [tokenizer.prompt(c, d, template) for c, d in zip(captions, batch.durations)]
    return torch.tensor([tokenizer.pad_left(row[:text_len], text_len) for row in rows])


@torch.no_grad()
def encode_clips(vqvae: VQVAE, clips: Tensor) -> Tensor:
    """[B, F, 3, R, R] to codes [B, F, N]."""
    return vqvae.encode(clips.flatten(0, 1)).unflatten(0, (len(clips), -1))


def object_weights(batch: Batch, phase: Phase) -> Tensor | None:
    """How much each cell of the clips counts [B, F, cells, cells]: 1, and more where the object is."""
    if not phase.object_weight or batch.cover is None:
        return None
    return 1 + phase.object_weight * batch.cover.to(batch.device)


def in_window(number: int, share: float) -> bool:
    """Whether only a window of the clip of this number is learnt: a `share` of any that follow each other."""
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
    """Codes [B, F, N] with about `share` of them replaced by near ones, drawn from each clip's own seed."""
    return codebook.perturb(codes.flatten(1), share, seeds).view_as(codes)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Resampler:
    """Replaces codes of clips by what the trained stages would sample there, given the true codes before."""

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


# -- objectives
# ---------------------------------------------------------------------------------------------------


def check(phase: Phase, spec: Spec) -> None:
    """ValueError if the objective of a phase can do nothing with its steps or its clips."""
    if phase.objective is tokenizer and phase.steps <= UNQUANTISED:
        raise ValueError(f"{phase.name}: there are no codes before step {UNQUANTISED}; give it more steps")
    if phase.objective in (image, stage1, stage2) and isinstance(spec, CogVideoSpec):
        grid, cover = spec.model.grid, phase.cut.cover
        if cover not in (0, grid):
            raise ValueError(f"{phase.name}: cut.cover is {cover}, but a frame has {grid} codes a side")
        if phase.windowed and not cover:
            raise ValueError(f"{phase.name}: windows over the object need a cut.cover of {grid}")
    elif phase.windowed:
        raise ValueError(f"{phase.name}.windowed must be 0: only models of codes learn windows of them")
    if phase.adversary and phase.objective is not decoder:
        raise ValueError(f"{phase.name}.adversary must be 0: only decoders of clips have a discriminator")
    if phase.reuse > 1 and phase.objective not in (image, stage1, stage2):
        raise ValueError(f"{phase.name}.reuse must be 1: clips recur as codes, and {phase.name} needs frames")
    if phase.objective is regression and isinstance(spec, RegressionSpec):
        (rate,) = phase.cut.rates
        have, due = len(spec.regression.slots(rate)[: phase.cut.keep]), phase.cut.keep or phase.cut.frames
        if have != due:
            raise ValueError(
                f"{phase.name} cuts {due} frames, but the model has {have} at {rate:g} frames a second"
            )


def tokenizer(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    vqvae = parts["vqvae"]
    hierarchical = HierarchicalLoss(phase.loss).to(next(vqvae.parameters()).device)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        if number >= UNQUANTISED and not vqvae.codebook.filled:
            with torch.no_grad():
                z = vqvae.latents(batch.frames[0].flatten(0, 1)).float()
            vqvae.codebook.init_codes(z.permute(0, 2, 3, 1).flatten(0, 2), generator)
        clips, weights = batch.frames[0], object_weights(batch, phase)
        return tokenizer_loss(vqvae, hierarchical, clips, generator, phase.perturb, batch.numbers, weights)

    return step


def image(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    layout = parts["base"].config.layout("image")
    return _tokens(parts, text, phase, DualChannelTransformer(parts["base"]), layout)


def stage1(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    layout = parts["base"].config.layout("stage1")
    return _tokens(parts, text, phase, DualChannelTransformer(parts["base"], parts["stage1"]), layout)


def stage2(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    layout = parts["base"].config.layout("stage2")
    return _tokens(parts, text, phase, DualChannelTransformer(parts["base"], parts["stage2"]), layout)


def _tokens(
    parts: Parts, text: TextTokenizer, phase: Phase, model: DualChannelTransformer, layout: Layout
) -> Step:
    side = layout.grid // 2  # of a window
    small = replace(layout, grid=side)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        ids = prepare_text(text, batch, layout.text_len, phase.drop, generator).to(batch.device)
        codes = encode_clips(parts["vqvae"], batch.frames[0]) if batch.codes is None else batch.codes
        context, weights = codes, object_weights(batch, phase)
        if phase.corrupt:
            context = corrupt(parts["vqvae"].codebook, codes, phase.corrupt, batch.numbers)
        weights = torch.ones_like(codes, dtype=torch.float32) if weights is None else weights.flatten(2)

        cut = torch.tensor([in_window(number, phase.windowed) for number in batch.numbers])
        if not cut.any():
            return token_loss(model, layout, ids, codes, context, weights)
        corners = window_corners(batch, side, model.window or 1)[cut].to(codes.device)
        learnt, read, counts = (windows(x[cut], corners, side) for x in (codes, context, weights))
        loss, _ = token_loss(model, small, ids[cut], learnt, read, counts, corners)
        numbers = {"window": float(loss.detach())}
        if not cut.all():
            share = float(cut.float().mean())
            whole, found = token_loss(model, layout, ids[~cut], codes[~cut], context[~cut], weights[~cut])
            loss, numbers = share * loss + (1 - share) * whole, {**found, **numbers}
        return loss, numbers

    return step


def decoder(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    """Codes of a clip to its frames. Some codes are wrong, as the decoder will meet them: replaced by near
    ones (`corrupt`), or sampled by the stages from all codes before them (`resample`). With an `adversary`
    the frames must pass a discriminator, too."""
    vqvae, model = parts["vqvae"], parts["decoder"]
    hierarchical = HierarchicalLoss(phase.loss).to(next(model.parameters()).device)
    resampler = Resampler(parts) if phase.resample else None

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        (clips,) = batch.frames
        ids = prepare_text(text, batch, model.config.text_len, phase.drop, generator).to(clips.device)
        codes = encode_clips(vqvae, clips)
        if phase.corrupt:
            codes = corrupt(vqvae.codebook, codes, phase.corrupt, batch.numbers)
        if resampler is not None:
            codes = resampler(codes, ids, batch, phase.resample)
        z = vqvae.vectors(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        made, weights = model(z, ids), object_weights(batch, phase)
        loss, numbers = frames_loss(made, hierarchical, clips, weights)
        if phase.adversary:
            found = opinion(parts["discriminator"], made, clips, batch.numbers, weights)
            loss, numbers = loss + phase.adversary * found.decoder + found.own, {**numbers, **found.numbers}
        return loss, numbers

    return step


def refiner(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    """Small clips to large ones: what the tokenizer makes of them, or, without a tokenizer, as they are."""
    hierarchical = HierarchicalLoss(phase.loss).to(next(parts["refiner"].parameters()).device)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        low, high = batch.frames
        if "vqvae" in parts:
            codes = encode_clips(parts["vqvae"], low)
            low = parts["vqvae"].decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        return frames_loss(parts["refiner"](low), hierarchical, high)

    return step


def regression(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    """Captions to frames at the one rate of the phase."""
    model, (rate,) = parts["regression"], phase.cut.rates
    slots = model.config.slots(rate)[: phase.cut.keep]
    hierarchical = HierarchicalLoss(phase.loss).to(next(model.parameters()).device)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        (clips,) = batch.frames
        ids = prepare_text(text, batch, model.config.text_len, phase.drop, generator, PLAIN).to(clips.device)
        return frames_loss(model(ids, rate, slots), hierarchical, clips)

    return step
