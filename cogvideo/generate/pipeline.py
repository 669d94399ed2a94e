"""What every loaded model can do: a sentence in, clips out. Each family has its own pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from cogvideo.generate.estimate import Estimate
from cogvideo.generate.prompts import Prompts
from cogvideo.hardware import find_device
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.progress import Progress
from cogvideo.video import Clip, Frames

Prompt = str | Sequence[str]
ImageInput = Frames | str | Path  # uint8 [H, W, 3], or a file
VideoInput = Clip | str | Path


class Pipeline(ABC):
    """A loaded model."""

    unsupported: ClassVar[dict[str, object]] = {}  # arguments of a call, and the value that asks for nothing

    prompts: Prompts

    def __init__(self, folder: ModelFolder, spec: Spec, device: torch.device | str, dtype: str | None):
        self.folder = folder
        self.device = find_device(device)
        fastest = spec.dtypes[0] if self.device.type == "cpu" else "bfloat16"
        self.dtype = dtype or fastest
        spec.check_dtype(self.dtype)

    @property
    @abstractmethod
    def frame_counts(self) -> dict[int, float]:
        """Numbers of frames that a call can ask for, and the frames per second that each comes with."""

    @abstractmethod
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
        """Generate clips, `num_videos_per_prompt` for each prompt, in the order of the prompts.

        image: the first frame, uint8 [H, W, 3] or a file. video: a clip or file to continue; the result
        begins with its last seconds. num_frames: one of `frame_counts` (default: the most). guidance_scale:
        how strongly the prompt is followed, 1 or more. seed: sample i has seed + i and is the same alone or
        in a batch, bit for bit on a CPU; a deterministic model accepts it and ignores it. progress: report on
        the terminal, or to a function. keep: a folder for the tokens after every step, from which the same
        call resumes. Raise ValueError for anything that the model cannot do, before any work.
        """

    @abstractmethod
    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if a prompt is empty or too long, saying by how many tokens."""

    @abstractmethod
    def new_seeds(self, seed: int | None, count: int) -> list[int] | None:
        """`count` seeds from `seed` on, or from a random one; None if the model is deterministic."""

    @abstractmethod
    def estimate(self, videos: int = 1) -> Estimate:
        """Estimate the cost of generating `videos` at a time, without loading anything."""

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """Hints for the user about these prompts, such as words that the model does not know."""
        return self.prompts.hints(prompts)

    def check_supported(self, **arguments: object) -> None:
        """Raise ValueError for an argument of a call that this family cannot use."""
        for name, value in arguments.items():
            if name not in self.unsupported:
                continue
            neutral = self.unsupported[name]
            # compared with == only if not None: an array's comparison would be an array
            unused = value is None if neutral is None else value == neutral
            if not unused:
                raise ValueError(
                    f"{name} is not supported: this model is deterministic, it generates the one clip that "
                    f"it knows for a prompt; leave it out, or choose a model such as tiny"
                )

    def check_prompts(self, prompt: Prompt) -> list[str]:
        """Return the prompts as a list; raise ValueError if there is none, or if one cannot be used."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt")
        for prompt in prompts:
            self.check_prompt(prompt)
        return prompts

    def check_frames(self, num_frames: int | None) -> int:
        """Return a valid number of frames, by default the largest; raise ValueError for an invalid one."""
        counts = self.frame_counts
        if num_frames is None:
            return max(counts)
        if num_frames not in counts:
            raise ValueError(
                f"num_frames {num_frames} is not possible; choose one of {', '.join(map(str, counts))}"
            )
        return num_frames
