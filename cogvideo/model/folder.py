"""A model is a folder: `config.json`, one safetensors file a part, `text.model`, and a README (its card).

Nothing is unpickled from a model folder. Parts are built without memory on the meta device and filled
strictly: a missing, unknown or misshapen tensor is an error that names it. Files are written under a
temporary name and renamed, so a folder never holds half a file. A part that is larger than memory is written
and compared piece by piece.
"""

import json
import math
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo.files import atomic_path, check_file, expand_user, read_json, write_json
from cogvideo.model.config import STAGES, ConfigError, SamplingConfig, TrainedPhase, read_table
from cogvideo.model.families import FAMILIES, Spec, read_spec
from cogvideo.model.hub import MODEL_FILES, download, is_hub_id
from cogvideo.text import GPT2Tokenizer, TextTokenizer

SHIPPED = Path(__file__).parent.parent / "models"
SCALE = ":scale"  # ends the names of the scales of a matrix that is stored as int8
FORMER = {"regression": "direct"}  # part and family, as folders and states of 2026 call them
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}  # in safetensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that weights are stored in

M = TypeVar("M", bound=nn.Module)


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the file."""


class Piece(NamedTuple):
    """A tensor of a part that is built when it is written."""

    shape: torch.Size
    dtype: torch.dtype
    build: Callable[[], Tensor]


@dataclass(frozen=True)
class FolderConfig:
    """What config.json holds."""

    spec: Spec  # the family and the sizes of its parts
    preset: str = ""  # the row of the table of models
    recipe: str = ""  # that it is trained by
    about: str = ""  # one sentence, for `cogvideo models`
    text: Literal["sentencepiece", "gpt2"] = "sentencepiece"
    words: tuple[str, ...] = ()  # of the captions of its training; none if they are not known
    languages: tuple[str, ...] = ()  # that prompts must be in; none: any
    prompts: dict[str, str] = field(default_factory=dict)  # by stage: the template of its text
    sampling: dict[str, SamplingConfig] = field(default_factory=dict)  # by stage
    trained: dict[str, TrainedPhase] | None = None  # by phase; None: it was not trained here
    begun: dict[str, str] = field(default_factory=dict)  # what a training run started from
    measured: dict[str, str] = field(default_factory=dict)  # numbers with their units
    converted: dict[str, str] | None = None  # by part, the foreign file that it comes from

    def __post_init__(self) -> None:
        self.spec.check_together()
        for name in ("prompts", "sampling"):
            for stage in getattr(self, name):
                if stage not in STAGES:
                    raise ConfigError(f"unknown key {name}.{stage}; choose from {', '.join(STAGES)}")
        for stage, template in self.prompts.items():
            _check_template(f"prompts.{stage}", template)

    @classmethod
    def read(cls, values: object) -> "FolderConfig":
        """Read a table of JSON; ConfigError names the key that is wrong, and what would be right."""
        if not isinstance(values, dict):
            raise ConfigError("the file holds no table")
        values = renamed(values)
        spec = read_spec(values)
        sizes = {"family", *(field.name for kind in FAMILIES.values() for field in fields(kind))}
        rest = {name: value for name, value in values.items() if name not in sizes}
        return read_table(cls, rest, spec=spec)

    def to_dict(self) -> dict[str, Any]:
        """The table of JSON that `read` reads. Values that say nothing are left out."""
        table: dict[str, Any] = {"preset": self.preset, "recipe": self.recipe}
        table = {name: value for name, value in table.items() if value}
        table |= self.spec.to_dict()
        if self.trained is not None:
            table["trained"] = {name: asdict(row) for name, row in self.trained.items()}
            table["begun"] = self.begun
        table["text"] = self.text
        for name in ("words", "about", "languages", "prompts"):
            if getattr(self, name) or name == "words" and self.trained is not None:
                table[name] = getattr(self, name)
        if self.sampling:
            table["sampling"] = {stage: _changed(options) for stage, options in self.sampling.items()}
        if self.measured:
            table["measured"] = self.measured
        if self.converted is not None:
            table["converted"] = self.converted
        return table


def _check_template(key: str, template: str) -> None:
    """Raise ConfigError unless a template is a text with {prompt} and {seconds}, as in {seconds:.1f}."""
    allowed = {"prompt": "", "seconds": r"(\.\d)?[fg]?"}  # by field, the pattern of its format
    try:
        pieces = list(Formatter().parse(template))
    except ValueError:
        pieces = [("", "", "", "")]
    for _, field_name, form, conversion in pieces:
        if field_name is None:
            continue
        if field_name not in allowed or conversion or not re.fullmatch(allowed[field_name], form or ""):
            raise ConfigError(
                f"{key} must be a text with {{prompt}} and {{seconds}}, as in '{{seconds:.1f}} s: "
                f"{{prompt}}'; got {template[:60]!r}"
            )


def _changed(options: SamplingConfig) -> dict[str, float]:
    """The options that are not the defaults."""
    default = asdict(SamplingConfig())
    return {name: value for name, value in asdict(options).items() if value != default[name]}


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose family and parts have their present names."""
    now = {former: name for name, former in FORMER.items()}
    config = {now.get(key, key): value for key, value in config.items()}
    family = config.get("family")
    if isinstance(family, str):
        config["family"] = now.get(family, family)
    trained = config.get("trained")
    if isinstance(trained, dict):
        config["trained"] = {name: _renamed_row(row, now) for name, row in trained.items()}
    return config


