"""One table of models. `tiny` and `direct-tiny` are shipped; `cogvideo-9b` has the exact sizes of the
released CogVideo, `direct` is the reference of the regression family."""

from dataclasses import replace

from cogvideo.model.config import SamplingConfig
from cogvideo.model.decoder import DecoderConfig
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.refiner import RefinerConfig
from cogvideo.model.regression import RegressionConfig
from cogvideo.model.superres import SuperResConfig
from cogvideo.model.transformer import TransformerConfig
from cogvideo.model.vqvae import VQVAEConfig

PRESETS: dict[str, Spec] = {
    # layers, width, heads, grid of tokens a frame; codes and text pieces
    "tiny": CogVideoSpec(
        TransformerConfig(
            layers=8,
            width=384,
            heads=6,
            vocab=1024 + 2048,
            codes=1024,
            pad=1024 + 3,
            start=1024 + 4,
            text_len=32,
            grid=16,
            window=4,
            rotary=True,
            qk_norm=True,
            activation="relu2",
            norm="pre",
            zero_init=True,
            skew=2,
        ),
        VQVAEConfig(resolution=192, channels=48, multipliers=(1, 2, 4), codes=1024, code_width=32, patch=3),
        DecoderConfig(pieces=2048, first_text=1024, pad=1024 + 3),
    ),
    # the paper's sizes; its tokenizer has three rates, of which 8 makes 20 x 20 tokens of 160 pixels
    "cogvideo-9b": CogVideoSpec(
        TransformerConfig(
            layers=48,
            width=3072,
            heads=48,
            vocab=150010,
            codes=20000,
            pad=20003,
            start=150000,
            text_len=64,
            grid=20,
            text_positions=512,
            window=10,
            dropout=0.1,
        ),
        VQVAEConfig(
            resolution=160,
            channels=128,
            multipliers=(1, 2, 4),
            encoder_blocks=2,
            codes=20000,
            code_width=256,
            groups=32,
            mean=(0.79093, 0.76271, 0.75340),
            std=(0.30379, 0.32279, 0.32800),
            rates=(4, 8, 16),
            rate=8,
            attended=(4,),
        ),
        superres=SuperResConfig(grid=20, scale=3, text_len=96, pad=0, window=(9, 5), cross=(5, 5)),
    ),
    # captions to frames in one pass; text is GPT-2's
    "direct": RegressionSpec(
        RegressionConfig(layers=32, width=2560, heads=32, vocab=50257, pad=50256),
    ),
    "direct-gpt2": RegressionSpec(  # as wide as the smallest GPT-2, whose embedding it may begin with
        RegressionConfig(layers=12, width=768, heads=12, vocab=50257, pad=50256),
    ),
    "direct-tiny": RegressionSpec(
        RegressionConfig(
            layers=4, width=192, heads=4, vocab=1280, pad=3, text_len=32, resolution=48, patch=8, frames=33
        ),
        RefinerConfig(scale=4, width=64, blocks=6),
    ),
    # for tests: made in a second
    "direct-nano": RegressionSpec(
        RegressionConfig(
            layers=1,
            width=16,
            heads=2,
            vocab=500,
            pad=3,
            text_len=64,
            resolution=16,
            patch=8,
            frames=33,
            refine_width=8,
            refine_blocks=1,
        ),
        RefinerConfig(scale=2, width=8, blocks=1),
    ),
    "nano": CogVideoSpec(
        TransformerConfig(
            layers=2,
            width=32,
            heads=2,
            vocab=64 + 500,
            codes=64,
            pad=64 + 3,
            start=64 + 4,
            text_len=64,
            grid=4,
            window=2,
            rotary=True,
            qk_norm=True,
            activation="relu2",
            norm="pre",
            zero_init=True,
            skew=2,
        ),
        VQVAEConfig(resolution=16, channels=8, multipliers=(1, 2, 2), codes=64, code_width=8, groups=4),
        DecoderConfig(pieces=500, first_text=64, pad=64 + 3, text_len=64, heads=2),
        refiner=RefinerConfig(scale=2, width=8, blocks=1),
    ),
}


RELEASED = SamplingConfig(temperature=1.05, top_k=12, token_temperature=0.89, text_boost=1.4)
SAMPLING: dict[str, dict[str, SamplingConfig]] = {  # where not the defaults (docs/reference.md, "Inference")
    "cogvideo-9b": {
        "image": replace(RELEASED, temperature=1.0, top_k=16),
        "stage1": replace(RELEASED, guidance_scale=3.0),
        "stage2": RELEASED,
        "superres": SamplingConfig(temperature=1.0, top_k=6, token_temperature=0.6),
    },
}


def find(name: str) -> Spec:
    """The spec of a row of the table; ValueError names the rows."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def released() -> CogVideoSpec:
    """The spec of the released CogVideo."""
    spec = PRESETS["cogvideo-9b"]
    assert isinstance(spec, CogVideoSpec)
    return spec
