"""Read a sentence about the tiny world: which sprite, which motion, which place.

Judges need to know what a caption asks for. Sprites are found by their names, the longest one first; motions
and places by an ordered table of patterns, of which the first that matches counts. What a sentence does not
say is None.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cogvideo.data.tinyworld.cast import sprites
from cogvideo.data.tinyworld.own import OwnWorld, open_world
from cogvideo.data.tinyworld.phrasing import names

_CHINESE = re.compile("[\u4e00-\u9fff]")

# Phrases with a sprite's word that are about the place, and what is read instead.
_PHRASES = (
    (r"(under|beneath|below|of|with) (the )?(shining |twinkling |bright )?stars", "starry"),
    (r"(among|amongst|between) (the )?stars at night", "starry"),
    (r"(among|amongst|between) (the )?stars|星星之间|群星", "space 太空"),
    (r"deep down in the (sea|ocean)", "underwater"),
    (r"(the )?setting sun|(the )?sun (sets|setting|is setting|goes down|going down|is going down)", "sunset"),
    (r"(the )?(light of the|full) moon(?= (light|night))", "night"),
    (r"太阳.{0,3}(落|下)山|落日|日落", "夕阳"),
)
# Specific motions come before general ones: "spinning in circles" spins, "hopping to the left" goes left.
_MOTIONS = (
    ("zigzags", r"zig ?zag|weav|serpentine|up and down (to|towards) the (left|right)"),
    (
        "zigzags",
        r"之字|曲折|[Zz]字|折线|弯弯曲曲|拐来拐去|蜿蜒|(一上一下|忽上忽下|忽高忽低)地?[向往朝].{0,2}[左右]",
    ),
    ("diagonal", r"diagonal|slant|oblique|(upper|lower|top|bottom) (left|right)"),
    ("diagonal", r"\b(up|down)(wards?)? (and )?(to|towards) the (left|right)"),
    ("diagonal", r"斜|对角|[左右][上下][角方]|[上下][左右][角方]"),
    ("right", r"left( side)? to (the )?right|[从由]左.{0,3}[到往向]右"),
    ("left", r"right( side)? to (the )?left|[从由]右.{0,3}[到往向]左"),
    ("down", r"top to (the )?bottom|[从由]上.{0,2}[到往向]下"),
    ("up", r"bottom to (the )?top|[从由]下.{0,2}[到往向]上"),
    (
        "spins",
        r"spin|rotat|twirl|whirl|pirouett|turn(s|ing|ed)?\b(?! (up|left|right|small|big))|somersault|revolv",
    ),
    ("spins", r"原地.{0,4}[转旋打]|旋转|自转|打转|团团转|翻滚|翻跟"),
    ("circles", r"circl|loops?\b|looping|orbit|round and round|绕|圈|盘旋|环"),
    ("spins", r"转"),
    ("bounces", r"bounc|\bbob|up and down|(hop|jump)[a-z]*.* (on|in) (the|one|same) (spot|place)"),
    ("bounces", r"弹|蹦|一上一下|上下|跳上跳下|原地.{0,3}跳"),
    ("shrinks", r"shr[iau]nk|smaller|dwindl|decreas|reced|变小|越来越小|缩|远去|变得.{0,2}小|走远|越变越小"),
    ("grows", r"grow|bigger|larger|increas|expand|swell|approach|closer|inflat|enlarg"),
    ("grows", r"变大|越.越大|越来越大|长大|放大|靠近|走近|变得.{0,2}大|增大|长得"),
    ("left", r"left|左"),
    ("right", r"right|右"),
    ("bounces", r"\bhop|\bjump|\bleap|跳"),
    ("down", r"\bdown|\bfall|\bfell|sink|drop|descend|plung|plummet|\bdiv(es|ing)|lower"),
    ("down", r"向下|往下|朝下|落|下沉|下潜|下降|下滑|降|坠|掉|沉|俯冲"),
    ("up", r"\bup|\bris(e|es|ing)\b|climb|ascen|launch|lift|tak(es|ing) off|higher|toward the sky"),
    ("up", r"向上|往上|朝上|升|上天|飞起|起飞|冲天|飞上|往.{0,5}上空飞|上浮"),
    ("stays", r"stay|still|stand|sit|rest|wait|not mov|n t move|motionless|nothing|park|linger|sleep"),
    ("stays", r"hang|hover|paus|float|remain|unmoving|perch|\bidl|stationary|pos(es|ing)|danc|sway|beats"),
    ("stays", r"(in one|in|on the|on one) (place|spot)"),
    ("stays", r"不动|静止|停|待|站|坐|躺|趴|呆|休息|悬|留|漂|浮|立"),
)
_PLACES = (
    (
        "underwater",
        r"under ?(the )?(water|sea|ocean|waves|surface)|deep (in|ocean|sea|water|under|below|blue|down)",
    ),
    (
        "underwater",
        r"(bottom|floor|depths?) of the (sea|ocean)|(sea|ocean) ?(floor|bed|bottom)|coral|submerged",
    ),
    ("underwater", r"(below|beneath) the (surface|waves|water|sea|ocean)"),
    ("underwater", r"水下|海底|水里|水底|水面下|深海|海水下|海面下|海洋深处|大海深处"),
    ("space", r"\bspace\b|universe|cosmos|galax|太空|宇宙|星际|银河|深空"),
    ("night sky", r"night|stars|starry|moonlight|\bdark\b|夜|星空|星星|月光|繁星|晚上"),
    ("sunset", r"sunset|evening|dusk|sundown|twilight|夕阳|傍晚|黄昏|晚霞"),
    ("snow", r"snow|wint|\bice\b|icy|frozen|雪|冰"),
    ("desert", r"desert|dune|sand|沙|大漠"),
    ("forest", r"forest|wood|trees|jungle|林|树"),
    (
        "city",
        r"city|cities|street|town|road|building|urban|skyscraper|traffic|城|街|马路|路上|路边|公路|楼|都市|市区|市中心",
    ),
    ("sea", r"\bseas?\b|ocean|waves?\b|water|海|水|浪"),
    ("field", r"field|meadow|grass|pasture|lawn|green hill|countryside|草|田|原野|绿地|乡间|山坡"),
)


@dataclass(frozen=True)
class Reading:
    """What a sentence asks for; None where it does not say."""

    sprite: str | None
    motion: str | None
    place: str | None


def read(text: str, world: OwnWorld | None = None) -> Reading:
    """The sprite, motion and place of a sentence in English or Chinese, in the tiny world or a user's."""
    text = _normalise(text)
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    keys = sprites(None) if world is None else tuple(world.sprites)
    sprite, rest = _read_name(text, _name_patterns(keys))
    place = None
    if world is not None:
        place, rest = _read_name(rest, _place_patterns(world.folder))
    return Reading(sprite, _first_match(_MOTIONS, rest), place or _first_match(_PLACES, rest))


