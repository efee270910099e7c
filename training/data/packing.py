"""Bin packing of documents into sequences of a fixed capacity.

Best-fit-decreasing is fast, and close to the bound where short documents fill the gaps. Where all
documents have about the same share of the capacity, filling one bin after the other is better.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ENOUGH = 1.001
"""Bins over their lower bound above which another way of packing is tried."""
_POOR = 1.01
"""Bins over their lower bound above which none of them are worth keeping."""


@dataclass(frozen=True)
class Bins:
    """An assignment of documents to bins; a bin becomes a sequence."""

    documents: Indices
    """The index of every document, grouped by bin."""
    offsets: Indices
    """Bin b contains documents[offsets[b]:offsets[b + 1]]; there is one more offset than bins."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: NDArray[np.int32], capacity: int) -> Bins:
    """Pack documents, the longest first, each into the fullest bin that has enough space.

    Documents of equal length are placed together: the best-fitting bin receives as many of them
    as it can hold, so the work grows with the number of distinct lengths. Deterministic.

    Args:
        lengths: tokens of each document, 1 ≤ length ≤ capacity.
        capacity: tokens that a bin can hold.
    """
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    space = _Space(capacity)
    placed = [
        space.place(int(length), int(count))
        for length, count in zip(distinct[::-1], counts[::-1], strict=True)
    ]
    bin_of = np.concatenate(placed) if placed else np.zeros(0, np.int64)
    documents = order[np.argsort(bin_of, kind="stable")]
    sizes = np.bincount(bin_of, minlength=space.bins)
    return Bins(documents, np.concatenate(([0], np.cumsum(sizes))))


def with_less_waste(bins: Bins, lengths: NDArray[np.int32], capacity: int) -> Bins:
    """The bins, or fewer ones where they are not nearly full and exact filling needs fewer.

    Args:
        bins: an assignment of all documents.
        lengths: tokens of each document.
        capacity: tokens that a bin can hold.
    """
    if len(bins) <= _ENOUGH * fewest_bins(lengths, capacity):
        return bins
    other = fill_exactly(lengths, capacity)
    return other if len(other) < len(bins) else bins


def is_poor(bins: Bins, lengths: NDArray[np.int32], capacity: int) -> bool:
    """True if exact filling may need many bins fewer, so that these are not worth keeping."""
    return len(bins) > _POOR * fewest_bins(lengths, capacity)


