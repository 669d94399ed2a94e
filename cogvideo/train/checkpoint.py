"""Save and resume a phase. A run that is killed resumes from its last save as if uninterrupted.

A checkpoint holds the step, the parts that learn, and the optimizers' state. The data needs no state: sample
k is a function of the seed and k, and so is the randomness of step k. It is one of two things in the phase's
folder, and a run with any number of processes, in any mesh, resumes from either:

    state.pt          of processes that each hold all weights
    shards/STEP/      of a mesh: each process writes its own shards while training continues
                      (torch.distributed.checkpoint); complete when its .metadata is there
"""

import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor

from cogvideo.files import DAMAGE_ERRORS, atomic_path
from cogvideo.model.folder import FORMER, ModelFolder, Piece
from cogvideo.train.muon import gather_momentum
from cogvideo.train.optim import set_learning_rate
from cogvideo.train.parallel import whole
from cogvideo.train.peers import Distributed
from cogvideo.train.slices import THIRDS, split_names

Flat = dict[str, Tensor]  # by name: parts/PART/KEY, optimizer/PARAMETER/KEY
Optimizers = list[torch.optim.Optimizer]

WRAPPER = "_checkpoint_wrapped_module."  # in the names of recomputed blocks


class Checkpoint:
    """What a phase saves and resumes from, as one of its processes sees it."""

    def __init__(
        self, folder: Path, parts: dict[str, nn.Module], optimizers: Optimizers, distributed: Distributed
    ):
        self.folder = folder
        self.parts = parts
        self.optimizers = optimizers
        self.distributed = distributed
        self._writing: Future[Any] | None = None  # the shards that are being written
        self._group = None  # its messages do not meet those of training
        if distributed.mesh is not None:
            self._group = dist.new_group(backend="gloo")

    # -- save

    def save(self, step: int) -> None:
        """Write a checkpoint; all processes call this. Shards are copied, and written in the background."""
        gather_momentum(self.optimizers, self.distributed)
        if self.distributed.mesh is not None:
            self._save_shards(step)
        elif self.distributed.first:
            self._save_file(step)

    def close(self) -> None:
        """Wait until the last checkpoint is complete; all processes call this."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except CheckpointException as error:
            raise OSError(f"cannot write {self.folder / 'shards'}: {_reason(error)}") from None
        self._writing = None
        if self.distributed.first:
            newest = max(_complete(self.folder))
            for other in newest.parent.iterdir():
                if other != newest:
                    shutil.rmtree(other)
            (self.folder / "state.pt").unlink(missing_ok=True)

    def _save_shards(self, step: int) -> None:
        self.close()
        target = self.folder / "shards" / f"{step:07d}"
        if self.distributed.first and target.exists():  # of a run that was killed while it wrote
            shutil.rmtree(target)
        dist.barrier(self._group)
        values = {**self._flat(), "step": torch.tensor(step)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = async_save(values, checkpoint_id=target, process_group=self._group)
        assert isinstance(written, Future)
        self._writing = written

    def _save_file(self, step: int) -> None:
        flat = {name: value.cpu() for name, value in self._flat().items()}
        target = self.folder / "state.pt"
        with atomic_path(target) as file, file.open("wb") as stream:
            try:
                torch.save({"step": step, "tensors": flat}, stream)
            except RuntimeError as error:  # of torch's own writer, which keeps the reason to itself
                free = shutil.disk_usage(self.folder).free
                raise OSError(
                    f"cannot write {target}: the disk is full ({free / 1e6:.0f} MB are free)"
                ) from error
        shutil.rmtree(self.folder / "shards", ignore_errors=True)

    # -- resume

    def resume(self) -> int:
        """Load the checkpoint into parts and optimizers, if there is one; return the next step. Every process
        reads what it holds. ValueError if the checkpoint is damaged or belongs to another optimizer."""
        place = find(self.folder)
        if place is None:
            return 0
        for optimizer in self.optimizers:
            _fill_empty(optimizer)
        stored = read(place)
        if "optimizers" in stored:
            stored |= self._name(stored["optimizers"])
        flat = _split_as(stored, self._flat())
        if missing := [name for name in flat if name not in stored]:
            raise ValueError(
                f"{place} belongs to another optimizer or model: it has no {missing[0]}; delete it to begin "
                f"this phase again"
            )
        if place.is_dir():
            self._load_shards(place, flat)
        else:
            for name, value in flat.items():
                if stored[name].shape != value.shape:
                    raise ValueError(
                        f"{place} is of a model of other sizes: {name}; delete it to begin again"
                    )
                value.copy_(_like(stored[name], value))
        return int(stored["step"])

    def _load_shards(self, place: Path, flat: Flat) -> None:
        try:
            if self.distributed.mesh is None:  # then every process reads everything
                _load_alone(flat, place)
            else:
                load(flat, checkpoint_id=place, process_group=self._group)
        except CheckpointException as error:
            raise ValueError(
                f"{place} is damaged ({_reason(error)}); delete it to begin this phase again"
            ) from None

    def _flat(self) -> Flat:
        """All tensors of a checkpoint, as they are in memory."""
        flat: Flat = {}
        for part, module in self.parts.items():
            for key, value in module.state_dict().items():
                flat[f"parts/{part}/{key}"] = value.detach()
        names = self._names()
        for optimizer in self.optimizers:
            for p, row in optimizer.state.items():
                for key, value in row.items():
                    flat[f"optimizer/{names[p]}/{key}"] = value
        return flat

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter."""
        names: dict[Tensor, str] = {}
        for part, module in self.parts.items():
            for key, p in module.named_parameters():
                names[p] = f"{part}/{key.replace(WRAPPER, '')}"
        return names

    def _name(self, numbered: list[dict[str, Any]]) -> Flat:
        """The optimizers' state of a version before 0.2, which numbered the parameters."""
        if self.distributed.mesh is not None or len(numbered) != len(self.optimizers):
            raise ValueError(
                f"{self.folder} was saved by a version before 0.2; resume it without --mesh and --shard, and "
                f"with the same optimizer, until the next save"
            )
        names = self._names()
        flat: Flat = {}
        for optimizer, saved in zip(self.optimizers, numbered):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for number, row in saved["state"].items():
                for key, value in row.items():
                    flat[f"optimizer/{names[params[number]]}/{key}"] = value
        return flat


