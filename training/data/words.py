"""Encodes texts word by word, so that a word that many texts have is encoded once.

A byte-level tokenizer cuts a text at its added tokens, cuts the rest into words with a pattern, and
encodes each word on its own. Here Python cuts the words, and their tokens are kept: a word costs a
look-up. That is done for ASCII texts, where a pattern of letters, digits and spaces needs no table
of Unicode, and for tokenizers that are seen to agree on a sample; all others encode for themselves.
"""

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chat import Span

_KEPT = 16_000_000
"""Bytes of the words whose tokens are kept."""
_BESIDE = 200
"""Bytes that a word takes beside its characters."""
_BYTES = 4
"""Bytes of a token's id."""
_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
)
_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9"}
_NO_ASCII = dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Mc", "Nl", "No"), "\u0301")
"""Classes without a character of ASCII, as one that no such text has."""
_READABLE = re.compile(
    r"\\[sSrnt]|\\p\{(?P<name>\w+)\}|\[\^?|\]|\(\?i?:|\(\?!\\S\)|\)|\{\d+(?:,\d*)?\}(?!\+)"
    r"|[|?+*]|[ '/\-A-Za-z0-9]"
)
"""The parts of a pattern that mean the same to Python as to the tokenizers library, and to a word
alone as to one in a text."""
_ALPHABET = "".join(map(chr, range(128)))
_ODD = "aS1'. \n\t"


