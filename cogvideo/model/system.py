"""What a whole model consists of: the configurations of its parts, and the parts by name.

vqvae      frames to codes and back
base       the text-to-image transformer, shared by both stages
stage1     the temporal channel that makes key frames
stage2     the temporal channel that interpolates
refiner    decoded frames to larger ones (optional)
superres   what the base needs to make larger maps of codes out of small ones (optional)
itersr     what it needs to make a large map better, some codes at a time (optional)
superres_base, itersr_base: the transformers of these two, where that is not `base`
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cogvideo.model.refiner import Refiner, RefinerConfig
from cogvideo.model.superres import SuperResChannel, SuperResConfig
from cogvideo.model.transformer import Base, ModelConfig, TemporalChannel
from cogvideo.vqvae import VQVAE, HierarchicalVQVAE, VQVAEConfig

CONFIGS = {"model": ModelConfig, "vqvae": VQVAEConfig, "refiner": RefinerConfig, "superres": SuperResConfig,
           "itersr": SuperResConfig}
BASES = ("base", "superres_base", "itersr_base")


class _Unfilled(TorchFunctionMode):
    """Nothing is drawn for new weights: what takes no memory has no numbers, and asking for them costs two
    seconds of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class System:
    model: ModelConfig
    vqvae: VQVAEConfig
    refiner: RefinerConfig | None = None
    superres: SuperResConfig | None = None
    itersr: SuperResConfig | None = None
    bases: tuple[str, ...] = ()  # beside `base`: which of superres and itersr have one of their own

    @property
    def parts(self) -> tuple[str, ...]:
        optional = (part for part in ("refiner", "superres", "itersr") if getattr(self, part))
        return ("vqvae", "base", "stage1", "stage2", *optional, *self.bases)

    def build(self, part: str) -> Any:
        """A part with fresh weights, a module of the class that the part is."""
        if part == "vqvae":
            return HierarchicalVQVAE(self.vqvae) if self.vqvae.rates else VQVAE(self.vqvae)
        if part in BASES:
            return Base(self.model)
        if part == "stage1":
            return TemporalChannel(self.model, window=0)
        if part == "stage2":
            return TemporalChannel(self.model, window=self.model.window)
        if part == "refiner" and self.refiner:
            return Refiner(self.refiner)
        if part == "superres" and self.superres:
            return SuperResChannel(self.model, self.superres)
        if part == "itersr" and self.itersr:
            return SuperResChannel(self.model, self.itersr)
        raise ValueError(f"no part {part!r} in this model; its parts are {', '.join(self.parts)}")

    def outline(self, part: str) -> Any:
        """A part whose tensors take no memory (device "meta"): to be filled, or only measured."""
        with torch.device("meta"), _Unfilled():
            return self.build(part)

    def shapes(self, part: str) -> dict[str, torch.Size]:
        """The shapes of all tensors of a part, by their names."""
        return {name: tensor.shape for name, tensor in self.outline(part).state_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "System":
        parts: dict[str, Any] = {"bases": tuple(values.get("bases", ()))}
        for name, kind in CONFIGS.items():
            if given := values.get(name):
                parts[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        return cls(**parts)
