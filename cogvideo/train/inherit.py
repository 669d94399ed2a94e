"""What a new run begins with: another model's weights, GPT-2's embedding of words, or new weights.

A tensor is taken if the other model has one of its name and shape. Of a table, the rows with the same meaning
are taken: of `embed` the image codes, the words if both models have the same text model, and the tokens of
equal fps; of the decoder's `words` all or none; of `frame_positions` the moments that both have.
"""

from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from cogvideo.convert.gpt2 import read_embedding
from cogvideo.data.cut import Source
from cogvideo.data.loader import read_captions
from cogvideo.files import atomic_folder
from cogvideo.model.families import Spec
from cogvideo.model.folder import FolderConfig, ModelFolder
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import split_words, train_text
from cogvideo.train.recipes import Recipe

CAPTIONS = 40_000  # that the text model is trained on


@runtime_checkable
class SelfInitialised(Protocol):
    """A part that initialises its own weights."""

    def init_weights(self, generator: torch.Generator) -> None: ...


@runtime_checkable
class HasTables(Protocol):
    """A part with tables of which another part may have some rows."""

    def shared_rows(self, other: Any, same_words: bool) -> dict[str, list[tuple[int, int]]]:
        """For each such table, the rows with the same meaning, here and in a part of the same class."""
        ...


def new_part(spec: Spec, name: str, seed: int) -> nn.Module:
    """Build a part with new weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part = spec.build(name)
    if isinstance(part, SelfInitialised):
        part.init_weights(torch.Generator().manual_seed(seed))
    return part


def shared_parts(spec: Spec, init: ModelFolder) -> list[str]:
    """The parts that both models have; ValueError if there are none."""
    there = init.spec().parts
    shared = [name for name in spec.parts if name in there and init.has(name)]
    if not shared:
        raise ValueError(
            f"{init.path} has no part of this model; its parts are {', '.join(there)}, "
            f"this model's are {', '.join(spec.parts)}"
        )
    return shared


def text_model(init: ModelFolder, spec: Spec) -> bytes | None:
    """The text model of `init`, if `init` has the embedding of its pieces and they fit into this model."""
    if init.config.text == "gpt2" or spec.text_part not in shared_parts(spec, init):
        return None
    text = init.text()
    return text.model if spec.first_text + len(text) <= spec.text_config.vocab else None


def read_words(spec: Spec, where: str) -> Tensor:
    """GPT-2's embedding [ids, width]; ValueError if it is not of this model's size."""
    given = read_embedding(where)
    ids = spec.text_config.vocab
    width = spec.text_config.width
    if given.shape != (ids, width):
        raise ValueError(
            f"the embedding in {where} is {given.shape[0]} ids x {given.shape[1]}, this model's "
            f"is {ids} x {width}; direct-gpt2 is as wide as the smallest GPT-2, 768"
        )
    return given


def check(
    folder: ModelFolder, recipe: Recipe, spec: Spec, init: ModelFolder | None, init_embedding: str | None
) -> None:
    """Raise ValueError if this initialisation is invalid or differs from the run's."""
    if (folder.path / "config.json").exists():
        config = folder.config
        asked = _asked(init, init_embedding)
        if folder.spec() != spec:
            raise ValueError(
                f"{folder.path} holds another model, {config.preset}, than the recipe "
                f"{recipe.name} trains, {recipe.preset}; choose another --out"
            )
        if asked and asked != config.begun:
            raise ValueError(
                f"the run in {folder.path.parent} has begun with {config.begun or 'new weights'}; to "
                f"begin with {asked} choose another --out"
            )
        return
    if init is not None:
        shared_parts(spec, init)
    if init_embedding is not None:
        if recipe.pieces:
            raise ValueError(
                f"the recipe {recipe.name} has words of its own; GPT-2's embedding is for "
                f"recipes with GPT-2's words, such as direct-gpt2"
            )
        read_words(spec, init_embedding)


def _asked(init: ModelFolder | None, init_embedding: str | None) -> dict[str, str]:
    asked = {"init": str(init.path) if init else "", "init_embedding": init_embedding or ""}
    return {name: value for name, value in asked.items() if value}


