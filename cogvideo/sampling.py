"""From logits to a token: guide, filter, pick. Pure functions; randomness comes in as numbers.

Shapes: B samples, V codes.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 keeps all; `guidance_scale` 1 is no guidance."""

    temperature: float = 1.0
    top_k: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or self.guidance_scale < 1:
            raise ValueError(
                "temperature and top_k must be 0 or more, guidance_scale 1 or more; "
                f"got {self.temperature}, {self.top_k}, {self.guidance_scale}"
            )


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: logits [2 * B, V], first half with the prompt, second half without, to [B,
    V]."""
    prompted, plain = logits.chunk(2)
    return torch.lerp(plain, prompted, scale)


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw a token for each row of logits [B, V]: [B]. `uniform` [B] in [0, 1) decides; temperature 0 takes
    the likeliest."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k, -1)  # [B, k]
    mass = torch.softmax(logits / sampling.temperature, -1).cumsum(-1)
    rank = (mass < uniform[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    return (rank if ids is None else ids.gather(-1, rank)).squeeze(-1)


def uniforms(seeds: Sequence[int], count: int, stream: int) -> Tensor:
    """Random numbers [B, count], a row from each seed alone, so that a sample does not depend on its batch.

    `stream` tells apart the numbers that one seed gives to different uses.
    """
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63))
        for seed in seeds
    ]
    return torch.stack(rows)


def pick_seeds(seed: int | None, count: int) -> list[int]:
    """`count` seeds from `seed` on, or from a random one."""
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - count)
    if not 0 <= seed <= MAX_SEED - count + 1:
        raise ValueError(f"seed {seed} is out of range; choose one from 0 to {MAX_SEED - count + 1}")
    return list(range(seed, seed + count))
