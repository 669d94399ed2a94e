"""Optimizers, and the learning rate of each step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cogvideo.hardware import has_fast_bfloat16

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("trapezoid", "cosine")
SETTLING_STEPS = 100  # the first of "cosine"


_TorchMuon: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, decay: float, schedule: str = "trapezoid"
) -> float:
    """The learning rate of a step, counted from 0.

    "trapezoid": rise linearly over `warmup` steps, stay at the peak, and fall linearly to 0 over the last
    `decay` share of the steps.

    "cosine": the schedule of the released models (docs/reference.md, "Learning rate"). 100 steps at a
    twentieth of the peak let the optimizer's averages settle on inherited weights. The linear rise follows,
    at the value it would have reached by then, and half a cosine down to a tenth of the peak.
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    if schedule == "trapezoid":
        return peak * rise * min(1.0, (steps - step) / max(decay * steps, 1))
    if step < SETTLING_STEPS:
        return peak / 20
    progress = min(max(step + 1 - warmup, 0) / steps, 1.0)
    return peak * rise * (1 + 9 * (1 + math.cos(math.pi * progress)) / 2) / 10


def check_optimizer(name: str) -> None:
    """Raise ValueError unless this torch has an optimizer of this name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"the optimizer 'muon' needs torch 2.9 or later, here is {torch.__version__}; choose 'adamw'"
        )


def optimizers(
    model: nn.Module, name: str, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Optimizers of everything in `model` that requires gradients; `set_learning_rate` sets the rate.

    "adamw" updates all; "muon" gives hidden matrices to `Muon` (torch 2.9 or later), with
    updates as large as AdamW's, and the rest to AdamW. Only matrices decay.
    """
    check_optimizer(name)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    hidden = []
    decayed = []
    plain = []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            plain.append(p)
        elif name == "muon" and p.ndim == 2 and id(p) not in tables:
            hidden.append(p)
        else:
            decayed.append(p)
    groups: list[dict[str, Any]] = []
    for group in by_mesh(decayed):
        groups.append({"params": group, "weight_decay": weight_decay})
    for group in by_mesh(plain):
        groups.append({"params": group, "weight_decay": 0.0})
    fused = all(p.is_cuda for p in decayed + plain)
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=betas, fused=fused)
    if not hidden:
        return [adamw]
    muon = Muon(hidden, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def by_mesh(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Weights that are cut over the same mesh, together: torch updates no others in one call."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in weights:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return list(groups.values())


class Muon(_TorchMuon):  # type: ignore[misc]
    """`torch.optim.Muon`, but that a CPU without bfloat16 iterates in float32: emulated it takes sixty times
    as long."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if all(has_fast_bfloat16(p.device) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
        average = state["momentum_buffer"]
        average.lerp_(p.grad, 1 - group["momentum"])
        direction = p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        direction = orthogonalise(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])  # match_rms_adamw


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix [a, b] with its singular values near 1, by Newton-Schulz iteration, in its own dtype."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
