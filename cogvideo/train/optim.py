"""Optimizers, and the learning rate of each step."""

import math

import torch
from torch import nn

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("trapezoid", "cosine")
SETTLING_STEPS = 100  # the first of "cosine"


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

    "adamw" updates all; "muon" gives hidden matrices to `torch.optim.Muon` (torch 2.9 or later), with
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
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = all(p.is_cuda for p in decayed + plain)
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=betas, fused=fused)
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(hidden, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
