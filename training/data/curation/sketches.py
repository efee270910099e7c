"""Sketches of sets (MinHash), whose bands are equal for similar sets."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...config.curation import NearDuplicates, band_rows
from .words import Hashes, Offsets, mixed

_SEED = 0x5EED
_TOGETHER = 65_536
"""Hashes that are permuted at once: they stay in the processor's cache."""


@dataclass(frozen=True)
class Bands:
    """How sketches are compared: similar sets agree in one of the bands."""

    count: int
    rows: int
    """Numbers in a band."""

    @classmethod
    def of(cls, near: NearDuplicates) -> "Bands":
        """The bands that propose enough pairs at the threshold, with as few others as possible."""
        rows = band_rows(near)
        return cls(near.permutations // rows, rows)


def band_keys(hashes: Hashes, offsets: Offsets, bands: Bands) -> Hashes:
    """The bands of each set.

    Args:
        hashes: the sets' members; repetitions do not count.
        offsets: set n has hashes[offsets[n]:offsets[n + 1]], at least one.
        bands: how many there are, and their size.

    Returns:
        Shape (sets, bands.count); keys of different bands are different, too.
    """
    factors, summands = _permutations(bands.count * bands.rows)
    small = (hashes >> np.uint64(32)).astype(np.uint32)
    sketches = np.empty((len(factors), len(offsets) - 1), np.uint32)
    for first, last in _parts(offsets):
        start, stop = int(offsets[first]), int(offsets[last])
        members, places = small[start:stop], offsets[first:last] - start
        permuted = np.empty_like(members)
        for number, (factor, summand) in enumerate(zip(factors, summands, strict=True)):
            np.multiply(members, factor, out=permuted)
            permuted += summand
            np.minimum.reduceat(permuted, places, out=sketches[number, first:last])
    keys = np.empty((len(offsets) - 1, bands.count), np.uint64)
    for band in range(bands.count):
        key = np.full(len(keys), band + 1, np.uint64)
        for number in range(band * bands.rows, (band + 1) * bands.rows):
            key *= np.uint64(0x9E3779B97F4A7C15)
            key ^= sketches[number]
            mixed(key)
        keys[:, band] = key
    return keys


def _parts(offsets: Offsets) -> list[tuple[int, int]]:
    """Consecutive sets that are permuted at once."""
    parts = []
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _TOGETHER, side="right")) - 1
        last = min(max(last, first + 1), len(offsets) - 1)
        parts.append((first, last))
        first = last
    return parts


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """x ↦ factor · x + summand modulo 2^32, with odd factors."""
    draws = np.random.default_rng(_SEED).integers(0, 2**32, (2, count), dtype=np.uint32)
    return draws[0] | np.uint32(1), draws[1]
