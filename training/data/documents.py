"""The documents of a flat row: their borders, what they begin with together, and groups of them
that are alike in length."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_PADDED = 8
_LONGER = 10 / 9
"""A document joins a group whose longest has at most _PADDED tokens more, or is at most _LONGER
times as long."""

_WORTH_SHARING = 0.05
"""Least share of the tokens that need not be computed: copies for attention cost something, too."""


@dataclass(frozen=True)
class Shared:
    """The places on a row whose documents share what they begin with, which is there once.

    A token's hidden state depends on the tokens before it alone, so it is the same in all of them.
    """

    index: torch.Tensor
    """(tokens of all documents,): the place of each on the row."""
    back: torch.Tensor
    """(tokens of the row,): the place of each among those of all documents, in one of them."""
    copies: torch.Tensor
    """(tokens of all documents,): True where `back` names another document's."""

    @classmethod
    def of(cls, documents: Sequence[NDArray[np.int32]]) -> "Shared | None":
        """The places, if documents have enough in common; each keeps a token of its own.

        Args:
            documents: token ids of each.
        """
        # Next to each other in the order of a dictionary are those that have most in common.
        order = sorted(range(len(documents)), key=lambda n: documents[n].astype(">i4").tobytes())
        lengths = [len(document) for document in documents]
        starts = np.cumsum([0, *lengths])
        index = np.empty(starts[-1], np.int64)
        back: list[NDArray[np.int64]] = []
        first, before = 0, order[0]
        for number in order:
            common = 0 if number == order[0] else _common(documents[before], documents[number])
            start, end = starts[number], starts[number + 1]
            index[start : start + common] = index[starts[before] :][:common]
            index[start + common : end] = first + np.arange(end - start - common)
            back.append(np.arange(start + common, end))
            first, before = first + end - start - common, number
        if first > (1 - _WORTH_SHARING) * len(index):
            return None
        copies = np.ones(len(index), np.bool_)
        copies[(joined := np.concatenate(back))] = False
        return cls(*map(torch.from_numpy, (index, joined, copies)))

    def to(self, device: torch.device) -> "Shared":
        """The same on another device."""
        return Shared(*(moved(part, device) for part in (self.index, self.back, self.copies)))


@dataclass(frozen=True)
class Groups:
    """Documents in groups, padded at the end to the longest of their group."""

    shapes: tuple[tuple[int, int], ...]
    """Documents and tokens of each group."""
    index: torch.Tensor
    """(padded tokens,): which token of the row is at each place."""
    inverse: torch.Tensor
    """(tokens,): the place of each token of the row."""
    padding: torch.Tensor
    """(padded tokens,): True where there is none, and `index` repeats another."""


@dataclass(frozen=True)
class Documents:
    """The documents of one row without padding, in their order, each with all of its tokens."""

    lengths: tuple[int, ...]
    """Tokens of each; on the host, so that nobody waits for a GPU to read them."""
    borders: torch.Tensor
    """(documents + 1,), int32: where each begins, and the end."""
    numbers: torch.Tensor
    """(1, tokens), int32: the document of each token."""
    shared: Shared | None = None
    """None if every token has its own place, in the documents' order."""
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, lengths: NDArray[np.int32], shared: Shared | None = None) -> "Documents":
        """Documents of these lengths, each at least 1."""
        borders = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return cls(
            tuple(lengths.tolist()),
            torch.from_numpy(borders),
            torch.from_numpy(numbers)[None],
            shared,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self.numbers.shape[1]

    @property
    def on_row(self) -> int:
        """Tokens of the row."""
        return self.tokens if self.shared is None else len(self.shared.back)

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where tokens, counted over all documents, are on the row."""
        return tokens if self.shared is None else self.shared.index[tokens]

    def to(self, device: torch.device) -> "Documents":
        """The same, its tensors on another device."""
        shared = None if self.shared is None else self.shared.to(device)
        return Documents(
            self.lengths, moved(self.borders, device), moved(self.numbers, device), shared
        )

    @cached_property
    def groups(self) -> Groups:
        """The documents in groups of like length; computed when a layer first asks."""
        lengths = np.array(self.lengths)
        order = np.argsort(-lengths, kind="stable")
        shapes = _shapes(lengths[order])
        padded = np.repeat([size for _, size in shapes], [count for count, _ in shapes])
        own = lengths[order]
        within = np.arange(padded.sum()) - np.repeat(np.cumsum(padded) - padded, padded)
        padding = within >= np.repeat(own, padded)
        starts = (np.cumsum(lengths) - lengths)[order]
        index = np.repeat(starts, padded) + np.where(padding, 0, within)
        inverse = np.empty(self.tokens, np.int64)
        inverse[index[~padding]] = np.flatnonzero(~padding)
        device = self.borders.device
        return Groups(
            shapes, *(moved(torch.from_numpy(part), device) for part in (index, inverse, padding))
        )

    def mask(self, size: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of a document, (size, size); made once for all layers.

        Args:
            size: tokens of the document.
            window: number of tokens that a token sees, itself included; None for all before it.
            dtype: type of the scores.
        """
        key = (size, window, dtype)
        if key not in self._masks:
            device = self.borders.device
            is_seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
            if window is not None:
                is_seen = is_seen.triu(1 - window)
            mask = torch.zeros(size, size, dtype=dtype, device=device)
            self._masks[key] = mask.masked_fill_(~is_seen, torch.finfo(dtype).min)
        return self._masks[key]


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Number of tokens that both begin with, without the last of the other."""
    size = min(len(one), len(other) - 1)
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if differ.size else size


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; the host does not wait for a copy to a GPU."""
    # A copy from pinned memory is queued behind the work of the GPU; torch waits for any other.
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _shapes(lengths: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Documents and longest of each group.

    Args:
        lengths: of the documents, the longest first.
    """
    shapes: list[tuple[int, int]] = []
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        least = min(longest - _PADDED, longest / _LONGER)
        end = int(np.searchsorted(-lengths, -least, side="right"))
        shapes.append((end - first, longest))
        first = end
    return tuple(shapes)
