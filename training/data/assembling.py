"""The second pass over the data: turns token files into files of packed sequences."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.storage import Folder
from .packing import Indices, pack, unpacked
from .prepared import ROW_GROUP, SEQUENCE_SCHEMA, Split, write_hashed
from .tokenising import TokenGroup

# A task packs at least this much, so that its few unfilled sequences do not matter. More would
# need more memory.
_GROUP_TOKENS = 2_000_000
_GROUP_SEQUENCES = 256


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


def assemble_items(split: str, parts: Iterable[Part], capacity: int) -> Iterator[AssembleItem]:
    """Group consecutive parts of a split into the inputs of tasks.

    Args:
        split: train or eval.
        parts: the split's row groups of tokens, in order.
        capacity: tokens that a sequence can hold.
    """
    limit = max(_GROUP_TOKENS, _GROUP_SEQUENCES * capacity)
    group: list[Part] = []
    tokens = number = 0
    for part in parts:
        group.append(part)
        tokens += part.tokens.tokens
        if tokens >= limit:
            yield AssembleItem(split, number, tuple(group))
            group, tokens, number = [], 0, number + 1
    if group:
        yield AssembleItem(split, number, tuple(group))


@dataclass(frozen=True)
class AssembleTask:
    """Packs the documents of an item, shuffles the sequences and writes them to a file."""

    attempt: Folder
    capacity: int
    packing: bool
    seed: int

    def __call__(self, item: AssembleItem) -> SequenceFile:
        table = pa.concat_tables(self._read(part) for part in item.parts).combine_chunks()
        lengths = _sizes(table["input_ids"])
        bins = pack(lengths, self.capacity) if self.packing else unpacked(len(lengths))
        sizes = np.diff(bins.offsets)
        shuffled = np.random.default_rng((self.seed, item.number)).permutation(len(bins))
        # Documents of the shuffled bins, one after another.
        offsets = np.concatenate(([0], np.cumsum(sizes[shuffled])))
        shift = np.repeat(bins.offsets[:-1][shuffled] - offsets[:-1], sizes[shuffled])
        documents = bins.documents[np.arange(len(lengths)) + shift]
        sequences = _sequences(table, documents, offsets)
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

    def _read(self, part: Part) -> pa.Table:
        source = self.attempt.file(part.tokens.file)
        with pq.ParquetFile(source, filesystem=self.attempt.filesystem) as parquet:
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
