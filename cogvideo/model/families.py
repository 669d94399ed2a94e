"""The two families of models: the parts of each by name, and their sizes.

"cogvideo", the autoregressive one:
vqvae      frames to codes and back
base       the text-to-image transformer, shared by both stages
stage1     the temporal channel that generates key frames
stage2     the temporal channel that interpolates
decoder    codes of a clip to frames, with their neighbours and the caption (optional)
refiner    decoded frames to larger ones (optional)
superres   what the base needs to generate a larger map of codes from a small one (optional)
itersr     what it needs to improve a large map, some codes at a time (optional)
superres_base, itersr_base: the transformers of these two, if they do not use `base`

"regression":
regression   captions to frames
refiner      frames to larger ones (optional)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cogvideo.layout import rounds
from cogvideo.model.config import ConfigError, read_table
from cogvideo.model.decoder import DecoderConfig, VideoDecoder
from cogvideo.model.refiner import Refiner, RefinerConfig
from cogvideo.model.regression import RegressionConfig, RegressionTransformer
from cogvideo.model.superres import SuperResChannel, SuperResConfig
from cogvideo.model.transformer import Base, TemporalChannel, TransformerConfig
from cogvideo.model.vqvae import VQVAE, HierarchicalVQVAE, VQVAEConfig
from cogvideo.text import PLAIN, TEMPLATE

BASES = ("base", "superres_base", "itersr_base")


class _Unfilled(TorchFunctionMode):
    """Skips the random numbers of new weights: tensors on "meta" hold none, and drawing them would cost two
    seconds of imports."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


class Spec(ABC):
    """The parts of a model and their sizes: what every family can be asked."""

    family: ClassVar[str]
    text_part: ClassVar[str]  # the part that embeds text
    template: ClassVar[str]  # of the text that it is trained with
    dtypes: ClassVar[tuple[str, ...]]  # that generation can compute in; the first is the fastest on a CPU
    refiner: RefinerConfig | None

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The names of the parts."""

    @abstractmethod
    def build(self, part: str) -> nn.Module:
        """Build a part with new weights."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Sizes for `cogvideo models`, each with its title."""

    @property
    @abstractmethod
    def text_config(self) -> TransformerConfig | RegressionConfig:
        """The config of the part that reads text: `vocab` ids, at most `text_len` of them."""

    @property
    @abstractmethod
    def first_text(self) -> int:
        """The first id of text."""

    @property
    @abstractmethod
    def clip_frames(self) -> int:
        """Frames of a clip of the full length."""

    @property
    def generation_parts(self) -> tuple[str, ...]:
        """The parts that generation uses."""
        return self.parts

    @property
    @abstractmethod
    def pixel_parts(self) -> tuple[str, ...]:
        """The parts that compute pixels, in float32."""

    @property
    @abstractmethod
    def postprocessing_parts(self) -> tuple[str, ...]:
        """The parts that enlarge or improve a generated clip; training comes to them last."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Pixels a side of the frames, before a refiner enlarges them."""

    def check_together(self) -> None:
        """Raise ConfigError if the parts of a finished model do not fit together."""
        return None

    def check_dtype(self, dtype: str) -> None:
        """Raise ValueError for a dtype that generation cannot compute in."""
        if dtype not in self.dtypes:
            raise ValueError(
                f"unknown dtype {dtype!r} for a model of the family {self.family}; choose one of "
                f"{', '.join(self.dtypes)}"
            )

    def outline(self, part: str) -> nn.Module:
        """Build a part on the device "meta", where its tensors take no memory, to fill or measure it."""
        with torch.device("meta"), _Unfilled():
            return self.build(part)

    def shapes(self, part: str) -> dict[str, torch.Size]:
        """The shapes of all tensors of a part, by their names."""
        return {name: tensor.shape for name, tensor in self.outline(part).state_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **asdict(self)}  # type: ignore[call-overload]

    def _unknown(self, part: str) -> ValueError:
        return ValueError(f"no part {part!r} in this model; its parts are {', '.join(self.parts)}")


