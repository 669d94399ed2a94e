"""A scene as a sentence, in English or Chinese, that says only what is drawn; `words.json` has phrases."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from cogvideo.data.tinyworld.cast import table
from cogvideo.data.tinyworld.places import LAND
from cogvideo.data.tinyworld.scene import CROSSING, Scene

_AIRY = (
    "fly",
    "float",
    "drift",
    "soar",
    "glide",
    "hover",
    "flutter",
    "swoop",
    "buzz",
    "streak",
    "shoot",
    "sweep",
)


@lru_cache(1)
def _words() -> dict:
    """Phrases. In those for motions V stands for a verb, S for right or left, W for up or down, R rests."""
    return json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))


def names_of(sprite: str, language: str = "en") -> tuple[str, ...]:
    """The name of a sprite and its synonyms, as captions use them; `language` is "en" or "zh"."""
    row = table()[sprite]
    if language == "zh":
        return (row["zh"], *row["synonyms_zh"])
    return (sprite, *(s for s in row["synonyms_en"] if s not in _words()["synonyms left out"]))


def plain_caption(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """One of a few sentences that say what is drawn, as the first models were trained with, in "en" or
    "zh"."""
    names = names_of(scene.sprite, language)
    name = names[0] if rng.random() < 0.6 else _pick(rng, names[1:])
    verb = _pick(rng, verbs_of(scene))
    phrases = phrases_of(scene, language)
    if scene.motion == "bounces" and not scene.stands:  # nothing hops or jumps in the air
        phrases = [p for p in phrases if "bounce" in p or "上" in p]
    there = _where(scene, rng, language)
    say = _english if language == "en" else _chinese
    return say(scene, rng, name, verb, _pick(rng, phrases), there)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def phrases_of(scene: Scene, language: str) -> list[str]:
    """Phrases for the motion; capital letters stand for words, see `_words`."""
    return _words()["motions"][scene.motion][language]


def places_of(scene: Scene, language: str) -> dict[str, list[str]]:
    """Phrases for the place: standing, crossing, flying, swimming."""
    return _words()["places"][scene.place][language]


def _where(scene: Scene, rng: np.random.Generator, language: str) -> str:
    phrases = places_of(scene, language)
    manner = "standing" if scene.stands else "flying"
    if manner == "standing" and scene.place == "sea" and table()[scene.sprite]["kind"] == "sea animal":
        manner = "swimming"
    crosses = scene.motion in CROSSING and (scene.stands or scene.place not in LAND)
    if crosses and "crossing" in phrases and rng.random() < 0.5:
        manner = "crossing"
    return _pick(rng, phrases[manner])


def verbs_of(scene: Scene) -> list[str]:
    """The sprite's verbs that are true of the scene: nothing walks in the air or floats on the ground."""
    row, carrying, resting = table()[scene.sprite], _words()["carrying verbs"], _words()["resting verbs"]
    own, motion = row["moves"], scene.motion
    if motion == "stays":
        at_rest = [v for v in own if v in resting]
        return at_rest or ["float" if not scene.stands and row["kind"] not in ("bird", "insect") else "wait"]
    verbs = [v for v in own if v in carrying and (v not in ("hop", "jump") or v == own[0])]
    verbs = [v for v in verbs if v != "fall" and (v != "roll" or row["kind"] == "vehicle")]
    if scene.place == "underwater" or (scene.place == "sea" and scene.stands):
        verbs = [v for v in verbs if v not in ("fly", "run", "walk", "hop", "jump")]
    elif scene.stands:
        verbs = [v for v in verbs if v not in ("swim", "fly", "soar", "hover", "float", "drift")] or ["slide"]
    else:
        verbs = [v for v in verbs if v in _AIRY] or ["fly"]
    if motion == "down":
        verbs = [v for v in verbs if v not in ("soar", "hover")] + ["fall"] * ("fall" in own)
    return verbs + ["move"] * (motion not in ("up", "down") or not verbs)


def inflect(verb: str, form: str) -> str:
    """`form` s: he runs; ing: running. Only the first word of `verb` changes."""
    word, _, rest = verb.partition(" ")
    if form == "s":
        if word[-1] == "y" and word[-2] not in "aeiou":
            word = word[:-1] + "ies"
        else:
            word += "es" if word.endswith(("s", "sh", "ch", "x", "z", "go")) else "s"
    elif word in (
        "run",
        "swim",
        "jog",
        "trot",
        "hop",
        "spin",
        "get",
        "strut",
        "zigzag",
        "chug",
        "bob",
        "drop",
        "set",
    ):
        word += word[-1] + "ing"
    else:
        word = word.removesuffix("e") + "ing"
    return f"{word} {rest}".strip()


def _english(scene: Scene, rng: np.random.Generator, name: str, verb: str, phrase: str, there: str) -> str:
    article = "an" if name[0] in "aeiou" and name != "ewe" else "a"
    who = f"{table()[scene.sprite]['article'] if name == scene.sprite else article} {name}"
    side, way = ("right" if scene.handed > 0 else "left"), ("up" if scene.rising > 0 else "down")
    said = {"V": verb, "S": side, "W": way, "Swards": side + "wards"}
    does = " ".join(said.get(word, word) for word in phrase.split())
    order = rng.random()
    if order < 0.55:
        return f"{who} {inflect(does, 's')} {there}"
    if order < 0.70:
        return f"{there}, {who} {inflect(does, 's')}"
    return f"{who} {'is ' if order < 0.85 else ''}{inflect(does, 'ing')} {there}"


def measure_of(sprite: str, name: str) -> str:
    """The Chinese measure word of a name."""
    return "个" if name[-1] in "头脸" else _words()["measures"].get(name, table()[sprite]["zh_measure"])


def said_in_chinese(scene: Scene, verb: str) -> str:
    """A verb that carries its sprite along, in Chinese."""
    said = _words()["carrying verbs"].get(verb, "移动")
    wet = scene.place == "underwater" or (scene.place == "sea" and scene.stands)
    return said.replace("飘", "漂") if wet else said


def resting_in_chinese(verb: str) -> str:
    return _words()["resting verbs"].get(verb, "停着")


def _chinese(scene: Scene, rng: np.random.Generator, name: str, verb: str, phrase: str, there: str) -> str:
    measure, said = measure_of(scene.sprite, name), said_in_chinese(scene, verb)
    side, way = ("右" if scene.handed > 0 else "左"), ("上" if scene.rising > 0 else "下")
    rest = resting_in_chinese(verb)
    does = phrase.replace("S", side).replace("W", way).replace("V", said).replace("R", rest)
    order, who = rng.random(), f"一{measure}{name}"
    if order < 0.5:
        return f"{who}{there}{does}"
    if order < 0.7:
        return f"{who}正{there}{does}"
    return f"{there[1:] if order < 0.8 else there}，{who}{does}"
