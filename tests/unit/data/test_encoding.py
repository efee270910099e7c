"""Long texts are encoded in windows: the tokens are those of the whole text."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.data import encoding
from finray.training.data.encoding import encode
from finray.training.data.words import TextEncoder

LETTERS = "the model learns to ask. \n\t äß漢字🙂 <|im_end|> 12345"


def all_of(encoder: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    (pieces,) = encode(encoder, [text])
    parts = list(pieces)
    assert len(parts) > 1
    return [i for part in parts for i in part.ids], [s for part in parts for s in part.offsets]


def metaspace() -> Any:
    """A tokenizer that puts a mark before the first word, as Llama 2's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(
        ["the model learns to answer questions. a an one two three"] * 9,
        trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False),
    )
    return core


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def encoder(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return TextEncoder(tokenizer.backend_tokenizer if request.param == "bytes" else metaspace())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), size=st.integers(701, 3000))
def test_windows_give_the_tokens_of_the_whole_text(encoder: Any, seed: int, size: int) -> None:
    source = random.Random(seed)
    words = ["".join(source.choices(LETTERS, k=source.randint(1, 9))) for _ in range(size)]
    text = " ".join(words)[:size]
    whole = encoder.tokenizer.encode(text, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "WINDOW", 400)
        patch.setattr(encoding, "_OVERLAP", 150)
        ids, offsets = all_of(encoder, text)
    assert ids == whole.ids
    assert offsets == whole.offsets


def test_a_word_longer_than_a_window_is_divided(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens still make the whole word, and what follows it is not changed."""
    monkeypatch.setattr(encoding, "WINDOW", 400)
    monkeypatch.setattr(encoding, "_OVERLAP", 50)
    core = tokenizer.backend_tokenizer
    text = "one " + "answerquestions" * 200 + " two three " * 60
    ids, offsets = all_of(TextEncoder(core), text)
    assert core.decode(ids, skip_special_tokens=False) == text
    assert [start for start, _ in offsets[1:]] == [stop for _, stop in offsets[:-1]]
    assert ids[-100:] == core.encode(text, add_special_tokens=False).ids[-100:]


def test_short_and_long_texts_keep_their_order(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "WINDOW", 40)
    monkeypatch.setattr(encoding, "_OVERLAP", 20)
    core = tokenizer.backend_tokenizer
    texts = ["one", "two three " * 20, "four", "five six seven " * 9]
    for text, pieces in zip(texts, encode(TextEncoder(core), texts), strict=True):
        ids = [i for piece in pieces for i in piece.ids]
        assert core.decode(ids, skip_special_tokens=False) == text
