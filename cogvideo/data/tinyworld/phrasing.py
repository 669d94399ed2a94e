"""Captions: a scene in the words of many people.

`words.plain_caption` says a scene in a few ways; here are articles, synonyms, word orders, keywords and
requests, and the words for size and speed where the scene has them. All say only what is drawn.
`phrasing.json` has the phrases; those of `words.json` belong to them.

    who     an article, a size, a name           "a tiny dog"        一只小小的狗
    does    a verb, a direction, a speed         "runs to the right" 慢慢地向右跑
    there   the place                            "in the desert"     在沙漠里
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from cogvideo.data.tinyworld import words
from cogvideo.data.tinyworld.cast import table
from cogvideo.data.tinyworld.places import LAND
from cogvideo.data.tinyworld.scene import CROSSING, Scene

LONGEST = {"en": 16, "zh": 26}  # words or characters, so that a text of 32 tokens has room for them
_PERSONS = ("person", "man", "woman", "人")  # who they are is told by what they do
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
def _phrasing() -> dict:
    return json.loads(Path(__file__).with_name("phrasing.json").read_text(encoding="utf-8"))


def names(sprite: str, language: str = "en") -> tuple[str, ...]:
    """What people call a sprite; its own name is the first."""
    more = _phrasing()["names"].get(sprite, {}).get(language, [])
    found = dict.fromkeys((*words.names_of(sprite, language), *more))
    return tuple(name for name in found if name not in _phrasing()["names left out"])


def caption(scene: Scene, rng: np.random.Generator, language: str | None = None, varied: bool = False) -> str:
    """One of many sentences that say what is drawn; `language` is "en", "zh" or None (English, p = 0.75).

    `varied`: as people write; without it as the first models were trained with.
    """
    if language is None:
        language = "en" if rng.random() < 0.75 else "zh"
    assert language in ("en", "zh"), f"language is en, zh or None, not {language!r}"
    return phrase(scene, rng, language) if varied else words.plain_caption(scene, rng, language)


def phrase(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """One of very many sentences that say what is drawn, in "en" or "zh"."""
    say = _english if language == "en" else _chinese
    while True:
        text = say(scene, rng)
        if len(text.replace("-", " ").split() if language == "en" else text) <= LONGEST[language]:
            return text


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _name(scene: Scene, rng: np.random.Generator, language: str) -> str:
    found = names(scene.sprite, language)
    if rng.random() < 0.5 or len(found) == 1:
        return found[0]
    name = _pick(rng, found[1:])
    sized = name[0] in "小大" or any(w in name.split() for w in ("tall", "great", "baby"))
    return found[0] if scene.bulk and sized else name


def _verb(scene: Scene, rng: np.random.Generator) -> str:
    """A verb of the sprite that is true of the scene and of its pace."""
    other = {"slow": "fast verbs", "fast": "slow verbs"}.get(scene.pace)
    found = words.verbs_of(scene)
    if other:
        found = [verb for verb in found if verb not in _phrasing()[other]] or ["move"]
    return _pick(rng, found)


def _motion(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """A phrase for the motion, with V for the verb."""
    own = _phrasing()["bare verbs"].get(scene.sprite, {}).get(scene.motion, {}).get(language)
    if own and rng.random() < 0.3:
        return _pick(rng, own)
    shared = "right" if scene.motion == "left" else scene.motion
    found = [*words.phrases_of(scene, language), *_phrasing()["motions"][shared][language]]
    if scene.motion == "bounces":  # nothing hops or jumps in the air
        airy = [p for p in found if p.startswith(("bounce", "bob")) or "上" in p]
        found = [p for p in found if p not in ("bob up and down", "bounce in the air", "上下浮动")]
        found = found if scene.stands else airy
    if language == "zh":
        found = [p for p in found if "慢慢" not in p]  # which is a speed
        if table()[scene.sprite]["kind"] in ("vehicle", "aircraft", "boat", "thing", "food", "weather"):
            found = [p for p in found if "长" not in p]  # which grows up
    if language == "zh" and scene.pace:
        other = ("越", "不断", "逐渐", "渐渐", "不停", "地向", "地往")  # which say how by themselves
        found = [p for p in found if not any(word in p for word in other)]
    return _pick(rng, found)


def _manner(scene: Scene, rng: np.random.Generator, language: str) -> str:
    """Which of a place's phrases suit: standing, swimming, flying, crossing, rising."""
    manner = "standing" if scene.stands else "flying"
    if manner == "standing" and scene.place == "sea" and table()[scene.sprite]["kind"] == "sea animal":
        manner = "swimming"
    more = _phrasing()["places"][scene.place][language]
    crosses = scene.motion in CROSSING and (scene.stands or scene.place not in LAND)
    if language == "zh":
        crosses = crosses and scene.motion in ("right", "left")
    if crosses and "crossing" in more and rng.random() < 0.45:
        return "crossing"
    if scene.motion == "up" and "rising" in more and rng.random() < 0.3:
        return "rising"
    return manner


