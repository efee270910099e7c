"""The second pass: how parts are grouped, and how their documents are packed."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from finray.training.common.storage import Folder
from finray.training.data.assembling import AssembleItem, AssembleTask, Part, assemble_items
from finray.training.data.rendering import Document
from finray.training.data.tokenising import TokenFile, TokenGroup


def part(tokens: int) -> Part:
    return Part(TokenGroup("tokens/x.parquet", 0, tokens), 0)


def test_parts_are_grouped_up_to_a_limit() -> None:
    parts = [part(1_500_000)] * 5
    sizes = [len(item.parts) for item in assemble_items("train", parts, 1024)]
    assert sizes == [2, 2, 1]
    # Long sequences need more tokens per task, so that equally few of them stay unfilled.
    assert [len(item.parts) for item in assemble_items("train", parts, 20_000)] == [4, 1]
    assert [item.number for item in assemble_items("eval", parts, 1024)] == [0, 1, 2]
    assert list(assemble_items("train", [], 8)) == []


def test_documents_of_several_parts_stay_whole(tmp_path: Path) -> None:
    attempt = Folder(str(tmp_path))
    for name in ("tokens", "train"):
        (attempt / name).create()
    generator = np.random.default_rng(0)
    written: dict[int, Document] = {}
    parts = []
    for number, first_row in enumerate((0, 100)):
        file = TokenFile(attempt, f"tokens/train-{number}.parquet")
        for row in range(50):
            size = int(generator.integers(1, 40))
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
    result = task(AssembleItem("train", 0, tuple(parts)))
    table = pq.read_table(tmp_path / result.name)
    assert table.num_rows == sum(result.row_groups)
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
    assert result.documents == 100
    assert result.tokens == sum(len(document.input_ids) for document in written.values())
    assert result.trainable_tokens == sum(document.trainable.sum() for document in written.values())
