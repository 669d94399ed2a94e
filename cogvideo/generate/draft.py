"""Clips as tokens, on the way to pixels, and where an interrupted call finds them."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from cogvideo.files import DAMAGE_ERRORS, atomic_path


@dataclass(frozen=True)
class Draft:
    """Clips of one length and one fps."""

    codes: Tensor  # [B, F, N] in time order
    fps: float
    prompts: tuple[str, ...]  # one a clip
    seeds: tuple[int, ...]

    def save(self, file: str | Path) -> None:
        """Write the tokens and all that belongs to them as .npz."""
        with atomic_path(Path(file)) as new, new.open("wb") as stream:
            self.write(stream)

    def write(self, stream: BinaryIO) -> None:
        np.savez(stream, codes=self.codes.cpu(), fps=self.fps, prompts=self.prompts, seeds=self.seeds)

    @classmethod
    def load(cls, file: str | Path | BinaryIO) -> "Draft":
        """Read what `save` wrote. ValueError, with the file, if it is damaged or something else."""
        try:
            with np.load(file) as stored:
                codes = torch.from_numpy(stored["codes"])
                prompts = tuple(stored["prompts"].tolist())
                seeds = tuple(stored["seeds"].tolist())
                draft = cls(codes, float(stored["fps"]), prompts, seeds)
        except DAMAGE_ERRORS as error:
            raise ValueError(f"{file} holds no tokens of clips: {error}") from None
        whole = codes.dtype == torch.int64 and codes.ndim == 3 and len(codes) == len(prompts) == len(seeds)
        if not whole or not all(isinstance(prompt, str) for prompt in prompts) or not 0 < draft.fps < 1e6:
            raise ValueError(f"{file} holds no tokens of clips: they do not go with its prompts and seeds")
        return draft


@dataclass(frozen=True)
class DraftStore:
    """Where the drafts of one call are, so that an interrupted call can resume."""

    folder: str | Path | None  # None: nowhere
    call: str  # all that decides what is generated
    device: torch.device

    def file(self, name: str) -> Path:
        return Path(self.folder or "", f"{sha256(self.call.encode()).hexdigest()[:12]}-{name}.npz")

    def save(self, name: str, draft: Draft) -> None:
        if self.folder is not None:
            draft.save(self.file(name))

    def load(self, name: str) -> Draft | None:
        """What was saved by this name. ValueError, with the file, if it is damaged."""
        if self.folder is None or not self.file(name).exists():
            return None
        draft = Draft.load(self.file(name))
        return replace(draft, codes=draft.codes.to(self.device))
