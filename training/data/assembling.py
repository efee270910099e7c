"""The second pass over the data: turns token files into files of packed sequences."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.storage import Folder
from .packing import Bins, Indices, is_poor, pack, unpacked, with_less_waste
from .prepared import ROW_GROUP, SEQUENCE_SCHEMA, Split, write_hashed
from .tokenising import TokenGroup

_FILE_TOKENS = 2_000_000
_FILE_SEQUENCES = 256
"""A task writes about this much, the larger of both, and holds it in memory."""
_TOGETHER = 8
"""Files whose documents are packed together, so that few sequences stay unfilled. Each of their
tasks reads the documents of all, a row group after the other, and keeps its own."""


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
    """Of all files that are packed together."""
    share: int = 0
    """Which of these files it writes,"""
    shares: int = 1
    """and their number."""


@dataclass(frozen=True)
class SequenceFile:
    """A file of sequences that a task wrote."""

    split: str
    name: str
    hash: str
    """Of the file's content."""
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
    number = 0
    groups = _groups(parts, limit * _TOGETHER if packing else limit)
    for group, tokens in _without_small_end(groups, limit * _TOGETHER) if packing else groups:
        shares = max(1, -(-(tokens - limit // 4) // limit)) if packing else 1
        for share in range(shares):
            yield AssembleItem(split, number, group, share, shares)
            number += 1


def _groups(parts: Iterable[Part], limit: int) -> list[tuple[tuple[Part, ...], int]]:
    """Consecutive parts with this number of tokens or a little more, and the number."""
    groups = []
    group: list[Part] = []
    tokens = 0
    for part in parts:
        group.append(part)
        tokens += part.tokens.tokens
        if tokens >= limit:
            groups.append((tuple(group), tokens))
            group, tokens = [], 0
    return [*groups, (tuple(group), tokens)] if group else groups


def _without_small_end(
    groups: list[tuple[tuple[Part, ...], int]], limit: int
) -> list[tuple[tuple[Part, ...], int]]:
    """The groups, of which the last one is joined with the one before it if it has less than half
    the tokens: the fewer documents are packed together, the more sequences stay unfilled."""
    if len(groups) < 2 or groups[-1][1] >= limit // 2:
        return groups
    (parts, tokens), (rest, of_rest) = groups[-2:]
    return [*groups[:-2], (parts + rest, tokens + of_rest)]


@dataclass(frozen=True)
class AssembleTask:
    """Packs the documents of an item, shuffles the sequences and writes its share to a file."""

    attempt: Folder
    capacity: int
    packing: bool
    seed: int

    def __call__(self, item: AssembleItem) -> SequenceFile:
        table, lengths, bins = self._share(item)
        if self.packing:
            bins = with_less_waste(bins, lengths, self.capacity)
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
        if item.shares == 1:
            table = pa.concat_tables(map(self._read, item.parts)).combine_chunks()
            lengths = _sizes(table["input_ids"])
            bins = pack(lengths, self.capacity) if self.packing else unpacked(len(lengths))
            return table, lengths, bins
        of_parts = [self._lengths(part) for part in item.parts]
        lengths = np.concatenate(of_parts)
        bins = pack(lengths, self.capacity)
        draw = np.random.default_rng((self.seed, item.number - item.share))
        is_own = np.zeros(len(lengths), np.bool_)
        if is_poor(bins, lengths, self.capacity):
            shares = _whole_shares(lengths, self.capacity, item.shares, draw)
            is_own[shares[item.share]] = True
            bins = pack(lengths[is_own], self.capacity)
        else:
            dealt = draw.permutation(len(bins))
            own = _chosen(bins, np.sort(dealt[item.share :: item.shares]))
            is_own[own.documents] = True
            places = np.cumsum(is_own) - 1
            bins = Bins(places[own.documents], own.offsets)
        of_part = np.split(is_own, np.cumsum([len(each) for each in of_parts])[:-1])
        tables = [
            self._read(part).filter(pa.array(mask))
            for part, mask in zip(item.parts, of_part, strict=True)
        ]
        table = pa.concat_tables(tables).combine_chunks()
        return table, lengths[is_own], bins

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


def _whole_shares(
    lengths: NDArray[np.int32], capacity: int, shares: int, draw: np.random.Generator
) -> list[Indices]:
    """Deal documents at random to shares whose tokens nearly fill whole sequences, so that none of
    them ends in one that is nearly empty; what is left goes to the last share."""
    order = draw.permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    sequences = -(-int(ends[-1]) // capacity)
    cuts = [0]
    for share in range(shares - 1):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        own = sequences * (share + 1) // shares - sequences * share // shares
        cuts.append(int(np.searchsorted(ends, before + own * capacity, side="right")))
    return np.split(order, cuts[1:])


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


def _chosen(bins: Bins, numbers: Indices) -> Bins:
    """Some bins."""
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
