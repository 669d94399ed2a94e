"""Models whose config.json, weights or text model are damaged, and the commands that open them."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from scripts.campaign.case import Case
from scripts.campaign.damage import damage

MODELS = ("tiny", "direct-tiny")
DIGITS = "9" * 4300
VALUES = (  # as JSON
    "0", "-1", "1", "2", "3", "5", "0.5", "1e308", "1e999", "-1e999", "NaN", "Infinity", "null", "true",
    "[]", "{}",
    "1024", "65536", "1000000", "10000000", "1000000000000", "9" * 400, DIGITS, "9" * 5000, '""', '"a"',
    '"tiny"',
    r'"\ud800"', r'"\u0000"', '"' + "x" * 100_000 + '"', "[1]", "[1, 1]", "[0]", '["a"]', '[""]', '{"": ""}',
    '{"a": 1}', "[" * 100_000, '{"a":' * 100_000, "[" * 100 + "]" * 100, "[" + "1," * 100_000 + "1]",
    '"{seconds:.999999999f}"', '"{prompt:>999999999}"', '"{prompt.__class__}"', '"{0}"', '"{"',
    '"{prompt!r}"',
    '"{seconds:.1f}{prompt}"', '"' + "{prompt}" * 10_000 + '"', '"' + "<n>" * 10_000 + '"', '"no prompt"',
    '"gpt2"', '"sentencepiece"', '"cogvideo"', '"regression"', '"../../x"', "[2, 2, 2]", "[8, 8]", "16",
    "32", "64",
)  # fmt: skip
KEYS = (
    "a",
    "",
    "layers",
    "__class__",
    "spec",
    "family",
    "model",
    "prompts",
    "sampling",
    "x" * 2000,
    "a.b",
    "\n",
)
FREE = (  # keys that the models here do not have
    ("prompts", "stage1"), ("prompts", "image"), ("prompts", "a"), ("sampling", "stage1", "temperature"),
    ("sampling", "stage1", "top_k"), ("sampling", "stage2", "guidance_scale"), ("sampling", "image"),
    ("sampling", "image", "token_temperature"), ("trained", "image"), ("trained",), ("converted",),
    ("measured", "a"),
    ("measured",), ("languages",), ("begun",), ("bases",), ("superres",), ("itersr",), ("text",), ("about",),
    ("superres", "grid"), ("words",),
)  # fmt: skip
NAMES = ["-bad", "the hub does not know"]  # what errors name: the model's folder; of a push that is right
MARK = "\ufffc"  # is replaced by JSON that Python does not write
TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "U64",
    "X9",
    "",
)


def _commands(model: str, random: Random) -> list[str]:
    """A command that opens the model."""
    bad = f"{model}-bad"
    some: list[str] = ["--num-frames", "9"] if model == "tiny" else []
    return random.choice((
        ["generate", "a dog runs", "--model", bad, *some, "--seed", "1", "--out", "out/a.png", "--quiet"],
        ["generate", "a dog runs", "--model", bad, *some, "--dtype", "float32", "--out", "out/a.gif",
        "--quiet"],
        ["models", bad],
        ["estimate", bad],
        ["push", bad, "owner/name"],
        ["data", "tokenize", "videos", "--model", bad, "--out", "out/codes", "--quiet"],
        ["data", "check", "videos", "--init", bad, "--out", "out/check", "--quiet"],
        ["train", model, "--init", bad, "--out", "out/run"],
        ["serve", "--models", bad, "--data", "out/data", "--workers", "0", "--port", "8123"],
    ))  # fmt: skip


def keys_of(table: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a table, and of the tables and lists in it."""
    items: Any = ()
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, list):
        items = enumerate(table[:3])
    for key, value in items:
        yield (*path, key)
        yield from keys_of(value, (*path, key))


def config_case(ground: Path, random: Random) -> Case:
    """A config.json with some wrong values, or damaged as a text."""
    model = random.choice(MODELS)
    data = (ground / "models" / model / "config.json").read_bytes()
    file = f"{model}-bad/config.json"
    arguments = _commands(model, random)
    if random.random() < 0.15:
        content = damage("config.json", data, [data], random)
        if isinstance(content, bytes):
            return Case(arguments, NAMES, files={file: content})
    if random.random() < 0.05:
        encoding = random.choice(("utf-8-sig", "utf-16", "utf-32", "utf-7"))
        return Case(arguments, NAMES, files={file: data.decode().encode(encoding)})

    table = json.loads(data)
    table["words"] = table["words"][:20]
    values = {}
    for number in range(random.choice((1, 1, 1, 2, 4))):
        paths = [*keys_of(table)]
        path = random.choice(paths if random.random() < 0.8 else FREE)
        mark = f"{MARK}{number}{MARK}"
        values[mark] = random.choice(VALUES)
        _put(table, path, mark, random)
    text = json.dumps(table, ensure_ascii=False)
    for mark, value in values.items():
        text = text.replace(f'"{mark}"', value)
    if random.random() < 0.03:
        text = text.replace("{", '{"family": "cogvideo", "family": "regression", ', 1)
    return Case(arguments, NAMES, files={file: text.encode()})


