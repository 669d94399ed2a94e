"""A scene as a sentence, in English or Chinese, that says only what is visible; phrases from `words.json`."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.data.tinyworld.cast import find
from cogvideo.data.tinyworld.own import world_of
from cogvideo.data.tinyworld.places import is_land
from cogvideo.data.tinyworld.scene import CROSSING, Scene

_AIR_VERBS = (
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
_DOUBLED = (  # verbs whose last letter is doubled before -ing
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
)


@lru_cache(1)
def _words() -> dict[str, Any]:
    """Phrases. In those for motions V is a verb, S right or left, W up or down, R a resting verb."""
    words: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
    return words


def known_verbs() -> frozenset[str]:
    """The verbs that captions can use, of movement and of rest."""
    return frozenset((*_words()["carrying verbs"], *_words()["resting verbs"]))


def names_of(sprite: str, language: str = "en") -> tuple[str, ...]:
    """The name of a sprite and its synonyms, as captions use them; `language` is "en" or "zh"."""
    row = find(sprite)
    if language == "zh":
        return (row["zh"], *row["synonyms_zh"])
    excluded = _words()["synonyms left out"]
    return (row["name"], *(name for name in row["synonyms_en"] if name not in excluded))


def plain_caption(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """One of a few sentences about a scene, in "en" or "zh": the captions of the first models."""
    names = names_of(scene.sprite, language)
    name = names[0] if rng.random() < 0.6 or len(names) == 1 else _choose(rng, names[1:])
    verb = _choose(rng, verbs_of(scene))
    phrases = phrases_of(scene, language)
    if scene.motion == "bounces" and not scene.stands:  # nothing hops or jumps in the air
        phrases = [p for p in phrases if "bounce" in p or "上" in p]
    there = _where(scene, rng, language)
    phrase = _choose(rng, phrases)
    say = _english if language == "en" else _chinese
    return say(scene, rng, name, verb, phrase, there)


def _choose(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def phrases_of(scene: Scene, language: str) -> list[str]:
    """Phrases for the motion; capital letters stand for words, see `_words`."""
    phrases: list[str] = _words()["motions"][scene.motion][language]
    return phrases


def places_of(scene: Scene, language: str) -> dict[str, list[str]]:
    """Phrases for the place: standing, crossing, flying, swimming."""
    world = world_of(scene.place)
    if world is not None:
        place = world.backgrounds[scene.place]
        said = [*(place.said if language == "en" else place.said_zh)]
        return {"standing": said, "flying": said}
    phrases: dict[str, list[str]] = _words()["places"][scene.place][language]
    return phrases


def _where(scene: Scene, rng: np.random.Generator, language: str) -> str:
    phrases = places_of(scene, language)
    manner = "standing" if scene.stands else "flying"
    if manner == "standing" and scene.place == "sea" and find(scene.sprite)["kind"] == "sea animal":
        manner = "swimming"
    crosses = scene.motion in CROSSING and (scene.stands or not is_land(scene.place))
    if crosses and "crossing" in phrases and rng.random() < 0.5:
        manner = "crossing"
    return _choose(rng, phrases[manner])


def verbs_of(scene: Scene) -> list[str]:
    """The sprite's verbs that are true of the scene: nothing walks in the air or floats on the ground."""
    row = find(scene.sprite)
    own = row["moves"]
    motion = scene.motion
    if motion == "stays":
        return [v for v in own if v in _words()["resting verbs"]] or [_default_rest(scene)]

    carrying = _words()["carrying verbs"]
    verbs = [v for v in own if v in carrying and (v not in ("hop", "jump") or v == own[0])]
    verbs = [v for v in verbs if v != "fall" and (v != "roll" or row["kind"] == "vehicle")]
    if scene.place == "underwater" or (scene.place == "sea" and scene.stands):
        verbs = [v for v in verbs if v not in ("fly", "run", "walk", "hop", "jump")]
    elif scene.stands:
        verbs = [v for v in verbs if v not in ("swim", "fly", "soar", "hover", "float", "drift")] or ["slide"]
    else:
        verbs = [v for v in verbs if v in _AIR_VERBS] or ["fly"]
    if motion == "down":
        verbs = [v for v in verbs if v not in ("soar", "hover")] + ["fall"] * ("fall" in own)
    return verbs + ["move"] * (motion not in ("up", "down") or not verbs)


def _default_rest(scene: Scene) -> str:
    """The resting verb of a sprite that has none of its own."""
    floats = not scene.stands and find(scene.sprite)["kind"] not in ("bird", "insect")
    return "float" if floats else "wait"


def inflect(verb: str, form: str) -> str:
    """The form "s" (he runs) or "ing" (running) of a verb; only the first word of `verb` changes."""
    word, _, rest = verb.partition(" ")
    if form == "s":
        if word[-1] == "y" and word[-2] not in "aeiou":
            word = word[:-1] + "ies"
        else:
            word += "es" if word.endswith(("s", "sh", "ch", "x", "z", "go")) else "s"
    elif word in _DOUBLED:
        word += word[-1] + "ing"
    else:
        word = word.removesuffix("e") + "ing"
    return f"{word} {rest}".strip()


def _english(scene: Scene, rng: np.random.Generator, name: str, verb: str, phrase: str, there: str) -> str:
    article = article_of(name)
    row = find(scene.sprite)
    if name == row["name"]:
        article = row["article"]
    who = f"{article} {name}"
    side = "right" if scene.handed > 0 else "left"
    way = "up" if scene.rising > 0 else "down"
    letters = {"V": verb, "S": side, "W": way, "Swards": side + "wards"}
    does = " ".join(letters.get(word, word) for word in phrase.split())

    order = rng.random()
    if order < 0.55:
        return f"{who} {inflect(does, 's')} {there}"
    if order < 0.70:
        return f"{there}, {who} {inflect(does, 's')}"
    return f"{who} {'is ' if order < 0.85 else ''}{inflect(does, 'ing')} {there}"


def article_of(name: str) -> str:
    """a or an, as the name sounds: an otter, a unicorn, a UFO."""
    sounds_like_y = name.startswith(("uni", "eu", "ewe", "ute"))
    return "an" if name[0] in "aeiou" and not sounds_like_y else "a"


def measure_of(sprite: str, name: str) -> str:
    """The Chinese measure word of a name."""
    if name[-1] in "头脸":
        return "个"
    return str(_words()["measures"].get(name, find(sprite)["zh_measure"]))


def said_in_chinese(scene: Scene, verb: str) -> str:
    """A verb of movement in Chinese."""
    word = str(_words()["carrying verbs"].get(verb, "移动"))
    wet = scene.place == "underwater" or (scene.place == "sea" and scene.stands)
    return word.replace("飘", "漂") if wet else word


def resting_in_chinese(verb: str) -> str:
    """A verb of rest in Chinese."""
    return str(_words()["resting verbs"].get(verb, "停着"))


def _chinese(scene: Scene, rng: np.random.Generator, name: str, verb: str, phrase: str, there: str) -> str:
    side = "右" if scene.handed > 0 else "左"
    way = "上" if scene.rising > 0 else "下"
    moves = said_in_chinese(scene, verb)
    rests = resting_in_chinese(verb)
    does = phrase.replace("S", side).replace("W", way).replace("V", moves).replace("R", rests)
    who = f"一{measure_of(scene.sprite, name)}{name}"

    order = rng.random()
    if order < 0.5:
        return f"{who}{there}{does}"
    if order < 0.7:
        return f"{who}正{there}{does}"
    return f"{there[1:] if order < 0.8 else there}，{who}{does}"
