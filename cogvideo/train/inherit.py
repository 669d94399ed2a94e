"""What a new run begins with: another model's weights, GPT-2's embedding of words, or new weights.

A tensor is taken if the other model has one of its name and shape. Of a table, the rows with the same meaning
are taken: of `embed` the image codes, the words if both models have the same text model, and the tokens of
equal frame rates; of the decoder's `words` all or none; of `frame_positions` the moments that both have.
"""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cogvideo.convert.gpt2 import read_embedding
from cogvideo.data.cut import Source
from cogvideo.data.loader import read_captions
from cogvideo.files import atomic_folder
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.families import Spec
from cogvideo.model.folder import FolderConfig, ModelFolder
from cogvideo.model.regression import RegressionTransformer
from cogvideo.model.transformer import Base
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import split_words, train_text
from cogvideo.train.recipes import Recipe

Rows = list[tuple[int, int]]  # here and there
CAPTIONS = 40_000  # that the text model is trained on


@runtime_checkable
class SelfInitialised(Protocol):
    """A part that initialises its own weights."""

    def init_weights(self, generator: torch.Generator) -> None: ...


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
    if not (shared := [name for name in spec.parts if name in there and init.has(name)]):
        raise ValueError(
            f"{init.path} has no part of this model; its parts are {', '.join(there)}, "
            f"this model's are {', '.join(spec.parts)}"
        )
    return shared


def text_model(init: ModelFolder, spec: Spec) -> bytes | None:
    """The text model of `init`, if `init` has the embedding of its pieces and they fit into this model."""
    if init.config.text == "gpt2" or spec.reader not in shared_parts(spec, init):
        return None
    text = init.text()
    return text.model if spec.first_text + len(text) <= spec.speaks.vocab else None


def read_words(spec: Spec, where: str) -> Tensor:
    """GPT-2's embedding [ids, width]; ValueError if it is not of this model's size."""
    given, ids, width = read_embedding(where), spec.speaks.vocab, spec.speaks.width
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
        if asked and asked != (begun := config.begun):
            raise ValueError(
                f"the run in {folder.path.parent} has begun with {begun or 'new weights'}; to "
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
        read = list(read_captions(source, captions or CAPTIONS, recipe.seed))
        words = sorted({word for caption in read for word in split_words(caption)})
        config = replace(config, words=tuple(words))
        theirs = text_model(init, spec) if init else None
        text = _own_text(folder) or theirs or train_text(read, recipe.pieces)
        same_words = text == theirs
    else:
        config = replace(config, text="gpt2")  # which knows all words
        text = b""
        same_words = bool(init and init.config.text == "gpt2")
    parts = _first_parts(spec, recipe.seed, init, init_embedding, same_words)
    with atomic_folder(folder.path) as path:
        new = ModelFolder(path)
        if recipe.pieces:
            new.write_text(text)
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
        if spec.reader not in parts:
            parts[spec.reader] = new_part(spec, spec.reader, seed)
        model: Any = parts[spec.reader]
        with torch.no_grad():
            model.embed.weight[: spec.speaks.vocab] = read_words(spec, init_embedding)
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
def take(part: nn.Module, parent: nn.Module, same_words: bool = True) -> str:
    """Copy the tensors, or the rows of tables, that a part has in common with its parent. Return a line that
    says what was taken and what stays new."""
    tables = _tables(part, parent, same_words)
    theirs = parent.state_dict()
    if isinstance(part, VQVAE) and part.codebook.vectors.shape != theirs["codebook.vectors"].shape:
        for name in part.codebook.state_dict():  # all or none: without its codes it must not count as filled
            del theirs[f"codebook.{name}"]
    mine = dict(part.named_parameters()) | dict(part.named_buffers())
    trained = mine.pop("trained", None)  # of RegressionTransformer: the frames that it can generate

    new = []
    for name, tensor in mine.items():
        given = theirs.get(name)
        rows = tables.get(name)
        if given is not None and rows is not None and given.shape[1:] == tensor.shape[1:]:
            here = [row for row, _ in rows]
            there = [row for _, row in rows]
            tensor[here] = given[there]
            if len(rows) < len(tensor):
                new.append(f"{name} but for {len(rows)} of {len(tensor)} rows")
        elif given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
        else:
            new.append(name)

    if isinstance(part, RegressionTransformer):
        moments = len(tables["frame_positions.weight"])
        part.spread(theirs["trained"][:, :moments].any(0))
        if trained is not None and same_words and not mine.keys() & {*new}:
            for mine_fps, their_fps in _equal_fps(part, parent):
                trained[mine_fps, :moments] = theirs["trained"][their_fps, :moments]
    summary = f"new: {', '.join(new)}" if new else "nothing is new"
    return f"{len(mine) - len(new)} of {len(mine)} tensors taken; {summary}"


def _tables(part: nn.Module, parent: nn.Module, same_words: bool) -> dict[str, Rows]:
    """The rows with the same meaning in both, for each table where not all have it."""
    if not isinstance(part, (Base, RegressionTransformer, VideoDecoder)):
        return {}
    here: Any = part.config
    there: Any = parent.config
    if isinstance(part, Base):
        same = here.vocab if same_words else here.codes
        return {"embed.weight": _first(same if here.codes == there.codes else 0, there.vocab)}
    if isinstance(part, VideoDecoder):
        return {"words.weight": _first(here.pieces if same_words else 0, there.pieces)}
    words = _first(here.vocab if same_words else 0, there.vocab)
    fps = [(here.vocab + i, there.vocab + j) for i, j in _equal_fps(part, parent)]
    moments = here.frames if here.rates[-1] == there.rates[-1] else 1
    return {"embed.weight": words + fps, "frame_positions.weight": _first(moments, there.frames)}


def _first(*counts: int) -> Rows:
    return [(i, i) for i in range(min(counts))]


def _equal_fps(part: Any, parent: Any) -> Rows:
    """The frame rates that both know."""
    here = part.config.rates
    there = parent.config.rates
    return [(here.index(fps), there.index(fps)) for fps in here if fps in there]