def _renamed_row(row: object, now: dict[str, str]) -> object:
    if not isinstance(row, dict) or not isinstance(row.get("parts"), list):
        return row
    parts = [now.get(part, part) if isinstance(part, str) else part for part in row["parts"]]
    return {**row, "parts": parts}


class ModelFolder:
    """A model folder on disk, read part by part."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def config(self) -> FolderConfig:
        """What config.json says; ModelError names the file and the key that is wrong."""
        file = self.path / "config.json"
        try:
            values = read_json(file, any_number=True)
        except FileNotFoundError:
            raise ModelError(f"{self.path} is not a model folder: {file.name} is missing") from None
        except (ValueError, OSError) as error:
            raise ModelError(f"{file} is damaged: {error}") from None
        try:
            return FolderConfig.read(values)
        except ConfigError as error:
            raise ModelError(f"{file} does not describe a model: {error}") from None

    def spec(self) -> Spec:
        """The parts of the model and their sizes."""
        return self.config.spec

    def check(self, parts: Iterable[str]) -> None:
        """Raise ModelError unless the files of these parts exist and are complete. Only headers are read."""
        for file in map(self.file, parts):
            try:
                with safe_open(file, "pt"):
                    pass
            except FileNotFoundError:
                raise ModelError(f"{self.path} is incomplete: {file.name} is missing") from None
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is damaged: {error}") from None

    def version(self) -> list[tuple[str, int, int]]:
        """Fingerprint: path, size and modification time of its files."""
        kinds = (".safetensors", ".model", ".npy")
        files = sorted(file for file in self.path.resolve().iterdir() if file.suffix in kinds)
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    @property
    def postprocessing_parts(self) -> list[str]:
        """The parts that enlarge or improve a generated clip, except parts not trained yet."""
        trained = self.config.trained
        done = {part for row in (trained or {}).values() for part in row.parts}
        return [
            part
            for part in self.spec().postprocessing_parts
            if trained is None or part in done or self.has(part)
        ]

    def has(self, part: str) -> bool:
        return self.file(part).exists()

    def file(self, part: str) -> Path:
        """The file of a part; in a folder of 2026 or before, of its former name."""
        file = self.path / f"{part}.safetensors"
        former = self.path / f"{FORMER.get(part, part)}.safetensors"
        return former if former.exists() and not file.exists() else file

    def load(
        self, part: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> nn.Module:
        """Load a part and convert its floating-point weights to `dtype`; ModelError names a tensor with a
        number that is not finite. None keeps the stored dtypes, and on a CPU the weights are lazily
        memory-mapped, and so not looked at (`check_finite`)."""
        module = self.outline(part)
        try:
            state = load_file(self.file(part), device=str(device))
        except FileNotFoundError:
            raise ModelError(f"{self.path} is incomplete: {self.file(part).name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.file(part)} is damaged: {error}") from None
        restore_rounded(state)
        misfit = _misfit(module.state_dict(), state)
        if misfit:
            raise ModelError(f"{self.file(part)} does not fit {self.path / 'config.json'}: {misfit}")
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            self._check_weights(part, state.items())
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def check_finite(self, numbers: Tensor, parts: Iterable[str]) -> None:
        """Raise ModelError if one of the numbers that these parts computed is NaN or infinite; it names the
        tensor that is to blame. To look at results costs less than to look at all weights."""
        if math.isfinite(float(numbers.sum())):
            return
        for part in parts:
            with safe_open(self.file(part), "pt") as stored:
                names = stored.keys()
                self._check_weights(part, ((name, stored.get_tensor(name)) for name in names))
        raise ModelError(f"{self.path} computes numbers that are not finite; choose --dtype float32")

    def _check_weights(self, part: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ModelError(f"{self.file(part)} is damaged: {name} holds numbers that are not finite")

    def outline(self, part: str) -> nn.Module:
        """Build a part without memory; ModelError if its sizes do not fit together."""
        spec = self.spec()
        if part not in spec.parts:
            raise ModelError(f"{self.path} has no {part}; its parts are {', '.join(spec.parts)}")
        try:
            module: nn.Module = spec.outline(part)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            file = self.path / "config.json"
            raise ModelError(f"{file} does not describe a model: {part}: {error}") from None
        return module

    def load_as(
        self,
        kind: type[M],
        part: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> M:
        """As `load`, for a part of a known class."""
        module = self.load(part, device, dtype)
        assert isinstance(module, kind), f"{part} is a {type(module).__name__}, not a {kind.__name__}"
        return module

    def text(self) -> TextTokenizer:
        if self.config.text == "gpt2":
            return GPT2Tokenizer()
        file = self.path / "text.model"
        try:
            check_file(file)
            text = TextTokenizer.load(file, self.spec().first_text)
        except FileNotFoundError:
            raise ModelError(f"{self.path} is incomplete: {file.name} is missing") from None
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{file} is damaged: {error}") from None
        room = self.spec().text_config.vocab - text.first_id
        if len(text) > room:
            raise ModelError(
                f"{file} does not fit {self.path / 'config.json'}: it has {len(text)} pieces, and the vocab "
                f"has room for {room}"
            )
        return text

    # -- writing

    def write_config(self, config: FolderConfig) -> None:
        write_json(self.path / "config.json", config.to_dict())

    def write_text(self, model: bytes) -> None:
        with atomic_path(self.path / "text.model") as file:
            file.write_bytes(model)

    def save(self, part: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Write a part; `dtype` rounds its floating-point weights. int8 rounds the matrices of
        linear layers as `Int8Linear` does, so generation in int8 gives the same result, and those of
        convolutions; the rest becomes float16. The encoder of a tokenizer stays in float16, since rounding it
        further would change codes."""
        state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        if dtype == torch.int8:
            state |= round_matrices(module)
            dtype = torch.float16
        if dtype is not None:
            kept = {k: v for k, v in state.items() if k.endswith(SCALE)}
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()} | kept
        write_state(self.file(part), state)

    def write(self, part: str, pieces: dict[str, Piece]) -> int:
        """Write a part, building one tensor at a time. Return the bytes of all tensors."""
        order = self.order(pieces)
        table = {}
        end = 0
        for name in order:
            shape, dtype, _ = pieces[name]
            begin = end
            end += shape.numel() * dtype.itemsize
            table[name] = {"dtype": TYPES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
        free = shutil.disk_usage(self.path).free
        if end > free:
            raise ModelError(f"{part} needs {end / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
        header = json.dumps(table).encode()
        header += b" " * (-len(header) % 8)
        with atomic_path(self.file(part)) as file, file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                flat = pieces[name].build().detach().contiguous().flatten()
                stream.write(flat.view(torch.uint8).numpy().data)
        return end

    @staticmethod
    def order(pieces: Mapping[str, Piece]) -> list[str]:
        """The order in which a part is written, which keeps its tensors aligned."""
        return sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))

    def differing(self, part: str, pieces: dict[str, Piece]) -> Iterator[str]:
        """Names of the tensors that differ from those of the part on disk."""
        try:
            with safe_open(self.file(part), "pt") as stored:
                for name, piece in pieces.items():
                    if not torch.equal(stored.get_tensor(name), piece.build()):
                        yield name
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.file(part)} is damaged: {error}") from None