def _fill_empty(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that it makes in its first step, by a step of size 0."""
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    set_learning_rate([optimizer], 0.0)
    optimizer.step()
    optimizer.zero_grad()


def _split_as(stored: dict[str, Any], flat: Flat) -> Flat:
    """The same memory, but projections as three tensors where only these are stored."""
    split: Flat = {}
    for name, value in flat.items():
        if name not in stored and any(third in stored for third in split_names(name)):
            split |= _thirds(name, value)
        else:
            split[name] = value
    return split


def _thirds(name: str, value: Tensor) -> Flat:
    if value.ndim == 0:  # the count of steps, which all thirds share
        return dict.fromkeys(split_names(name), value)
    return dict(zip(split_names(name), value.chunk(3)))


def _like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut like `like`; scalars, such as a count of steps, stay whole."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# -- what is stored


def find(folder: Path) -> Path | None:
    """The last complete checkpoint of a phase's folder: a file, or a folder of shards."""
    shards = max(_complete(folder), default=None)
    file = folder / "state.pt"
    if not file.exists():
        return shards
    if shards is not None and shards.stat().st_mtime > file.stat().st_mtime:
        return shards
    return file


def _complete(folder: Path) -> Iterator[Path]:
    for metadata in (folder / "shards").glob("*/.metadata"):
        yield metadata.parent


def read(place: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name: its step, and tensors; of shards their descriptions. A projection in
    a file is there as one tensor and as three. ValueError if the checkpoint is damaged."""
    return _read_shards(place) if place.is_dir() else _read_file(place)


def _read_shards(place: Path) -> dict[str, Any]:
    step = {"step": torch.tensor(0)}
    try:
        described = FileSystemReader(place).read_metadata().state_dict_metadata
        _load_alone(step, place)
    except (CheckpointException, UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{place} is damaged ({_reason(error)}); delete it to begin again") from None
    return {**described, "step": int(step["step"])}


def _read_file(place: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
        _check_state(state)
    except DAMAGE_ERRORS as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{place} is damaged ({reason}); delete it to begin this phase again") from None
    stored: dict[str, Any] = {"step": state["step"]}
    if "tensors" not in state:  # of a version before 0.2
        stored["optimizers"] = state["optimizers"]
        now = {former: name for name, former in FORMER.items()}
        state["tensors"] = {}
        for part, values in state["parts"].items():
            for key, value in values.items():
                state["tensors"][f"parts/{now.get(part, part)}/{key}"] = value
    for name, value in state["tensors"].items():
        stored[name] = value
        if split_names(name):
            stored |= _thirds(name, value)
    return stored


def _check_state(state: object) -> None:
    """Raise ValueError unless a file holds what `Checkpoint` or a version before 0.2 writes."""
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or state["step"] < 0:
        raise ValueError("it has no step")
    if "tensors" not in state:
        if not isinstance(state.get("parts"), dict) or not isinstance(state.get("optimizers"), list):
            raise ValueError("it has no parts")
        return
    tensors = state["tensors"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("it holds no tensors")


def read_part(place: Path, part: str, module: nn.Module) -> None:
    """Load a part of a checkpoint into a module of the same sizes."""
    stored = read(place)
    flat = {f"parts/{part}/{key}": value for key, value in module.state_dict().items()}
    flat = _split_as(stored, flat)
    if place.is_dir():
        _load_alone(flat, place)
        return
    for name, value in flat.items():
        if name not in stored or stored[name].shape != value.shape:
            raise ValueError(f"{place} is of another model: {name} does not fit")
        value.copy_(stored[name])


def _load_alone(flat: Flat, place: Path) -> None:
    """Fill tensors from a folder of shards, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is no distributed load
        load(flat, checkpoint_id=place, no_dist=True)


def _reason(error: BaseException) -> str:
    """The first cause in a failure of torch.distributed.checkpoint, which lists one a process."""
    failures = getattr(error, "failures", {})
    causes = [failure[0] if isinstance(failure, tuple) else failure for failure in failures.values()]
    return str(causes[0] if causes else error).splitlines()[0]


# -- export


def export(folder: ModelFolder, part: str, module: nn.Module, distributed: Distributed) -> None:
    """Write a part into a model folder; all processes call this. Of a mesh, one tensor at a time is gathered,
    and written before the next."""
    if distributed.mesh is None:
        if distributed.first:
            folder.save(part, module)
        return
    pieces = {name: _piece(values) for name, values in _joined(module.state_dict()).items()}
    if distributed.first:
        folder.write(part, pieces)
    else:
        for name in folder.order(pieces):
            pieces[name].build()


def _joined(state: Flat) -> dict[str, list[Tensor]]:
    """The tensors that each tensor of the model folder is put together from."""
    joined: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        head, _, kind = name.rpartition(".")
        head, _, third = head.rpartition(".")
        split = head.endswith("qkv") and third in THIRDS
        joined.setdefault(f"{head}.{kind}" if split else name, []).append(value)
    return joined


def _piece(values: list[Tensor]) -> Piece:
    """What is built from some tensors, one above the other."""
    shape = values[0].shape
    if len(values) > 1:
        shape = torch.Size((sum(len(value) for value in values), *shape[1:]))

    def build() -> Tensor:
        gathered = [whole(value.detach()).cpu() for value in values]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    return Piece(shape, values[0].dtype, build)
