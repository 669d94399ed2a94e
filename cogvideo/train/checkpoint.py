"""Save and resume a phase. A run that is killed goes on from its last save as if nothing had happened.

A checkpoint holds the step, the parts that learn, and the optimizers' state. The data needs nothing: sample k
is a function of the seed and k, and so is the randomness of step k.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideo.weights import replacing


def save(
    path: Path,
    step: int,
    parts: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    extra: dict[str, Any] | None = None,
) -> None:
    state = {
        "step": step,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "extra": extra or {},
    }
    with replacing(path) as file:
        torch.save(state, file)


def resume(path: Path, parts: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> int:
    """Load a checkpoint into parts and optimizers, if there is one; returns the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