def _misfit(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """How stored tensors differ from those that a part has: the first of them; an empty text if they fit."""
    unknown = next((name for name in stored if name not in expected), None)
    if unknown is not None:
        return f"unknown tensor {unknown[:100]!r}"
    for name, tensor in expected.items():
        if name not in stored:
            return f"{name} is missing"
        if stored[name].shape != tensor.shape:
            return f"{name} is {[*stored[name].shape]}, not {[*tensor.shape]}"
        dtype = stored[name].dtype
        if dtype not in FLOATS if tensor.is_floating_point() else dtype != tensor.dtype:
            right = "a floating-point type" if tensor.is_floating_point() else str(tensor.dtype)
            return f"{name} is stored as {dtype}, not as {right}".replace("torch.", "")
    return ""


def round_matrices(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of linear layers and convolutions of a part as int8, and the scales of their outputs."""
    rounded = {}
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.startswith("encoder."):
            weight = layer.weight.detach().cpu().float()
            rows = weight.flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-8) / 127
            rounded[f"{name}.weight"] = (rows / scale[:, None]).round().to(torch.int8).view_as(weight)
            rounded[f"{name}.weight{SCALE}"] = scale
    return rounded


def restore_rounded(state: dict[str, torch.Tensor]) -> None:
    """Bring weights that were stored as int8 back to float32, in place. What does not fit together stays for
    the strict loading to name it."""
    for name in [name for name in state if name.endswith(SCALE)]:
        weight = state.get(name.removesuffix(SCALE))
        if weight is not None and weight.ndim in (2, 4) and state[name].shape == weight.shape[:1]:
            scale = state.pop(name).view(-1, *(1,) * (weight.ndim - 1))
            state[name.removesuffix(SCALE)] = weight.float() * scale


def read_state(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name; ModelError if it cannot be read."""
    try:
        state: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}") from None
    return state


def write_state(file: Path, state: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Store tensors as safetensors, with texts `about` them."""
    with atomic_path(file) as part:
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part, about)
        except SafetensorError as error:  # as the disk is full
            raise OSError(f"cannot write {file}: {error}") from None
        part.chmod(file.parent.stat().st_mode & 0o666)  # as its folder; safetensors lets nobody else read it


def read_about(file: Path) -> dict[str, str]:
    """The texts that are stored with the tensors of a safetensors file; ModelError if it cannot be read."""
    try:
        with safe_open(file, "pt") as stored:
            return dict(stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}") from None


def read_tensor(file: Path, ending: str) -> Tensor | None:
    """The first tensor of a safetensors file whose name has this ending; ModelError if it cannot be read."""
    try:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.endswith(ending):
                    tensor: Tensor = stored.get_tensor(name)
                    return tensor
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read an embedding from {file}: {error}") from None
    return None


def shipped() -> list[str]:
    """Names of the models inside the package."""
    if not SHIPPED.exists():
        return []
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / "config.json").exists())


def find_model(name: str | Path) -> Path:
    """The folder of a model: a shipped name, a folder, or the id of a repository on the hub ("owner/name" or
    "owner/name@revision")."""
    if str(name) in shipped():
        return SHIPPED / str(name)
    path = expand_user(name)
    if path.is_dir():
        return path
    if is_hub_id(name):
        return download(str(name), MODEL_FILES)
    shown = reprlib.repr(str(name))
    missing = f"there is no model folder {shown}" if "/" in str(name) else f"unknown model {shown}"
    raise ModelError(
        f"{missing}; choose one of {', '.join(shipped())}, or give a model folder "
        f"or a hub id (owner/name or owner/name@revision)"
    )


def read_clusters(file: Path, codes: int) -> npt.NDArray[np.int64]:
    """The cluster of each code, int64 [V]; ValueError if the .npy file does not hold that."""
    check_file(file)
    try:
        labels: npt.NDArray[np.int64] = np.load(file, allow_pickle=False)
    except Exception as error:  # of a header in Python: TokenError, MemoryError ...
        raise ValueError(f"{file} is damaged: {error or type(error).__name__}") from None
    if labels.shape != (codes,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"{file} does not give a cluster to each of {codes} codes")
    return labels.astype(np.int64)
