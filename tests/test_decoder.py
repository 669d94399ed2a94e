"""The video decoder: nothing new at first, then a look at neighbours and words, and no further."""

import dataclasses

import pytest
import torch
from conftest import loosen

from cogvideo import CogVideo
from cogvideo.model import presets
from cogvideo.model.decoder import VideoDecoder
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE

NANO = presets.find("nano")
MIXERS = 5  # residual blocks of the nano decoder, each followed by a look one frame ahead and back


@pytest.fixture
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(NANO.vqvae).eval()


@pytest.fixture
def decoder(vqvae: VQVAE) -> VideoDecoder:
    torch.manual_seed(1)
    decoder = VideoDecoder(NANO.vqvae, NANO.decoder).eval()
    decoder.inherit(vqvae)
    return decoder


def example(clips: int = 1, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(clips, frames, NANO.vqvae.code_width, 4, 4, generator=generator)
    return z, torch.randint(70, 500, (clips, 8), generator=generator)


def test_it_starts_as_the_tokenizers_decoder(vqvae, decoder):
    z, text = example()
    assert (decoder(z, text)[0] - vqvae.rebuild(z[0])).abs().max() < 1e-5


def test_a_frame_depends_on_its_neighbours_as_far_as_there_are_mixers(decoder):
    loosen(decoder, torch.Generator().manual_seed(3))
    frames = 2 * MIXERS + 5
    z, text = example(frames=frames)
    z.requires_grad_()
    middle = frames // 2
    decoder(z, text)[0, middle].sum().backward()
    reached = (z.grad[0].abs().sum((1, 2, 3)) > 0).nonzero().flatten().tolist()
    assert reached == list(range(middle - MIXERS, middle + MIXERS + 1))


def test_words_count_and_padding_does_not(decoder):
    loosen(decoder, torch.Generator().manual_seed(3))
    z, text = example()
    other = text.clone()
    other[0, -1] += 1
    padded = torch.cat((torch.full((1, 5), NANO.decoder.pad), text), 1)
    with torch.inference_mode():
        made = decoder(z, text)
        assert (made - decoder(z, other)).abs().max() > 1e-3
        assert (made - decoder(z, padded)).abs().max() < 1e-5


def test_a_clip_alone_equals_one_in_a_batch(decoder):
    loosen(decoder, torch.Generator().manual_seed(3))
    z, text = example(clips=3)
    with torch.inference_mode():
        together = decoder(z, text)
        for i in range(3):
            assert (decoder(z[i : i + 1], text[i : i + 1])[0] - together[i]).abs().max() < 1e-5


def test_the_pipeline_decodes_by_it_with_the_prompt(nano):
    """And frame by frame where the model has none: the same codes, other pictures."""
    pipe = CogVideo.from_pretrained(nano, dtype="float32")
    draft = pipe.keyframes(["a dog runs to the right"], [1])
    z = pipe.parts.vqvae.vectors(draft.codes[0])[None]
    expected = pipe.parts.decoder(z, pipe._text("stage1", draft.prompts, 4.0))[0]
    frames = torch.from_numpy(pipe.decode(draft)[0].frames).movedim(-1, 1).float() / 255
    assert (frames - expected.clamp(0, 1)).abs().max() < 0.01
    folder = ModelFolder(nano)
    config = folder.config
    assert "decoder" in folder.postprocessing_parts and config.spec.decoder.pieces == 500
    apart = pipe.parts.vqvae.decode(draft.codes[0])
    assert (apart - expected.clamp(0, 1)).abs().max() > 0.01


def test_the_config_survives_a_round_trip():
    values = NANO.to_dict()
    assert values["decoder"] == dataclasses.asdict(NANO.decoder)
