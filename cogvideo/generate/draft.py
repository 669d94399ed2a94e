"""Clips as tokens, on the way to becoming pixels, and where they are kept meanwhile."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from cogvideo.files import replacing


@dataclass(frozen=True)
class Draft:
    """Clips of one length and rate."""

    codes: Tensor  # [B, F, N] in time order
    fps: float
    prompts: tuple[str, ...]  # one a clip
    seeds: tuple[int, ...]

    def save(self, file: str | Path) -> None:
        """Write the tokens and all that belongs to them as .npz."""
        with replacing(Path(file)) as part, part.open("wb") as stream:
            np.savez(stream, codes=self.codes.cpu(), fps=self.fps, prompts=self.prompts, seeds=self.seeds)

    @classmethod
    def load(cls, file: str | Path) -> "Draft":
        try:
            with np.load(file) as kept:
                codes, prompts, seeds = torch.from_numpy(kept["codes"]), kept["prompts"], kept["seeds"]
                return cls(codes, float(kept["fps"]), tuple(prompts.tolist()), tuple(seeds.tolist()))
        except (KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"{file} holds no tokens of clips: {error}") from None


@dataclass(frozen=True)
class Kept:
    """Where drafts of one call are, for the same call after it was killed."""

    folder: str | Path | None  # None: nowhere
    call: str  # all that decides what is made
    device: torch.device

    def file(self, name: str) -> Path:
        return Path(self.folder or "", f"{sha256(self.call.encode()).hexdigest()[:12]}-{name}.npz")

    def save(self, name: str, draft: Draft) -> None:
        if self.folder is not None:
            draft.save(self.file(name))

    def load(self, name: str) -> Draft | None:
        if self.folder is None or not self.file(name).exists():
            return None
        draft = Draft.load(self.file(name))
        return replace(draft, codes=draft.codes.to(self.device))
