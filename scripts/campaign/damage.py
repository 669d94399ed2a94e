"""Good files become bad ones: cut, flipped, spliced, or changed where their format says something.

`damage` chooses by the extension; the same generator gives the same bytes.
"""

import csv
import io
import json
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Content = bytes | str  # of a file; a str says what is in its place: pipe, device or folder
PLACES = ("pipe", "device", "folder")
EVIL = "/tmp/evil-of-the-campaign"
NAMES = ("../evil", "../../evil", EVIL, "a/../../evil", "C:\\evil", "x" * 400, "", ".", "\0", "é\n")
NUMBERS = (
    "-1",
    "0",
    "1e999",
    "NaN",
    "-Infinity",
    "1e308",
    "9" * 30,
    "9" * 400,
    "9" * 5000,
    "1.5",
    "2147483648",
)
VALUES = (
    *NUMBERS,
    "null",
    "true",
    '""',
    r'"\ud800"',
    r'"\u0000"',
    '"../../evil"',
    '"' + "x" * 9999 + '"',
    "[]",
    "{}",
    "[" * 400 + "]" * 400,
    "[" * 99_999,
    '{"a": ' * 99_999,
)
WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def damage(name: str, data: bytes, others: list[bytes], random: Random) -> Content:
    """A bad version of a file's content. `others` are good files that parts may come from."""
    if random.random() < 0.004:
        return random.choice(PLACES)
    own = KINDS.get(name.rpartition(".")[2])
    if own is not None and random.random() < 0.6:
        return own(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        data = random.choice(BYTES)(data, others, random)
    return data


# -- any bytes


def _cut(data: bytes, others: list[bytes], random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _flip(data: bytes, others: list[bytes], random: Random) -> bytes:
    if not data:
        return data
    at = _place(data, random)
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def _write(data: bytes, others: list[bytes], random: Random) -> bytes:
    """A number that headers may stumble over, of some width and order."""
    width = random.choice((1, 2, 4, 8))
    word = (random.choice(WORDS) % 256**width).to_bytes(width, random.choice(("big", "little")))
    at = _place(data, random)
    return data[:at] + word + data[at + width :]


def _drop(data: bytes, others: list[bytes], random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.randrange(1, 200) :]


def _repeat(data: bytes, others: list[bytes], random: Random) -> bytes:
    at = _place(data, random)
    part = data[at : at + random.randrange(1, 200)]
    return data[:at] + part * random.choice((2, 2, 9, 1000)) + data[at + len(part) :]


def _splice(data: bytes, others: list[bytes], random: Random) -> bytes:
    other = random.choice(others)
    return data[: _place(data, random)] + other[_place(other, random) :]


def _noise(data: bytes, others: list[bytes], random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + random.randbytes(random.choice((1, 4, 64))) + data[at:]


BYTES = (_cut, _flip, _flip, _write, _write, _drop, _repeat, _splice, _noise)


def _place(data: bytes, random: Random) -> int:
    """A position, often near the beginning or the end, where headers are."""
    size = max(1, len(data))
    near = random.randrange(min(size, 600))
    return random.choice((random.randrange(size), near, size - 1 - near))


# -- text


def _json(data: bytes, random: Random) -> bytes:
    """One value of a text of JSON, or of a line of it, becomes another."""
    lines = data.decode().splitlines() if b"\n{" in data else [data.decode()]
    at = random.randrange(len(lines))
    value = json.loads(lines[at])
    places = _places(value)
    holder, key = random.choice(places) if places else ([value], 0)
    mark = "a mark that nothing else has"
    change = random.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder["x" * random.choice((1, 99))] = holder.pop(key)
    elif change == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * random.choice((1, 999)))
    else:
        holder[key] = mark
    lines[at] = json.dumps(value).replace(json.dumps(mark), random.choice(VALUES))
    return "\n".join(lines).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All places in a value of JSON, as what holds them and their key."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found


def _csv(data: bytes, random: Random) -> bytes:
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = random.choice(rows)
    at = random.randrange(len(row))
    row[at] = random.choice((*NAMES, *NUMBERS, "nan", "inf", '"', "a\nb", "y" * 200_000))
    if random.random() < 0.2:
        del row[at]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _toml(data: bytes, random: Random) -> bytes:
    lines = data.decode().splitlines()
    at = random.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    others = (
        "inf",
        "0x" + "f" * 9999,
        "1979-05-27",
        "{a = 1}",
        "'''",
        "[" * 9999,
        "[[1], ['a']]",
        "5e5",
        '"\\ud800"',
    )
    value = random.choice((*VALUES, *others))
    lines[at] = (
        f"{key}= {value}" if equals else random.choice((f"[{value}]", "[sprites]", "[sprites.none]", value))
    )
    return "\n".join(lines).encode()


def _text(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    lines[random.randrange(len(lines))] = random.choice(NAMES).encode() * random.choice((1, 1, 1000))
    return b"\n".join(lines)


# -- pictures


def _png(data: bytes, random: Random) -> bytes:
    """Another size, depth or kind in the header, or another chunk, with a right checksum."""
    chunk = random.choice((b"IHDR", b"IHDR", b"zTXt", b"acTL", b"fcTL", b"gAMA", b"PLTE", b"eXIf", b"iCCP"))
    body = random.randbytes(random.choice((0, 1, 4, 13, 26, 99)))
    if chunk == b"IHDR":
        width, height = (random.choice((0, 1, 9, 9000, 10_000, 65_535, 2**31 - 1)) for _ in "wh")
        body = struct.pack(
            ">IIBBBBB", width, height, random.choice((1, 8, 16)), random.choice((0, 2, 3, 6)), 0, 0, 0
        )
    if chunk == b"zTXt":
        body = b"a\0\0" + zlib.compress(bytes(2**21 * random.randrange(9)))
    whole = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return data[:8] + whole + data[8 + (25 if chunk == b"IHDR" else 0) :]


# -- archives


def _tar(data: bytes, random: Random) -> bytes:
    """A header with another field and a right checksum, or a member that should not be there."""
    if random.random() < 0.5:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            starts = [member.offset for member in tar]
        at = random.choice(starts)
        header = bytearray(data[at : at + 512])
        first, last = random.choice(
            ((0, 100), (100, 108), (124, 136), (124, 136), (156, 157), (157, 257), (345, 500))
        )
        values = (
            b"\x80" + b"\xff" * 11,
            b"77777777777\0",
            b"\xff" * 12,
            b"../../evil\0\0",
            b"x",
            b"g",
            b"L",
            b"S",
            b"1",
            b"2",
        )
        header[first:last] = random.choice(values).ljust(last - first, b"\0")[: last - first]
        header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
        return data[:at] + header + data[at + 512 :]
    out = io.BytesIO(data)
    with tarfile.open(fileobj=out, mode="a") as tar:
        member = tarfile.TarInfo(
            random.choice(NAMES).replace("\0", "0") + random.choice((".txt", ".json", ".mp4"))
        )
        member.type = random.choice(
            (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        )
        member.linkname = random.choice((*NAMES, "a.mp4")).replace("\0", "0")
        if random.random() < 0.3:
            sizes = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.realsize": random.choice(NUMBERS),
            }
            member.pax_headers = random.choice(
                (sizes, {"size": random.choice(NUMBERS)}, {"path": "x" * 9999})
            )
        body = random.choice((b"", b"1\n0\n1\n".ljust(600, b"\0"), *(value.encode() for value in VALUES)))
        member.size = len(body) if member.type == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(body[: member.size]))
    return out.getvalue()


def _zip(data: bytes, random: Random) -> bytes:
    """The same archive compressed otherwise, with another member, and perhaps a flipped byte."""
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            body = old.read(name)
            if random.random() < 0.2:
                body = body[: random.randrange(len(body) + 1)] if body else b"x"
            if random.random() < 0.9:
                new.writestr(name, body)
        if random.random() < 0.3:
            new.writestr(
                random.choice(NAMES).replace("\0", "0") or "x", random.choice((b"7", bytes(9_000_000)))
            )
    made = out.getvalue()
    return _flip(made, [], random) if random.random() < 0.6 else made


# -- pickles

# ways to call something, as opcodes around a module, a name and an argument
CALLS: tuple[Callable[[str, str, str], bytes], ...] = (
    lambda module, name, word: f"c{module}\n{name}\n(V{word}\ntR.".encode(),  # GLOBAL, REDUCE
    lambda module, name, word: f"(V{word}\ni{module}\n{name}\n.".encode(),  # INST
    lambda module, name, word: f"(c{module}\n{name}\nV{word}\no.".encode(),  # OBJ
    lambda module, name, word: f"\x80\x02c{module}\n{name}\n(V{word}\nt\x81.".encode("latin-1"),  # NEWOBJ
    lambda module, name, word: (
        b"\x80\x04" + _short(module) + _short(name) + b"\x93" + _short(word) + b"\x85R."
    ),
    lambda module, name, word: (
        b"\x80\x04" + _short(module) + _short(name) + b"\x93" + _short(word) + b"\x85}\x92."
    ),
    lambda module, name, word: f"c{module}\n{name}\n(tR(V{word}\ndb.".encode(),  # BUILD
    lambda module, name, word: f"ccopyreg\n_reconstructor\n(c{module}\n{name}\nV{word}\nNtR.".encode(),
    lambda module, name, word: f"cbuiltins\ngetattr\n(c{module}\n__dict__\nV{name}\ntR(V{word}\ntR.".encode(),
    lambda module, name, word: f"\x80\x02\x82\x01(V{word}\ntR.".encode("latin-1"),  # EXT1
    lambda module, name, word: f"P{module}.{name}\n.".encode(),  # PERSID
    lambda module, name, word: b"\x80\x04" + _short(word) + b"Q.",  # BINPERSID
)
TARGETS = (
    ("os", "system", "touch canary"),
    ("posix", "system", "touch canary"),
    ("subprocess", "getoutput", "touch canary"),
    ("builtins", "exec", "open('canary', 'w')"),
    ("builtins", "eval", "open('canary', 'w')"),
    ("__builtin__", "eval", "open('canary', 'w')"),
    ("torch.utils._config_module", "exec", "open('canary', 'w')"),
    ("torch", "load", "canary"),
    ("torch.serialization", "load", "canary"),
    ("torch.hub", "load", "canary"),
    ("pathlib", "Path.touch", "canary"),
    ("numpy", "fromfile", "canary"),
    ("numpy.testing._private.utils", "runstring", "open('canary', 'w')"),
    ("collections", "OrderedDict", "canary"),
    ("torch", "FloatStorage", "canary"),
    ("torch._utils", "_rebuild_tensor_v2", "canary"),
)


def _short(text: str) -> bytes:
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data


def _pickle(data: bytes, random: Random) -> bytes:
    """A checkpoint, as torch's zip or as one pickle, with another pickle inside."""
    if not data.startswith(b"PK"):
        return random.choice(CALLS)(*random.choice(TARGETS))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            if name.endswith("data.pkl"):
                body = _other_pickle(body, random)
            new.writestr(name, body)
    return out.getvalue()


def _other_pickle(data: bytes, random: Random) -> bytes:
    """A call, alone or in front, or the same with another opcode, number or text."""
    change = random.randrange(4)
    if change == 0:
        return random.choice(CALLS)(*random.choice(TARGETS))
    if change == 1:
        return data[:2] + random.choice(CALLS)(*random.choice(TARGETS))[:-1] + b"0" + data[2:]
    operations = [(code.name, argument, at) for code, argument, at in pickletools.genops(data)]
    if change == 2:
        names = [row for row in operations if row[0] in ("GLOBAL", "BINUNICODE", "SHORT_BINUNICODE")]
        name, argument, at = random.choice(names)
        if name == "GLOBAL":
            old = str(argument).replace(" ", "\n", 1).encode()
            module, target, _ = random.choice(TARGETS)
            return data.replace(b"c" + old, f"c{module}\n{target}".encode())
    numbers = [at for name, _, at in operations if name in ("BININT", "BININT1", "BININT2", "LONG1")]
    at = random.choice(numbers or [2])
    code = random.choice(
        b"K\x00 M\x00\x00 J\xff\xff\xff\xff J\xff\xff\xff\x7f \x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f".split(
            b" "
        )
    )
    return data[:at] + code + data[at + {75: 2, 77: 3, 74: 5}.get(data[at], 1) :]


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": _json,
    "jsonl": _json,
    "csv": _csv,
    "toml": _toml,
    "txt": _text,
    "png": _png,
    "tar": _tar,
    "zip": _zip,
    "pt": _pickle,
}
