"""Captions to ids and back.

`TextTokenizer` is one sentencepiece model for all languages; text ids follow the image codes, so the id of a
piece is `first_id + piece`. `GPT2Tokenizer` has the byte pairs of GPT-2, for models that start from its
embedding. For token models the duration of the clip is part of the text, as in the paper: "4.0秒<n>a dog runs
to the right" asks for five frames over four seconds.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

GPT2 = Path(__file__).parent / "gpt2"  # GPT-2's files, MIT
PAD = "<pad>"
START = "<start_of_image>"
NEWLINE = "<n>"
TEMPLATE = "{seconds:.1f}秒<n>{prompt}"  # of the token models
PLAIN = "{prompt}"  # of the regression models, which have a token for the frame rate
DURATIONS = (4.0, 2.0, 1.0, 0.5)
CHINESE = "([\u4e00-\u9fff])(?=.)"  # a character becomes a piece: phrases would take the room of words
SEPARATOR = "\u241f"  # between two pieces of a caption, in training only
RESERVED = 256 + 6 + len(DURATIONS)  # pieces: bytes, markers, durations


class TextTokenizer:
    """A sentencepiece model whose ids start at `first_id`."""

    def __init__(self, model: bytes, first_id: int):
        self.model = model
        self.first_id = first_id
        if not model:
            raise ValueError("it is empty")
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pad = first_id + self.pieces.piece_to_id(PAD)
        self.start = first_id + self.pieces.piece_to_id(START)
        self.newline = first_id + self.pieces.piece_to_id(NEWLINE)
        # `train_text` puts its markers first; the original's are elsewhere
        self.trained_here = 0 < self.start - first_id < RESERVED

    @classmethod
    def load(cls, path: Path, first_id: int) -> "TextTokenizer":
        return cls(path.read_bytes(), first_id)

    def __len__(self) -> int:
        return int(self.pieces.get_piece_size())

    def encode(self, text: str) -> list[int]:
        return [self.first_id + piece for piece in self.pieces.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [i - self.first_id for i in ids if i not in (self.pad, self.start)]
        return str(self.pieces.decode(pieces))

    def prompt(self, caption: str, duration: float, template: str = TEMPLATE) -> list[int]:
        """Ids of the duration prompt (seconds) and the caption; an empty caption is the unconditional prompt.

        The parts before and after the template's <n> are encoded separately, as in the original. A text model
        trained by `train_text` ignores capital letters and sentence punctuation (`without_stops`).
        """
        if self.trained_here:
            caption = without_stops(caption)
        first, *rest = template.format(seconds=duration, prompt=caption).split(NEWLINE)
        ids = self.encode(first.strip())
        for part in rest:
            ids += [self.newline, *self.encode(part.strip())]
        return ids

    def pad_left(self, ids: list[int], length: int, pad: int | None = None) -> list[int]:
        """`ids` with padding in front, `length` in all. Raise ValueError if there are more than that."""
        if len(ids) > length:
            raise ValueError(
                f"the text has {len(ids)} tokens, {len(ids) - length} more than the {length} that fit"
            )
        if pad is None:
            pad = self.pad
        return [pad] * (length - len(ids)) + ids


class GPT2Tokenizer(TextTokenizer):
    """The byte pairs of GPT-2: 50257 ids, of which the last, <|endoftext|>, is also the padding."""

    def __init__(self) -> None:
        from tokenizers import ByteLevelBPETokenizer

        self.first_id = 0
        self.trained_here = False
        self.pairs = ByteLevelBPETokenizer(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe"))
        self.pad = len(self) - 1
        (self.newline,) = self.encode("\n")

    def __len__(self) -> int:
        return int(self.pairs.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.pairs.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.pairs.decode([i for i in ids if i != self.pad]))


def train_text(captions: Iterable[str], pieces: int) -> bytes:
    """Train byte pairs, in which frequent words are whole; return the bytes of the model's file.

    The same captions give the same model. Each Chinese character is one piece. If there are more
    characters than pieces, the rare ones are spelt in bytes. Raise ValueError if the training fails.
    """
    captions = [without_stops(caption) for caption in captions]
    rare = _rare_characters(captions, pieces - RESERVED)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(_training_text(caption, rare) for caption in captions),
            pretokenization_delimiter=SEPARATOR,
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            pad_id=3,
            pad_piece=PAD,
            control_symbols=[START],
            user_defined_symbols=[NEWLINE, *(f"{seconds:.1f}秒" for seconds in DURATIONS)],
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a text model of {pieces} pieces on these captions: {error}") from None
    return model.getvalue()


def _rare_characters(captions: Sequence[str], room: int) -> set[str]:
    """The characters that have to be spelt in bytes, of captions with more characters than `room`."""
    counts = Counter(chain.from_iterable(captions))
    if len(counts) <= room:
        return set()
    return {character for character, _ in counts.most_common()[max(room // 2, 0) :]}


def _training_text(caption: str, rare: set[str]) -> str:
    kept = "".join(character for character in caption if character not in rare)
    return re.sub(CHINESE, r"\1" + SEPARATOR, kept)


def without_stops(text: str) -> str:
    """`text` without quotation marks and final punctuation; full stops inside it become commas.

    "A dog runs." becomes "A dog runs".
    """
    text = re.sub(r"[\"“”「」『』《》]", "", text).strip()
    text = re.sub(r"[.!?;:…。！？；：~～\s]+$", "", text)
    text = re.sub(r"[.!?;:…]+(?=\s)", ",", text)
    return re.sub("[。！？；：…]+", "，", text).rstrip(",， ")


def split_words(text: str) -> list[str]:
    """The words of a text, lower case, without a possessive s; each Chinese character counts as one."""
    text = re.sub(r"['’]s?\b", "", text.lower())
    return re.findall(r"[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])\w)+", text)
