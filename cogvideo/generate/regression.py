"""The regression family: a sentence to a video in one pass, always the same one for a prompt."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from cogvideo.generate.estimate import Estimate
from cogvideo.generate.parts import refine
from cogvideo.generate.pipeline import ImageInput, Pipeline, Prompt, VideoInput
from cogvideo.generate.prompts import Prompts
from cogvideo.generate.sampling import stages
from cogvideo.model.families import RegressionSpec
from cogvideo.model.folder import ModelError, ModelFolder
from cogvideo.model.refiner import Refiner
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.vqvae import to_frames
from cogvideo.progress import Progress, open_progress
from cogvideo.video import Clip


class RegressionPipeline(Pipeline):
    """A loaded model of the family `regression`. It is deterministic: it accepts a seed and ignores it."""

    unsupported: ClassVar[dict[str, object]] = {
        "image": None,
        "video": None,
        "guidance_scale": None,
        "keep": None,
        "num_videos_per_prompt": 1,
    }

    def __init__(self, folder: ModelFolder, device: torch.device | str = "cpu", dtype: str | None = None):
        spec = folder.spec()
        if not isinstance(spec, RegressionSpec):
            raise ModelError(f"{folder.path} is no model of the family regression")
        super().__init__(folder, spec, device, dtype)
        self.spec: RegressionSpec = spec
        self.prompts = Prompts(folder.text(), folder.config.words)

    @cached_property
    def model(self) -> RegressionTransformer:
        dtype = getattr(torch, self.dtype)
        return self.folder.load_as(RegressionTransformer, "regression", self.device, dtype)

    @cached_property
    def refiner(self) -> Refiner:
        return self.folder.load_as(Refiner, "refiner", self.device)

    @property
    def frame_counts(self) -> dict[int, float]:
        """Numbers of frames that a call can ask for, and the frames per second that each comes with: those of
        the frame rates that the model was trained at, or the one image of an image model."""
        c = self.spec.regression
        counts = {}
        for row, fps in zip(self.model.trained, c.rates):
            slots = c.slots(fps)
            if row[list(slots)].all():
                counts[len(slots)] = fps
        return counts or {1: c.rates[0]}

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
        """Generate a clip for each prompt; see `Pipeline`. The seed changes nothing."""
        self.check_supported(
            image=image,
            video=video,
            guidance_scale=guidance_scale,
            keep=keep,
            num_videos_per_prompt=num_videos_per_prompt,
        )
        prompts = self.check_prompts(prompt)
        self.folder.check(["regression", *self.folder.postprocessing_parts])
        num_frames = self.check_frames(num_frames)
        with open_progress(progress) as report:
            return self.upscale(self.regress(prompts, num_frames, progress=report), progress=report)

    @torch.inference_mode()
    def regress(
        self, prompts: Sequence[str], num_frames: int, *, progress: Progress | None = None
    ) -> list[Clip]:
        """Clips of one of `frame_counts` at the model's own size, one after the other."""
        fps = self.frame_counts[self.check_frames(num_frames)]
        slots = self.spec.regression.slots(fps)[:num_frames]
        clips = []
        for i, prompt in enumerate(prompts):
            frames = self.model(self._ids(prompt), fps, slots)[0]  # [F, 3, R, R]
            clips.append(Clip(to_frames(frames.float()), fps, prompt))
            if progress is not None:
                progress("frames", i + 1, len(prompts))
        return clips

    def upscale(self, clips: Sequence[Clip], *, progress: Progress | None = None) -> list[Clip]:
        """Refine clips to the larger size; without a refiner in the model folder they stay as they are."""
        if not self.folder.postprocessing_parts:
            return list(clips)
        return refine(self.refiner, clips, progress)

    def check_prompt(self, prompt: str) -> None:
        self.prompts.check(prompt)
        self._ids(prompt)

    def new_seeds(self, seed: int | None, count: int) -> list[int] | None:
        return None

    def estimate(self, videos: int = 1) -> Estimate:
        return Estimate(self.spec, stages({}), self.dtype, videos, self.device)

    def _ids(self, prompt: str) -> Tensor:
        c = self.spec.regression
        return torch.tensor(
            self.prompts.ids([prompt], 0.0, self.spec.template, c.text_len), device=self.device
        )
