"""How people write: captions of a varied world, 400 phrasings by hand, and prompts read in known words."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from benchmarks.phrasings import load
from cogvideo.data.loader import read_captions
from cogvideo.data.tinyworld import (
    MOTIONS,
    PLACES,
    Scene,
    TinyWorld,
    allowed,
    caption,
    path,
    phrasing,
    sprites,
)
from cogvideo.data.tinyworld.cast import shape
from cogvideo.generate.prompts import Prompts
from cogvideo.text import TextTokenizer, split_words, train_text, without_stops

ALL = sprites()
WORLD = TinyWorld(ALL, 5, held_out=None, even=True, varied=True)
SCENES = [WORLD[i].scene for i in range(1500)]
TIMES = np.arange(33) / 8
SLOW = re.compile("slow|慢|缓")
FAST = re.compile(r"\b(fast|quickly|rapidly|at high speed)\b|飞快|快速|迅速|很快|急速")
SMALL = re.compile(r"\b(small|tiny|little)\b|小小的|很小的|微小的")
BIG = re.compile(r"\b(big|huge|large|giant|enormous)\b|巨大的|很大的|大大的|超大的")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return list(read_captions(TinyWorld(ALL, 1, even=True, varied=True), 8000, 1))


@pytest.fixture(scope="module")
def prompts(captions) -> Prompts:
    words = sorted({word for text in captions for word in split_words(text)})
    return Prompts(TextTokenizer(train_text(captions, 1280), 0), words)


def fold(text: str) -> str:
    return re.sub(r"[\s,，]+", " ", without_stops(text).lower()).strip()


# -- scenes that vary more --


def test_a_varied_world_has_the_same_scenes_where_nothing_is_extreme():
    plain = TinyWorld(ALL, 5, held_out=None, even=True)
    usual = [i for i, scene in enumerate(SCENES) if not scene.bulk and not scene.pace]
    assert 0.6 < len(usual) / len(SCENES) < 0.85
    assert all(plain[i].scene == SCENES[i] for i in usual)
    assert not any(plain[i].scene.bulk or plain[i].scene.pace for i in range(600))


def test_small_big_slow_and_fast_are_each_seen_often_and_stay_in_the_frame():
    kinds = Counter(kind for scene in SCENES for kind in (scene.bulk, scene.pace))
    assert all(0.04 < kinds[kind] / len(SCENES) < 0.11 for kind in ("small", "big", "slow", "fast"))
    for scene in SCENES:
        x, y, size, _, _ = path(scene, TIMES)
        for centre, side in zip((x, y), shape(scene.sprite)):
            assert (centre - size * side / 2).min() > -0.07 and (centre + size * side / 2).max() < 1.07, scene


def test_slow_is_slower_and_fast_is_faster_than_usual():
    """What is covered in a clip, by motion: way, change of size, turns or hops."""

    def covered(scene: Scene) -> float:
        x, y, size, turn, _ = path(scene, np.linspace(0, 4, 401))
        steps = np.hypot(np.diff(x), np.diff(y))
        other = {"spins": abs(turn[-1]), "grows": np.ptp(size), "shrinks": np.ptp(size)}
        return other.get(scene.motion, steps.sum())

    for motion in set(MOTIONS) - {"stays"}:
        some = [scene for scene in SCENES if scene.motion == motion and scene.bulk != "big"]
        found = {pace: [covered(s) for s in some if s.pace == pace] for pace in ("slow", "", "fast")}
        assert all(found.values()), motion
        assert max(found["slow"]) < 0.75 * np.mean(found[""]) < np.mean(found["fast"]) / 1.25, motion


def test_no_sprite_is_rarer_than_a_third_of_the_mean():
    """In an even world few sprites fly and many stay on the ground; none is too rare to be learnt."""
    world = TinyWorld(ALL, 1, even=True, varied=True)
    counts = Counter(world[i].scene.sprite for i in range(6000))
    assert set(counts) == set(ALL) and min(counts.values()) > 6000 / len(ALL) / 3


# -- captions --


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_say_size_and_speed_exactly_where_they_are_unusual(language):
    names = {name for sprite in ALL for name in phrasing.names(sprite, language)}
    for i, scene in enumerate(SCENES):
        text = f" {caption(scene, np.random.default_rng(i), language, varied=True)} "
        assert bool(SMALL.search(text)) == (scene.bulk == "small"), text
        assert bool(BIG.search(text)) == (scene.bulk == "big"), text
        for name in sorted(names & set(phrasing.names(scene.sprite, language)), key=len, reverse=True):
            text = text.replace(f" {name} " if language == "en" else name, " ")
        assert bool(SLOW.search(text)) == (scene.pace == "slow") or "慢跑" in text, text
        assert bool(FAST.search(text)) == (scene.pace == "fast"), text


def test_captions_name_the_thing_and_its_direction():
    for i, scene in enumerate(SCENES):
        english, chinese = (caption(scene, np.random.default_rng(i), lang, True) for lang in ("en", "zh"))
        names = (*phrasing.names(scene.sprite), "person", "man", "woman")
        assert any(name in english for name in names), english
        assert any(name in chinese for name in (*phrasing.names(scene.sprite, "zh"), "人")), chinese
        assert not re.search(r"\b[VSOWCB]\b", english), english
        assert not re.search("[VSOWRPQ]", chinese.replace("UFO", "")), chinese
        if scene.motion in ("right", "left"):
            other = {"right": "left", "left": "right"}[scene.motion]
            assert scene.motion in english and (other not in english or "from" in english), english
            assert {"right": "右", "left": "左"}[scene.motion] in chinese
        assert not re.search(r"\ba [aeiou](?!we\b|uro)", english.lower().replace("a ufo", "")), english


def test_captions_vary_in_article_order_and_length():
    scene = Scene("dog", "right", "field")
    texts = [caption(scene, np.random.default_rng(i), "en", True) for i in range(400)]
    assert len({fold(text) for text in texts}) > 370
    starts = Counter(text.split()[0] for text in texts)
    assert {"a", "the", "one", "there", "across", "dog", "video"} <= set(starts)
    assert any(text.startswith(("there is", "show me")) for text in texts)
    assert {"running", "runs", "run"} <= {word for text in texts for word in text.split()}


def test_captions_fit_into_the_text_of_the_model(captions, prompts):
    lengths = [len(prompts.text.prompt(text, 4.0)) for text in captions]
    assert np.mean(np.array(lengths) > 32) < 0.001 and max(lengths) < 36


# -- the text model --


def test_case_and_full_stops_mean_nothing(prompts):
    ids = prompts.text.prompt("a dog runs to the right", 4.0)
    for same in ("A Dog Runs To The Right.", ' "a dog runs to the right!" ', "a dog runs to the right ..."):
        assert prompts.text.prompt(same, 4.0) == ids
    assert prompts.text.prompt("一只狗向右跑。", 4.0) == prompts.text.prompt("一只狗向右跑", 4.0)
    assert prompts.text.prompt("a dog runs to the left", 4.0) != ids


def test_frequent_words_are_one_piece_and_so_is_each_chinese_character(captions):
    text = TextTokenizer(train_text(captions, 2048), 0)
    for word in ("dog", "penguin", "right", "slowly", "across", "desert"):
        assert len(text.encode(word)) == 1, word
    assert len(text.encode("沙漠里")) <= 4


def test_prompts_are_read_in_words_that_the_model_knows(prompts):
    same = {
        "dogs run right": "dog run right",
        "Two PENGUINS": "Two penguin",
        "butterflies at sunrise": "butterfly at sunset",
        "a crab on the beach": "a crab on the sand",
        "please show me a dog": "show me a dog",
        "一只螃蟹在沙滩上": "一只螃蟹在沙地上",
    }
    for said, read in same.items():
        assert prompts.read(said) == read
    assert prompts.unknown_words("Dogs and butterflies").keys() <= {"and"}
    assert Prompts(prompts.text).read("dogs on the beach") == "dogs on the beach"  # of models without a list
    row = {"length": 32, "seconds": 4.0, "template": "{seconds:.1f}秒<n>{prompt}"}
    assert prompts.ids(["Dogs run right."], **row) == prompts.ids(["dog run right"], **row)


def test_hints_name_sensible_words(prompts):
    assert prompts.unknown_words("a wolf runs") == {"wolf": ["dog"]}
    assert "lake" in prompts.unknown_words("a swan on the lake")
    assert prompts.unknown_words("a penguinn")["penguinn"][0] == "penguin"
    (hint,) = prompts.hints(["a crab on the beach"])
    assert "read as 'sand'" in hint


# -- the phrasings --


def test_phrasings_cover_the_world():
    for language in ("en", "zh"):
        some = [p for p in load() if p.language == language]
        assert len(some) == len({fold(p.text) for p in some}) == 200
        assert len({p.sprite for p in some}) >= 90
        assert {p.motion for p in some} == set(MOTIONS) and {p.place for p in some} == set(PLACES)
        assert {p.size for p in some} == {"", "small", "big"}
        assert {p.speed for p in some} == {"", "slow", "fast"}
        assert {p.text.isascii() for p in some} == {language == "en"}
    triples = [(p.sprite, p.motion, p.place) for p in load()]
    assert all(allowed(*triple) for triple in triples)
    assert 0.4 < np.mean([Scene(*triple).held_out for triple in triples]) < 0.6
    assert all(triple in set(product(ALL, MOTIONS, PLACES)) for triple in triples)


def test_no_caption_is_a_phrasing_word_for_word(monkeypatch):
    """Captions of the scene of each phrasing, drawn by choosing phrases that the phrasing has where there are
    any: what could be equal is found soon."""
    pick = phrasing._choose
    for i, one in enumerate(load()):
        target = fold(one.text)

        def likely(rng, choices, target=target, english=one.language == "en"):
            def parts(text: str) -> list[str]:
                words = text.lower().split() if english else re.split("[A-Z]", text)
                return [word for word in words if not english or (len(word) > 1 and word != "swards")]

            return pick(rng, [c for c in choices if all(part in target for part in parts(c))] or choices)

        monkeypatch.setattr(phrasing, "_choose", likely)
        scene, rng = one.scene(i), np.random.default_rng(i)
        said = {fold(caption(scene, rng, one.language, varied=True)) for _ in range(40)}
        assert target not in said, one.text
