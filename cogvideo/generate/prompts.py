"""Validate prompts, hint at unknown words, encode them."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cogvideo.limits import MOST_PROMPT
from cogvideo.text import TextTokenizer, split_words


@lru_cache(1)
def _near() -> dict[str, Any]:
    """Filler words, words that are read as others, and the words that a hint names for a word."""
    file = Path(__file__).parent.parent / "data" / "tinyworld" / "near.json"
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table


def _forms(word: str) -> list[str]:
    """An English word as it is, and what its singulars and its plural may be."""
    endings = (("", ""), ("s", ""), ("es", ""), ("ies", "y"), ("", "s"))
    return [word.removesuffix(old) + new for old, new in endings if word.endswith(old)]


@dataclass(frozen=True)
class Prompts:
    """Checks and encodes prompts for one model."""

    text: TextTokenizer
    words: Sequence[str] = ()  # of the captions of its training; none if they are not known
    languages: Sequence[str] = ()

    def ids(
        self, prompts: Sequence[str], seconds: float, template: str, length: int, pad: int | None = None
    ) -> list[list[int]]:
        """A row of `length` ids for each prompt; ValueError if one is too long, saying by how many."""
        rows = []
        for prompt in prompts:
            ids = self.text.prompt(self.read(prompt), seconds, template)
            rows.append(self.text.pad_left(ids, length, pad))
        return rows

    def check(self, prompt: str) -> None:
        """Raise ValueError if a prompt has no tokens, far too many characters, or bytes that are none."""
        if len(prompt) > MOST_PROMPT:
            raise ValueError(f"the prompt has {len(prompt)} characters; at most {MOST_PROMPT} are possible")
        if re.search("[\ud800-\udfff]", prompt):
            raise ValueError(f"the prompt is not text in UTF-8: {ascii(prompt[:60])}")
        if not self.text.encode(prompt.strip()):
            raise ValueError(
                "the prompt is empty; write a sentence such as 'a dog runs to the right across a green field'"
            )

    def read(self, prompt: str) -> str:
        """Replace words of a prompt by words that the model knows, where there are any.

        A plural that no training caption has becomes the singular, a filler word is dropped, and some words
        are read as others: "Please show dogs on the beach" becomes "show dog on the sand". Words of the
        training captions stay as they are.
        """
        if not self.words:
            return prompt
        for word, other in self._chinese_read_as(prompt).items():
            prompt = prompt.replace(word, other)
        prompt = re.sub("[A-Za-z]+|[\u4e00-\u9fff]", lambda match: self._read_word(match[0]), prompt)
        return re.sub(" +", " ", prompt).strip()

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Words of a prompt that no training caption has, in singular or plural, each with the word that it
        is read as, or with the nearest known words."""
        if not self.words:
            return {}
        unknown = {word: [other] for word, other in self._chinese_read_as(prompt).items()}
        for word in unknown:
            prompt = prompt.replace(word, " ")
        for word in dict.fromkeys(split_words(prompt)):
            if word in _near()["fillers"] or self._known_form(word):
                continue
            other = self._stands_for(word)
            unknown[word] = [other] if other else self._nearest(word)
        return unknown

    def _read_word(self, word: str) -> str:
        known = self._known_form(word.lower()) or self._stands_for(word.lower())
        return known or ("" if word.lower() in _near()["fillers"] else word)

    def _known_form(self, word: str) -> str:
        """A word, its singular or its plural, whichever is known, or an empty string."""
        return next((form for form in _forms(word) if form in self.words), "")

    def _stands_for(self, word: str) -> str:
        """The known word that an unknown one is read as, or an empty string."""
        other = next((_near()["read as"][w] for w in _forms(word) if w in _near()["read as"]), "")
        return other if all(part in self.words for part in split_words(other)) else ""

    def _chinese_read_as(self, prompt: str) -> dict[str, str]:
        """Chinese words of the prompt with an unknown character, and the known words they are read as."""
        words = [w for w in _near()["read as"] if not w.isascii() and w in prompt]
        unknown = [w for w in words if not all(part in self.words for part in split_words(w))]
        return {word: self._stands_for(word) for word in unknown if self._stands_for(word)}

    def _nearest(self, word: str) -> list[str]:
        """Known words of like meaning, else of like spelling."""
        meant: list[str] = next((_near()["near"][w] for w in _forms(word) if w in _near()["near"]), [])
        return [w for w in meant if w in self.words] or difflib.get_close_matches(word, self.words, 3, 0.66)

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """What a user should know before waiting for these prompts."""
        hints = []
        unknown: dict[str, list[str]] = {}
        for prompt in prompts:
            unknown |= self.unknown_words(prompt)
        for word, near in unknown.items():
            nearest = ""
            if near == [self._stands_for(word)]:
                nearest = f"; it is read as {near[0]!r}"
            elif near:
                nearest = f"; near it are: {', '.join(near)}"
            hints.append(f"the model never saw the word {word!r}{nearest}")
        chinese = all(re.search("[\u4e00-\u9fff]", prompt) for prompt in prompts)
        if list(self.languages) == ["zh"] and not chinese:
            hints.append("the model was trained on Chinese captions alone; write the prompt in Chinese")
        return hints