def fewest_bins(lengths: NDArray[np.int32], capacity: int) -> int:
    """A number of bins below which documents of these lengths have no space (Martello and Toth).

    Of all documents the tokens, or those over half the capacity, each in a bin of its own, with the
    tokens of the others that have no space beside them: not beside those longer than `capacity -
    least`, if only documents of `least` tokens and more are counted.
    """
    ordered = np.sort(lengths.astype(np.int64))
    sums = np.concatenate(([0], np.cumsum(ordered)))
    half = int(np.searchsorted(ordered, capacity // 2, side="right"))
    first = np.arange(half)  # the first of the documents that are counted
    alone = np.searchsorted(ordered, capacity - ordered[:half], side="right")
    free = (alone - half) * capacity - (sums[alone] - sums[half])
    beside = np.maximum(0, -(-(sums[half] - sums[first] - free) // capacity))
    return max(-(-int(sums[-1]) // capacity), len(ordered) - half + int(beside.max(initial=0)))


def fill_exactly(lengths: NDArray[np.int32], capacity: int) -> Bins:
    """Pack documents bin by bin: the longest one left, and others that fill its bin, or nearly.

    Bins of the same lengths are made together, as often as there are documents. Deterministic.

    Args:
        lengths: tokens of each document, 1 ≤ length ≤ capacity.
        capacity: tokens that a bin can hold.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    sizes, counts = distinct[::-1].tolist(), counts[::-1]
    next_of = np.cumsum(counts) - counts
    left: list[int] = counts.tolist()
    documents, offsets = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    filled = 0
    for longest in range(len(sizes)):
        while left[longest]:
            used = _filling(sizes, left, longest, capacity)
            times = min(left[kind] // number for kind, number in used.items())
            columns = []
            for kind, number in used.items():
                part = order[next_of[kind] : next_of[kind] + number * times]
                columns.append(part.reshape(times, number))
                next_of[kind] += number * times
                left[kind] -= number * times
            members = np.concatenate(columns, axis=1)
            documents.append(members.reshape(-1))
            offsets.append(filled + members.shape[1] * np.arange(1, times + 1))
            filled += members.size
    return Bins(np.concatenate(documents), np.concatenate(offsets))


def _filling(sizes: list[int], left: list[int], longest: int, capacity: int) -> dict[int, int]:
    """How many documents of which kinds fill a bin best, one of the longest kind among them.

    Sums that can be reached are the bits of a number: a document shifts them by its size. Long
    documents are tried first, as short ones fit everywhere later.

    Args:
        sizes: tokens of a document of each kind, descending.
        left: documents of each kind.
        longest: the first kind of which there are any.
        capacity: tokens that a bin can hold.
    """
    space = capacity - sizes[longest]
    within, goal = (1 << space + 1) - 1, 1 << space
    reached = 1
    tried: list[tuple[int, int]] = []
    for kind in range(longest, len(sizes)):
        if reached & goal:
            break
        size = sizes[kind]
        number = min(left[kind] - (kind == longest), space // size)
        if number > 0:
            tried.append((kind, reached))
            together = 1
            while number:  # doubled, to reach all numbers of documents in few shifts
                together = min(together, number)
                reached |= reached << together * size & within
                number -= together
                together *= 2
    total = reached.bit_length() - 1
    used = {longest: 1}
    for kind, before in reversed(tried):
        while not before >> total & 1:
            total -= sizes[kind]
            used[kind] = used.get(kind, 0) + 1
    return used


def unpacked(count: int) -> Bins:
    """Bins with one document each, in order."""
    return Bins(np.arange(count), np.arange(count + 1))


class _Space:
    """Open bins, grouped by the space that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._open: dict[int, list[Indices]] = {}
        self._spaces = 0
        """Bit s is set if some bin has exactly s tokens left, so a shift finds the best fit."""
        self.bins = 0

    def place(self, length: int, count: int) -> Indices:
        """Place `count` documents of equal length; returns the bin of each."""
        parts = []
        while count > 0:
            candidates = self._spaces >> length
            if candidates:
                left = length + (candidates & -candidates).bit_length() - 1
                part = self._fill(left, length, count)
            else:
                part = self._open_bins(length, count)
            parts.append(part)
            count -= len(part)
        return np.concatenate(parts)

    def _open_bins(self, length: int, count: int) -> Indices:
        each = self._capacity // length
        needed = -(-count // each)
        new = np.arange(self.bins, self.bins + needed)
        self.bins += needed
        return self._put(new, self._capacity, length, count)

    def _fill(self, left: int, length: int, count: int) -> Indices:
        needed = -(-count // (left // length))
        return self._put(self._remove(left, needed), left, length, count)

    def _put(self, bins: Indices, left: int, length: int, count: int) -> Indices:
        """Put up to `left // length` documents into each bin; the last bin may get fewer."""
        each = left // length
        count = min(count, each * len(bins))
        in_last = count - each * (len(bins) - 1)
        self._add(left - each * length, bins[:-1])
        self._add(left - in_last * length, bins[-1:])
        return np.repeat(bins, each)[:count]

    def _remove(self, left: int, needed: int) -> Indices:
        stack = self._open[left]
        parts: list[Indices] = []
        while needed > 0 and stack:
            top = stack.pop()
            if len(top) > needed:
                stack.append(top[needed:])
                top = top[:needed]
            parts.append(top)
            needed -= len(top)
        if not stack:
            self._spaces &= ~(1 << left)
        return np.concatenate(parts)

    def _add(self, left: int, bins: Indices) -> None:
        if left > 0 and len(bins) > 0:
            self._open.setdefault(left, []).append(bins)
            self._spaces |= 1 << left
