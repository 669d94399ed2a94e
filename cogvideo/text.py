"""Captions to ids and back.

One sentencepiece model for all languages; text ids follow the image codes, so a piece's id is `first_id +
piece`. Or the byte pairs of GPT-2, for models that begin with its embedding. For token models the duration of
the clip is part of the text, as in the paper: "4.0秒<n>a dog runs to the right" asks for five frames over
four seconds.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

GPT2 = Path(__file__).parent / "gpt2"  # its files, MIT
PAD, START, NEWLINE = "<pad>", "<start_of_image>", "<n>"
TEMPLATE = "{seconds:.1f}秒<n>{prompt}"  # what the token models are trained with
PLAIN = "{prompt}"  # and the regression models, which have a token for the rate
DURATIONS = (4.0, 2.0, 1.0, 0.5)
APART = "([\u4e00-\u9fff])(?=.)"  # Chinese characters, each a piece: phrases would take the room of words
CUT = "\u241f"  # between two pieces of a caption, in training only
TAKEN = 256 + 6 + len(DURATIONS)  # pieces: bytes, markers, durations


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
        # `train_text` puts its markers in front, where the original's have other places
        self.trained_here = 0 < self.start - first_id < TAKEN

    @classmethod
    def load(cls, path: Path, first_id: int) -> "TextTokenizer":
        return cls(path.read_bytes(), first_id)

    def __len__(self) -> int:
        return self.pieces.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return [self.first_id + piece for piece in self.pieces.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pieces.decode([i - self.first_id for i in ids if i not in (self.pad, self.start)])

    def prompt(self, caption: str, duration: float, template: str = TEMPLATE) -> list[int]:
        """Ids of the duration prompt (seconds) and the caption; an empty caption is the unconditional prompt.

        What stands before and after the template's <n> is encoded apart, as in the original. A text model
        trained by `train_text` reads no punctuation of sentences (`without_stops`), nor capital letters.
        """
        caption = without_stops(caption) if self.trained_here else caption
        first, *rest = template.format(seconds=duration, prompt=caption).split(NEWLINE)
        ids = self.encode(first.strip())
        for part in rest:
            ids += [self.newline, *self.encode(part.strip())]
        return ids

    def pad_left(self, ids: list[int], length: int, pad: int | None = None) -> list[int]:
        """`ids` with padding in front; they must not be longer than `length`."""
        if len(ids) > length:
            raise ValueError(
                f"the text has {len(ids)} tokens, {len(ids) - length} more than the {length} that fit"
            )
        return [self.pad if pad is None else pad] * (length - len(ids)) + ids


class GPT2Tokenizer(TextTokenizer):
    """The byte pairs of GPT-2: 50257 ids, of which the last, <|endoftext|>, is also the padding."""

    def __init__(self) -> None:
        from tokenizers import ByteLevelBPETokenizer

        self.first_id, self.trained_here = 0, False
        self.pairs = ByteLevelBPETokenizer(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe"))
        self.pad = len(self) - 1
        (self.newline,) = self.encode("\n")

    def __len__(self) -> int:
        return self.pairs.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pairs.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.pairs.decode([i for i in ids if i != self.pad])


def train_text(captions: Iterable[str], pieces: int) -> bytes:
    """Train byte pairs, in which frequent words are whole; return the bytes of the model's file.

    The same captions give the same model. A Chinese character is a piece of its own. Where there are more
    characters than pieces, the rare ones are spelt in bytes. Raises ValueError if no model can be made.
    """
    captions = [without_stops(caption) for caption in captions]
    room = pieces - TAKEN
    counts = Counter(chain.from_iterable(captions))
    spelt = {c for c, _ in counts.most_common()[max(room // 2, 0) :]} if len(counts) > room else set()
    left = ("".join(c for c in caption if c not in spelt) for caption in captions)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(re.sub(APART, r"\1" + CUT, caption) for caption in left),
            pretokenization_delimiter=CUT,
            model_writer=written,
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
        raise ValueError(f"no text model of {pieces} pieces can be made of these captions: {error}") from None
    return written.getvalue()


def without_stops(text: str) -> str:
    """`text` without quotation marks and the punctuation that ends a sentence; within the text it becomes a
    comma. "A dog runs." reads as "A dog runs"."""
    text = re.sub(r"[\"“”「」『』《》]", "", text).strip()
    text = re.sub(r"[.!?;:…。！？；：~～\s]+$", "", text)
    text = re.sub(r"[.!?;:…]+(?=\s)", ",", text)
    return re.sub("[。！？；：…]+", "，", text).rstrip(",， ")


def split_words(text: str) -> list[str]:
    """The words of a text, lower case, without a possessive s; each Chinese character counts as one."""
    return re.findall(r"[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])\w)+", re.sub(r"['’]s?\b", "", text.lower()))
