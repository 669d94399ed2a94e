"""Key rules: a strict table from the tensors of a checkpoint to those of a part.

The rules name every tensor on both sides: a missing or additional tensor is an error that names it.
Model-parallel ranks are joined, and a tensor is built only when it is written.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from cogvideo.model.folder import Piece

States = dict[str, Tensor]
Shapes = dict[str, torch.Size]
# their name or names, {l} a layer, {p} weight and bias; our name; how tensors of these names are joined
Rule = tuple[str, str, str | int]


def expand(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """The rules for each layer, weight and bias."""
    expanded: list[Rule] = []
    for source, target, split in rules:
        endings = ("weight", "bias") if "{p}" in source else ("",)
        for layer in range(layers if "{l}" in source else 1):
            expanded += [(source.format(l=layer, p=p), target.format(l=layer, p=p), split) for p in endings]
    return expanded


def convert(
    name: str, ranks: list[States], rules: dict[str, list[Rule]], shapes: Callable[[str], Shapes]
) -> dict[str, dict[str, Piece]]:
    """The tensors of all parts, by part and name, from the states of all ranks.

    rules: of each part; shapes: the names and shapes that a part must have. Raise ValueError, with `name`, if
    the states are not exactly those that the rules name, or do not give these shapes.
    """
    named = set()
    for rows in rules.values():
        for source, _, _ in rows:
            named.update(source.split())
    for states in ranks:
        _check_names(named, states, name)

    converted: dict[str, dict[str, Piece]] = {}
    for part, rows in rules.items():
        expected = shapes(part)
        _check_names(expected, {target for _, target, _ in rows}, part)
        converted[part] = {}
        for source, target, split in rows:
            source_names = source.split()
            for key in source_names:
                _check_ranks([states[key] for states in ranks], split, f"{name}: {key}")
            shards: list[Tensor] = []
            for states in ranks:
                shards += [states[key] for key in source_names]
            converted[part][target] = _piece(shards, split, expected[target], f"{name}: {source}")
    return converted


def _check_names(expected: Iterable[str], found: Iterable[str], name: str) -> None:
    wrong = [f"{key} is missing" for key in sorted({*expected} - {*found})]
    wrong += [f"{key} is unknown" for key in sorted({*found} - {*expected})]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{name} is not the expected model: {', '.join(wrong[:20])}{more}")


def _check_ranks(shards: list[Tensor], split: str | int, name: str) -> None:
    """Raise ValueError unless the shards of all ranks have one shape and, if replicated, are equal."""
    first, *others = shards
    if any(shard.shape != first.shape for shard in others):
        raise ValueError(f"{name} has different shapes in the ranks: {[list(s.shape) for s in shards]}")
    if _replicated(first, split) and not all(torch.equal(first, shard) for shard in others):
        raise ValueError(f"{name} is not the same in all ranks; they are not of one checkpoint")


def _replicated(shard: Tensor, split: str | int) -> bool:
    """Whether all ranks hold the whole tensor."""
    return isinstance(split, int) or split == "same" or (split == "columns" and shard.ndim == 1)


def _piece(shards: list[Tensor], split: str | int, shape: torch.Size, name: str) -> Piece:
    try:
        fits = join([shard.to("meta") for shard in shards], split, shape[0]).shape == shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits or len({shard.dtype for shard in shards}) > 1:
        found = " and ".join(f"{list(shard.shape)} {shard.dtype}" for shard in shards)
        raise ValueError(f"{name} is {found}, which does not make the {list(shape)} of the configuration")
    return Piece(shape, shards[0].dtype, partial(join, shards, split, shape[0]))


def join(shards: Sequence[Tensor], split: str | int, rows: int) -> Tensor:
    """Join the tensors of all model-parallel ranks (docs/reference.md, "Checkpoint files").

    split: "same", equal in all ranks; "rows", cut along dimension 0; "columns", cut along dimension 1, a bias
    equal in all; "thirds", each rank holds some heads of queries, keys and values. A number is the first of
    `rows` rows of a table that is equal in all.
    """
    if isinstance(split, int):
        return shards[0][split : split + rows]
    if len(shards) == 1 or _replicated(shards[0], split):
        return shards[0]
    if split == "thirds":
        thirds = [shard.chunk(3) for shard in shards]  # of each rank: queries, keys, values
        return torch.cat(list(chain.from_iterable(zip(*thirds))))
    return torch.cat(list(shards), 1 if split == "columns" else 0)
