"""Turns texts into token ids: a long text window by window, because an encoding takes a hundred
times the memory of its text.

Windows overlap. They are joined inside a run of tokens that both have, which makes the result the
encoding of the whole text: what a tokenizer does with a word depends on its surroundings only.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chat import Span
from .words import TextEncoder

WINDOW = 16_000
"""Characters of a window; a shorter text is encoded as a whole."""
_OVERLAP = 1_000
_RUN = 8
"""Tokens in a row that two windows must have in common to be joined."""
_AT_ONCE = {True: 4, False: 2}
"""Windows that the tokenizer's threads encode together, by whether the text is ASCII: a character
of other text may be several tokens."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a text."""

    encoding: Any
    """The encoding of a window."""
    start: int = 0
    """Position of the window's first character in the text."""
    first: int = 0
    """Index of the window's first token that belongs to the piece."""
    last: int | None = None
    """Index after the last one; None: the last of the window."""
    stop: int | None = None
    """Position after the window's last character in the text, if no other piece has any of it."""
    array: NDArray[np.int32] | None = None
    """The ids, where they are computed already."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The ids of the tokens, shape (tokens,)."""
        if self.array is not None:
            return self.array
        return np.array(self.encoding.ids[self.first : self.last], np.int32)

    @property
    def offsets(self) -> list[Span]:
        """The characters of each token, in the text."""
        offsets: list[Span] = self.encoding.offsets
        if not self.start:
            return offsets[self.first : self.last]
        return [
            (start + self.start, stop + self.start)
            for start, stop in offsets[self.first : self.last]
        ]


def token_at(piece: Piece, position: int) -> tuple[int, int, int]:
    """The first token of a piece that ends after a position of the text.

    Returns:
        Its index in the piece, its first character, and the character after the token before it;
        the number of tokens and the piece's end if there is none.
    """
    if piece.stop is not None:
        index = piece.encoding.char_to_token(position - piece.start)
        if index is not None:
            first = piece.encoding.token_to_chars(index)[0]
            before = piece.encoding.token_to_chars(index - 1) if index else (0, 0)
            if before is not None:
                return index, first + piece.start, before[1] + piece.start
    offsets = piece.offsets
    index = bisect_right(offsets, position, key=itemgetter(1))
    before_it = offsets[index - 1][1] if index else piece.start
    return index, offsets[index][0] if index < len(offsets) else before_it, before_it


class Tokens:
    """Token ids that are collected piece by piece, and which of them are trained.

    They grow in place: joined at the end, they would take twice their memory for a moment.
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._trainable = bytearray()

    def __len__(self) -> int:
        return len(self._trainable)

    def add(self, ids: NDArray[np.int32], trainable: NDArray[np.bool_]) -> None:
        """Add tokens; both arguments have the shape (tokens,)."""
        self._ids.frombytes(ids.view(np.uint8).data)
        self._trainable += trainable.view(np.uint8).data

    def add_special(self, ids: Sequence[int], trainable: bool) -> None:
        """Add a few tokens, all of which are trained or none."""
        self._ids.extend(ids)
        self._trainable += bytes([trainable]) * len(ids)

    def ends_in(self, ids: Sequence[int]) -> bool:
        """True if the last tokens are these."""
        return self._ids[-len(ids) :].tolist() == [*ids]

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, trainable), both of shape (tokens,); nothing can be added afterwards."""
        if not self._trainable:
            return np.empty(0, np.int32), np.empty(0, np.bool_)
        return np.frombuffer(self._ids, np.int32), np.frombuffer(self._trainable, np.bool_)


