import numpy as np
import pytest

from cogvideo.data.loader import read_captions
from cogvideo.text import GPT2Tokenizer, TextTokenizer, split_words, train_text


@pytest.fixture(scope="module")
def text(world) -> TextTokenizer:
    return TextTokenizer(train_text(read_captions(world, 2000, seed=0), 500), first_id=64)


def test_ids_come_after_the_image_codes_and_decode_back(text):
    for caption in ("a dog runs to the right", "一只小狗向右跑", "a zebra-ish ☃ word nobody trained"):
        ids = text.encode(caption)
        assert min(ids) >= 64 and max(ids) < 64 + len(text)
        assert text.decode(ids) == caption


def test_the_duration_is_part_of_the_prompt(text):
    long, short = text.prompt("a dog", 4.0), text.prompt("a dog", 0.5)
    assert len(long) == len(short) and sum(a != b for a, b in zip(long, short)) == 1
    assert text.prompt("", 4.0) == long[: len(text.prompt("", 4.0))]  # the unconditional prompt keeps it


def test_padding_goes_in_front_and_overflow_is_counted(text):
    ids = text.encode("a dog")
    padded = text.pad_left(ids, len(ids) + 3)
    assert padded == [text.pad] * 3 + ids
    with pytest.raises(ValueError, match="2 more than"):
        text.pad_left(ids, len(ids) - 2)


def test_the_same_captions_make_the_same_model(world, text):
    assert train_text(read_captions(world, 2000, seed=0), 500) == text.model


def test_too_few_pieces_is_a_clear_error(world):
    with pytest.raises(ValueError, match="cannot train a text model of 50 pieces"):
        train_text(read_captions(world, 200, seed=0), 50)


def test_more_characters_than_pieces_are_spelt_in_bytes():
    rng = np.random.default_rng(0)
    captions = ["".join(map(chr, rng.integers(0x4E00, 0x4E00 + 1500, 8))) for _ in range(3000)]
    text = TextTokenizer(train_text(captions, 900), 0)
    assert all(text.decode(text.encode(caption)) == caption for caption in captions[:50])


def test_split_words():
    assert split_words("A dog, the DOG!") == ["a", "dog", "the", "dog"]
    assert split_words("小狗 runs") == ["小", "狗", "runs"]


def test_the_words_of_gpt2():
    """Ids that GPT-2 is known to have; no network is asked."""
    text = GPT2Tokenizer()
    known = {
        "Hello world": [15496, 995],
        "The quick brown fox": [464, 2068, 7586, 21831],
        "\n": [198],
        " the": [262],
    }
    assert {words: text.encode(words) for words in known} == known
    assert len(text) == 50257 and text.pad == 50256
    for caption in ("a dog runs to the right", "一只小狗向右跑", "naïve ☃ café\n\nindeed"):
        assert text.decode([text.pad, *text.encode(caption)]) == caption
    assert text.prompt(" a dog ", 4.0, "{prompt}") == text.encode("a dog")
    assert text.pad_left([5], 3) == [50256, 50256, 5]
