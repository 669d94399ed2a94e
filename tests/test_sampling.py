import pytest
import torch

from cogvideo.generate.sampling import Sampling, guide, new_seeds, sample, uniforms
from cogvideo.limits import MOST_SEED


@pytest.mark.parametrize("top_k, temperature", [(0, 1.0), (3, 1.0), (3, 0.5), (0, 2.0)])
def test_pick_draws_from_the_filtered_softmax(top_k, temperature):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    count = 40_000
    drawn = sample(
        logits.expand(count, -1), Sampling(temperature, top_k), (torch.arange(count) + 0.5) / count
    )
    kept = logits.topk(top_k or 5).indices
    expected = torch.zeros(5)
    expected[kept] = torch.softmax(logits[kept] / temperature, 0)
    shares = torch.bincount(drawn, minlength=5) / count
    assert (shares - expected).abs().max() < 1e-3


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, Sampling(0.0), torch.tensor([0.99, 0.99])).tolist() == [1, 0]


def test_uniforms_belong_to_their_seed_and_stream():
    together = uniforms([3, 4], 100, 0)
    assert torch.equal(together[1], uniforms([4], 100, 0)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], uniforms([3], 100, 1)[0])
    assert together.min() >= 0 and together.max() < 1


def test_guide_moves_away_from_the_plain_logits():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert guide(logits, 1.0).tolist() == [[2.0, 0.0]]
    assert guide(logits, 3.0).tolist() == [[4.0, 0.0]]


def test_seeds():
    assert new_seeds(7, 3) == [7, 8, 9]
    assert len(set(new_seeds(None, 5))) == 5
    for seed in (-1, MOST_SEED + 1):
        with pytest.raises(ValueError, match="out of range"):
            new_seeds(seed, 1)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="guidance_scale must be from 1 to 1000"):
        Sampling(guidance_scale=0.5)