class Divider:
    """Divides texts at special tokens, each side of which a tokenizer encodes on its own.

    So a piece that many texts have, such as the tools of a data set, is encoded once.

    Args:
        tokenizer: a fast tokenizer.
        source: the chat template that writes the special tokens.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        added = list(tokenizer.added_tokens_decoder.values())
        named = set(map(str, tokenizer.special_tokens_map.values()))
        marks = [
            token.content
            for token in added
            if token.special
            and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and (token.content in source or token.content in named)
            and not any(token.content in other.content for other in added if other is not token)
        ]
        self._border = re.compile("|".join(map(re.escape, marks))) if marks else None
        self.mark: str | None = marks[0] if marks else None
        """One of the special tokens."""

    def starts(self, text: str) -> list[int]:
        """Positions at which the pieces of a text begin."""
        if self._border is None:
            return [0]
        starts = [match.start() for match in self._border.finditer(text)]
        return starts if starts[:1] == [0] else [0, *starts]


def encode_divided(
    encoder: TextEncoder, divider: Divider, texts: Sequence[str]
) -> list[Iterator[Piece]]:
    """Encode texts piece by piece; equal pieces are encoded once.

    Args:
        encoder: encodes the texts.
        divider: finds the pieces.
        texts: the texts.

    Returns:
        The pieces of each text, in order.
    """
    divided = [_parts(text, divider.starts(text)) for text in texts]
    different = dict.fromkeys(part for parts in divided for _, part in parts if len(part) <= WINDOW)
    encodings = encoder.encode_batch(list(different))
    encoded = {
        part: (encoding, np.array(encoding.ids, np.int32))
        for part, encoding in zip(different, encodings, strict=True)
    }
    return [_pieces_of(encoder, parts, encoded) for parts in divided]


def _parts(text: str, starts: Sequence[int]) -> list[tuple[int, str]]:
    stops = [*starts[1:], len(text)]
    return [(start, text[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def _pieces_of(
    encoder: TextEncoder,
    parts: Iterable[tuple[int, str]],
    encoded: dict[str, tuple[Any, NDArray[np.int32]]],
) -> Iterator[Piece]:
    for start, part in parts:
        if part in encoded:
            encoding, ids = encoded[part]
            yield Piece(encoding, start, stop=start + len(part), array=ids)
        else:
            for piece in _pieces(encoder.tokenizer, part):
                yield Piece(piece.encoding, start + piece.start, piece.first, piece.last)


def encode(encoder: TextEncoder, texts: Sequence[str]) -> list[Iterator[Piece]]:
    """Encode texts without special tokens at their ends.

    Args:
        encoder: encodes the texts.
        texts: the texts; short ones are encoded in one call, which runs them in parallel.

    Returns:
        The pieces of each text, in order; those of a long text are encoded when they are taken.
    """
    short = [text for text in texts if len(text) <= WINDOW]
    encodings = iter(encoder.encode_batch(short))
    return [
        iter((Piece(next(encodings)),)) if len(text) <= WINDOW else _pieces(encoder.tokenizer, text)
        for text in texts
    ]


def _pieces(encoder: Any, text: str) -> Iterator[Piece]:
    windows = _windows(encoder, text)
    before = next(windows)
    end = WINDOW
    for window in windows:
        joint = _joint(before, window, end)
        if joint is not None:
            yield Piece(before.encoding, before.start, before.first, joint[0])
            before = Piece(window.encoding, window.start, joint[1])
        else:  # as in a word that is longer than the overlap: it is divided
            yield before
            rest = text[end : window.start + WINDOW]
            before = Piece(encoder.encode(rest, add_special_tokens=False), end)
        end = window.start + WINDOW
    yield before


def _windows(encoder: Any, text: str) -> Iterator[Piece]:
    starts = iter(range(0, len(text) - _OVERLAP, WINDOW - _OVERLAP))
    at_once = _AT_ONCE[text.isascii()]
    while some := list(islice(starts, at_once)):
        parts = [text[start : start + WINDOW] for start in some]
        encodings = encoder.encode_batch(parts, add_special_tokens=False)
        yield from map(Piece, encodings, some)


def _joint(before: Piece, after: Piece, end: int) -> tuple[int, int] | None:
    """The middle of the longest run of tokens that two windows have in common.

    Args:
        before: a window.
        after: the next one.
        end: position after the last character of the first.

    Returns:
        The index of the same token in both windows; None if the run is too short.
    """
    place = {token: index for index, token in _tokens(after, after.start, end)}
    longest = length = previous = 0
    last = (0, 0)
    for index, token in _tokens(before, after.start, end):
        other = place.get(token, -1)
        follows = length > 0 and other == previous + 1
        length = length + 1 if follows else int(other >= 0)
        previous = other
        if length > longest:
            longest, last = length, (index, other)
    middle = longest // 2
    return (last[0] - middle, last[1] - middle) if longest >= _RUN else None


def _tokens(piece: Piece, start: int, end: int) -> Iterator[tuple[int, tuple[int, Span]]]:
    """(index in the window, (id, characters)) of a piece's tokens inside [start, end)."""
    tokens = zip(piece.ids.tolist(), piece.offsets, strict=True)
    for index, (token, span) in enumerate(tokens, start=piece.first):
        if start <= span[0] and span[1] <= end:
            yield index, (token, span)