def _where(scene: Scene, manner: str, rng: np.random.Generator, language: str) -> str:
    found = list(_phrasing()["places"][scene.place][language].get(manner, []))
    found += words.places_of(scene, language).get(manner, [])
    return _pick(rng, found)


# -- English --


def _with_speed(does: str, verb_first: bool, speed: str, rng: np.random.Generator) -> str:
    """`does` with an adverb in front, behind its verb, or at its end."""
    where = rng.random()
    if where < 0.4 and speed in ("slowly", "very slowly", "quickly", "rapidly"):
        return f"{speed} {does}"
    word, _, rest = does.partition(" ")
    if where < 0.7 and verb_first and rest:
        return f"{word} {speed} {rest}"
    return f"{does} {speed}"


def _inflect(does: str, form: str) -> str:
    """As `words.inflect`, of what may begin with an adverb."""
    front = next((w for w in ("very slowly", "slowly", "quickly", "rapidly") if does.startswith(w)), "")
    rest = words.inflect(does.removeprefix(front).strip(), form)
    return f"{front} {rest}".strip()


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" and name != "ewe" or name.startswith("xmas") else "a"


def _english(scene: Scene, rng: np.random.Generator) -> str:
    name, verb, shape = _name(scene, rng, "en"), _verb(scene, rng), _motion(scene, rng, "en")
    if name in _PERSONS:  # the verb tells who it is
        own = _phrasing()["signature"][scene.sprite]
        if not shape.startswith("V") or scene.motion == "stays":
            name = scene.sprite
        else:
            verb = _pick(rng, own)
    side, other = ("right", "left") if scene.handed > 0 else ("left", "right")
    tops = ("upper", "lower") if rng.random() < 0.6 else ("top", "bottom")
    way, high = ("up" if scene.rising > 0 else "down"), tops[0 if scene.rising > 0 else 1]
    low = tops[1 if scene.rising > 0 else 0]
    said = {
        "V": verb,
        "S": side,
        "O": other,
        "W": way,
        "Swards": f"{side}{_pick(rng, ('wards', 'ward'))}",
        "C": f"{high} {side}",
        "B": f"{low} {other}",
    }
    does = " ".join(said.get(word, word) for word in shape.split())
    if scene.pace:
        speed = _pick(rng, _phrasing()["speed"][scene.pace]["en"])
        does = _with_speed(does, shape.startswith("V "), speed, rng)
    if scene.bulk:
        name = f"{_pick(rng, _phrasing()['size'][scene.bulk]['en'])} {name}"
    manner = _manner(scene, rng, "en")
    there = _where(scene, manner, rng, "en")
    article = _article(name)
    kind = rng.random()
    who = f"{article} {name}"
    if kind > (0.35 if scene.sprite in ("sun", "moon") else 0.7):
        who = f"the {name}" if kind < 0.92 else f"{'one' if kind < 0.97 else 'a single'} {name}"
    return _order_english(scene, rng, who, name, does, there, manner, shape)


