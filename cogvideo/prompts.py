"""What is asked of a model: captions, refused before any work or with hints, as the ids that it reads."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cogvideo.text import TextTokenizer, split_words


@dataclass(frozen=True)
class Prompts:
    """How a model is spoken to."""

    text: TextTokenizer
    words: Sequence[str] = ()  # of the captions of its training; none: it is not known
    languages: Sequence[str] = ()

    def ids(self, prompts: Sequence[str], seconds: float, template: str, length: int,
            pad: int | None = None) -> list[list[int]]:
        """A row of `length` ids for each prompt; ValueError if one is too long, saying by how many."""
        return [self.text.pad_left(self.text.prompt(one, seconds, template), length, pad) for one in prompts]

    def check(self, prompt: str) -> None:
        """Raise ValueError if a prompt says nothing."""
        if not self.text.encode(prompt.strip()):
            raise ValueError("the prompt is empty; write a sentence such as 'a dog runs to the right across "
                             "a green field'")

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Words of a prompt that were in no caption of the training, each with the nearest words that
        were."""
        found = dict.fromkeys(split_words(prompt)) if self.words else ()
        near = {word: difflib.get_close_matches(word, self.words, 3, 0.3) for word in found}
        return {word: nearest for word, nearest in near.items() if word not in self.words}

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """What a user should know before waiting for these prompts."""
        found = []
        for word, near in {w: n for one in prompts for w, n in self.unknown_words(one).items()}.items():
            nearest = f"; near it are: {', '.join(near)}" if near else ""
            found.append(f"the model never saw the word {word!r}{nearest}")
        chinese = all(re.search("[\u4e00-\u9fff]", one) for one in prompts)
        if list(self.languages) == ["zh"] and not chinese:
            found.append("the model was trained on Chinese captions alone; write the prompt in Chinese")
        return found
