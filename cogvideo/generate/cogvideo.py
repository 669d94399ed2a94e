"""Text to video: key frames, then interpolation again and again, each round doubling the rate, then pixels,
then larger pixels.

    draft = pipe.keyframes(["a dog runs to the right"], seeds=[7])     5 frames, 1 frame a second
    while draft.fps < 8:
        draft = pipe.interpolate(draft)                               9, 17, 33 frames
    clips = pipe.upscale(pipe.decode(pipe.enlarge(draft)))

Every verb takes a value and returns one, so any step can be saved, shown, repeated or skipped: the first
frame of a user's (image to video), the last seconds of a clip (continuation) or a few frames to fill between
(in-betweening) are drafts made by `encode`. `pipe(prompt)` is the verbs in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideo.generate.cost import cache_bytes
from cogvideo.generate.draft import Draft, Kept
from cogvideo.generate.estimate import Estimate
from cogvideo.generate.fill import fill
from cogvideo.generate.parts import Parts, refine
from cogvideo.generate.prompts import Prompts
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.generate.sampling import STAGES, Sampling, pick, pick_seeds, stages, uniforms
from cogvideo.hardware import find_device, free_memory, has_fast_bfloat16
from cogvideo.layout import SECONDS, Layout, rounds
from cogvideo.model.folder import ModelError, ModelFolder, find_model, read_clusters
from cogvideo.model.vqvae import to_frames, to_pictures
from cogvideo.progress import Progress, telling
from cogvideo.text import TEMPLATE
from cogvideo.video import VIDEOS, Clip, VideoFile, read_image

ROWS = 400  # of logits at a time
MOST = {"cpu": 16}  # samples that are filled together: more of them are slower where caches are small


class CogVideo:
    """A loaded model."""

    draws = True  # at random: a prompt may have many videos

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        reference_quirks: bool = False,
    ):
        self.folder, self.device, self.reference_quirks = folder, find_device(device), reference_quirks
        self.dtype = dtype or ("int8" if self.device.type == "cpu" else "bfloat16")
        self.parts = Parts(folder, self.device, self.dtype)
        self.config, self.spec, self.text = folder.config, folder.spec(), folder.text()
        self.prompts = Prompts(self.text, self.config.get("words", ()), self.config.get("languages", ()))
        chosen, file = self.config.get("sampling", {}), folder.path / "cluster_labels.npy"
        clusters = None
        if file.exists():
            clusters = torch.from_numpy(read_clusters(file, self.spec.model.codes)).to(self.device)
        self.templates = dict.fromkeys(STAGES, TEMPLATE) | self.config.get("prompts", {})
        c, v = self.spec.model, self.spec.vqvae
        try:
            cut = c.width % c.heads or (c.window and c.grid % c.window)
            if cut or (c.codes, c.grid) != (v.codes, v.grid):
                raise ValueError("its grid, codes, window, width and heads do not fit together")
            self.sampling = stages(chosen, clusters)
            for template in self.templates.values():
                self.text.prompt("", SECONDS, template)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            file = folder.path / "config.json"
            raise ModelError(f"{file} does not describe a model that generates: {error}") from None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        reference_quirks: bool = False,
    ) -> Any:
        """Open a model: a shipped name, a folder, or a hub id. One of the regression family is a
        `RegressionPipeline`, which is called the same way.

        dtype: what the transformer computes with, float32, bfloat16 or int8; by default what is fastest, int8
        weights on a CPU and bfloat16 elsewhere. reference_quirks: also repeat what the original's inference
        does otherwise than its training (docs/original-weights.md).
        """
        folder = ModelFolder(find_model(model))
        if folder.config.get("family") == "regression":
            if reference_quirks:
                raise ValueError("reference_quirks are the original's; leave it out for a regression model")
            return RegressionPipeline(folder, device, dtype)
        return cls(folder, device, dtype, reference_quirks)

    @property
    def frame_counts(self) -> dict[int, float]:
        """Frames that can be asked for, and the rate each comes with: 1 is a picture by the image model
        alone."""
        return {1: self._keyframe_rate} | rounds(self.spec.model.frames)

    @property
    def _keyframe_rate(self) -> float:
        return (self.spec.model.frames - 1) / SECONDS

    def _needed(self, num_frames: int) -> list[str]:
        stages = ["stage1"] if num_frames > 1 else []
        stages += ["stage2"] if num_frames > self.spec.model.frames else []
        own = [f"{part}_base" for part in self.folder.finishing if f"{part}_base" in self.spec.parts]
        return ["vqvae", "base", *stages, *self.folder.finishing, *own]

    # -- the whole way

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: np.ndarray | str | Path | None = None,
        video: Clip | str | Path | None = None,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | None = None,
        seed: int | None = None,
        progress: bool | Progress = True,
        keep: str | Path | None = None,
    ) -> list[Clip]:
        """Make clips, `num_videos_per_prompt` for each prompt, in the order of the prompts.

        image: the first frame, uint8 [H, W, 3] or a file. video: a clip or file to go on from; the result
        begins with its last seconds. num_frames: one of `frame_counts` (default: the most; 1: a picture).
        guidance_scale: how strongly the prompt is followed, 1 or more. seed: sample i has seed + i and is the
        same alone or in a batch, bit for bit on a CPU. keep: a folder for the tokens after every step, from
        which the same call resumes after it was killed. Raises ValueError for anything it cannot do, before
        any work.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_frames is None:
            num_frames = max(self.frame_counts)
        fps = self.frame_counts.get(num_frames)
        if fps is None:
            raise ValueError(
                f"num_frames {num_frames} cannot be made; "
                f"choose one of {', '.join(map(str, self.frame_counts))}"
            )
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt must be 1 or more, got {num_videos_per_prompt}")
        if guidance_scale is not None:
            replace(self.sampling["stage1"], guidance_scale=guidance_scale)  # refuses what is out of range
        if image is not None and video is not None:
            raise ValueError("give an image or a video to begin with, not both")
        if num_frames == 1 and (image is not None or video is not None):
            raise ValueError(
                "num_frames 1 is the first frame, which an image or a video already gives; "
                f"choose one of {', '.join(map(str, sorted(self.frame_counts)[1:]))}"
            )
        if not prompts:
            raise ValueError("there is no prompt")
        for one in prompts:
            self.check_prompt(one)
        self.folder.check(self._needed(num_frames))
        prompts = [one for one in prompts for _ in range(num_videos_per_prompt)]
        seeds = pick_seeds(seed, len(prompts))
        begin = self._beginning(image, video, prompts, seeds)
        codes = None if begin is None else begin.codes.tolist()
        decides = (
            self.folder.version(),
            self.dtype,
            self.sampling,
            self.templates,
            self.reference_quirks,
            prompts,
            seeds,
            num_frames,
            guidance_scale,
            codes,
        )
        kept = Kept(keep, repr(decides), self.device)
        with telling(progress) as told:
            draft = kept.load("frames")
            if draft is None:
                options: dict[str, Any] = {"guidance_scale": guidance_scale, "progress": told}
                if num_frames == 1:
                    draft = self.first_frames(prompts, seeds, **options)
                else:
                    draft = self.keyframes(prompts, seeds, begin=begin, **options)
            while draft.fps < fps:
                kept.save("frames", draft)
                draft = self.interpolate(draft, progress=told)
            kept.save("frames", draft)
            larger = self.enlarge(
                draft, begin=kept.load("larger"), each=partial(kept.save, "larger"), progress=told
            )
            return self.upscale(self.decode(larger), progress=told)

    # -- the verbs

    def first_frames(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> Draft:
        """The first picture of every clip, by the image model alone."""
        c = self.spec.model
        known = torch.empty(len(prompts), 0, c.frame_len, dtype=torch.long, device=self.device)
        last = self.sampling["stage1"] if self.reference_quirks else None
        codes = self._fill(
            "image",
            c.layout("image"),
            prompts,
            SECONDS,
            known,
            uniforms(seeds, c.frame_len, 0),
            guidance_scale,
            "first frame",
            progress,
            last,
        )
        return Draft(codes, self._keyframe_rate, tuple(prompts), tuple(seeds))

    def keyframes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        begin: Draft | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> Draft:
        """Stage 1: the first frame by the image model, then the key frames after it, one frame a second.

        `begin` holds frames that are there already: the first k key frames of every clip.
        """
        c = self.spec.model
        if begin is None:
            begin = self.first_frames(prompts, seeds, guidance_scale=guidance_scale, progress=progress)
        layout = c.layout("stage1")
        missing = (c.frames - begin.codes.shape[1]) * c.frame_len
        codes = self._fill(
            "stage1",
            layout,
            prompts,
            SECONDS,
            begin.codes,
            uniforms(seeds, missing, 1),
            guidance_scale,
            "key frames",
            progress,
        )
        return Draft(codes, begin.fps, tuple(prompts), tuple(seeds))

    def interpolate(self, draft: Draft, *, progress: Progress | None = None) -> Draft:
        """Stage 2: one round of interpolation. F frames (odd, 3 or more) become 2F - 1 at twice the rate.

        Each three neighbouring frames (of models of five) are a window; all windows of all clips are one
        batch.
        """
        c, (count, frames, _) = self.spec.model, draft.codes.shape
        if c.frames % 2 == 0:
            raise ValueError(f"a model of {c.frames} frames has none at both ends of a window")
        size = (c.frames + 1) // 2  # frames of a window that are known
        if frames < size or (frames - 1) % (size - 1):
            those = ", ".join(str(1 + k * (size - 1)) for k in (1, 2, 3))
            raise ValueError(f"interpolation begins with {those} ... frames; got {frames}")
        rates = sorted(rounds(c.frames).values())[:-1]
        if draft.fps not in rates:
            those = ", ".join(f"{rate:g}" for rate in rates)
            raise ValueError(f"interpolation begins with {those} frames a second; got {draft.fps:g}")
        windows = (frames - 1) // (size - 1)
        layout = c.layout("stage2")
        known = draft.codes.unfold(1, size, size - 1).movedim(-1, 2).flatten(0, 1)  # [B * windows, size, N]
        prompts = [one for one in draft.prompts for _ in range(windows)]
        missing = (size - 1) * c.frame_len
        numbers = [uniforms(draft.seeds, missing, 100 * windows + i) for i in range(windows)]
        seconds = (c.frames - 1) / (2 * draft.fps)
        filled = self._fill(
            "stage2",
            layout,
            prompts,
            seconds,
            known,
            torch.stack(numbers, 1).flatten(0, 1),
            None,
            f"to {2 * draft.fps:g} fps",
            progress,
        )
        made = filled[:, :-1].unflatten(0, (count, windows)).flatten(1, 2)  # its last frame begins the next
        return replace(draft, codes=torch.cat((made, draft.codes[:, -1:]), 1), fps=2 * draft.fps)

    def _fill(
        self,
        stage: str,
        layout: Layout,
        prompts: Sequence[str],
        seconds: float,
        known: Tensor,
        uniform: Tensor,
        guidance_scale: float | None,
        what: str,
        progress: Progress | None,
        last: Sampling | None = None,
    ) -> Tensor:
        """Fill in a layout by the model of a stage: codes [B, F, N]."""
        model, sampling = getattr(self.parts, stage), self.sampling[stage]
        if guidance_scale is not None and (stage != "image" or sampling.guided):
            sampling = replace(sampling, guidance_scale=guidance_scale)
        text, plain = (self._text(stage, p, seconds) for p in (prompts, [""] * len(prompts)))
        layout = replace(layout, reference=self.reference_quirks)
        count, filled = self._at_once(layout, model.window, 1 + sampling.guided), []
        groups = list(zip(*(x.split(count) for x in (text, known, uniform.to(self.device), plain))))
        cache = None
        if len(groups) > 1:
            with torch.inference_mode():
                cache = model.new_cache(layout, count * (1 + sampling.guided))
        for number, (t, k, u, p) in enumerate(groups):
            for state in fill(model, layout, t, k, sampling, u, p, last, cache):
                if progress is not None:
                    progress(what, number * state.total + state.done, len(groups) * state.total)
            filled.append(state.frames)
        return torch.cat(filled)

    def _at_once(self, layout: Layout, window: int, rows: int) -> int:
        """Samples of so many rows that are filled together: as many as 85 % of the free memory hold, but not
        more than are fast on the device."""
        most, free = MOST.get(self.device.type, 256), free_memory(self.device)
        if free is None:
            return most
        held = rows * cache_bytes(self.spec.model, layout, window, self.dtype)
        return int(min(max(0.85 * free // held, 1), most))

    @torch.inference_mode()
    def enlarge(
        self,
        draft: Draft,
        *,
        begin: Draft | None = None,
        each: Callable[[Draft], None] | None = None,
        progress: Progress | None = None,
    ) -> Draft:
        """Super-resolution of tokens, frame by frame, to as many codes more a side as the model's scale;
        without such a part in the model folder a draft stays as it is.

        `begin` holds the first frames that are large already; `each` is told of the large frames so far.
        """
        c, (count, frames, _) = self.spec.superres, draft.codes.shape
        if c is None or "superres" not in self.folder.finishing:
            return draft
        numbers = uniforms(draft.seeds, frames * c.side**2, 2).to(self.device).view(count, frames, -1)
        texts, sampling = self._text("superres", draft.prompts, SECONDS), self.sampling["superres"]
        large = replace(draft, codes=draft.codes.new_empty(count, 0, c.side**2)) if begin is None else begin
        for i in range(large.codes.shape[1], frames):
            made = []
            for text, codes, uniform in zip(texts, draft.codes[:, i], numbers[:, i]):
                hidden = self.parts.superres.hidden(text[None], codes[None])[0]  # [S, D]
                rows = zip(hidden.split(ROWS), uniform.split(ROWS))
                made.append(torch.cat([pick(self.parts.superres.head(h), sampling, u) for h, u in rows]))
            large = replace(large, codes=torch.cat((large.codes, torch.stack(made)[:, None]), 1))
            if each is not None:
                each(large)
            if progress is not None:
                progress("larger frames", i + 1, frames)
        return large

    @torch.inference_mode()
    def decode(self, draft: Draft) -> list[Clip]:
        """Tokens to frames at the tokenizer's resolution, by the video decoder or else frame by frame."""
        if "decoder" in self.folder.finishing:
            return self._decode_together(draft)
        clips = []
        for codes, prompt in zip(draft.codes, draft.prompts):
            clips.append(Clip(to_frames(self.parts.vqvae.decode(codes)), draft.fps, prompt))
        return clips

    def _decode_together(self, draft: Draft) -> list[Clip]:
        """Each clip by the video decoder, which sees neighbouring frames and the prompt."""
        clips, texts = [], self._text("stage1", draft.prompts, SECONDS)
        fast = self.dtype != "float32" and has_fast_bfloat16(self.device)
        for codes, text, prompt in zip(draft.codes, texts, draft.prompts):
            z = self.parts.vqvae.vectors(codes)[None]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast):
                frames = self.parts.decoder(z, text[None])[0]
            clips.append(Clip(to_frames(frames), draft.fps, prompt))
        return clips

    def upscale(self, clips: Sequence[Clip], *, progress: Progress | None = None) -> list[Clip]:
        """Refine clips to the larger size; without a refiner in the model folder they stay as they are."""
        if "refiner" not in self.folder.finishing:
            return list(clips)
        return refine(self.parts.refiner, clips, progress)

    @torch.inference_mode()
    def encode(self, clips: Sequence[Clip], prompts: Sequence[str], seeds: Sequence[int]) -> Draft:
        """Frames to tokens: a draft of the user's own frames. All clips must have as many frames and the same
        rate."""
        if not clips or not len(clips) == len(prompts) == len(seeds):
            raise ValueError(
                f"each clip needs a prompt and a seed; got {len(clips)} clips, "
                f"{len(prompts)} prompts, {len(seeds)} seeds"
            )
        if len({(len(clip.frames), clip.fps) for clip in clips}) > 1:
            raise ValueError("all clips must have as many frames and the same rate")
        vqvae, size = self.parts.vqvae, self.spec.resolution
        codes = [vqvae.encode(to_pictures(clip.square(size).frames).to(self.device)) for clip in clips]
        return Draft(torch.stack(codes), clips[0].fps, tuple(prompts), tuple(seeds))

    # -- helpers

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if a prompt is empty or too long, saying by how many tokens."""
        self.prompts.check(prompt)
        for stage in STAGES:
            self._text(stage, [prompt], SECONDS)

    def estimate(self, videos: int = 1) -> Estimate:
        """What making so many videos costs; nothing is loaded for it."""
        return Estimate(self.spec, self.sampling, self.dtype, videos, self.device)

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """What a user should know before waiting for these prompts."""
        found = self.prompts.hints(prompts)
        if any(one.token_temperature != 1 and one.clusters is None for one in self.sampling.values()):
            found.append("there is no cluster_labels.npy in the model folder, so plain top-k is used")
        return found

    def _text(self, stage: str, prompts: Sequence[str], duration: float) -> Tensor:
        """Ids [B, T] of the prompts as a stage has them, padded."""
        pad, length = self.text.pad, self.spec.model.text_len
        if stage == "superres" and self.spec.superres:
            pad, length = self.spec.superres.pad, self.spec.superres.text_len
        rows = self.prompts.ids(prompts, duration, self.templates[stage], length, pad)
        return torch.tensor(rows, device=self.device)

    def _beginning(self, image, video, prompts: Sequence[str], seeds: Sequence[int]) -> Draft | None:
        """The frames a clip has to begin with, as a draft at the rate of key frames."""
        if image is None and video is None:
            return None
        size, fps, frames = self.spec.resolution, self._keyframe_rate, self.spec.model.frames
        if image is not None:
            first = read_image(image, 4 * size) if isinstance(image, (str, Path)) else np.asarray(image)
            if first.dtype != np.uint8 or first.ndim != 3 or first.shape[2] != 3:
                raise ValueError(f"an image is uint8 [H, W, 3]; got {first.dtype} {list(first.shape)}")
            clip = Clip(first[None], fps)
        else:
            back = np.arange(frames - 2, -1, -1) / fps  # seconds before the end, of key frames
            if not isinstance(video, Clip) and Path(video).suffix.lower() in VIDEOS:  # which may be long
                file = VideoFile.open(video)
                clip = Clip(file.frames(file.seconds - back[back <= file.seconds], 4 * size), fps)
            else:
                clip = video if isinstance(video, Clip) else Clip.load(video)
                places = [len(clip.frames) - 1 - round(b * clip.fps) for b in back]
                clip = Clip(clip.frames[[place for place in places if place >= 0]], fps)
        codes = self.encode([clip], prompts[:1], seeds[:1]).codes.expand(len(prompts), -1, -1)
        return Draft(codes, fps, tuple(prompts), tuple(seeds))
