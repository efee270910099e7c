"""The stream's order: a pure function of data, seed and epoch, for any number of workers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finray.training.common.storage import Folder
from finray.training.data.microbatches import number_of_parts
from finray.training.data.prepared import SEQUENCE_SCHEMA, Split, _hash_of_file
from finray.training.data.stream import (
    Sequence,
    Slice,
    epoch_windows,
    every_sequence,
    share,
    stream,
)


def make_split(folder: Path, files: list[list[int]]) -> Split:
    """Sequences numbered from 0, in files of row groups of the given sizes."""
    number = 0
    for index, groups in enumerate(files):
        path = folder / f"{index}.parquet"
        with pq.ParquetWriter(path, SEQUENCE_SCHEMA) as writer:
            for size in groups:
                rows = []
                for _ in range(size):
                    trainable = [False, True]
                    row = {"input_ids": [number, number], "lengths": [2], "rows": [number]}
                    rows.append({**row, "trainable": trainable})
                    number += 1
                writer.write_table(pa.Table.from_pylist(rows, SEQUENCE_SCHEMA))
    return Split(
        files=tuple(f"{index}.parquet" for index in range(len(files))),
        hashes=tuple(
            _hash_of_file(Folder(str(folder)), f"{index}.parquet") for index in range(len(files))
        ),
        row_groups=tuple(map(tuple, files)),
        sequences=number,
        documents=number,
        tokens=2 * number,
        trainable_tokens=number,
        capacity=2,
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Split]:
    folder = tmp_path_factory.mktemp("split")
    # More row groups than a window holds, of uneven sizes.
    return Folder(str(folder)), make_split(folder, [[7] * 20 + [3], [5] * 25, [1]])


def part(
    split: tuple[Folder, Split], rank: int, world_size: int, steps: tuple[int, int], seed: int = 0
) -> Slice:
    return Slice(split[0], split[1], seed, 12, rank, world_size, *steps)


def ids(sequences: Iterator[Sequence]) -> list[int]:
    return [int(sequence.rows[0]) for sequence in sequences]


def by_steps(split: tuple[Folder, Split], world_size: int, steps: tuple[int, int]) -> list[int]:
    """Sample ids in global order, merged from the slices of all ranks."""
    parts = [
        iter(ids(stream(part(split, rank, world_size, steps), on_ray=False)))
        for rank in range(world_size)
    ]
    merged = []
    for _ in range(*steps):
        for rank, rows in enumerate(parts):
            merged += [next(rows) for _ in range(share(12, rank, world_size))]
    return merged


def test_each_epoch_contains_each_sequence_once(split: tuple[Folder, Split]) -> None:
    size = split[1].sequences
    steps = -(-3 * size // 12)
    seen = ids(stream(part(split, 0, 1, (0, steps)), on_ray=False))
    epochs = [seen[epoch * size : (epoch + 1) * size] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(seen) == steps * 12


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_the_order_does_not_depend_on_the_workers(
    split: tuple[Folder, Split], world_size: int
) -> None:
    assert by_steps(split, world_size, (0, 40)) == by_steps(split, 1, (0, 40))


@pytest.mark.parametrize("start", [1, 13, 22, 23, 39])
def test_a_resumed_stream_continues_exactly(split: tuple[Folder, Split], start: int) -> None:
    whole = by_steps(split, 1, (0, 40))
    assert by_steps(split, 3, (start, 40)) == whole[start * 12 :]


def test_the_seed_changes_the_order(split: tuple[Folder, Split]) -> None:
    orders = [ids(stream(part(split, 0, 1, (0, 20), seed), on_ray=False)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_rows_are_mixed_across_files(split: tuple[Folder, Split]) -> None:
    first = ids(stream(part(split, 0, 1, (0, 2)), on_ray=False))
    assert min(first) < 100 < max(first)


def test_held_out_sequences_are_shared_out_once(split: tuple[Folder, Split]) -> None:
    for world_size in (1, 2, 3):
        parts = [ids(every_sequence(*split, rank, world_size)) for rank in range(world_size)]
        assert sorted(row for rows in parts for row in rows) == list(range(split[1].sequences))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_shares_add_up_and_all_ranks_do_as_many_passes(
    batch: int, world_size: int, micro: int
) -> None:
    shares = [share(batch, rank, world_size) for rank in range(world_size)]
    assert sum(shares) == batch and max(shares) - min(shares) <= 1
    assert number_of_parts(batch, micro, world_size) * micro >= max(shares)


@settings(deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=80), st.integers(0, 3), st.integers(0, 3))
def test_windows_cover_an_epoch(groups: list[int], seed: int, epoch: int) -> None:
    size = sum(groups)
    split = Split(("a",), ("",), (tuple(groups),), size, size, size, size, 1)
    windows = epoch_windows(split, seed, epoch)
    assert [w.start for w in windows] == list(
        epoch * size + np.cumsum([0, *(w.size for w in windows[:-1])])
    )
    assert sorted(group for w in windows for _, group in w.groups) == list(range(len(groups)))