def _order_english(
    scene: Scene,
    rng: np.random.Generator,
    who: str,
    name: str,
    does: str,
    there: str,
    manner: str,
    shape: str,
) -> str:
    """One of the orders of an English sentence."""
    does_s, doing = _inflect(does, "s"), _inflect(does, "ing")
    some = f"{_article(name)} {name}" if who.startswith("the ") else who
    comma, order = "," if rng.random() < 0.5 else "", rng.random()
    if order < 0.34:
        return f"{who} {does_s} {there}"
    if order < 0.44 and manner != "rising":
        return f"{there}{comma} {who} {does_s}"
    if order < 0.54:
        return f"{who} is {doing} {there}"
    if order < 0.61:
        return f"{who} {doing} {there}"
    if order < 0.65 and manner not in ("crossing", "rising"):
        return f"{who} {there} {_pick(rng, (does_s, f'is {doing}', doing))}"
    if order < 0.70:
        return f"there is {some} {doing} {there}"
    if order < 0.72 and manner not in ("crossing", "rising"):
        return f"{there} there is {some} {doing}"
    if order < 0.78:
        return f"{_pick(rng, _VIDEO)} {who} {doing} {there}"
    if order < 0.81:
        return f"{_pick(rng, _WISH)} {who} {doing} {there}"
    if order < 0.84:
        return f"{_pick(rng, ('watch', 'see', 'let'))} {who} {does} {there}"
    if order < 0.87:
        return f"{who} {_pick(rng, ('that', 'which'))} {does_s} {there}"
    if order < 0.90 and manner != "rising" and shape.startswith("V ") and not scene.pace:
        verb, _, rest = does_s.partition(" ")
        if rest not in ("right", "left"):
            return f"{there} {verb} {who} {rest}"
    noun = _pick(rng, _phrasing()["places"][scene.place]["en"]["noun"])
    if order < 0.94:
        return _pick(
            rng,
            (
                f"{name}, {doing}, {noun}",
                f"{name} {doing}, {noun}",
                f"{noun}, {name} {doing}",
                f"{name}, {noun}, {doing}",
                f"{noun}: {who} {does_s}",
            ),
        )
    return f"{name} {_pick(rng, (does_s, doing, doing))} {there}"


# -- Chinese --


def _chinese(scene: Scene, rng: np.random.Generator) -> str:
    name, verb, shape = _name(scene, rng, "zh"), _verb(scene, rng), _motion(scene, rng, "zh")
    if name in _PERSONS:
        if "V" not in shape:
            name = names(scene.sprite, "zh")[0]
        else:
            verb = _pick(rng, _phrasing()["signature"][scene.sprite])
    does = shape
    side, other = ("右", "左") if scene.handed > 0 else ("左", "右")
    way, low = ("上", "下") if scene.rising > 0 else ("下", "上")
    for letter, word in (("S", side), ("O", other), ("W", way), ("Q", low), ("P", other)):
        does = does.replace(letter, word)
    does = does.replace("V", words.said_in_chinese(scene, verb)).replace("R", words.resting_in_chinese(verb))
    if scene.pace:
        does = _pick(rng, _phrasing()["speed"][scene.pace]["zh"]) + does
    measure = _phrasing()["measures"].get(name) or words.measure_of(scene.sprite, name)
    size = _pick(rng, _phrasing()["size"][scene.bulk]["zh"]) if scene.bulk else ""
    who = f"一{measure}{size}{name}"
    manner = _manner(scene, rng, "zh")
    there = _where(scene, manner, rng, "zh")
    spot = there.removeprefix("在")
    noun = _pick(rng, _phrasing()["places"][scene.place]["zh"]["noun"])
    order, bare = rng.random(), size + name
    crossing = manner == "crossing"
    if order < 0.36:
        return f"{who}{there}{does}"
    if order < 0.44:
        return f"{who}正{there}{does}"
    if order < 0.54:
        return f"{there if crossing or order < 0.49 else spot}，{who}{does}"
    if order < 0.60 and not crossing:
        return f"{spot}有{who}{_pick(rng, ('', '正', '在'))}{does}"
    if order < 0.65:
        return f"有{who}{there}{does}"
    if order < 0.70:
        return f"{_pick(rng, ('视频里', '画面中', '画面里'))}{who}{there}{does}"
    if order < 0.74:
        return f"{who}{there}{does}的{_pick(rng, ('视频', '动画', '画面', '短片'))}"
    if order < 0.77:
        return f"{_pick(rng, ('我想看', '给我看', '看'))}{who}{there}{does}"
    if order < 0.85:
        return _pick(
            rng,
            (
                f"{bare}，{does}，{noun}",
                f"{noun}，{bare}，{does}",
                f"{bare}{does}，{noun}",
                f"{noun}，{bare}{does}",
                f"{noun}，{who}{does}",
            ),
        )
    if order < 0.94:
        return f"{bare}{there}{does}"
    if order < 0.97 and not crossing:
        return f"{who}{does}，{there}"
    return f"一{measure}{there}{does}的{bare}"
