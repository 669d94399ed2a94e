"""Text to video: key frames, then rounds of interpolation, each doubling the frame rate, then pixels.

    draft = pipe.keyframes(["a dog runs to the right"], seeds=[7])     5 frames, 1 frame per second
    while draft.fps < 8:
        draft = pipe.interpolate(draft)                               9, 17, 33 frames
    clips = pipe.upscale(pipe.decode(pipe.superresolve(draft)))

Every method takes a value and returns one, so any step can be saved, shown, repeated or skipped. A user's
image (image to video), the last seconds of a video (continuation) or frames to interpolate between become
drafts by `encode`. `pipe(prompt)` calls the methods one after the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo.files import expand_user
from cogvideo.generate import reference
from cogvideo.generate.cost import cache_bytes
from cogvideo.generate.draft import Draft, DraftStore
from cogvideo.generate.estimate import Estimate
from cogvideo.generate.fill import fill
from cogvideo.generate.parts import LoadedParts, refine
from cogvideo.generate.pipeline import ImageInput, Pipeline, Prompt, VideoInput
from cogvideo.generate.prompts import Prompts
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.generate.sampling import Sampling, new_seeds, sample, stages, uniforms
from cogvideo.generate.torchrun import Slices
from cogvideo.hardware import free_memory, has_fast_bfloat16
from cogvideo.layout import SECONDS, Layout, rounds
from cogvideo.model.config import STAGES
from cogvideo.model.families import BASES, CogVideoSpec
from cogvideo.model.folder import ModelError, ModelFolder, find_model, read_clusters
from cogvideo.model.lora import Adapter
from cogvideo.model.vqvae import to_frames, to_images
from cogvideo.progress import Progress, open_progress
from cogvideo.text import TEMPLATE
from cogvideo.video import VIDEOS, Clip, VideoFile, read_image

LOGIT_ROWS = 400  # computed together in super-resolution
MAX_SAMPLES = {"cpu": 16}  # filled together: more are slower where the processor's cache is small

Watch = Callable[[Tensor], None]  # sees the codes so far [B, F, N] in time order, -1 where there is none

# Streams of a sample's random numbers (`uniforms`), one for each use; interpolation has `_span_stream`.
FIRST_FRAME, KEYFRAMES, SUPERRES = range(3)


def load(
    model: str | Path = "tiny",
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    reference_quirks: bool = False,
    revision: str | None = None,
    slices: Slices | None = None,
) -> Pipeline:
    """Open a model of any family: a shipped name, a folder, or a hub id.

    dtype: what the transformer computes with, float32, bfloat16 or int8; by default what is fastest.
    reference_quirks: also repeat what the original's inference does otherwise than its training
    (docs/original-weights.md).
    revision: of a hub id: a branch, tag or commit; the same as MODEL@REVISION.
    slices: this process has one of several slices of the matrices (`torchrun.join`).
    """
    folder = ModelFolder(find_model(model if revision is None else f"{model}@{revision}"))
    if isinstance(folder.spec(), CogVideoSpec):
        return CogVideo(folder, device, dtype, reference_quirks, slices)
    if slices is not None:
        raise ValueError("--slices are for models of the family cogvideo")
    if reference_quirks:
        raise ValueError("reference_quirks are the original's; leave it out for a regression model")
    return RegressionPipeline(folder, device, dtype)


@dataclass(frozen=True)
class Request:
    """What one call asks for; all of it is checked."""

    prompts: list[str]  # one a clip
    seeds: list[int]
    num_frames: int
    fps: float
    guidance_scale: float | None
    begin: Draft | None  # frames that every clip starts with


class CogVideo(Pipeline):
    """A loaded model of the family `cogvideo`."""

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        reference_quirks: bool = False,
        slices: Slices | None = None,
    ):
        spec = folder.spec()
        if not isinstance(spec, CogVideoSpec):
            raise ModelError(f"{folder.path} is no model of the family cogvideo")
        super().__init__(folder, spec, device, dtype)
        self.spec: CogVideoSpec = spec
        self.reference_quirks = reference_quirks
        self.config = folder.config
        self.parts = LoadedParts(folder, self.device, self.dtype, slices)
        self.text = folder.text()
        self.prompts = Prompts(self.text, self.config.words, self.config.languages)
        self.templates = dict.fromkeys(STAGES, TEMPLATE) | self.config.prompts
        self.sampling = stages(self.config.sampling, self._clusters())
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, float] = {}  # of the active ones
        self._fused: list[tuple[Adapter, float]] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        reference_quirks: bool = False,
        revision: str | None = None,
    ) -> Pipeline:
        """Open a model, as `load` does: one of the regression family is a `RegressionPipeline`, which is
        called in the same way."""
        return load(model, device, dtype, reference_quirks, revision)

    # -- adapters

    def load_lora_weights(self, where: str | Path, adapter_name: str | None = None) -> str:
        """Load an adapter (a file, its folder, or a hub id) and generate with it from now on, beside those
        that are active. Return its name, by default that of its folder. ModelError if it does not fit."""
        adapter = Adapter.load(where)
        adapter.check_fits(self.spec, where)
        name = adapter_name or expand_user(where).absolute().stem
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r} already; give another adapter_name")
        self._adapters[name] = adapter
        self._weights[name] = 1.0
        self._adapt()
        return name

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
        """Generate with these adapters alone, each times its weight; no names: with none."""
        chosen = [names] if isinstance(names, str) else list(names)
        shares = [float(weights)] * len(chosen) if isinstance(weights, (int, float)) else list(weights)
        if len(shares) != len(chosen):
            raise ValueError(f"{len(chosen)} adapters need as many weights; got {len(shares)}")
        for name, share in zip(chosen, shares):
            if name not in self._adapters:
                there = ", ".join(self._adapters) or "none"
                raise ValueError(f"there is no adapter {name!r}; those loaded are {there}")
            if not math.isfinite(share):
                raise ValueError(f"the weight of {name} must be finite; got {share}")
        self._weights = dict(zip(chosen, shares))
        self._adapt()

    @property
    def active_adapters(self) -> dict[str, float]:
        """The adapters in use, and their weights."""
        return dict(self._weights)

    def fuse_lora(self) -> None:
        """Make the active adapters a part of this loaded model: `unload_lora_weights` keeps them, and they
        have no names any more."""
        self._fused += [(self._adapters[name], weight) for name, weight in self._weights.items()]
        self._adapters.clear()
        self._weights.clear()
        self._adapt()

    def unload_lora_weights(self) -> None:
        """Forget all adapters that are not fused."""
        self._adapters.clear()
        self._weights.clear()
        self._adapt()

    def _adapt(self) -> None:
        used = [(self._adapters[name], weight) for name, weight in self._weights.items()]
        self.parts.adapt([*self._fused, *used])
        words = {word for adapter, _ in self.parts.adapters for word in adapter.words}
        if self.config.words:
            words |= {*self.config.words}
            self.prompts = replace(self.prompts, words=tuple(sorted(words)))

    def _clusters(self) -> Tensor | None:
        """The cluster of each code [V], if the folder says it."""
        file = self.folder.path / "cluster_labels.npy"
        if not file.exists():
            return None
        return torch.from_numpy(read_clusters(file, self.spec.model.codes)).to(self.device)

    @property
    def frame_counts(self) -> dict[int, float]:
        """Numbers of frames that a call can ask for, and the frames per second that each comes with: 1 is an
        image by the image model alone."""
        return {1: self._keyframe_fps} | rounds(self.spec.model.frames)

    @property
    def _keyframe_fps(self) -> float:
        return (self.spec.model.frames - 1) / SECONDS

    # -- from prompts to clips

    def __call__(
        self,
        prompt: Prompt,
        *,
        image: ImageInput | None = None,
        video: VideoInput | None = None,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | None = None,
        seed: int | None = None,
        progress: bool | Progress = True,
        keep: str | Path | None = None,
    ) -> list[Clip]:
        """Generate clips, `num_videos_per_prompt` for each prompt; see `Pipeline`."""
        prompts = self.check_prompts(prompt)
        num_frames = self.check_frames(num_frames)
        self._check_options(num_frames, num_videos_per_prompt, guidance_scale, image, video)
        self.folder.check(self._needed(num_frames))
        prompts = [prompt for prompt in prompts for _ in range(num_videos_per_prompt)]
        seeds = new_seeds(seed, len(prompts))
        begin = self._beginning(image, video, prompts, seeds)
        fps = self.frame_counts[num_frames]
        request = Request(prompts, seeds, num_frames, fps, guidance_scale, begin)
        store = DraftStore(keep, self._describe(request), self.device)

        with open_progress(progress) as report:
            draft = self._draft(request, store, report)
            begun = self._begun_superresolution(request, store, draft)
            large = self.superresolve(draft, begin=begun, each=partial(store.save, "larger"), progress=report)
            return self.upscale(self.decode(large), progress=report)

    def _check_options(
        self,
        num_frames: int,
        num_videos_per_prompt: int,
        guidance_scale: float | None,
        image: ImageInput | None,
        video: VideoInput | None,
    ) -> None:
        if image is not None and video is not None:
            raise ValueError("give an image or a video to begin with, not both")
        begins = image is not None or video is not None
        self.check_options(num_frames, num_videos_per_prompt, guidance_scale, begins)

    def check_options(
        self, num_frames: int, num_videos_per_prompt: int, guidance_scale: float | None, begins: bool
    ) -> None:
        """Raise ValueError for options of a call that do not go together; `begins`: with an image or a
        video."""
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt must be 1 or more, got {num_videos_per_prompt}")
        if guidance_scale is not None:
            replace(self.sampling["stage1"], guidance_scale=guidance_scale)  # raises if out of range
        if num_frames == 1 and begins:
            raise ValueError(
                "num_frames 1 is the first frame, which an image or a video already gives; "
                f"choose one of {', '.join(map(str, sorted(self.frame_counts)[1:]))}"
            )

    def _needed(self, num_frames: int) -> list[str]:
        """The parts that a call needs."""
        needed = ["vqvae", "base"]
        if num_frames > 1:
            needed.append("stage1")
        if num_frames > self.spec.model.frames:
            needed.append("stage2")
        finishing = self.folder.postprocessing_parts
        own = [f"{part}_base" for part in finishing if f"{part}_base" in self.spec.parts]
        return [*needed, *finishing, *own]

    def _describe(self, request: Request) -> str:
        """All that decides what a call generates."""
        decides = (
            self.folder.version(),
            self.dtype,
            self.sampling,
            self.templates,
            self.reference_quirks,
            request.prompts,
            request.seeds,
            request.num_frames,
            request.guidance_scale,
            None if request.begin is None else request.begin.codes.tolist(),
            *((adapter.digest, weight) for adapter, weight in self.parts.adapters),
        )
        return repr(decides)

    def _draft(self, request: Request, store: DraftStore, report: Progress | None) -> Draft:
        """Key frames, then rounds of interpolation; each step is stored."""
        draft = self._stored("frames", request, store, self.spec.model.frame_tokens)
        if draft is not None and self.frame_counts.get(draft.codes.shape[1]) != draft.fps:
            raise ValueError(f"{store.file('frames')} is not of this call; delete it")
        if draft is None and request.num_frames == 1:
            draft = self.first_frames(
                request.prompts,
                request.seeds,
                guidance_scale=request.guidance_scale,
                progress=report,
            )
        elif draft is None:
            draft = self.keyframes(
                request.prompts,
                request.seeds,
                begin=request.begin,
                guidance_scale=request.guidance_scale,
                progress=report,
            )
        while draft.fps < request.fps:
            store.save("frames", draft)
            draft = self.interpolate(draft, progress=report)
        store.save("frames", draft)
        return draft

    def _begun_superresolution(self, request: Request, store: DraftStore, draft: Draft) -> Draft | None:
        """The first large frames of an interrupted call."""
        if self.spec.superres is None:
            return None
        begun = self._stored("larger", request, store, self.spec.superres.side**2)
        if begun is not None and begun.codes.shape[1] > draft.codes.shape[1]:
            raise ValueError(f"{store.file('larger')} is not of this call; delete it")
        return begun

    def _stored(self, name: str, request: Request, store: DraftStore, tokens: int) -> Draft | None:
        """What an interrupted call stored by this name, with so many tokens a frame. ValueError, with the
        file, if it is damaged or not of this call."""
        draft = store.load(name)
        if draft is None:
            return None
        codes = draft.codes
        asked = (tuple(request.prompts), tuple(request.seeds), tokens)
        if (draft.prompts, draft.seeds, codes.shape[2]) != asked or not codes.shape[1]:
            raise ValueError(f"{store.file(name)} is not of this call; delete it")
        most = self.spec.model.codes - 1
        if codes.min() < 0 or codes.max() > most:
            raise ValueError(f"{store.file(name)} is damaged: its tokens must be from 0 to {most}; delete it")
        return draft

    # -- one step each

    def first_frames(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Draft:
        """The first frame of every clip, by the image model alone."""
        c = self.spec.model
        codes = self._fill(
            "image",
            prompts,
            known=torch.empty(len(prompts), 0, c.frame_tokens, dtype=torch.long, device=self.device),
            uniform=uniforms(seeds, c.frame_tokens, FIRST_FRAME),
            guidance_scale=guidance_scale,
            last=reference.last_token(self.sampling) if self.reference_quirks else None,
            task="first frame",
            progress=progress,
            watch=watch,
        )
        return Draft(codes, self._keyframe_fps, tuple(prompts), tuple(seeds))

    def keyframes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        begin: Draft | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Draft:
        """Stage 1: the first frame by the image model, then the key frames after it, one frame a second.

        `begin` holds the first key frames of every clip, if they are known. `watch` sees the frames so far.
        """
        c = self.spec.model
        if begin is None:
            begin = self.first_frames(
                prompts, seeds, guidance_scale=guidance_scale, progress=progress, watch=watch
            )
        missing = (c.frames - begin.codes.shape[1]) * c.frame_tokens
        codes = self._fill(
            "stage1",
            prompts,
            known=begin.codes,
            uniform=uniforms(seeds, missing, KEYFRAMES),
            guidance_scale=guidance_scale,
            task="key frames",
            progress=progress,
            watch=watch,
        )
        return Draft(codes, begin.fps, tuple(prompts), tuple(seeds))

    def interpolate(
        self, draft: Draft, *, progress: Progress | None = None, watch: Watch | None = None
    ) -> Draft:
        """Stage 2: one round of interpolation. F frames (odd, 3 or more) become 2F - 1, at twice the fps.

        A span is three neighbouring frames (of a model of five), the last of which is the first of the next
        span. All spans of all clips are one batch.
        """
        c = self.spec.model
        count, frames, _ = draft.codes.shape
        size = (c.frames + 1) // 2  # known frames of a span
        self._check_interpolation(draft, size)
        spans = (frames - 1) // (size - 1)
        known = draft.codes.unfold(1, size, size - 1).movedim(-1, 2).flatten(0, 1)  # [B * spans, size, N]
        missing = (size - 1) * c.frame_tokens
        numbers = [uniforms(draft.seeds, missing, _span_stream(i, spans)) for i in range(spans)]

        def whole(filled: Tensor) -> Tensor:
            """Spans [B * spans, frames, N] to clips [B, 2F - 1, N]."""
            codes = filled[:, :-1].reshape(count, -1, c.frame_tokens)
            return torch.cat((codes, draft.codes[:, -1:]), 1)

        filled = self._fill(
            "stage2",
            [prompt for prompt in draft.prompts for _ in range(spans)],
            known=known,
            uniform=torch.stack(numbers, 1).flatten(0, 1),
            seconds=(c.frames - 1) / (2 * draft.fps),
            task=f"to {2 * draft.fps:g} fps",
            progress=progress,
            watch=None if watch is None else lambda spans_so_far: watch(whole(spans_so_far)),
        )
        return replace(draft, codes=whole(filled), fps=2 * draft.fps)

    def _check_interpolation(self, draft: Draft, size: int) -> None:
        """Raise ValueError unless spans of `size` frames cover a draft, at an fps that can be doubled."""
        c = self.spec.model
        frames = draft.codes.shape[1]
        if c.frames % 2 == 0:
            raise ValueError(f"a model of {c.frames} frames has none at both ends of a span")
        if frames < size or (frames - 1) % (size - 1):
            choices = ", ".join(str(1 + k * (size - 1)) for k in (1, 2, 3))
            raise ValueError(f"interpolation begins with {choices} ... frames; got {frames}")
        fps = sorted(rounds(c.frames).values())[:-1]
        if draft.fps not in fps:
            choices = ", ".join(f"{choice:g}" for choice in fps)
            raise ValueError(f"interpolation begins with {choices} frames a second; got {draft.fps:g}")

    def _fill(
        self,
        stage: str,
        prompts: Sequence[str],
        *,
        known: Tensor,
        uniform: Tensor,
        task: str,
        progress: Progress | None,
        watch: Watch | None = None,
        seconds: float = SECONDS,
        guidance_scale: float | None = None,
        last: Sampling | None = None,
    ) -> Tensor:
        """Fill in the frames of a stage by its model: codes [B, F, N].

        known [B, k, N] and uniform [B, tokens] as for `fill`; seconds: the duration prompt; task: what the
        progress calls it; watch: sees the frames so far, -1 where no token is yet.
        """
        model = self.parts.stage(stage)
        sampling = self._stage_sampling(stage, guidance_scale)
        layout = self.spec.model.layout(stage)
        if self.reference_quirks:
            layout = reference.reference_layout(layout)

        text = self._text(stage, prompts, seconds)
        unconditional = self._text(stage, [""] * len(prompts), seconds)
        rows = 1 + sampling.guided  # of a sample
        count = self._samples_at_once(layout, model.window, rows)
        columns = (text, known, uniform.to(self.device), unconditional)
        groups = list(zip(*(torch.split(column, count) for column in columns)))
        cache = None
        if len(groups) > 1:
            with torch.inference_mode():
                cache = model.new_cache(layout, count * rows)

        filled: list[Tensor] = []
        for i, (t, k, u, without) in enumerate(groups):
            states = fill(model, layout, t, k, sampling, u, unconditional=without, last=last, cache=cache)
            for state in states:
                self._check_finite(state.logit_sum, stage)
                if progress is not None:
                    progress(task, i * state.total + state.done, len(groups) * state.total)
                if watch is not None:
                    later = known[i * count + len(k) :]
                    missing = later.new_full((len(later), layout.frames - later.shape[1], later.shape[2]), -1)
                    watch(torch.cat((*filled, state.frames, layout.unlay(torch.cat((later, missing), 1)))))
            filled.append(state.frames)
        return torch.cat(filled)

    def _check_finite(self, numbers: Tensor, stage: str) -> None:
        """Raise ModelError if a stage computed numbers that are not finite."""
        self.folder.check_finite(numbers, [part for part in self.spec.parts if part in (*BASES, stage)])

    def _stage_sampling(self, stage: str, guidance_scale: float | None) -> Sampling:
        """The options of a stage. A call's own guidance scale leaves an image model that has no guidance
        without."""
        sampling = self.sampling[stage]
        if guidance_scale is None or (stage == "image" and not sampling.guided):
            return sampling
        return replace(sampling, guidance_scale=guidance_scale)

    def _samples_at_once(self, layout: Layout, window: int, rows: int) -> int:
        """How many samples of `rows` rows are filled together: as many as 85 % of the free memory hold, but
        not more than are fast on the device."""
        most = MAX_SAMPLES.get(self.device.type, 256)
        free = free_memory(self.device)
        if free is None:
            return most
        size = rows * cache_bytes(self.spec.model, layout, window, self.dtype)
        return int(min(max(0.85 * free // size, 1), most))

    @torch.inference_mode()
    def superresolve(
        self,
        draft: Draft,
        *,
        begin: Draft | None = None,
        each: Callable[[Draft], None] | None = None,
        progress: Progress | None = None,
    ) -> Draft:
        """Super-resolution of codes, frame by frame, to as many more codes a side as the model's scale.

        Without such a part in the model folder a draft is returned as it is. `begin` holds the first large
        frames, if they are known; `each` is called with the large frames so far.
        """
        c = self.spec.superres
        if c is None or "superres" not in self.folder.postprocessing_parts:
            return draft
        count, frames, _ = draft.codes.shape
        numbers = uniforms(draft.seeds, frames * c.side**2, SUPERRES).to(self.device).view(count, frames, -1)
        texts = self._text("superres", draft.prompts, SECONDS)
        large = begin
        if large is None:
            large = replace(draft, codes=draft.codes.new_empty(count, 0, c.side**2))
        for i in range(large.codes.shape[1], frames):
            columns = zip(texts, draft.codes[:, i], numbers[:, i])
            codes = torch.stack([self._superresolve_frame(*each_clip) for each_clip in columns])
            large = replace(large, codes=torch.cat((large.codes, codes[:, None]), 1))
            if each is not None:
                each(large)
            if progress is not None:
                progress("larger frames", i + 1, frames)
        return large

    def _superresolve_frame(self, text: Tensor, codes: Tensor, uniform: Tensor) -> Tensor:
        """Ids [T] and codes [N] of one frame, and random numbers [S], to codes [S]."""
        model = self.parts.superres
        hidden = model.hidden(text[None], codes[None])[0]  # [S, D]
        sampled = []
        logit_sum = hidden.new_zeros(())
        for rows, numbers in zip(torch.split(hidden, LOGIT_ROWS), torch.split(uniform, LOGIT_ROWS)):
            logits = model.head(rows)
            logit_sum = logit_sum + logits.sum()
            sampled.append(sample(logits, self.sampling["superres"], numbers))
        self._check_finite(logit_sum, "superres")
        return torch.cat(sampled)

    @torch.inference_mode()
    def decode(self, draft: Draft) -> list[Clip]:
        """Tokens to frames at the tokenizer's resolution, by the video decoder or else frame by frame."""
        if "decoder" in self.folder.postprocessing_parts:
            return self._decode_together(draft)
        clips = []
        for codes, prompt in zip(draft.codes, draft.prompts):
            clips.append(Clip(to_frames(self.parts.vqvae.decode(codes)), draft.fps, prompt))
        return clips

    def _decode_together(self, draft: Draft) -> list[Clip]:
        """Each clip by the video decoder, which sees neighbouring frames and the prompt."""
        clips = []
        texts = self._text("stage1", draft.prompts, SECONDS)
        fast = self.dtype != "float32" and has_fast_bfloat16(self.device)
        for codes, text, prompt in zip(draft.codes, texts, draft.prompts):
            z = self.parts.vqvae.vectors(codes)[None]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast):
                frames = self.parts.decoder(z, text[None])[0]
            clips.append(Clip(to_frames(frames), draft.fps, prompt))
        return clips

    def upscale(self, clips: Sequence[Clip], *, progress: Progress | None = None) -> list[Clip]:
        """Refine clips to the larger size; without a refiner in the model folder, return them as they are."""
        if "refiner" not in self.folder.postprocessing_parts:
            return list(clips)
        return refine(self.parts.refiner, clips, progress)

    @torch.inference_mode()
    def encode(self, clips: Sequence[Clip], prompts: Sequence[str], seeds: Sequence[int]) -> Draft:
        """Frames to codes: a draft of the user's own frames. All clips must have the same number of frames,
        and the same fps."""
        if not clips or not len(clips) == len(prompts) == len(seeds):
            raise ValueError(
                f"each clip needs a prompt and a seed; got {len(clips)} clips, "
                f"{len(prompts)} prompts, {len(seeds)} seeds"
            )
        if len({(len(clip.frames), clip.fps) for clip in clips}) > 1:
            raise ValueError("all clips must have the same number of frames and the same fps")
        codes = []
        for clip in clips:
            images = to_images(clip.square(self.spec.resolution).frames).to(self.device)
            codes.append(self.parts.vqvae.encode(images))
        return Draft(torch.stack(codes), clips[0].fps, tuple(prompts), tuple(seeds))

    # -- helpers

    def check_prompt(self, prompt: str) -> None:
        self.prompts.check(prompt)
        for stage in STAGES:
            self._text(stage, [prompt], SECONDS)

    def new_seeds(self, seed: int | None, count: int) -> list[int] | None:
        return new_seeds(seed, count)

    def estimate(self, videos: int = 1) -> Estimate:
        return Estimate(self.spec, self.sampling, self.dtype, videos, self.device)

    def hints(self, prompts: Sequence[str]) -> list[str]:
        hints = super().hints(prompts)
        for sampling in self.sampling.values():
            if sampling.token_temperature != 1 and sampling.clusters is None:
                hints.append("there is no cluster_labels.npy in the model folder, so plain top-k is used")
                break
        return hints

    def _text(self, stage: str, prompts: Sequence[str], duration: float) -> Tensor:
        """Ids [B, T] of the prompts as a stage has them, padded."""
        pad = self.text.pad
        length = self.spec.model.text_len
        if stage == "superres" and self.spec.superres:
            pad = self.spec.superres.pad
            length = self.spec.superres.text_len
        rows = self.prompts.ids(prompts, duration, self.templates[stage], length, pad)
        return torch.tensor(rows, device=self.device)

    def _beginning(
        self, image: ImageInput | None, video: VideoInput | None, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Draft | None:
        """The frames that all clips start with, as a draft at the fps of key frames."""
        if image is not None:
            clip = self._image_clip(image)
        elif video is not None:
            clip = self._last_keyframes(video)
        else:
            return None
        codes = self.encode([clip], prompts[:1], seeds[:1]).codes.expand(len(prompts), -1, -1)
        return Draft(codes, self._keyframe_fps, tuple(prompts), tuple(seeds))

    def _image_clip(self, image: ImageInput) -> Clip:
        """An image as a clip of one frame."""
        if isinstance(image, (str, Path)):
            image = read_image(image, 4 * self.spec.resolution)
        frame = np.asarray(image)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"an image is uint8 [H, W, 3]; got {frame.dtype} {list(frame.shape)}")
        return Clip(frame[None], self._keyframe_fps)

    def _last_keyframes(self, video: VideoInput) -> Clip:
        """The last frames of a video, as far apart as key frames: one less than a clip has."""
        fps = self._keyframe_fps
        before_end = np.arange(self.spec.model.frames - 2, -1, -1) / fps  # seconds
        if not isinstance(video, Clip) and Path(video).suffix.lower() in VIDEOS:  # it may be long
            file = VideoFile.open(video)
            times = file.seconds - before_end[before_end <= file.seconds]
            return Clip(file.frames(times, 4 * self.spec.resolution), fps)
        clip = video if isinstance(video, Clip) else Clip.load(video)
        numbers = [len(clip.frames) - 1 - round(seconds * clip.fps) for seconds in before_end]
        return Clip(clip.frames[[number for number in numbers if number >= 0]], fps)


def _span_stream(span: int, spans: int) -> int:
    """The stream of random numbers of a span in a round of `spans` spans."""
    return 100 * spans + span
