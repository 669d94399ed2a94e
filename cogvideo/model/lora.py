"""Low-rank adapters (LoRA, Hu et al. 2021): what a fine-tuning adds to the linear layers of some parts.

A layer y = W x + b becomes y = W x + b + B A x, where A [r, inputs] and B [outputs, r] are all that learns.
An adapter is a file of these two for each layer, about a megabyte, named as peft and diffusers name them:

    base.blocks.0.attention.qkv.lora_A.weight    [r, inputs]
    base.blocks.0.attention.qkv.lora_B.weight    [outputs, r]

B A is multiplied by alpha / r; alpha is in the file's metadata, and r without it. To generate, the product
is added to the weights. Where these are rounded to int8, both factors are kept beside them instead: a change
that is smaller than half a step of the rounding would be lost.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogvideo.files import expand_user
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelError, read_about, read_state, write_state
from cogvideo.model.hub import download, is_hub_id

FILE = "pytorch_lora_weights.safetensors"
A = ".lora_A.weight"
B = ".lora_B.weight"


class LoraLinear(nn.Module):
    """A frozen linear layer and what is learnt beside it: [..., inputs] to [..., outputs]."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.lora_B(self.lora_A(x)) if self.active else y


def attach(part: nn.Module, rank: int, seed: int) -> None:
    """Freeze a part and give each of its linear layers an adapter that changes nothing yet."""
    part.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, rank, generator))


def layers_of(part: nn.Module) -> dict[str, LoraLinear]:
    """The layers of a part that have an adapter, by name."""
    return {name: module for name, module in part.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def inactive(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, parts compute as if they had no adapters."""
    layers = [layer for part in parts for layer in layers_of(part).values()]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


class Factors(NamedTuple):
    """Of a change of one matrix, which is up @ down."""

    down: Tensor  # [r, inputs]
    up: Tensor  # [outputs, r]


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter file, and its metadata."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module], about: Mapping[str, str] | None = None) -> "Adapter":
        """That of parts in training; `about` adds to the metadata."""
        tensors = {}
        rank = 0
        for part, module in parts.items():
            for name, layer in layers_of(module).items():
                tensors[f"{part}.{name}{A}"] = layer.lora_A.weight.detach().cpu().half()
                tensors[f"{part}.{name}{B}"] = layer.lora_B.weight.detach().cpu().half()
                rank = len(layer.lora_A.weight)
        return cls(tensors, {"rank": str(rank), "alpha": str(rank), **(about or {})})

    @classmethod
    def load(cls, where: str | Path) -> "Adapter":
        """Read a file, the file in a folder, or that of a hub id. ModelError if it is no adapter."""
        file = find(where)
        adapter = cls(read_state(file), read_about(file))
        adapter._check(file)
        return adapter

    def save(self, folder: Path) -> Path:
        """Write the file into a folder, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder / FILE, self.tensors, dict(self.about))
        return folder / FILE

    def _check(self, file: Path) -> None:
        layers = self.layers()
        if not layers:
            raise ModelError(f"{file} is no adapter: it has no tensor whose name ends in {A}")
        for name in self.tensors:
            if not name.endswith((A, B)):
                raise ModelError(f"{file} is no adapter of this kind: unknown tensor {name}")
        for layer in layers:
            down, up = (self.tensors.get(layer + ending) for ending in (A, B))
            if down is None or up is None:
                raise ModelError(f"{file} lacks {layer}{B if up is None else A}")
            if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
                raise ModelError(f"{file}: {layer} has shapes {[*up.shape]} and {[*down.shape]}")
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ModelError(f"{file}: {layer} holds a number that is not finite")
        try:
            alpha = float(self.about.get("alpha", 1))
            json.loads(self.about.get("words", "[]"))
        except ValueError as error:
            raise ModelError(f"{file} has damaged metadata: {error}") from None
        if not math.isfinite(alpha):
            raise ModelError(f"{file}: alpha is {alpha}")

    def check_fits(self, spec: Spec, where: str | Path) -> None:
        """ModelError unless each layer is one of the model's, of the same shape."""
        shapes = {part: spec.shapes(part) for part in spec.parts}
        for layer in self.layers():
            part, _, inner = layer.partition(".")
            shape = shapes.get(part, {}).get(f"{inner}.weight")
            if shape is None:
                raise ModelError(f"{where} is of another model: this one has no layer {layer}")
            mine = [len(self.tensors[layer + B]), self.tensors[layer + A].shape[1]]
            if [*shape] != mine:
                raise ModelError(f"{where} is of another model: {layer} is {mine}, here {[*shape]}")

    def layers(self) -> list[str]:
        return sorted(name.removesuffix(A) for name in self.tensors if name.endswith(A))

    @property
    def parts(self) -> set[str]:
        return {layer.partition(".")[0] for layer in self.layers()}

    @property
    def words(self) -> list[str]:
        """Words of the captions that it was trained with."""
        words: list[str] = json.loads(self.about.get("words", "[]"))
        return words

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors."""
        sha = sha256(repr(sorted(self.about.items())).encode())
        for name in sorted(self.tensors):
            sha.update(name.encode())
            sha.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def factors(self, part: str) -> dict[str, Factors]:
        """A and B, which includes alpha / r, for each layer of a part by its name in the part; float32."""
        found = {}
        for layer in self.layers():
            owner, _, inner = layer.partition(".")
            if owner == part:
                down = self.tensors[layer + A].float()
                alpha = float(self.about.get("alpha", len(down)))
                found[inner] = Factors(down, self.tensors[layer + B].float() * (alpha / len(down)))
        return found

    def relative_change(self, part: nn.Module, name: str) -> float:
        """The norm of what this adapter adds to the matrices of a part, over the norm of these."""
        added = 0.0
        whole = 0.0
        for inner, factors in self.factors(name).items():
            module = part.get_submodule(inner)
            linear = module.linear if isinstance(module, LoraLinear) else module
            assert isinstance(linear, nn.Linear)
            added += float((factors.up @ factors.down).square().sum())
            whole += float(linear.weight.detach().float().square().sum())
        return math.sqrt(added / whole) if whole else 0.0

    def joined(self, other: "Adapter") -> "Adapter":
        """With the tensors of another, of which the ones with the same name count."""
        return Adapter({**self.tensors, **other.tensors}, {**self.about, **other.about})


def weighted(adapters: Iterable[tuple[Adapter, float]], part: str) -> dict[str, Factors]:
    """The factors of several adapters together, each times its weight, for each layer of a part."""
    together: dict[str, Factors] = {}
    for adapter, weight in adapters:
        for layer, (down, up) in adapter.factors(part).items():
            if layer in together:
                down = torch.cat((together[layer].down, down))
                up = torch.cat((together[layer].up, weight * up), 1)
            else:
                up = weight * up
            together[layer] = Factors(down, up)
    return together


@torch.no_grad()
def merge(part: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Add adapters to the weights of a part, in place."""
    for layer, (down, up) in factors.items():
        linear = part.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        changed = linear.weight.float() + (up @ down).to(linear.weight.device)
        linear.weight = nn.Parameter(changed.to(linear.weight.dtype), requires_grad=False)


def find(where: str | Path) -> Path:
    """The file of an adapter: given itself, in a folder, or by a hub id. ModelError if there is none."""
    path = expand_user(where)
    for file in (path, path / FILE, path / "lora" / FILE):
        if file.is_file():
            return file
    if is_hub_id(where):
        return download(str(where), [FILE]) / FILE
    raise ModelError(f"there is no adapter at {where}; give {FILE}, its folder, or a hub id")
