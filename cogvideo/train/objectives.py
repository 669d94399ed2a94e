"""What each model is trained for.

The first half are losses: pure functions of models and tensors. The second half are objectives, one a phase:
given the parts of the model by name, each returns the step that turns a batch of clips into a loss and the
numbers worth a line in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.data.loader import Batch
from cogvideo.layout import Layout
from cogvideo.model.system import DirectSystem, Family
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.text import PLAIN, TEMPLATE, TextTokenizer
from cogvideo.train.losses import HierarchicalLoss
from cogvideo.vqvae import VQVAE

if TYPE_CHECKING:
    from cogvideo.train.recipes import Phase

Parts = dict[str, Any]  # modules by name
Result = tuple[Tensor, dict[str, float]]
Step = Callable[[Batch, int, torch.Generator], Result]  # batch, number of the step, randomness

UNQUANTISED = 200  # steps of the tokenizer before its codebook is filled


def tokenizer_loss(
    vqvae: VQVAE, hierarchical: HierarchicalLoss, clips: Tensor, generator: torch.Generator
) -> Result:
    """Reconstruction of clips [B, F, 3, R, R] by the hierarchical loss, and commitment to the codes."""
    count = clips.shape[1]
    made, commitment, ids = vqvae(clips.flatten(0, 1), generator)
    loss, numbers = frames_loss(made.unflatten(0, (-1, count)), hierarchical, clips)
    if vqvae.codebook.filled:
        shares = torch.bincount(ids, minlength=vqvae.config.codes).float() / len(ids)
        numbers["perplexity"] = float(torch.exp(-(shares * shares.clamp_min(1e-9).log()).sum()))
    return loss + 0.25 * commitment, numbers


def token_loss(model: DualChannelTransformer, layout: Layout, text: Tensor, codes: Tensor) -> Result:
    """Cross-entropy of the frames that the layout trains (SPEC B.3). text [B, T], codes [B, F, N] in time
    order.

    Logged: the mean for each frame, by its place in time; frames that are given count only in the log.
    """
    laid = layout.lay(codes)
    hidden = model.body(torch.cat((text, layout.inputs(laid, model.config.start)), 1), layout)  # [B, S, D]
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
    return learnt.mean(), numbers


def frames_loss(made: Tensor, hierarchical: HierarchicalLoss, clips: Tensor) -> Result:
    """Clips that a model made against the right ones, both [B, F, 3, H, W], by the hierarchical loss."""
    loss, numbers = hierarchical(made, clips)
    numbers["psnr"] = float(-10 * F.mse_loss(made.detach().clamp(0, 1), clips).log10())
    return loss, numbers


def prepare_text(
    tokenizer: TextTokenizer, batch: Batch, text_len: int, drop: float, generator: torch.Generator,
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


# -- objectives
# ---------------------------------------------------------------------------------------------------


def check(phase: Phase, system: Family) -> None:
    """ValueError if the objective of a phase can do nothing with its steps or its clips."""
    if phase.objective is tokenizer and phase.steps <= UNQUANTISED:
        raise ValueError(f"{phase.name}: there are no codes before step {UNQUANTISED}; give it more steps")
    if phase.objective is direct and isinstance(system, DirectSystem):
        (rate,) = phase.cut.rates
        have, due = len(system.direct.slots(rate)[: phase.cut.keep]), phase.cut.keep or phase.cut.frames
        if have != due:
            raise ValueError(f"{phase.name} cuts {due} frames, but the model has {have} at {rate:g} frames a "
                             f"second")


def tokenizer(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    vqvae = parts["vqvae"]
    hierarchical = HierarchicalLoss(phase.loss).to(next(vqvae.parameters()).device)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        if number >= UNQUANTISED and not vqvae.codebook.filled:
            with torch.no_grad():
                z = vqvae.latents(batch.frames[0].flatten(0, 1)).float()
            vqvae.codebook.fill(z.permute(0, 2, 3, 1).flatten(0, 2), generator)
        return tokenizer_loss(vqvae, hierarchical, batch.frames[0], generator)

    return step


def image(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    config = parts["base"].config
    return _tokens(
        parts, text, phase, DualChannelTransformer(parts["base"]), Layout.image(config.text_len, config.grid)
    )


def stage1(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    config = parts["base"].config
    layout = Layout.keyframes(config.text_len, config.grid, config.frames)
    return _tokens(parts, text, phase, DualChannelTransformer(parts["base"], parts["stage1"]), layout)


def stage2(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    config = parts["base"].config
    layout = Layout.interpolation(config.text_len, config.grid, config.frames)
    return _tokens(parts, text, phase, DualChannelTransformer(parts["base"], parts["stage2"]), layout)


def _tokens(
    parts: Parts, text: TextTokenizer, phase: Phase, model: DualChannelTransformer, layout: Layout
) -> Step:
    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        ids = prepare_text(text, batch, layout.text_len, phase.drop, generator).to(batch.frames[0].device)
        return token_loss(model, layout, ids, encode_clips(parts["vqvae"], batch.frames[0]))

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


def direct(parts: Parts, text: TextTokenizer, phase: Phase) -> Step:
    """Captions to frames at the one rate of the phase."""
    model, (rate,) = parts["direct"], phase.cut.rates
    slots = model.config.slots(rate)[: phase.cut.keep]
    hierarchical = HierarchicalLoss(phase.loss).to(next(model.parameters()).device)

    def step(batch: Batch, number: int, generator: torch.Generator) -> Result:
        (clips,) = batch.frames
        ids = prepare_text(text, batch, model.config.text_len, phase.drop, generator, PLAIN).to(clips.device)
        return frames_loss(model(ids, rate, slots), hierarchical, clips)

    return step
