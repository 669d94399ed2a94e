"""One thread, and a random `nano` model folder that is made in a second and shared by all tests."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideo import cli
from cogvideo.data.loader import read_captions
from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.model import presets
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import FolderConfig, ModelFolder
from cogvideo.model.superres import SuperResChannel, SuperResConfig
from cogvideo.model.transformer import Base, TemporalChannel
from cogvideo.model.vqvae import VQVAE, HierarchicalVQVAE
from cogvideo.text import split_words, train_text
from cogvideo.train import recipes

torch.set_num_threads(1)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    """Chromium, one for all pages: a second Playwright in the same process answers no intercepted request."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def small_batches(monkeypatch):
    """The recipes, with two clips a step."""
    find = recipes.find

    def small(name: str) -> recipes.Recipe:
        recipe = find(name)
        return replace(recipe, phases=tuple(replace(phase, batch=2) for phase in recipe.phases))

    monkeypatch.setattr("cogvideo.train.recipes.find", small)


@pytest.fixture(scope="session")
def world() -> TinyWorld:
    return TinyWorld(sprites(8), seed=1)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory, world: TinyWorld) -> Path:
    """A model folder of the preset `nano` with random weights that are large enough to make every part
    matter."""
    return make(tmp_path_factory.mktemp("models") / "nano", presets.find("nano"), world)


@pytest.fixture(scope="session")
def nano_large(tmp_path_factory: pytest.TempPathFactory, world: TinyWorld) -> Path:
    """Like `nano`, but built like the released spec: super-resolution of codes, and no refiner."""
    nano = presets.find("nano")
    superres = SuperResConfig(grid=4, scale=2, text_len=64, pad=nano.model.pad, window=(3, 3), cross=(3, 3))
    vqvae = replace(nano.vqvae, resolution=32, rates=(4, 8), rate=8)
    original = replace(
        nano.model, rotary=False, qk_norm=False, activation="gelu", norm="sandwich", zero_init=False
    )
    spec = replace(nano, model=original, vqvae=vqvae, decoder=None, refiner=None, superres=superres)
    return make(tmp_path_factory.mktemp("models") / "nano_large", spec, world)


def make(path: Path, spec: CogVideoSpec, world: TinyWorld) -> Path:
    folder = ModelFolder(path)
    captions = list(read_captions(world, 2000, seed=0))
    words = sorted({word for caption in captions for word in split_words(caption)})
    folder.write_config(FolderConfig(spec, "nano", words=tuple(words)))
    folder.write_text(train_text(captions, 500))
    generator = torch.Generator().manual_seed(0)
    for name in spec.parts:
        part = spec.build(name)
        if isinstance(part, (Base, TemporalChannel, SuperResChannel)):
            part.init_weights(generator)
            loosen(part, generator)
        if isinstance(part, (VQVAE, HierarchicalVQVAE)):
            part.codebook.init_codes(torch.randn(200, spec.vqvae.code_width, generator=generator), generator)
        folder.save(name, part)
    return folder.path


def loosen(module: torch.nn.Module, generator: torch.Generator, by: float = 0.1) -> None:
    """Add noise to all weights, so that biases, gates and norms are not at their neutral values."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))


@pytest.fixture
def complaint(monkeypatch, capsys, tmp_path):
    """Run a command that must fail, in an empty folder; return the line that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cogvideo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        told = capsys.readouterr().err
        assert exit.value.code == 2 and told.count("\n") == 1, told
        assert not list(tmp_path.iterdir())
        return told

    return run