def _normalise(text: str) -> str:
    return " ".join(re.sub("[-‐–’'_]", " ", text.lower()).split())


Patterns = tuple[tuple[re.Pattern[str], str], ...]


def _read_name(text: str, patterns: Patterns) -> tuple[str | None, str]:
    """Whose name a sentence has, and the sentence without it ("sea" of "sea lion" is no place)."""
    for pattern, key in patterns:
        match = pattern.search(text)
        if match:
            return key, text[: match.start()] + " " + text[match.end() :]
    return None, text


@lru_cache(16)
def _name_patterns(keys: tuple[str, ...]) -> Patterns:
    """Patterns of all names of sprites in singular and plural, the longest first."""
    table: dict[str, str] = {}
    for sprite in keys:
        for language in ("en", "zh"):
            for name in names(sprite, language):
                table.setdefault(_normalise(name), sprite)
    return _ordered(table)


@lru_cache(16)
def _place_patterns(folder: Path) -> Patterns:
    """Patterns of the names of a world's backgrounds, and of what captions say for them."""
    table: dict[str, str] = {}
    for key, place in open_world(folder).backgrounds.items():
        for name in (place.name, place.zh, *place.said, *place.said_zh):
            table.setdefault(_normalise(name), key)
    return _ordered(table)


def _ordered(table: dict[str, str]) -> Patterns:
    ordered = sorted(filter(None, table), key=len, reverse=True)
    return tuple((_name_pattern(name), table[name]) for name in ordered)


def _name_pattern(name: str) -> re.Pattern[str]:
    if _CHINESE.search(name):
        return re.compile(re.escape(name))
    stem = re.escape(name)
    plural = "(s|es)?"
    if name.endswith("y"):
        stem, plural = re.escape(name[:-1]), "(y|ies)"
    elif name.endswith(("f", "fe")):
        stem, plural = re.escape(name.removesuffix("e").removesuffix("f")), "(f|fe|ves)"
    return re.compile(rf"(?<![a-z]){stem}{plural}(?![a-z])")


def _first_match(table: tuple[tuple[str, str], ...], text: str) -> str | None:
    for name, pattern in table:
        if re.search(pattern, text):
            return name
    return None
