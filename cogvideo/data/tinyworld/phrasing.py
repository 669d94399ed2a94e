"""Captions: a scene in the words of many people.

`words.plain_caption` describes a scene in a few ways; here are articles, synonyms, word orders, keywords and
requests, and words for size and speed if they are unusual. All say only what is visible. The phrases are in
`phrasing.json` and `words.json`. The order of the random numbers decides the captions.

    who     an article, a size, a name           "a tiny dog"        一只小小的狗
    does    a verb, a direction, a speed         "runs to the right" 慢慢地向右跑
    there   the place                            "in the desert"     在沙漠里
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.data.tinyworld import words
from cogvideo.data.tinyworld.cast import find
from cogvideo.data.tinyworld.own import world_of
from cogvideo.data.tinyworld.places import is_land
from cogvideo.data.tinyworld.scene import CROSSING, Scene

MAX_LENGTH = {"en": 16, "zh": 26}  # words or characters that fit in a text of 32 tokens
_PERSONS = ("person", "man", "woman", "人")  # names of which only the verb says who it is
_VIDEO = (
    "a video of",
    "video of",
    "a clip of",
    "an animation of",
    "a short video of",
    "footage of",
    "a cartoon of",
)
_WISH = ("show me", "i want to see", "make a video of", "here is", "we see", "you can see", "imagine")


@lru_cache(1)
def _phrasing() -> dict[str, Any]:
    text = Path(__file__).with_name("phrasing.json").read_text(encoding="utf-8")
    phrases: dict[str, Any] = json.loads(text)
    return phrases


def names(sprite: str, language: str = "en") -> tuple[str, ...]:
    """What people call a sprite; its own name is the first."""
    more = _phrasing()["names"].get(sprite, {}).get(language, [])
    options = dict.fromkeys((*words.names_of(sprite, language), *more))
    return tuple(name for name in options if name not in _phrasing()["names left out"])


def caption(scene: Scene, rng: np.random.Generator, language: str | None = None, varied: bool = False) -> str:
    """One of many sentences about a scene; `language` is "en", "zh" or None (English with p = 0.75).

    `varied`: as people write; without it, the captions of the first models.
    """
    if language is None:
        language = "en" if rng.random() < 0.75 or not has_chinese(scene) else "zh"
    assert language in ("en", "zh"), f"language is en, zh or None, not {language!r}"
    return phrase(scene, rng, language) if varied else words.plain_caption(scene, rng, language)


def has_chinese(scene: Scene) -> bool:
    """Whether sprite and place have Chinese names; in a user's world some may lack them."""
    world = world_of(scene.place)
    named = world is None or bool(world.backgrounds[scene.place].zh)
    return named and bool(find(scene.sprite)["zh"])