@dataclass(frozen=True)
class CogVideoSpec(Spec):
    model: TransformerConfig
    vqvae: VQVAEConfig
    decoder: DecoderConfig | None = None
    refiner: RefinerConfig | None = None
    superres: SuperResConfig | None = None
    itersr: SuperResConfig | None = None
    bases: tuple[str, ...] = ()  # of superres and itersr, where they have one of their own
    family: ClassVar[str] = "cogvideo"
    text_part: ClassVar[str] = "base"
    template: ClassVar[str] = TEMPLATE
    dtypes: ClassVar[tuple[str, ...]] = ("int8", "bfloat16", "float32")

    def __post_init__(self) -> None:
        if self.model.rotary and (self.superres or self.itersr):
            raise ValueError("model.rotary must be false: super-resolution of codes does not know it")
        for base in self.bases:
            if base not in BASES[1:] or not getattr(self, base.removesuffix("_base")):
                raise ValueError(f"bases must name those of superres and itersr; got {base!r}")
        if self.decoder is not None:
            self._check_decoder(self.decoder)

    def check_together(self) -> None:
        c = self.model
        v = self.vqvae
        if c.codes != v.codes:
            raise ConfigError(f"vqvae.codes must equal model.codes, {c.codes}; got {v.codes}")
        if c.grid != v.grid:
            raise ConfigError(
                f"model.grid must be the codes a side of vqvae, {v.grid} (its resolution, patch, "
                f"multipliers, rate); got {c.grid}"
            )

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        if decoder.pad >= decoder.first_text + decoder.pieces:
            raise ValueError(
                f"decoder.pad must be less than first_text + pieces, {decoder.first_text + decoder.pieces}; "
                f"got {decoder.pad}"
            )
        for multiplier in self.vqvae.multipliers:
            width = self.vqvae.channels * multiplier
            if decoder.read and width % decoder.heads:
                raise ValueError(
                    f"decoder.heads must divide the {width} channels of every level of vqvae; got "
                    f"{decoder.heads}"
                )

    @property
    def parts(self) -> tuple[str, ...]:
        optional = (part for part in ("decoder", "refiner", "superres", "itersr") if getattr(self, part))
        return ("vqvae", "base", "stage1", "stage2", *optional, *self.bases)

    def describe(self) -> dict[str, str]:
        c = self.model
        return {
            "transformer": f"{c.layers} layers, width {c.width}, {c.heads} heads",
            "frames": f"{c.frames} key frames of {c.grid}x{c.grid} tokens, {c.codes} codes",
        }

    @property
    def text_config(self) -> TransformerConfig:
        return self.model

    @property
    def first_text(self) -> int:
        return self.model.codes

    @property
    def clip_frames(self) -> int:
        return max(rounds(self.model.frames))

    @property
    def generation_parts(self) -> tuple[str, ...]:
        """All but iterative super-resolution, which generation does without."""
        return tuple(part for part in self.parts if not part.startswith("itersr"))

    @property
    def pixel_parts(self) -> tuple[str, ...]:
        return ("vqvae", "decoder", "refiner")

    @property
    def postprocessing_parts(self) -> tuple[str, ...]:
        return tuple(part for part in ("superres", "decoder", "refiner") if part in self.parts)

    @property
    def resolution(self) -> int:
        return self.vqvae.resolution

    def build(self, part: str) -> nn.Module:
        if part == "vqvae":
            return HierarchicalVQVAE(self.vqvae) if self.vqvae.rates else VQVAE(self.vqvae)
        if part in BASES:
            return Base(self.model)
        if part == "stage1":
            return TemporalChannel(self.model, window=0)
        if part == "stage2":
            return TemporalChannel(self.model, window=self.model.window)
        if part == "decoder" and self.decoder:
            return VideoDecoder(self.vqvae, self.decoder)
        if part == "refiner" and self.refiner:
            return Refiner(self.refiner)
        if part == "superres" and self.superres:
            return SuperResChannel(self.model, self.superres)
        if part == "itersr" and self.itersr:
            return SuperResChannel(self.model, self.itersr)
        raise self._unknown(part)


@dataclass(frozen=True)
class RegressionSpec(Spec):
    regression: RegressionConfig
    refiner: RefinerConfig | None = None
    family: ClassVar[str] = "regression"
    text_part: ClassVar[str] = "regression"
    template: ClassVar[str] = PLAIN
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("regression", "refiner") if self.refiner else ("regression",)

    def describe(self) -> dict[str, str]:
        c = self.regression
        return {
            "transformer": f"{c.layers} and {c.layers} layers, width {c.width}, {c.heads} heads",
            "frames": f"{c.frames} of {c.grid}x{c.grid} patches, {c.patch} px each",
        }

    @property
    def text_config(self) -> RegressionConfig:
        return self.regression

    @property
    def first_text(self) -> int:
        return 0

    @property
    def clip_frames(self) -> int:
        return self.regression.frames

    @property
    def pixel_parts(self) -> tuple[str, ...]:
        return ("refiner",)

    @property
    def postprocessing_parts(self) -> tuple[str, ...]:
        return ("refiner",) if self.refiner else ()

    @property
    def resolution(self) -> int:
        return self.regression.resolution

    def build(self, part: str) -> nn.Module:
        if part == "regression":
            return RegressionTransformer(self.regression)
        if part == "refiner" and self.refiner:
            return Refiner(self.refiner)
        raise self._unknown(part)


FAMILIES: dict[str, type[CogVideoSpec] | type[RegressionSpec]] = {
    CogVideoSpec.family: CogVideoSpec,
    RegressionSpec.family: RegressionSpec,
}


def read_spec(values: dict[str, Any]) -> Spec:
    """The spec of the keys of config.json that describe one; ConfigError names a key that is wrong."""
    family = values.get("family", CogVideoSpec.family)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    sizes = {field.name: values[field.name] for field in fields(kind) if field.name in values}
    try:
        return read_table(kind, sizes)
    except ConfigError as error:
        if "family" in values:
            raise
        raise ConfigError(f"{error}; family is missing, so {family} is meant") from None
