"""The face of the regression family: a sentence to a video in one pass. It draws nothing at random, so a
prompt is one clip."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cogvideo.generate.estimate import Estimate
from cogvideo.generate.parts import refine
from cogvideo.generate.prompts import Prompts
from cogvideo.generate.sampling import stages
from cogvideo.hardware import find_device
from cogvideo.model.folder import ModelFolder
from cogvideo.model.refiner import Refiner
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.vqvae import to_frames
from cogvideo.progress import Progress, telling
from cogvideo.video import Clip

DTYPES = ("float32", "bfloat16")


class RegressionPipeline:
    """A loaded model of the family "regression"."""

    draws = False  # nothing at random

    def __init__(self, folder: ModelFolder, device: torch.device | str = "cpu", dtype: str | None = None):
        self.folder, self.device, self.config = folder, find_device(device), folder.config
        self.dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        if self.dtype not in DTYPES:
            raise ValueError(f"a regression model computes in {' or '.join(DTYPES)}, not in {self.dtype}")
        self.spec = folder.spec()
        self.prompts = Prompts(folder.text(), self.config.get("words", ()))
        self.hints = self.prompts.hints

    @cached_property
    def model(self) -> RegressionTransformer:
        return self.folder.load("regression", self.device, getattr(torch, self.dtype))

    @cached_property
    def refiner(self) -> Refiner:
        return self.folder.load("refiner", self.device)

    @property
    def frame_counts(self) -> dict[int, float]:
        """Frames that can be asked for, and the rate each comes with: those of the rates that it was trained
        at, or the one picture of an image model."""
        c, trained = self.spec.regression, self.model.trained
        done = [rate for row, rate in zip(trained, c.rates) if row[list(c.slots(rate))].all()]
        return {len(c.slots(rate)): rate for rate in done} or {1: c.rates[0]}

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
        """Make a clip for each prompt, of `num_frames`, one of `frame_counts` (default: the most).

        The other arguments are those of `CogVideo`; what means nothing here is refused: ValueError, before
        any work, as for all that it cannot do.
        """
        means_nothing = {
            "image": image,
            "video": video,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "keep": keep,
            "num_videos_per_prompt": num_videos_per_prompt - 1 or None,
        }
        for name, value in means_nothing.items():
            if value is not None:
                raise ValueError(
                    f"{name} means nothing to a regression model, which makes the one clip that it "
                    f"knows of a prompt; leave it out, or choose a model such as tiny"
                )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt")
        for one in prompts:
            self.check_prompt(one)
        self.folder.check(["regression", *self.folder.finishing])
        if num_frames is None:
            num_frames = max(self.frame_counts)
        with telling(progress) as told:
            return self.upscale(self.regress(prompts, num_frames, progress=told), progress=told)

    @torch.inference_mode()
    def regress(
        self, prompts: Sequence[str], num_frames: int, *, progress: Progress | None = None
    ) -> list[Clip]:
        """Clips of one of `frame_counts` at the model's own size, one after the other."""
        if num_frames not in self.frame_counts:
            raise ValueError(
                f"num_frames {num_frames} cannot be made; "
                f"choose one of {', '.join(map(str, self.frame_counts))}"
            )
        rate, clips = self.frame_counts[num_frames], []
        for i, prompt in enumerate(prompts):
            slots = self.spec.regression.slots(rate)[:num_frames]
            frames = self.model(self._ids(prompt), rate, slots)[0]  # [F, 3, R, R]
            clips.append(Clip(to_frames(frames.float()), rate, prompt))
            if progress is not None:
                progress("frames", i + 1, len(prompts))
        return clips

    def upscale(self, clips: Sequence[Clip], *, progress: Progress | None = None) -> list[Clip]:
        """Refine clips to the larger size; without a refiner in the model folder they stay as they are."""
        return refine(self.refiner, clips, progress) if self.folder.finishing else list(clips)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if a prompt is empty or too long, saying by how many tokens."""
        self.prompts.check(prompt)
        self._ids(prompt)

    def estimate(self, videos: int = 1) -> Estimate:
        """What making so many videos costs; nothing is loaded for it."""
        return Estimate(self.spec, stages({}), self.dtype, videos, self.device)

    def _ids(self, prompt: str) -> torch.Tensor:
        length, template = self.spec.regression.text_len, self.spec.template
        return torch.tensor(self.prompts.ids([prompt], 0.0, template, length), device=self.device)
