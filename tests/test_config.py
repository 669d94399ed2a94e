"""config.json is read once, and says which key is wrong: no mutation of it ends anywhere else."""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cogvideo.model import presets
from cogvideo.model.config import ConfigError, SamplingConfig, TrainedPhase
from cogvideo.model.folder import FolderConfig, ModelError, ModelFolder, find_model

WRONG = (0.5, float("nan"), None, [], ["a"], "six", 0, -1, True, 10**12, {}, {"a": 1})
MISSING = object()


def shipped(name: str) -> dict[str, Any]:
    config = json.loads((find_model(name) / "config.json").read_text())
    return config | {"words": config.get("words", [])[:2]}


def described(preset: str) -> dict[str, Any]:
    config = FolderConfig(
        presets.find(preset),
        preset,
        recipe="tiny",
        about="Of a test.",
        words=("dog",),
        languages=("zh",),
        prompts={"stage1": "{seconds:.1f}秒<n>{prompt}"},
        sampling={"stage1": SamplingConfig(guidance_scale=3.0, top_k=12)},
        trained={"image": TrainedPhase(10, 2, ("base",))},
        begun={"init": "tiny"},
        measured={"sprite": "97 %"},
        converted={"base": "a.zip"},
    )
    return json.loads(json.dumps(config.to_dict()))


CONFIGS = {
    "tiny": lambda: shipped("tiny"),
    "direct-tiny": lambda: shipped("direct-tiny"),
    "nano": lambda: described("nano"),
    "cogvideo-9b": lambda: described("cogvideo-9b"),
}


def keys_of(table: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a table, and of the tables and lists in it."""
    items: Any = ()
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, list):
        items = enumerate(table)
    for key, value in items:
        yield (*path, key)
        yield from keys_of(value, (*path, key))


def changed(config: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """The config with one value replaced, or taken out."""
    config = copy.deepcopy(config)
    table: Any = config
    for key in path[:-1]:
        table = table[key]
    if value is MISSING:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_mutation_loads_or_is_refused_by_its_key(name, tmp_path):
    """A wrong value is an error that names the key; an allowed one gives a spec whose parts can be outlined,
    or an error that names the part."""
    config = CONFIGS[name]()
    folder = ModelFolder(tmp_path)
    count = refused = 0
    outlined = {folder_spec(config)}
    begin = time.perf_counter()
    for path in keys_of(config):
        for value in (*WRONG, MISSING):
            mutant = changed(config, path, value)
            if mutant == config:
                continue
            (tmp_path / "config.json").write_text(json.dumps(mutant))
            count += 1
            try:
                spec = folder.spec()
            except ModelError as error:
                refused += 1
                names = [str(key) for key in path if isinstance(key, str)]
                now = {"direct": "regression"}.get(names[-1], names[-1])
                assert now in str(error), f"{path} {value!r}: {error}"
                continue
            if spec not in outlined and count % 3 == 0:  # a third: outlining takes most of the time
                outlined.add(spec)
                for part in spec.parts:
                    try:
                        folder.outline(part)
                    except ModelError as error:
                        assert part in str(error)
    assert count > 300 and refused > 0.7 * count
    assert (time.perf_counter() - begin) / count < 0.05


def folder_spec(config: dict[str, Any]) -> object:
    return FolderConfig.read(config).spec


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_key_is_named(name):
    config = CONFIGS[name]()
    tables = [()] + [path for path in keys_of(config) if isinstance(value_at(config, path), dict)]
    free = ("prompts", "sampling", "trained", "begun", "measured", "converted")  # whose keys are names
    for path in tables:
        if path and path[0] in free and len(path) == 1:
            continue
        with pytest.raises(ConfigError, match="unknown key .*colour"):
            FolderConfig.read(changed(config, (*path, "colour"), 1))


def value_at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_is_written(name):
    config = CONFIGS[name]()
    read = FolderConfig.read(config)
    assert FolderConfig.read(json.loads(json.dumps(read.to_dict()))) == read


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("model", "layers"), "six", r"model.layers must be a whole number; got 'six'"),
        (("model", "layers"), True, r"model.layers must be a whole number; got True"),
        (("model", "layers"), 0, r"model.layers must be from 1 to 1024; got 0"),
        (("model", "heads"), 3, r"model.heads must divide the width 32; got 3"),
        (("model", "activation"), "swish", r"model.activation must be one of gelu, relu2"),
        (("vqvae", "groups"), 5, r"vqvae.groups must divide the channels"),
        (("decoder", "heads"), 3, r"decoder.heads must divide"),
        (("family",), "x", r"unknown family 'x'; choose one of cogvideo, regression"),
        (("sampling", "stage1", "top_k"), -1, r"sampling.stage1.top_k must be from 0"),
        (("sampling", "stage9"), {}, r"unknown key sampling.stage9; choose from image, stage1"),
        (("prompts", "stage1"), "{x}", r"prompts.stage1 must be a text with \{prompt\}"),
        (("trained", "image", "steps"), 0.5, r"trained.image.steps must be a whole number"),
        (("text",), "words", r"text must be one of sentencepiece, gpt2"),
        (("prompts", "stage1"), "{prompt:>2000000000}", r"prompts.stage1 must be a text with"),
        (("prompts", "stage1"), "{prompt.__class__}", r"prompts.stage1 must be a text with"),
        (("prompts", "stage1"), "{prompt", r"prompts.stage1 must be a text with"),
        (("vqvae", "codes"), 32, r"vqvae.codes must equal model.codes, 64; got 32"),
        (("vqvae", "resolution"), 32, r"model.grid must be the codes a side of vqvae, 8 .its resolution"),
    ],
)
def test_messages_say_what_would_be_right(path, value, message):
    with pytest.raises(ConfigError, match=message):
        FolderConfig.read(changed(described("nano"), path, value))


def test_what_ships_is_written_as_it_is():
    """But for the order of its keys."""
    config = shipped("tiny")
    assert json.loads(json.dumps(FolderConfig.read(config).to_dict())) == config


def test_a_number_without_end_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"layers": ' + "9" * 5000 + "}}")
    with pytest.raises(ModelError, match="config.json"):
        ModelFolder(tmp_path).spec()


def test_former_names_are_read():
    config = shipped("direct-tiny")
    assert "direct" in config and config["family"] == "direct"  # as it was written in 2026
    read = FolderConfig.read(config)
    assert read.spec.family == "regression" and read.trained["low"].parts == ("regression",)
    now = replace(read).to_dict()
    assert "direct" not in now and FolderConfig.read(json.loads(json.dumps(now))) == read
