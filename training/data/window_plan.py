"""Which rows a window of streamed data holds: a pure function of the sources, the recipe and its
seed.

Sources are cut into blocks. An epoch shuffles the blocks of each source, lays them evenly over its
length, and cuts that into windows. So each window holds every source in its share,
and a row stands in one window of an epoch, as often as its source's weight says.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import InputError
from ..config.recipe import Recipe
from .reading import count_rows, first_line
from .resolve import ResolvedData, ResolvedSource
from .sources import MOST_ROWS, Chunk, SourceFile, arrow_batches, parquet_metadata, plan_chunks

FIRST_BYTES, WINDOW_BYTES = 4 * 2**20, 16 * 2**20
"""Bytes of source files in an epoch's first window, so that training begins soon, and in the
largest: a window is twice as large as the one before it."""
BLOCK_BYTES = 2**18
LARGEST_BLOCK = 512 * 2**20
"""A larger part of a file cannot be read as a whole; windows would be as large."""
_SMALLEST_BLOCK = 4 * 2**10
_MOST_BLOCKS = 2**16
_PACKED_BYTES = 1024
"""Bytes of a window for each token of a sequence: some 256 sequences, of which packing wastes
less than 1%."""
_BYTES_OF_ROW = 2048
"""Assumed where only some rows of a file are used."""
_READERS = 16
_READ_FOR_LINE = 256 * 2**20
_BY_BYTES = ("lines", "text")


def plan_facts(recipe: Recipe) -> list[int]:
    """What decides the windows, beside the sources."""
    sizes = [FIRST_BYTES, WINDOW_BYTES, BLOCK_BYTES, _SMALLEST_BLOCK, _PACKED_BYTES]
    return [1, recipe.seed, *sizes]


def window_edges(total: float, first: int, largest: int) -> NDArray[np.float64]:
    """Where each window of an epoch begins, as a share of the epoch.

    Args:
        total: bytes of an epoch.
        first: bytes of the first window.
        largest: most bytes of a window.
    """
    sizes = [first]
    covered = first
    while covered < total:
        sizes.append(min(largest, 2 * sizes[-1]))
        covered += sizes[-1]
    return np.concatenate(([0.0], np.cumsum(sizes)[:-1] / sum(sizes)))


@dataclass(frozen=True)
class Block:
    """A part of a source in a window."""

    source: int
    """Number of its source."""
    chunk: Chunk
    weight: float
    """How often its rows are used; below 1, the share of them."""


class WindowPlan:
    """The windows of a recipe's training data.

    Args:
        recipe: the recipe.
        data: its sources.

    Raises:
        InputError: a file cannot be read, or only in parts that are too large.
    """

    def __init__(self, recipe: Recipe, data: ResolvedData) -> None:
        self._seed = recipe.seed
        self._weights = [source.weight for source in data.train]
        least = _PACKED_BYTES * recipe.row_length
        weighted = sum(source.bytes * source.weight for source in data.train)
        self._edges = window_edges(weighted, max(FIRST_BYTES, least), max(WINDOW_BYTES, least))
        self.windows = len(self._edges)
        """Windows of an epoch; one may be empty."""
        total = sum(source.bytes for source in data.train)
        block = min(max(FIRST_BYTES, least), max(BLOCK_BYTES, total // _MOST_BLOCKS))
        self._latest: tuple[int, tuple[NDArray[Any], ...]] | None = None
        with ThreadPoolExecutor(_READERS) as pool:
            self._blocks = [blocks_of(source, block, self.windows, pool) for source in data.train]

    def blocks(self, number: int) -> list[Block]:
        """The blocks of a window, in the order of sources and files.

        Args:
            number: of the window, counted from 0 over all epochs.
        """
        epoch, index = divmod(number, self.windows)
        sources, blocks, weights, windows = self._epoch(epoch)
        chosen = np.flatnonzero(windows == index)
        chosen = chosen[np.lexsort((blocks[chosen], sources[chosen]))]
        return [
            Block(int(sources[n]), self._blocks[sources[n]][blocks[n]][0], float(weights[n]))
            for n in chosen
        ]

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], ...]:
        """Source, block, weight and window of each entry of an epoch, in their order."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._shuffled(epoch)
        return self._latest[1]

    def _shuffled(self, epoch: int) -> tuple[NDArray[Any], ...]:
        random = np.random.default_rng((self._seed, epoch))
        parts = []
        for source, blocks in enumerate(self._blocks):
            passes = _passes(self._weights[source])
            order = np.concatenate([random.permutation(len(blocks)) for _ in passes])
            weights = np.repeat(passes, len(blocks))
            places = (np.arange(len(order)) + random.random()) / len(order)
            sizes = np.array([size for _, size in blocks], np.float64)[order] * weights
            parts.append((places, np.full(len(order), source), order, weights, sizes))
        columns: list[NDArray[Any]] = [np.concatenate(part) for part in zip(*parts, strict=True)]
        places, of, numbers, weights, sizes = columns
        order = np.argsort(places, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        windows = np.searchsorted(self._edges, before / sizes.sum(), side="right") - 1
        return of[order], numbers[order], weights[order], windows


def place_in_file(chunk: Chunk, line: int) -> int:
    """The number of a chunk's line in its file, counted from 1. Far behind the beginning of a file
    it is that in the block: nobody reads terabytes for a message."""
    if chunk.start > _READ_FOR_LINE and chunk.kind in _BY_BYTES:
        return line
    return first_line(chunk) - 1 + line


def _passes(weight: float) -> list[float]:
    """The weight of a source's rows in each of its passes: 2.5 is 1, 1, 0.5."""
    whole = int(weight)
    return [1.0] * whole + ([weight - whole] if weight > whole else [])


def blocks_of(
    source: ResolvedSource, size: int, least: int, pool: ThreadPoolExecutor
) -> list[tuple[Chunk, int]]:
    """The blocks of a source, each with its size in bytes.

    Args:
        source: the source.
        size: bytes of a block, where files can be cut so finely.
        least: how many blocks there should be, so that each window gets one.
        pool: reads the files' footers.

    Raises:
        InputError: a file cannot be read, or only in parts that are too large.
    """
    size = min(size, max(_SMALLEST_BLOCK, -(-source.bytes // least)))
    of_files = pool.map(lambda file: _blocks(file, size), source.files)
    blocks = [block for of_file in of_files for block in of_file]
    if len(blocks) >= least:
        return blocks
    parts = -(-least // len(blocks))
    return [part for chunk, bytes_ in blocks for part in _by_rows(chunk, bytes_, parts)]


def _blocks(file: SourceFile, size: int) -> list[tuple[Chunk, int]]:
    blocks = [(chunk, _bytes(chunk)) for chunk in plan_chunks(file, size)]
    for chunk, bytes_ in blocks:
        if bytes_ > LARGEST_BLOCK:
            what = "row groups of" if chunk.kind == "parquet" else "it is read as a whole:"
            raise InputError(
                f"data.prepare: {file.place}: {what} {_mebibytes(bytes_)}, and streaming takes at "
                f"most {_mebibytes(LARGEST_BLOCK)} at a time; write it as JSON Lines without "
                "compression, or as Parquet with smaller row groups"
            )
    return blocks


def _bytes(chunk: Chunk) -> int:
    """Bytes of a chunk's rows, roughly."""
    if chunk.kind == "parquet":
        metadata = parquet_metadata(chunk.file)
        groups = [metadata.row_group(group) for group in range(chunk.start, chunk.stop)]
        whole = sum(int(group.total_byte_size) for group in groups)
        rows = sum(int(group.num_rows) for group in groups)
        used = rows if chunk.rows is None else chunk.rows[1] - chunk.rows[0]
        return max(1, whole * used // max(1, rows))
    if chunk.rows is not None:
        return max(1, min(chunk.file.size, _BYTES_OF_ROW * (chunk.rows[1] - chunk.rows[0])))
    is_cut = chunk.kind in _BY_BYTES and not chunk.file.is_compressed
    return chunk.stop - chunk.start if is_cut else chunk.file.size


def _by_rows(chunk: Chunk, size: int, parts: int) -> Sequence[tuple[Chunk, int]]:
    """A chunk of a small file, cut by its rows; others stay whole, as each part reads it again."""
    is_cut = chunk.kind in _BY_BYTES and not chunk.file.is_compressed
    if parts == 1 or chunk.file.size > WINDOW_BYTES or (is_cut and chunk.rows is None):
        return [(chunk, size)]
    first, last = chunk.rows or (0, _rows_of(chunk))
    if last <= first:
        return [(chunk, size)]
    edges = np.unique(np.linspace(first, last, min(parts, max(1, last - first)) + 1).astype(int))
    return [
        (
            replace(chunk, rows=(int(start), int(stop))),
            max(1, size * int(stop - start) // (last - first)),
        )
        for start, stop in pairwise(edges)
    ]


def _rows_of(chunk: Chunk) -> int:
    if chunk.kind == "parquet":
        metadata = parquet_metadata(chunk.file)
        groups = range(chunk.start, chunk.stop)
        return sum(int(metadata.row_group(group).num_rows) for group in groups)
    if chunk.kind == "arrow":
        batches = islice(arrow_batches(chunk.file), chunk.start, chunk.stop)
        return sum(int(batch.num_rows) for batch in batches)
    return count_rows(chunk.file, MOST_ROWS)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
