"""What a whole model consists of: the configurations of its parts, and the parts by name.

vqvae      frames to codes and back
base       the text-to-image transformer, shared by both stages
stage1     the temporal channel that makes key frames
stage2     the temporal channel that interpolates
refiner    decoded frames to larger ones (optional)
"""

from dataclasses import asdict, dataclass
from typing import Any

from cogvideo.model.refiner import Refiner, RefinerConfig
from cogvideo.model.transformer import Base, ModelConfig, TemporalChannel
from cogvideo.vqvae import VQVAE, HierarchicalVQVAE, VQVAEConfig


@dataclass(frozen=True)
class System:
    model: ModelConfig
    vqvae: VQVAEConfig
    refiner: RefinerConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return ("vqvae", "base", "stage1", "stage2") + (("refiner",) if self.refiner else ())

    def build(self, part: str) -> Any:
        """A part with fresh weights, a module of the class that the part is."""
        if part == "vqvae":
            return HierarchicalVQVAE(self.vqvae) if self.vqvae.rates else VQVAE(self.vqvae)
        if part == "base":
            return Base(self.model)
        if part == "stage1":
            return TemporalChannel(self.model, window=0)
        if part == "stage2":
            return TemporalChannel(self.model, window=self.model.window)
        if part == "refiner" and self.refiner:
            return Refiner(self.refiner)
        raise ValueError(f"no part {part!r} in this model; its parts are {', '.join(self.parts)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "System":
        vqvae: dict[str, Any] = dict(values["vqvae"])
        vqvae |= {key: tuple(value) for key, value in vqvae.items() if isinstance(value, list)}
        refiner = RefinerConfig(**values["refiner"]) if values.get("refiner") else None
        return cls(ModelConfig(**values["model"]), VQVAEConfig(**vqvae), refiner)