def prepare(
    folder: ModelFolder,
    recipe: Recipe,
    spec: Spec,
    source: Source,
    init: ModelFolder | None = None,
    init_embedding: str | None = None,
    captions: int | None = None,
) -> None:
    """Write a new model folder, unless there is one: its text model, the parts that it inherits, its
    configuration. The text model is trained on `captions` captions, CAPTIONS by default."""
    if (folder.path / "config.json").exists():
        return
    config = FolderConfig(spec, recipe.preset, recipe.name, trained={}, begun=_asked(init, init_embedding))
    if recipe.pieces:
        texts = list(read_captions(source, captions or CAPTIONS, recipe.seed))
        words = sorted({word for text in texts for word in split_words(text)})
        config = replace(config, words=tuple(words))
        inherited = text_model(init, spec) if init else None
        model = _own_text(folder) or inherited or train_text(texts, recipe.pieces)
        same_words = model == inherited
    else:
        config = replace(config, text="gpt2")  # which knows all words
        model = b""
        same_words = bool(init and init.config.text == "gpt2")
    parts = _first_parts(spec, recipe.seed, init, init_embedding, same_words)
    with atomic_folder(folder.path) as path:
        new = ModelFolder(path)
        if recipe.pieces:
            new.write_text(model)
        for name, part in parts.items():
            new.save(name, part)
        new.write_config(config)


def _own_text(folder: ModelFolder) -> bytes | None:
    """The text model that a user has put into a folder without a config.json."""
    file = folder.path / "text.model"
    return file.read_bytes() if file.exists() else None


def _first_parts(
    spec: Spec, seed: int, init: ModelFolder | None, init_embedding: str | None, same_words: bool
) -> dict[str, nn.Module]:
    """The parts that a new run inherits, and a line for each about what it takes from where."""
    parts: dict[str, nn.Module] = {}
    if init is not None:
        for name in shared_parts(spec, init):
            parts[name] = new_part(spec, name, seed)
            print(f"{name} from {init.path}: {take(parts[name], init.load(name), same_words)}")
        print(f"words: {'the same' if same_words else 'those of the captions here'}")
    if init_embedding is not None:
        if spec.text_part not in parts:
            parts[spec.text_part] = new_part(spec, spec.text_part, seed)
        model: Any = parts[spec.text_part]
        with torch.no_grad():
            model.embed.weight[: spec.text_config.vocab] = read_words(spec, init_embedding)
        print(f"embedding of words from {init_embedding}")
    return parts


def copy(part: nn.Module, parent: nn.Module) -> None:
    """Let a new part start as a copy of another: of one of its class, or of one that it knows how to
    inherit."""
    if type(parent) is type(part):
        part.load_state_dict(parent.state_dict())
    else:
        inheriting: Any = part
        inheriting.inherit(parent)


@torch.no_grad()
def take(part: nn.Module, other: nn.Module, same_words: bool = True) -> str:
    """Copy the tensors, or the rows of tables, that a part has in common with another. Return a line that
    says what was taken and what stays new."""
    tables = part.shared_rows(other, same_words) if isinstance(part, HasTables) else {}
    given = other.state_dict()
    if isinstance(part, VQVAE) and part.codebook.vectors.shape != given["codebook.vectors"].shape:
        for name in part.codebook.state_dict():  # all or none: without its codes it must not count as filled
            del given[f"codebook.{name}"]
    tensors = dict(part.named_parameters()) | dict(part.named_buffers())
    if isinstance(part, RegressionTransformer):
        del tensors["trained"]

    new = []
    for name, tensor in tensors.items():
        source = given.get(name)
        rows = tables.get(name)
        if source is not None and rows is not None and source.shape[1:] == tensor.shape[1:]:
            tensor[[here for here, _ in rows]] = source[[there for _, there in rows]]
            if len(rows) < len(tensor):
                new.append(f"{name} but for {len(rows)} of {len(tensor)} rows")
        elif source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
        else:
            new.append(name)

    if isinstance(part, RegressionTransformer):
        complete = same_words and not any(name in tensors for name in new)
        part.take_trained(cast(RegressionTransformer, other), complete)
    summary = f"new: {', '.join(new)}" if new else "nothing is new"
    return f"{len(tensors) - len(new)} of {len(tensors)} tensors taken; {summary}"
