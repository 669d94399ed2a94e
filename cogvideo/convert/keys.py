"""Key rules: a strict table by which the tensors of a checkpoint become those of a part.

The rules name every tensor on both sides: one too many or too few is an error that names it. Model-parallel
ranks are joined, and a tensor is built only when it is written.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from cogvideo.model.folder import Piece

States = dict[str, Tensor]
Shapes = dict[str, torch.Size]
# names of theirs, {l} a layer, {p} weight and bias; our name; how tensors of these names are joined
Rule = tuple[str, str, str | int]


def expand(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """The rules, written out for every layer, weight and bias."""
    return [
        (theirs.format(l=layer, p=p), ours.format(l=layer, p=p), how)
        for theirs, ours, how in rules
        for layer in range(layers if "{l}" in theirs else 1)
        for p in (("weight", "bias") if "{p}" in theirs else ("",))
    ]


def pick(
    name: str, ranks: list[States], rules: dict[str, list[Rule]], shapes: Callable[[str], Shapes]
) -> dict[str, dict[str, Piece]]:
    """Every tensor of the parts that have these rules and are to have these shapes, out of all ranks."""
    named = {key for rows in rules.values() for theirs, _, _ in rows for key in theirs.split()}
    for states in ranks:
        _check_names(named, states, name)
    picked: dict[str, dict[str, Piece]] = {}
    for part, rows in rules.items():
        due = shapes(part)
        _check_names(due, {ours for _, ours, _ in rows}, part)
        for theirs, ours, how in rows:
            for key in theirs.split():
                _check_ranks([states[key] for states in ranks], how, f"{name}: {key}")
            shards = [states[key] for states in ranks for key in theirs.split()]
            picked.setdefault(part, {})[ours] = _piece(shards, how, due[ours], theirs)
    return picked


def _check_names(expected: Iterable[str], found: Iterable[str], name: str) -> None:
    wrong = [f"{key} is missing" for key in sorted({*expected} - {*found})]
    wrong += [f"{key} is unknown" for key in sorted({*found} - {*expected})]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{name} is not the expected model: {', '.join(wrong[:20])}{more}")


def _check_ranks(shards: list[Tensor], how: str | int, name: str) -> None:
    """Ranks of one checkpoint have shards of one shape, and agree in what all of them hold."""
    first, *others = shards
    if any(shard.shape != first.shape for shard in others):
        raise ValueError(f"{name} is of different shapes in the ranks: {[list(s.shape) for s in shards]}")
    if _replicated(first, how) and not all(torch.equal(first, shard) for shard in others):
        raise ValueError(f"{name} is not the same in all ranks; they are not of one checkpoint")


def _replicated(shard: Tensor, how: str | int) -> bool:
    return isinstance(how, int) or how == "same" or (how == "columns" and shard.ndim == 1)


def _piece(shards: list[Tensor], how: str | int, shape: torch.Size, name: str) -> Piece:
    try:
        fits = join([shard.to("meta") for shard in shards], how, shape[0]).shape == shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits or len({shard.dtype for shard in shards}) > 1:
        found = " and ".join(f"{list(shard.shape)} {shard.dtype}" for shard in shards)
        raise ValueError(f"{name} is {found}, which does not make the {list(shape)} of the configuration")
    return Piece(shape, shards[0].dtype, partial(join, shards, how, shape[0]))


def join(shards: Sequence[Tensor], how: str | int, rows: int) -> Tensor:
    """One tensor out of those of all model-parallel ranks (docs/reference.md, "Checkpoint files"). They are the "same"; or cut into
    "rows"; or into "columns", but for a bias, which is the same; or into "thirds": some heads of the queries,
    of the keys and of the values. A number is the first of `rows` of a table that is the same in all."""
    if isinstance(how, int):
        return shards[0][how : how + rows]
    if len(shards) == 1 or _replicated(shards[0], how):
        return shards[0]
    if how == "thirds":
        return torch.cat([third for thirds in zip(*(shard.chunk(3) for shard in shards)) for third in thirds])
    return torch.cat(list(shards), 1 if how == "columns" else 0)