def phrase(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """One of very many sentences about a scene, in "en" or "zh"."""
    say = _english if language == "en" else _chinese
    while True:
        text = say(scene, rng)
        length = len(text.replace("-", " ").split()) if language == "en" else len(text)
        if length <= MAX_LENGTH[language]:
            return text


def _choose(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _name(scene: Scene, rng: np.random.Generator, language: str) -> str:
    options = names(scene.sprite, language)
    if rng.random() < 0.5 or len(options) == 1:
        return options[0]
    name = _choose(rng, options[1:])
    sized = name[0] in "小大" or not {"tall", "great", "baby"}.isdisjoint(name.split())
    return options[0] if scene.bulk and sized else name


def _verb(scene: Scene, rng: np.random.Generator) -> str:
    """A verb of the sprite that is true of the scene and of its pace."""
    verbs = words.verbs_of(scene)
    wrong = {"slow": "fast verbs", "fast": "slow verbs"}.get(scene.pace)
    if wrong:
        verbs = [verb for verb in verbs if verb not in _phrasing()[wrong]] or ["move"]
    return _choose(rng, verbs)


def _motion(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """A phrase for the motion, with V for the verb."""
    own = _phrasing()["bare verbs"].get(scene.sprite, {}).get(scene.motion, {}).get(language)
    if own and rng.random() < 0.3:
        return _choose(rng, own)

    shared = "right" if scene.motion == "left" else scene.motion
    phrases = [*words.phrases_of(scene, language), *_phrasing()["motions"][shared][language]]
    if scene.motion == "bounces" and scene.stands:
        phrases = [p for p in phrases if p not in ("bob up and down", "bounce in the air", "上下浮动")]
    elif scene.motion == "bounces":  # nothing hops or jumps in the air
        phrases = [p for p in phrases if p.startswith(("bounce", "bob")) or "上" in p]
    if language == "zh":
        phrases = _true_in_chinese(scene, phrases)
    return _choose(rng, phrases)


def _true_in_chinese(scene: Scene, phrases: list[str]) -> list[str]:
    """The Chinese phrases for a motion that suit the sprite and its pace."""
    phrases = [p for p in phrases if "慢慢" not in p]  # a speed
    if find(scene.sprite)["kind"] in ("vehicle", "aircraft", "boat", "thing", "food", "weather"):
        phrases = [p for p in phrases if "长" not in p]  # to grow up
    if scene.pace:
        adverbs = ("越", "不断", "逐渐", "渐渐", "不停", "地向", "地往")
        phrases = [p for p in phrases if not any(adverb in p for adverb in adverbs)]
    return phrases


def _phrases_of(scene: Scene, language: str) -> dict[str, list[str]]:
    """More phrases for the place than `words.places_of`, and nouns."""
    world = world_of(scene.place)
    if world is not None:
        place = world.backgrounds[scene.place]
        return {"noun": [place.name if language == "en" else place.zh]}
    phrases: dict[str, list[str]] = _phrasing()["places"][scene.place][language]
    return phrases


def _manner(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """The kind of a place's phrases that suits: standing, swimming, flying, crossing or rising."""
    manner = "standing" if scene.stands else "flying"
    if manner == "standing" and scene.place == "sea" and find(scene.sprite)["kind"] == "sea animal":
        manner = "swimming"
    more = _phrases_of(scene, language)
    crosses = scene.motion in CROSSING and (scene.stands or not is_land(scene.place))
    if language == "zh":
        crosses = crosses and scene.motion in ("right", "left")
    if crosses and "crossing" in more and rng.random() < 0.45:
        return "crossing"
    if scene.motion == "up" and "rising" in more and rng.random() < 0.3:
        return "rising"
    return manner


def _where(scene: Scene, manner: str, rng: np.random.Generator, language: str) -> str:
    phrases = list(_phrases_of(scene, language).get(manner, []))
    phrases += words.places_of(scene, language).get(manner, [])
    return _choose(rng, phrases)


# -- English --


def _with_speed(does: str, verb_first: bool, speed: str, rng: np.random.Generator) -> str:
    """`does` with an adverb before it, after its verb, or at its end."""
    where = rng.random()
    if where < 0.4 and speed in ("slowly", "very slowly", "quickly", "rapidly"):
        return f"{speed} {does}"
    word, _, rest = does.partition(" ")
    if where < 0.7 and verb_first and rest:
        return f"{word} {speed} {rest}"
    return f"{does} {speed}"


def _inflect(does: str, form: str) -> str:
    """`words.inflect` of a phrase that may begin with an adverb."""
    adverbs = ("very slowly", "slowly", "quickly", "rapidly")
    front = next((adverb for adverb in adverbs if does.startswith(adverb)), "")
    rest = words.inflect(does.removeprefix(front).strip(), form)
    return f"{front} {rest}".strip()


def _article(name: str) -> str:
    return "an" if name.startswith("xmas") else words.article_of(name)


def _english(scene: Scene, rng: np.random.Generator) -> str:
    name = _name(scene, rng, "en")
    verb = _verb(scene, rng)
    motion = _motion(scene, rng, "en")
    if name in _PERSONS and world_of(scene.sprite) is None:
        if not motion.startswith("V") or scene.motion == "stays":
            name = scene.sprite
        else:
            verb = _choose(rng, _phrasing()["signature"][scene.sprite])

    does = _english_motion(scene, rng, verb, motion)
    if scene.bulk:
        name = f"{_choose(rng, _phrasing()['size'][scene.bulk]['en'])} {name}"
    manner = _manner(scene, rng, "en")
    there = _where(scene, manner, rng, "en")

    kind = rng.random()
    who = f"{_article(name)} {name}"
    if kind > (0.35 if scene.sprite in ("sun", "moon") else 0.7):
        who = f"the {name}" if kind < 0.92 else f"{'one' if kind < 0.97 else 'a single'} {name}"
    return _order_english(scene, rng, who, name, does, there, manner, motion)


def _english_motion(scene: Scene, rng: np.random.Generator, verb: str, motion: str) -> str:
    """The phrase for a motion, with words for its capital letters, and an adverb if slow or fast."""
    side, other = ("right", "left") if scene.handed > 0 else ("left", "right")
    top, bottom = ("upper", "lower") if rng.random() < 0.6 else ("top", "bottom")
    way, high, low = ("up", top, bottom) if scene.rising > 0 else ("down", bottom, top)
    letters = {
        "V": verb,
        "S": side,
        "O": other,
        "W": way,
        "Swards": f"{side}{_choose(rng, ('wards', 'ward'))}",
        "C": f"{high} {side}",
        "B": f"{low} {other}",
    }
    does = " ".join(letters.get(word, word) for word in motion.split())
    if scene.pace:
        speed = _choose(rng, _phrasing()["speed"][scene.pace]["en"])
        does = _with_speed(does, motion.startswith("V "), speed, rng)
    return does


def _order_english(
    scene: Scene,
    rng: np.random.Generator,
    who: str,
    name: str,
    does: str,
    there: str,
    manner: str,
    motion: str,
) -> str:
    """One of the orders of an English sentence."""
    does_s = _inflect(does, "s")
    doing = _inflect(does, "ing")
    some = f"{_article(name)} {name}" if who.startswith("the ") else who
    comma = "," if rng.random() < 0.5 else ""
    order = rng.random()
    if order < 0.34:
        return f"{who} {does_s} {there}"
    if order < 0.44 and manner != "rising":
        return f"{there}{comma} {who} {does_s}"
    if order < 0.54:
        return f"{who} is {doing} {there}"
    if order < 0.61:
        return f"{who} {doing} {there}"
    if order < 0.65 and manner not in ("crossing", "rising"):
        return f"{who} {there} {_choose(rng, (does_s, f'is {doing}', doing))}"
    if order < 0.70:
        return f"there is {some} {doing} {there}"
    if order < 0.72 and manner not in ("crossing", "rising"):
        return f"{there} there is {some} {doing}"
    if order < 0.78:
        return f"{_choose(rng, _VIDEO)} {who} {doing} {there}"
    if order < 0.81:
        return f"{_choose(rng, _WISH)} {who} {doing} {there}"
    if order < 0.84:
        return f"{_choose(rng, ('watch', 'see', 'let'))} {who} {does} {there}"
    if order < 0.87:
        return f"{who} {_choose(rng, ('that', 'which'))} {does_s} {there}"
    if order < 0.90 and manner != "rising" and motion.startswith("V ") and not scene.pace:
        verb, _, rest = does_s.partition(" ")
        if rest not in ("right", "left"):
            return f"{there} {verb} {who} {rest}"
    noun = _choose(rng, _phrases_of(scene, "en")["noun"])
    if order < 0.94:
        return _choose(
            rng,
            (
                f"{name}, {doing}, {noun}",
                f"{name} {doing}, {noun}",
                f"{noun}, {name} {doing}",
                f"{name}, {noun}, {doing}",
                f"{noun}: {who} {does_s}",
            ),
        )
    return f"{name} {_choose(rng, (does_s, doing, doing))} {there}"


# -- Chinese --


def _chinese(scene: Scene, rng: np.random.Generator) -> str:
    name = _name(scene, rng, "zh")
    verb = _verb(scene, rng)
    motion = _motion(scene, rng, "zh")
    if name in _PERSONS and world_of(scene.sprite) is None:
        if "V" not in motion:
            name = names(scene.sprite, "zh")[0]
        else:
            verb = _choose(rng, _phrasing()["signature"][scene.sprite])

    does = _chinese_motion(scene, verb, motion)
    if scene.pace:
        does = _choose(rng, _phrasing()["speed"][scene.pace]["zh"]) + does
    measure = _phrasing()["measures"].get(name) or words.measure_of(scene.sprite, name)
    if scene.bulk:
        name = _choose(rng, _phrasing()["size"][scene.bulk]["zh"]) + name
    manner = _manner(scene, rng, "zh")
    there = _where(scene, manner, rng, "zh")
    noun = _choose(rng, _phrases_of(scene, "zh")["noun"])
    return _order_chinese(rng, measure, name, does, there, noun, manner == "crossing")


def _chinese_motion(scene: Scene, verb: str, motion: str) -> str:
    """The phrase for a motion, with words for its capital letters."""
    side, other = ("右", "左") if scene.handed > 0 else ("左", "右")
    way, low = ("上", "下") if scene.rising > 0 else ("下", "上")
    letters = {"S": side, "O": other, "W": way, "Q": low, "P": other}
    letters |= {"V": words.said_in_chinese(scene, verb), "R": words.resting_in_chinese(verb)}
    for letter, word in letters.items():
        motion = motion.replace(letter, word)
    return motion


def _order_chinese(
    rng: np.random.Generator, measure: str, name: str, does: str, there: str, noun: str, crossing: bool
) -> str:
    """One of the orders of a Chinese sentence."""
    who = f"一{measure}{name}"
    spot = there.removeprefix("在")
    order = rng.random()
    if order < 0.36:
        return f"{who}{there}{does}"
    if order < 0.44:
        return f"{who}正{there}{does}"
    if order < 0.54:
        return f"{there if crossing or order < 0.49 else spot}，{who}{does}"
    if order < 0.60 and not crossing:
        return f"{spot}有{who}{_choose(rng, ('', '正', '在'))}{does}"
    if order < 0.65:
        return f"有{who}{there}{does}"
    if order < 0.70:
        return f"{_choose(rng, ('视频里', '画面中', '画面里'))}{who}{there}{does}"
    if order < 0.74:
        return f"{who}{there}{does}的{_choose(rng, ('视频', '动画', '画面', '短片'))}"
    if order < 0.77:
        return f"{_choose(rng, ('我想看', '给我看', '看'))}{who}{there}{does}"
    if order < 0.85:
        return _choose(
            rng,
            (
                f"{name}，{does}，{noun}",
                f"{noun}，{name}，{does}",
                f"{name}{does}，{noun}",
                f"{noun}，{name}{does}",
                f"{noun}，{who}{does}",
            ),
        )
    if order < 0.94:
        return f"{name}{there}{does}"
    if order < 0.97 and not crossing:
        return f"{who}{does}，{there}"
    return f"一{measure}{there}{does}的{name}"
