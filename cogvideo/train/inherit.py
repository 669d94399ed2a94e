"""What a new run begins with: another model's weights, GPT-2's embedding of words, or fresh numbers.

A tensor is taken where the other model has one of its name and shape. Two tables may be larger here than
there: in a `direct` model frames have positions of their own, and one of pictures has that of the first only.
"""

from typing import Any

import torch
from torch import nn

from cogvideo.model.system import Family
from cogvideo.weights import ModelFolder, read_embedding

GROWING = ("frame_positions.weight", "trained")


def new_part(system: Family, name: str, seed: int) -> Any:
    """A part with fresh weights, the same for the same seed."""
    part = system.build(name)
    if hasattr(part, "init_weights"):
        part.init_weights(torch.Generator().manual_seed(seed))
    return part


def text_model(init: ModelFolder | None, system: Family) -> bytes | None:
    """The text model of `init`, if its pieces are as many as this model has room for."""
    if init is None or not (init.path / "text.model").exists():
        return None
    text = init.text()
    return text.model if system.first_text + len(text) == system.speaks.vocab else None


def begin(folder: ModelFolder, system: Family, seed: int, init: ModelFolder | None,
          init_embedding: str | None) -> None:
    """Write the parts that are begun with foreign weights, and say what was taken and what is new."""
    if init is not None:
        if not (shared := [name for name in system.parts if name in init.system().parts and init.has(name)]):
            raise ValueError(f"{init.path} has no part of this model; its parts are "
                             f"{', '.join(init.system().parts)}, this model's are {', '.join(system.parts)}")
        for name in shared:
            part = new_part(system, name, seed)
            print(f"{name} from {init.path}: {take(part, init.load(name))}")
            folder.save(name, part)
    if init_embedding is not None:
        part = folder.load("direct") if folder.has("direct") else new_part(system, "direct", seed)
        table, given = part.embed.weight, read_embedding(init_embedding)
        ids, width = system.speaks.vocab, table.shape[1]
        if given.shape != (ids, width):
            raise ValueError(f"the embedding in {init_embedding} is {given.shape[0]} ids x {given.shape[1]}, "
                             f"this model's is {ids} x {width}; choose a preset of that width")
        with torch.no_grad():
            table[:ids] = given
        print(f"embedding of {ids} ids from {init_embedding}")
        folder.save("direct", part)


@torch.no_grad()
def take(part: nn.Module, parent: nn.Module) -> str:
    """Copy what the two have in common; says what was taken and what stays new."""
    mine, theirs, new = part.state_dict(), parent.state_dict(), []
    for name, tensor in mine.items():
        given = theirs.get(name)
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
        elif given is not None and name in GROWING:
            common = tuple(map(slice, map(min, given.shape, tensor.shape)))
            tensor[common] = given[common]
            new.append(f"{name} from {len(given)} on")
        else:
            new.append(name)
    what = f"new: {', '.join(new)}" if new else "nothing is new"
    return f"{len(mine) - len(new)} of {len(mine)} tensors taken; {what}"
