"""Texts that are encoded word by word have the tokens that the tokenizers library gives them."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from finray.training.data import words
from finray.training.data.words import TextEncoder, WordEncoding

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im_end|><|im_start|>")
PARTS = (
    *("the", "model", " learns", "THE", "Learns", "'s", "'RE", " 'll", "12345", " 7", "3.14"),
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        " \n \n",
        '{"a": [1]}',
        "...",
        "!?\n",
        "/",
        "<tool>",
        "x" * 40,
    ),
    *("\x00", "\x1c", "\x7f", "x" * 40, *SPECIAL),
)
OTHERS = ("é", "漢字", "\u00a0", "ſ", "²", "\u0301")


def byte_level(pattern: str | None, trims: bool = False, **settings: Any) -> Tokenizer:
    """A byte-level tokenizer with a pattern of words; None: that of GPT-2."""
    core = Tokenizer(models.BPE(**settings))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        core.pre_tokenizer = own
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, own])
        core.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(PARTS[:12])] * 3, trainer)
    core.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trims)
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    core.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return core


@pytest.fixture(
    scope="module",
    params=[(None, False), (None, True), (QWEN2, False), (LLAMA3, True), (O200K, False)],
    ids=["gpt2", "gpt2-trimmed", "qwen2", "llama3-trimmed", "o200k"],
)
def core(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(*request.param)


@pytest.fixture(scope="module")
def encoder(core: Tokenizer) -> TextEncoder:
    return TextEncoder(core)


def assert_equal(encoding: Any, whole: Any, text: str) -> None:
    assert list(encoding.ids) == whole.ids
    assert encoding.offsets == whole.offsets
    for index in range(len(whole.ids)):
        assert encoding.token_to_chars(index) == whole.token_to_chars(index)
    for position in random.Random(0).sample(range(len(text) + 1), len(text) + 1):
        assert encoding.char_to_token(position) == whole.char_to_token(position)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), max_size=4))
def test_words_have_the_tokens_of_the_whole_text(
    core: Tokenizer, encoder: TextEncoder, texts: list[str]
) -> None:
    encodings = encoder.encode_batch(texts)
    for text, encoding in zip(texts, encodings, strict=True):
        assert isinstance(encoding, WordEncoding)
        assert_equal(encoding, core.encode(text, add_special_tokens=False), text)


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.sampled_from((*PARTS, *OTHERS, "<mask>")), max_size=9))
def test_other_texts_keep_their_place(
    core: Tokenizer, encoder: TextEncoder, parts: list[str]
) -> None:
    """The library encodes a text with other characters, or with a token that takes spaces."""
    texts = ["".join(parts), "the model", " <mask>", "".join(reversed(parts))]
    for text, encoding in zip(texts, encoder.encode_batch(texts), strict=True):
        is_plain = text.isascii() and "<mask>" not in text
        assert isinstance(encoding, WordEncoding) == is_plain
        assert_equal(encoding, core.encode(text, add_special_tokens=False), text)


def test_an_encoding_outlives_the_words_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_KEPT", 500)
    core = byte_level(None)
    encoder = TextEncoder(core)
    texts = [f"word{number} and zq{number}j" for number in range(30)]
    encodings = [encoder.encode_batch([text])[0] for text in texts]
    for text, encoding in zip(texts, encodings, strict=True):
        assert_equal(encoding, core.encode(text, add_special_tokens=False), text)
    assert len(encoder._ids) < 10


def unlike(name: str) -> Tokenizer:
    """A tokenizer whose words Python does not cut."""
    core = byte_level(LLAMA3 if name != "digits" else r"\p{Nl}|\p{N}+|\D+")
    split = pre_tokenizers.Split(Regex(LLAMA3), "removed" if name == "removed" else "isolated")
    own = pre_tokenizers.ByteLevel(add_prefix_space=name == "prefix", use_regex=False)
    if name in ("removed", "prefix"):
        core.pre_tokenizer = pre_tokenizers.Sequence([split, own])
    if name == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    if name == "lower":
        core.normalizer = normalizers.Lowercase()
    if name == "first":
        core.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    return core


@pytest.mark.parametrize(
    "name", ["removed", "prefix", "metaspace", "lower", "first", "digits", "dropout"]
)
def test_other_tokenizers_encode_for_themselves(name: str) -> None:
    core = byte_level(LLAMA3, dropout=0.5) if name == "dropout" else unlike(name)
    (encoding,) = TextEncoder(core).encode_batch([" The model learns 12345"])
    assert not isinstance(encoding, WordEncoding)
