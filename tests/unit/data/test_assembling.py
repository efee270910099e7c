"""The second pass: how parts are grouped, and how their documents are packed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.storage import Folder
from finray.training.data.assembling import AssembleItem, AssembleTask, Part, assemble_items
from finray.training.data.packing import pack
from finray.training.data.rendering import Document
from finray.training.data.tokenising import TokenFile, TokenGroup


def part(tokens: int) -> Part:
    return Part(TokenGroup("tokens/x.parquet", 0, tokens), 0)


def test_parts_are_grouped_up_to_a_limit() -> None:
    def shares(parts: list[Part], capacity: int, packing: bool) -> list[tuple[int, int, int]]:
        items = assemble_items("train", parts, capacity, packing)
        return [(len(item.parts), item.share, item.shares) for item in items]

    parts = [part(1_500_000)] * 5
    assert shares(parts, 1024, packing=False) == [(2, 0, 1), (2, 0, 1), (1, 0, 1)]
    # Long sequences need more tokens per task, so that equally few of them stay unfilled.
    assert shares(parts, 20_000, packing=False) == [(4, 0, 1), (1, 0, 1)]
    # Documents of several files are packed together, and the files are as large.
    assert shares(parts, 1024, packing=True) == [(5, share, 4) for share in range(4)]
    of_many = shares(parts * 4, 1024, packing=True)
    assert of_many == [
        *((11, share, 8) for share in range(8)),
        *((9, share, 7) for share in range(7)),
    ]
    items = assemble_items("eval", parts * 4, 1024, True)
    assert [item.number for item in items] == list(range(15))
    # A small end is packed together with what stands before it.
    assert shares(parts * 3, 1024, packing=True) == [(15, share, 11) for share in range(11)]
    assert list(assemble_items("train", [], 8, True)) == []


@pytest.mark.parametrize(("shares", "sizes"), [(1, (1, 40)), (3, (1, 40)), (3, (9, 12))])
def test_documents_of_several_parts_stay_whole(
    tmp_path: Path, shares: int, sizes: tuple[int, int]
) -> None:
    attempt = Folder(str(tmp_path))
    for name in ("tokens", "train"):
        (attempt / name).create()
    generator = np.random.default_rng(0)
    written: dict[int, Document] = {}
    parts = []
    for number, first_row in enumerate((0, 100)):
        file = TokenFile(attempt, f"tokens/train-{number}.parquet")
        for row in range(50):
            size = int(generator.integers(*sizes))
            ids = generator.integers(0, 1000, size).astype(np.int32)
            document = Document(ids, generator.random(size) < 0.5, (size,))
            written[first_row + row] = document
            file.add(row, document, None)
            if row % 20 == 19:
                file.flush()
        file.flush()
        file.close()
        assert len(file.groups) == 3
        parts += [Part(group, first_row) for group in file.groups]
    task = AssembleTask(attempt, capacity=40, packing=True, seed=1)
    items = [AssembleItem("train", share, tuple(parts), share, shares) for share in range(shares)]
    results = [task(item) for item in items]
    tables = [pq.read_table(tmp_path / result.name) for result in results]
    assert [table.num_rows for table in tables] == [sum(each.row_groups) for each in results]
    table = pa.concat_tables(tables)
    lengths = np.array([len(document.input_ids) for document in written.values()], np.int32)
    if sizes == (9, 12):  # best fit wastes much, and each share fills its sequences
        assert table.num_rows <= -(-lengths.sum() // 40) + 1 < len(pack(lengths, 40))
    else:
        assert table.num_rows == len(pack(lengths, 40))
    assembled: dict[int, tuple[list[int], list[bool]]] = {}
    for sequence in table.to_pylist():
        assert len(sequence["input_ids"]) == sum(sequence["lengths"]) <= 40
        start = 0
        for row, size in zip(sequence["rows"], sequence["lengths"], strict=True):
            stop = start + size
            assembled[row] = (sequence["input_ids"][start:stop], sequence["trainable"][start:stop])
            start = stop
    expected = {
        row: (document.input_ids.tolist(), document.trainable.tolist())
        for row, document in written.items()
    }
    assert assembled == expected
    assert sum(result.documents for result in results) == 100
    assert sum(result.tokens for result in results) == lengths.sum()
    trainable = sum(document.trainable.sum() for document in written.values())
    assert sum(result.trainable_tokens for result in results) == trainable
