"""Read frozen dataclasses from JSON tables.

Types and ranges stand in the dataclasses, as in `layers: Annotated[int, Range(1, 1000)]`. Whatever does not
fit raises ConfigError, which names the key, what it is, and what would be right. What must hold between the
keys of one table is checked by its `__post_init__`.
"""

import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

STAGES = ("image", "stage1", "stage2", "superres")  # that generate tokens


class ConfigError(ValueError):
    """A table does not describe what it should; the message names the key."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


Size = Annotated[int, Range(1, 65536)]  # of a layer, an image, a text
SmallSize = Annotated[int, Range(1, 1024)]  # layers, heads, frames, codes a side
SmallCount = Annotated[int, Range(0, 1024)]
Id = Annotated[int, Range(0, 10**7)]  # of a token
Ids = Annotated[int, Range(1, 10**7)]  # how many there are
MOST_WEIGHTS = 10**12  # of a matrix of every layer: a model that no machine holds is refused
Total = Annotated[int, Range(1, 10**9)]  # steps, clips


def read_table(kind: type[T], values: object, path: str = "", **built: Any) -> T:
    """Build a dataclass from a table of JSON, and from fields that are `built` already. `path` is the key of
    the table, with dots."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'} must be a table; got {_shown(values)}")
    hints = get_type_hints(kind, include_extras=True)
    known = {field.name: field for field in fields(kind) if field.name not in built}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown key {_key(path, str(name))}; choose from {', '.join(known)}")

    arguments = dict(built)
    for name, field in known.items():
        if name in values:
            arguments[name] = read_value(hints[name], values[name], _key(path, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{_key(path, name)} is missing")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:  # of __post_init__, which begins with the name of a key
        raise ConfigError(_key(path, str(error))) from None


def read_value(hint: Any, value: object, key: str) -> Any:
    """A value of JSON as the type of a hint."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, limits = get_args(hint)
        number = read_value(base, value, key)
        if not limits.low <= number <= limits.high:
            raise ConfigError(f"{key} must be {limits}; got {_shown(value)}")
        return number
    if origin in (Union, types.UnionType):
        (inner,) = (inner for inner in get_args(hint) if inner is not type(None))
        return None if value is None else read_value(inner, value, key)
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{key} must be one of {choices}; got {_shown(value)}")
        return value
    if origin is tuple:
        return _read_list(hint, value, key)
    if origin is dict:
        return _read_rows(hint, value, key)
    if is_dataclass(hint):
        return read_table(hint, value, key)  # type: ignore[arg-type]
    return _read_plain(hint, value, key)


def _read_plain(kind: type, value: object, key: str) -> object:
    """A whole number, a number, a word, or true or false."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        value = float(value)
    right = type(value) is kind
    if isinstance(value, float) and not math.isfinite(value):
        right = False
    if not right:
        name = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]
        raise ConfigError(f"{key} must be {name}; got {_shown(value)}")
    return value


def _read_list(hint: Any, value: object, key: str) -> tuple[Any, ...]:
    inner = get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} must be a list; got {_shown(value)}")
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise ConfigError(f"{key} must be a list of {len(inner)}; got {_shown(value)}")
    return tuple(read_value(hint, item, f"{key}.{i}") for i, (hint, item) in enumerate(zip(inner, value)))


def _read_rows(hint: Any, value: object, key: str) -> dict[str, Any]:
    names, inner = get_args(hint)
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a table; got {_shown(value)}")
    rows = {}
    for name, row in value.items():
        rows[read_value(names, name, f"{key}.{name}")] = read_value(inner, row, f"{key}.{name}")
    return rows


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- rows of a model folder's config.json


@dataclass(frozen=True)
class SamplingConfig:
    """How a stage samples its tokens. `top_k` 0 keeps all; `guidance_scale` 1 is no guidance."""

    temperature: Annotated[float, Range(0, 1000)] = 1.0
    top_k: Annotated[int, Range(0, 10**7)] = 0
    guidance_scale: Annotated[float, Range(1, 1000)] = 1.0
    text_boost: Annotated[float, Range(0, 1000)] = 0.0  # added to scores of text without guidance
    token_temperature: Annotated[float, Range(1e-6, 1000)] = 1.0  # of a code in its cluster


@dataclass(frozen=True)
class TrainedPhase:
    """A phase of training that was finished."""

    steps: Total
    batch: Total  # clips a step
    parts: tuple[str, ...]  # that it trained
