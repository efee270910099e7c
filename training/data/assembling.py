"""The second pass over the data: turns token files into files of packed sequences."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.storage import Folder
from .packing import Bins, Indices, fewest_bins, pack, pack_tightly, unpacked
from .prepared import ROW_GROUP, SEQUENCE_SCHEMA, Split, write_hashed
from .tokenising import TokenGroup

_FILE_TOKENS = 2_000_000
_FILE_SEQUENCES = 256
"""A task writes about this much, the larger of both, and holds it in memory."""
_TOGETHER = 8
"""Files whose documents are packed together, so that few sequences stay unfilled. Each of their
tasks reads the documents of all, a row group after the other, and keeps its own."""

_WASTEFUL = 1.002
"""Sequences over the fewest that could do, above which documents are packed tightly."""


@dataclass(frozen=True)
class Part:
    """A row group of tokens, and the number of its chunk's first row within the split."""

    tokens: TokenGroup
    first_row: int


@dataclass(frozen=True)
class AssembleItem:
    """Input of one task of the second pass."""

    split: str
    number: int
    parts: tuple[Part, ...]
    """Parts of all files that are packed together."""
    share: int = 0
    """Which of the files this task writes, from 0."""
    shares: int = 1
    """Number of files, each written by a task."""


@dataclass(frozen=True)
class SequenceFile:
    """A file of sequences that a task wrote."""

    split: str
    name: str
    hash: str
    """SHA-256 of the file's content."""
    row_groups: tuple[int, ...]
    documents: int
    tokens: int
    trainable_tokens: int


