"""Runs of words as 64-bit hashes, of many texts at once.

A word is a run of letters and digits, in lower case. A character from U+0800 on that is no sign is
a word of its own, as most scripts there have no spaces. Everything else separates words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]
_Number = TypeVar("_Number", np.uint64, np.int64)

_SEPARATOR, _LETTER, _OWN_WORD = 0, 1, 2
_MULTIPLIER = 0x9E3779B97F4A7C15
_RUN_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_TOGETHER = 2**16
"""Characters that are hashed at once: they stay in the processor's cache."""
_POWERS = 2**16
"""Powers that are computed once; more as texts need them."""


@dataclass(frozen=True)
class Runs:
    """The runs of words of several texts."""

    hashes: Hashes
    """All runs, text by text in their order, repetitions included."""
    offsets: Offsets
    """Text n has hashes[offsets[n]:offsets[n + 1]]."""
    words: Offsets
    """Number of words of each text."""


def word_runs(texts: Sequence[str], length: int) -> Runs:
    """Hash the runs of neighbouring words; a text with fewer words is one run, without any none.

    Args:
        texts: the texts; what they contain beside words does not count.
        length: words in a run.
    """
    parts = [_runs(part, length) for part in _parts(texts)]
    sizes = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
    return Runs(
        np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)]),
        np.cumsum(sizes),
        np.concatenate([np.zeros(0, np.int64), *(part.words for part in parts)]),
    )


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Consecutive texts that are hashed at once."""
    first = size = 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= _TOGETHER:
            yield texts[first : number + 1]
            first, size = number + 1, 0
    if first < len(texts):
        yield texts[first:]


def _runs(texts: Sequence[str], length: int) -> Runs:
    words, offsets = _words(texts)
    counts = np.diff(offsets)
    sizes = np.where(counts > 0, np.maximum(1, counts - length + 1), 0)
    run_offsets = np.concatenate(([0], np.cumsum(sizes)))
    # First the runs at all words, those across the borders of texts among them.
    every = words.copy()
    for place in range(1, length):
        every *= _RUN_MULTIPLIER
        if place < len(words):
            every[: len(words) - place] += words[place:]
    left = np.repeat(offsets[1:], counts) - np.arange(len(words))
    is_whole = left >= length
    short = np.flatnonzero((counts > 0) & (counts < length))
    for number in short:
        start, stop = offsets[number], offsets[number + 1]
        every[start] = _polynomial(words[start:stop], length)
        is_whole[start] = True
    return Runs(mixed(every[is_whole]), run_offsets, counts)


def _polynomial(words: Hashes, length: int) -> np.uint64:
    """The hash of a text that is shorter than a run, as if words of 0 followed."""
    total = np.zeros(1, np.uint64)
    for place in range(length):
        total *= _RUN_MULTIPLIER
        if place < len(words):
            total += words[place]
    return np.uint64(total[0])


def mixed(values: Hashes) -> Hashes:
    """Spread values over 64 bits (the finaliser of splitmix64); changes them in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def distinct(values: NDArray[_Number]) -> NDArray[_Number]:
    """The values in order, each once: numpy's `unique`, in a fraction of the time.

    Args:
        values: shape (values,).
    """
    ordered = np.sort(values)
    is_new = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return ordered[is_new]


def _words(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """The hash of every word, and where the words of each text begin."""
    encoded = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    joined = b"".join([b"\n", b"\n".join(encoded), b"\n"])
    content = np.frombuffer(joined, np.uint8)
    first, last = _borders(joined) if joined.isascii() else _borders_of_utf8(content)
    sums = np.zeros(len(content) + 1, np.uint64)
    powers, inverse = _powers(len(content))
    np.multiply(content, powers, out=sums[1:])
    np.cumsum(sums, out=sums)
    hashes = mixed((sums[last] - sums[first]) * inverse[first])
    text_ends = np.cumsum([len(part) + 1 for part in encoded])
    return hashes, np.concatenate(([0], np.searchsorted(first, text_ends))).astype(np.int64)


def _borders(content: bytes) -> tuple[Offsets, Offsets]:
    """Where words begin and end in ASCII that begins and ends with a separator."""
    # As fast as reading it; numpy makes a wide index of each byte.
    is_word = np.frombuffer(content.translate(_IS_WORD), np.bool_)
    borders = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    return borders[::2], borders[1::2]


def _borders_of_utf8(content: NDArray[np.uint8]) -> tuple[Offsets, Offsets]:
    """As `_borders`, of UTF-8."""
    kinds = np.frombuffer(_without_signs(content).tobytes().translate(_KINDS), np.uint8)
    is_word = kinds > _SEPARATOR
    before = np.zeros(len(content), np.bool_)
    before[1:] = is_word[:-1]
    starts = is_word & ~before
    own = np.flatnonzero(kinds == _OWN_WORD)
    starts[own] = True
    after = own + _LENGTHS[content[own]]
    starts[after] |= is_word[after]
    return np.flatnonzero(starts), np.flatnonzero(before & (~is_word | starts))


def _without_signs(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """UTF-8 with spaces in place of signs: U+0080 to U+00BF and U+2000 to U+2FFF."""
    content = content.copy()
    for lead, length in ((0xC2, 2), (0xE2, 3)):
        places = np.flatnonzero(content == lead)
        for n in range(length):
            content[places + n] = 0x20
    return content


def _kinds() -> bytes:
    kinds = np.zeros(256, np.uint8)
    for letters in (b"abcdefghijklmnopqrstuvwxyz0123456789", range(0x80, 0xE0)):
        kinds[list(letters)] = _LETTER
    kinds[0xE0:0xF8] = _OWN_WORD
    return kinds.tobytes()


def _lengths() -> NDArray[np.int64]:
    lengths = np.ones(256, np.int64)
    lengths[0xE0:0xF0], lengths[0xF0:] = 3, 4
    return lengths


_KINDS = _kinds()
_LENGTHS = _lengths()
_IS_WORD = bytes(kind > _SEPARATOR for kind in _KINDS)


def _make_powers(count: int) -> tuple[Hashes, Hashes]:
    """The powers of an odd number modulo 2^64, and their inverses."""
    inverse = pow(_MULTIPLIER, -1, 2**64)
    tables = []
    for factor in (_MULTIPLIER, inverse):
        powers = np.full(count, factor, np.uint64)
        powers[0] = 1
        tables.append(np.multiply.accumulate(powers))
    return tables[0], tables[1]


_tables = [_make_powers(_POWERS)]


def _powers(count: int) -> tuple[Hashes, Hashes]:
    while len(_tables[0][0]) < count:
        _tables[0] = _make_powers(2 * len(_tables[0][0]))
    return _tables[0][0][:count], _tables[0][1][:count]