class WordEncoding:
    """The encoding of a text by its words, as the tokenizers library's `Encoding` has it.

    Args:
        words: the words, in order.
        parts: the ids of each one's tokens, as bytes of int32.
        spans: the characters of the tokens of a word, where they are not one token for all of it.
    """

    def __init__(
        self, words: list[str], parts: list[bytes], spans: Mapping[str, Sequence[Span]]
    ) -> None:
        self._words = words
        self._parts = parts
        self._spans = spans
        self.ids: NDArray[np.int32] = np.frombuffer(b"".join(parts), np.int32)
        """Shape (tokens,)."""
        # Borders stand at the beginning of most texts, so words are counted as far as needed.
        self._starts = [0]
        self._firsts = [0]

    @property
    def offsets(self) -> list[Span]:
        """The characters of each token."""
        starts = accumulate(map(len, self._words), initial=0)
        return [
            (start + first, start + last)
            for word, start in zip(self._words, starts, strict=False)
            for first, last in self._spans_of(word)
        ]

    def char_to_token(self, position: int) -> int | None:
        """The token that holds a character; None if none does."""
        while self._starts[-1] <= position:
            if not self._reads_on():
                return None
        word = bisect_right(self._starts, position) - 1
        at = position - self._starts[word]
        for number, (first, last) in enumerate(self._spans_of(self._words[word])):
            if first <= at < last:
                return self._firsts[word] + number
        return None

    def token_to_chars(self, index: int) -> Span | None:
        """The characters of a token; None beyond the last one."""
        while self._firsts[-1] <= index:
            if not self._reads_on():
                return None
        word = bisect_right(self._firsts, index) - 1
        start = self._starts[word]
        first, last = self._spans_of(self._words[word])[index - self._firsts[word]]
        return start + first, start + last

    def _reads_on(self) -> bool:
        """True if there is another word, whose place is known now."""
        word = len(self._starts) - 1
        if word >= len(self._words):
            return False
        self._starts.append(self._starts[-1] + len(self._words[word]))
        self._firsts.append(self._firsts[-1] + len(self._parts[word]) // _BYTES)
        return True

    def _spans_of(self, word: str) -> Sequence[Span]:
        return self._spans.get(word) or [(0, len(word))]


class TextEncoder:
    """Encodes texts without special tokens at their ends.

    Args:
        tokenizer: a tokenizer of the tokenizers library; its added tokens must not change later.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, bytes] = {}
        self._spans: dict[str, list[Span]] = {}
        self._size = 0
        self._cutter = _cutter_of(tokenizer)
        if self._cutter is not None and not self._agrees():
            self._cutter = None

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """The encodings of texts: the tokenizers library's, or those of their words."""
        cut = [None if self._cutter is None else self._cutter.cut(text) for text in texts]
        self._learn(words for words in cut if words is not None)
        whole = [text for text, words in zip(texts, cut, strict=True) if words is None]
        others = iter(self._encoded(whole))
        return [
            next(others)
            if words is None
            else WordEncoding(words, list(map(self._ids.__getitem__, words)), self._spans)
            for words in cut
        ]

    def _learn(self, texts: Iterable[Sequence[str]]) -> None:
        """Encode the words whose tokens are not kept."""
        words: set[str] = set().union(*texts)
        if self._size > _KEPT:
            # Encodings that are still in use keep the spans of theirs.
            self._ids, self._spans, self._size = {}, {}, 0
        new = list(words - self._ids.keys())
        for word, encoding in zip(new, self._encoded(new), strict=True):
            self._ids[word] = array("i", encoding.ids).tobytes()
            spans = encoding.offsets
            if spans != [(0, len(word))]:
                self._spans[word] = spans
        self._size += sum(map(len, new)) + _BESIDE * len(new)

    def _encoded(self, texts: list[str]) -> list[Any]:
        if not texts:
            return []
        encodings: list[Any] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _agrees(self) -> bool:
        """True if the words give the tokens of texts with all pairs of characters, and with the
        longer combinations that patterns tell apart."""
        pairs = "".join(map("".join, product(_ALPHABET, repeat=2)))
        odd = "".join(map("".join, product(_ODD, repeat=4)))
        texts = [pairs, odd]
        by_words = self.encode_batch(texts)
        return all(
            isinstance(own, WordEncoding) and own.ids.tolist() == whole.ids
            for own, whole in zip(by_words, self._encoded(texts), strict=True)
        )


class _Cutter:
    """Cuts texts into added tokens and words.

    Args:
        pattern: of a word.
        added: added tokens that stand in a text as they are.
        other: added tokens that take spaces with them, or have other conditions.
    """

    def __init__(self, pattern: str, added: Iterable[str], other: Iterable[str]) -> None:
        self._word = re.compile(pattern, re.ASCII)
        self._added = _any_of(added)
        self._other = _any_of(other)

    def cut(self, text: str) -> list[str] | None:
        """The words of a text; None if the tokenizer has to encode it."""
        if not text.isascii() or (self._other is not None and self._other.search(text)):
            return None
        words: list[str] = []
        for number, part in enumerate([text] if self._added is None else self._added.split(text)):
            if number % 2:
                words.append(part)
            else:
                words += self._word.findall(part)
        return words if sum(map(len, words)) == len(text) else None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of some tokens."""
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None


def _cutter_of(tokenizer: Any) -> _Cutter | None:
    """Cuts texts as a tokenizer does; None if that is not known."""
    from tokenizers.models import BPE

    normaliser = _state_of(tokenizer.normalizer)
    is_bpe = isinstance(tokenizer.model, BPE) and not tokenizer.model.dropout
    is_plain = normaliser.get("type") in (None, "NFC") and not tokenizer.encode_special_tokens
    pattern = _pattern_of(_state_of(tokenizer.pre_tokenizer))
    keeps_offsets = not any(map(_moves_offsets, _steps(_state_of(tokenizer.post_processor))))
    if pattern is None or not (is_bpe and is_plain and keeps_offsets):
        return None
    added = list(tokenizer.get_added_tokens_decoder().values())
    other = [
        token.content
        for token in added
        if token.lstrip or token.rstrip or token.single_word or token.normalized
    ]
    return _Cutter(pattern, {token.content for token in added} - {*other}, other)


def _pattern_of(state: dict[str, Any]) -> str | None:
    """The pattern with which a byte-level pre-tokenizer cuts words, for Python; None for others."""
    *before, last = _steps(state) or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return _as_python(_GPT2) if last["use_regex"] else None
    split = before[0]
    is_split = split.get("type") == "Split" and len(before) == 1 and not last["use_regex"]
    if not is_split or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = split["pattern"].get("Regex")
    return None if pattern is None else _as_python(pattern)


def _as_python(pattern: str) -> str | None:
    """A pattern of the tokenizers library for ASCII texts, in Python's notation; None if it has
    parts that may mean something else there."""
    parts: list[str] = []
    in_class = False
    at = 0
    while at < len(pattern):
        part = _READABLE.match(pattern, at)
        if part is None:
            return None
        at = part.end()
        text, name = part.group(), part["name"]
        if name is not None:
            characters = {**_CLASSES, **_NO_ASCII}.get(name)
            if characters is None:
                return None
            text = characters if in_class else f"[{characters}]"
        elif text[0] in "[]":
            if in_class == (text != "]"):  # a class in a class
                return None
            in_class = not in_class
        parts.append(text)
    return "".join(parts)


def _moves_offsets(step: dict[str, Any]) -> bool:
    """True if a step after the encoding may change the offsets of a text by what is around it."""
    if step.get("type") == "ByteLevel":
        return bool(step["trim_offsets"] and step["add_prefix_space"])
    return step.get("type") not in (None, "TemplateProcessing")


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state.get("type") != "Sequence":
        return [state]
    steps: list[dict[str, Any]] = state.get("pretokenizers") or state.get("processors") or []
    return steps


def _state_of(component: Any) -> dict[str, Any]:
    """A component of a tokenizer as its file has it; empty if there is none."""
    if component is None:
        return {}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state