def assemble_items(
    split: str, parts: Iterable[Part], capacity: int, packing: bool
) -> Iterator[AssembleItem]:
    """The inputs of the tasks that write a split's files.

    Args:
        split: train or eval.
        parts: the split's row groups of tokens, in order.
        capacity: tokens that a sequence can hold.
        packing: whether a sequence holds several documents.
    """
    limit = max(_FILE_TOKENS, _FILE_SEQUENCES * capacity)
    together = limit * _TOGETHER if packing else limit
    number = 0
    for group in _groups(parts, together, least=together // 2 if packing else 0):
        tokens = _tokens(group)
        shares = max(1, -(-(tokens - limit // 4) // limit)) if packing else 1
        for share in range(shares):
            yield AssembleItem(split, number, tuple(group), share, shares)
            number += 1


def _groups(parts: Iterable[Part], limit: int, least: int) -> Iterator[list[Part]]:
    """Consecutive parts with `limit` tokens or a little more; fewer than `least` join the last
    group, as few documents fill sequences badly."""
    before: list[Part] = []
    group: list[Part] = []
    for part in parts:
        if _tokens(group) >= limit:
            if before:
                yield before
            before, group = group, []
        group.append(part)
    if before and _tokens(group) >= least:
        yield before
        before = []
    if before or group:
        yield before + group


def _tokens(parts: list[Part]) -> int:
    return sum(part.tokens.tokens for part in parts)


@dataclass(frozen=True)
class AssembleTask:
    """Packs the documents of an item, shuffles the sequences and writes its share to a file."""

    attempt: Folder
    capacity: int
    packing: bool
    seed: int

    def __call__(self, item: AssembleItem) -> SequenceFile:
        table, lengths, bins = self._share(item)
        shuffled = np.random.default_rng((self.seed, item.number)).permutation(len(bins))
        bins = _chosen(bins, shuffled)
        sequences = _sequences(table, bins.documents, bins.offsets)
        name = f"{item.split}/{item.number:06d}.parquet"
        content_hash = write_hashed(
            self.attempt, name, sequences, row_group_size=ROW_GROUP, use_dictionary=False
        )
        full, rest = divmod(len(bins), ROW_GROUP)
        return SequenceFile(
            split=item.split,
            name=name,
            hash=content_hash,
            row_groups=(ROW_GROUP,) * full + ((rest,) if rest else ()),
            documents=len(lengths),
            tokens=int(lengths.sum()),
            trainable_tokens=_flat(sequences["trainable"]).true_count,
        )

    def _share(self, item: AssembleItem) -> tuple[pa.Table, NDArray[np.int32], Bins]:
        """The documents of an item's share, their lengths, and their bins."""
        if not self.packing:
            table = pa.concat_tables(map(self._read, item.parts)).combine_chunks()
            lengths = _sizes(table["input_ids"])
            return table, lengths, unpacked(len(lengths))
        of_parts = [self._lengths(part) for part in item.parts]
        lengths = np.concatenate(of_parts)
        bins = pack(lengths, self.capacity)
        draw = np.random.default_rng((self.seed, item.number - item.share))
        of_shares = _dealt(lengths, item.shares, self.capacity, draw)
        fewest = sum(fewest_bins(lengths[each], self.capacity) for each in of_shares)
        if len(bins) > _WASTEFUL * fewest:
            own = np.sort(of_shares[item.share])
            bins = pack_tightly(lengths[own], self.capacity)
        else:
            dealt = draw.permutation(len(bins))
            bins = _chosen(bins, np.sort(dealt[item.share :: item.shares]))
            own = np.sort(bins.documents)
            bins = Bins(np.searchsorted(own, bins.documents), bins.offsets)
        is_own = np.zeros(len(lengths), np.bool_)
        is_own[own] = True
        of_part = np.split(is_own, np.cumsum([len(each) for each in of_parts])[:-1])
        tables = [
            self._read(part).filter(pa.array(mask))
            for part, mask in zip(item.parts, of_part, strict=True)
        ]
        return pa.concat_tables(tables).combine_chunks(), lengths[own], bins

    def _lengths(self, part: Part) -> NDArray[np.int32]:
        """The tokens of each document."""
        with self._opened(part) as parquet:
            texts = parquet.read_row_group(part.tokens.group, columns=["lengths"])["lengths"]
        total = np.concatenate(([0], np.cumsum(_flat(texts).to_numpy(), dtype=np.int64)))
        ends = np.concatenate(([0], np.cumsum(_sizes(texts), dtype=np.int64)))
        lengths: NDArray[np.int32] = np.diff(total[ends]).astype(np.int32)
        return lengths

    def _opened(self, part: Part) -> Any:
        return pq.ParquetFile(
            self.attempt.file(part.tokens.file), filesystem=self.attempt.filesystem
        )

    def _read(self, part: Part) -> pa.Table:
        with self._opened(part) as parquet:
            table = parquet.read_row_group(part.tokens.group)
        rows = pa.array(table["row"].to_numpy() + part.first_row)
        return table.set_column(0, "row", rows)


def split_of(files: list[SequenceFile], capacity: int) -> Split | None:
    """The split that these files form together; None if there are none."""
    if not files:
        return None
    return Split(
        files=tuple(file.name for file in files),
        hashes=tuple(file.hash for file in files),
        row_groups=tuple(file.row_groups for file in files),
        sequences=sum(sum(file.row_groups) for file in files),
        documents=sum(file.documents for file in files),
        tokens=sum(file.tokens for file in files),
        trainable_tokens=sum(file.trainable_tokens for file in files),
        capacity=capacity,
    )


def _dealt(
    lengths: NDArray[np.int32], shares: int, capacity: int, draw: np.random.Generator
) -> list[Indices]:
    """Deal documents, so that each share but the last hardly fails to fill whole sequences."""
    documents = draw.permutation(len(lengths))
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    sequences = -(-int(lengths.sum(dtype=np.int64)) // (capacity * shares))
    stops = [0]
    for _ in range(shares - 1):
        before = int(ends[stops[-1] - 1]) if stops[-1] else 0
        stops.append(int(np.searchsorted(ends, before + sequences * capacity, side="right")))
    return np.split(documents, stops[1:])


def _chosen(bins: Bins, numbers: Indices) -> Bins:
    """The bins of these numbers, in their order."""
    sizes = np.diff(bins.offsets)[numbers]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    shift = np.repeat(bins.offsets[:-1][numbers] - offsets[:-1], sizes)
    return Bins(bins.documents[np.arange(offsets[-1]) + shift], offsets)


def _sequences(table: pa.Table, documents: Indices, offsets: Indices) -> pa.Table:
    """A table of sequences; sequence s contains documents[offsets[s]:offsets[s + 1]]."""
    taken = table.take(pa.array(documents))
    lengths = _sizes(taken["input_ids"])
    token_offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[offsets]
    texts = np.concatenate(([0], np.cumsum(_sizes(taken["lengths"]), dtype=np.int64)))[offsets]
    columns = [
        pa.ListArray.from_arrays(token_offsets.astype(np.int32), _flat(taken["input_ids"])),
        pa.ListArray.from_arrays(texts.astype(np.int32), _flat(taken["lengths"])),
        pa.ListArray.from_arrays(token_offsets.astype(np.int32), _flat(taken["trainable"])),
        pa.ListArray.from_arrays(offsets.astype(np.int32), _flat(taken["row"])),
        taken["extra"].take(pa.array(offsets[:-1])),
    ]
    return pa.table(columns, schema=SEQUENCE_SCHEMA)


def _sizes(lists: Any) -> Any:
    """The length of each list in a column, int32."""
    return pa.compute.list_value_length(lists).to_numpy()


def _flat(column: Any) -> Any:
    """A column's values as one array; lists are concatenated."""
    joined = column.combine_chunks()
    return joined.flatten() if pa.types.is_list(joined.type) else joined
