"""From logits to a token: guide, filter, sample. Pure functions; randomness comes in as numbers.

Shapes: B samples, V codes.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from cogvideo.limits import MOST_SEED, check_range
from cogvideo.model.config import STAGES, SamplingConfig


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """How tokens are sampled.

    With `clusters`, codes that look alike: one of the `top_k` likeliest clusters is sampled, then one of its
    codes, at `temperature` times `token_temperature` (docs/reference.md, "Sampling").
    """

    clusters: Tensor | None = field(default=None, repr=False, compare=False)  # [V] the cluster of each code

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SamplingConfig, include_extras=True).items():
            _, limits = get_args(hint)
            check_range(name, getattr(self, name), limits.low, limits.high)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def stages(chosen: Mapping[str, SamplingConfig], clusters: Tensor | None = None) -> dict[str, Sampling]:
    """How each stage samples its tokens, by the options of a model folder."""
    samplings = {}
    for stage in STAGES:
        options = chosen.get(stage, SamplingConfig())
        samplings[stage] = Sampling(**asdict(options), clusters=clusters)
    return samplings


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: logits [2 * B, V], first half with the prompt, second half without, to [B,
    V]."""
    prompted, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, prompted, scale)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Sample a token for each row of logits [B, V]: [B]. `uniform` [B] in [0, 1) decides; temperature 0 takes
    the likeliest."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits / sampling.temperature
    if sampling.clusters is None:
        return _sample_index(torch.softmax(scores, -1), sampling.top_k, uniform)[0]

    labels = sampling.clusters.expand_as(scores)
    probs = torch.softmax(scores, -1)
    mass = probs.new_zeros(len(probs), int(labels.max()) + 1).scatter_add_(-1, labels, probs)
    cluster, rest = _sample_index(mass, sampling.top_k, uniform)
    scores = scores.masked_fill(labels != cluster[:, None], float("-inf")) / sampling.token_temperature
    return _sample_index(torch.softmax(scores, -1), 0, rest)[0]


def _sample_index(mass: Tensor, top_k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample an index for each row of weights [B, n], among the `top_k` largest if that is not 0. Return it
    [B], and a second uniform number [B] that is independent of it, for the next choice."""
    ids = None
    if 0 < top_k < mass.shape[-1]:
        mass, ids = mass.topk(top_k, -1)  # [B, k]
    upto = mass.cumsum(-1)
    threshold = uniform[:, None] * upto[:, -1:]
    rank = (upto <= threshold).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    width = mass.gather(-1, rank)
    rest = (threshold - upto.gather(-1, rank) + width) / width
    index = rank if ids is None else ids.gather(-1, rank)
    return index.squeeze(-1), rest.squeeze(-1).clamp(0, 1 - 1e-6)


def uniforms(seeds: Sequence[int], count: int, stream: int) -> Tensor:
    """Random numbers [B, count], a row from each seed alone, so that a sample does not depend on its batch.

    `stream` tells apart the numbers that one seed gives to different uses.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
        rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def new_seeds(seed: int | None, count: int) -> list[int]:
    """`count` seeds from `seed` on, or from a random one."""
    if seed is None:
        seed = secrets.randbelow(MOST_SEED - count)
    if not 0 <= seed <= MOST_SEED - count + 1:
        raise ValueError(f"seed {seed} is out of range; choose one from 0 to {MOST_SEED - count + 1}")
    return list(range(seed, seed + count))
