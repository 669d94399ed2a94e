"""The ablations of the paper's Table 3 in miniature: what each of its ideas is worth for equal time.

    random       no text-to-image model to inherit: base and temporal channel start from random weights
    one-stage-1  no hierarchy: five frames at the full 8 fps, continued with one frame in common
    one-stage-2  the same with two frames in common
    unfrozen     the base is trained further along with the temporal channel of stage 1
    unwindowed   full attention in the temporal channel of stage 2, instead of shifted windows

On Kinetics-600 the paper has FVD 108 for the full method, 121 and 137 for one stage with two frames and with
one in common, 125 without pre-training on videos, 166 from random weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.rivals.contest import FPS, to_clips
from benchmarks.rivals.ours import Ours
from benchmarks.rivals.phased import Part
from cogvideo.data.loader import Batch
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.draft import Draft
from cogvideo.generate.sampling import uniforms
from cogvideo.layout import Layout
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import TextTokenizer
from cogvideo.train import recipes
from cogvideo.train.inputs import Parts, encode_clips, object_weights, part, prepare_text
from cogvideo.train.losses import Result, token_loss
from cogvideo.train.objectives import LossFunction, TokenObjective
from cogvideo.train.phase import Phase
from cogvideo.video import Clip

WHOLE = {"crop_share": 0.0, "batch": 8}
RECIPE = recipes.find("tiny")
FRAMES = 33


class EveryFrame(Layout):
    """A layout whose first frame is trained as well: nobody else models it."""

    @property
    def trained(self) -> tuple[int, ...]:
        return self.order


@dataclass(frozen=True)
class EveryFrameObjective(TokenObjective):
    """A caption to all key frames, the first one included."""

    def build_loss(self, parts: Parts, text: TextTokenizer, phase: Phase) -> LossFunction:
        vqvae = part(parts, "vqvae", VQVAE)
        model = self.model(parts)
        plain = model.config.layout(self.stage)
        layout = EveryFrame(plain.text_len, plain.grid, plain.frames, plain.order, skew=plain.skew)

        def loss(batch: Batch, step: int) -> Result:
            ids = prepare_text(text, batch, layout.text_len).to(batch.device)
            codes = encode_clips(vqvae, batch.frames[0])
            cells = object_weights(batch, phase)
            return token_loss(model, layout, ids, codes, codes, None if cells is None else cells.flatten(2))

        return loss


class RandomInit(Ours):
    name = "random"
    plan: ClassVar[tuple[Part, ...]] = (
        Part(
            "stage1",
            0.75,
            {
                "objective": EveryFrameObjective("stage1"),
                "trains": ("base", "stage1"),
                "uses": ("vqvae",),
                "inherits": None,
                **WHOLE,
            },
        ),
        Part("stage2", 0.25),
    )

    def keyframes(self, pipe: CogVideo, captions: Sequence[str], seeds: Sequence[int]) -> Draft:
        """All key frames by stage 1: there is no image model."""
        c = self.spec.model
        codes = pipe._fill(
            "stage1",
            captions,
            known=torch.empty(len(captions), 0, c.frame_tokens, dtype=torch.long),
            uniform=uniforms(seeds, c.frames * c.frame_tokens, 0),
            task="key frames",
            progress=None,
        )
        return Draft(codes, pipe._keyframe_fps, tuple(captions), tuple(seeds))


class OneStage(Ours):
    """No hierarchy: five frames at the full fps, the next five after the last `overlap` of them."""

    learnt = ("base", "stage1")
    overlap: ClassVar[int]
    taken = 1
    plan: ClassVar[tuple[Part, ...]] = (
        Part("image", 0.5),
        Part("stage1", 0.5, {"clips": replace(RECIPE.phase("stage1").clips, fps=(FPS,))}),
    )

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        pipe = CogVideo(self.folder)
        c = self.spec.model
        codes = pipe.first_frames(list(captions), list(seeds)).codes
        span = 0
        while codes.shape[1] < FRAMES:
            known = codes[:, -self.overlap :]
            missing = (c.frames - known.shape[1]) * c.frame_tokens
            filled = self._continue(pipe, captions, known, uniforms(seeds, missing, 1000 + span))
            codes = torch.cat((codes, filled[:, known.shape[1] :]), 1)
            span += 1
        return to_clips(pipe.parts.vqvae, codes[:, :FRAMES], captions)

    def _continue(self, pipe: CogVideo, captions: Sequence[str], known: Tensor, uniform: Tensor) -> Tensor:
        seconds = (self.spec.model.frames - 1) / FPS
        return pipe._fill(
            "stage1", captions, known=known, uniform=uniform, task="frames", progress=None, seconds=seconds
        )


class OneStage1(OneStage):
    name = "one-stage-1"
    overlap = 1


class OneStage2(OneStage):
    name = "one-stage-2"
    overlap = 2


class Unfrozen(Ours):
    name = "unfrozen"
    taken = 1
    plan: ClassVar[tuple[Part, ...]] = (
        Part("image", 0.5),
        Part("stage1", 0.25, {"trains": ("base", "stage1"), "uses": ("vqvae",)}),
        Part("stage2", 0.25),
    )


class Unwindowed(Ours):
    name = "unwindowed"
    taken = 2
    changes: ClassVar[dict[str, int]] = {"window": 0}


ABLATIONS = (RandomInit, OneStage1, OneStage2, Unfrozen, Unwindowed)