def _put(table: Any, path: tuple[Any, ...], mark: str, random: Random) -> None:
    """Replace, remove or rename a value of a table, or add one next to it."""
    for key in path[:-1]:
        if isinstance(table, dict):
            table = table.setdefault(key, {})
        elif isinstance(table, list) and isinstance(key, int) and key < len(table):
            table = table[key]
    last = path[-1]
    way = random.random()
    if isinstance(table, list):
        table.append(mark) if way < 0.3 else table.__setitem__(slice(0, 1), [mark])
    elif isinstance(table, dict):
        if way < 0.8:
            table[last] = mark
        elif way < 0.9:
            table.pop(last, None)
        else:
            table[random.choice(KEYS)] = mark


# -- weights


def tensor_case(ground: Path, random: Random) -> Case:
    """A part of a model whose safetensors file is damaged: its header, its numbers, or any bytes."""
    model = random.choice(MODELS)
    folder = ground / "models" / model
    name = random.choice([path.name for path in sorted(folder.glob("*.safetensors"))])
    data = (folder / name).read_bytes()
    arguments = _commands(model, random)
    wrong = False
    content: bytes | str
    if random.random() < 0.6:
        content, wrong = _change_header(data, random)
        wrong = wrong and arguments[0] == "generate"
    else:
        content = damage(name, data, [data], random)
    if isinstance(content, str):
        content = b""
    file = f"{model}-bad/{name}"
    return Case(arguments, NAMES, wrong, files={file: content})


def _change_header(data: bytes, random: Random) -> tuple[bytes, bool]:
    """Change what the header says, or the numbers; and whether it cannot be used in any case."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    row = header[name]
    begin, end = row["data_offsets"]
    way = random.randrange(14)
    if way == 0:
        length = random.choice((0, 1, 7, 2**31, 2**60, 2**63, 2**64 - 1, size - 1, size + 1, 100_000_001))
        return struct.pack("<Q", length) + data[8:], True
    if way == 1:
        return data[: random.randrange(len(data))], True
    if way == 2:
        row["dtype"] = random.choice(TYPES)
    elif way == 3:
        row["shape"] = random.choice(
            ([], [0], [2**31, 2**31], [1, *row["shape"]], row["shape"][::-1], [-1], [2**62])
        )
    elif way == 4:
        row["data_offsets"] = random.choice(
            ([0, 0], [end, begin], [begin, 2**62], [begin], [-1, 5], ["a", "b"])
        )
    elif way == 5:
        del header[name]
        return _joined(header, body), True
    elif way == 6:
        header[random.choice(("extra", name + ".x", "", "x" * 3000, "\n", name + ":scale"))] = row
    elif way == 7:
        header["__metadata__"] = random.choice(({}, {"a": "b" * 9999}, {"a": 1}, [], "x", {"format": "pt"}))
    elif way == 8:
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    elif way == 9:
        header["x" * 20] = json.loads("[" * 100 + "]" * 100)
    elif row["dtype"] in ("F16", "F32", "BF16") and end > begin:
        width = 4 if row["dtype"] == "F32" else 2
        special = random.choice(
            (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f")
        )
        if row["dtype"] == "F16":
            special = random.choice((b"\xff\xff", b"\x00\x7c", b"\x00\xfc"))
        value = special[-width:]
        count = (end - begin) // width
        chosen = range(count) if way > 11 else [random.randrange(count)]
        for i in chosen:
            body[begin + i * width : begin + (i + 1) * width] = value
        nan = special in (b"\xff\xff\xff\xff", b"\xff\xff")
        return _joined(header, body), nan
    return _joined(header, body), False


def _joined(header: dict[str, Any], body: bytearray) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body)


# -- text models


def text_case(ground: Path, random: Random) -> Case:
    """A text.model that is damaged, or another one than the model's."""
    model = random.choice(MODELS)
    file = f"{model}-bad/text.model"
    data = (ground / "models" / model / "text.model").read_bytes()
    arguments = _commands(model, random)
    if random.random() < 0.2:
        piece = b"\x0a\x07\x0a\x05extra\x15\0\0\0\0"
        return Case(arguments, NAMES, files={file: data + piece * random.choice((1, 300, 5000))})
    content = damage("text.model", data, [data], random)
    if isinstance(content, str):
        content = b""
    return Case(arguments, NAMES, files={file: content})


KINDS: dict[str, Callable[[Path, Random], Case]] = {
    "config": config_case,
    "tensor": tensor_case,
    "text": text_case,
}
