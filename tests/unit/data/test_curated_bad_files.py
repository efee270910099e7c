"""What is wrong with files while rows are curated: one message, or counted rows in quarantine."""

import errno
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finray.training.common.errors import InputError, RunError
from finray.training.data.reading import read_chunk
from finray.training.data.sources import find_files, plan_chunks

from .conftest import MakeRecipe, write_jsonl
from .test_curation import left, run, text_of, texts

SCORE = {
    "kind": "score",
    "with": {"file": "/s.py:f", "source": "def f(row):\n    return len(row['text'])\n"},
    "keep_top": 0.9,
}
EVERY_WRITE: list[Any] = ["normalise", {"kind": "deduplicate", "near": {}}, "decontaminate", SCORE]


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    def of_texts(**data: Any) -> Any:
        return make_recipe(**{"max_length": 512, "method": {"kind": "pretrain"}, **data})

    return of_texts


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array(range(10)), "text is of type int; expected text"),
        (pa.array([{"a": 1}] * 10), "text is of type dict; expected text"),
        (pa.array([[f"w{n}"] for n in range(10)]), "text is of type list; expected text"),
        (pa.array([b"\xff\xfe"] * 10), "text is of type bytes; expected text"),
        (pa.nulls(10), "text is null; expected text"),
    ],
)
def test_a_parquet_file_whose_column_has_another_type(
    tmp_path: Path, make: MakeRecipe, column: Any, reason: str
) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        values = column if number == 1 else [text_of(10 * number + n) for n in range(10)]
        pq.write_table(pa.table({"text": values}), tmp_path / "data" / f"{number}.parquet")
    recipe = make(train=str(tmp_path / "data"), curate=["normalise", SCORE], max_bad_rows=0.4)
    prepared = run(recipe, tmp_path)
    assert len(left(prepared)) == 18 and {*left(prepared)} <= {*range(10), *range(20, 30)}
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert {(Path(row["file"]).name, row["reason"]) for row in bad} == {("1.parquet", reason)}
    assert [row["line"] for row in bad] == [*range(1, 11)]


@pytest.mark.parametrize("change", ["cut", "grown", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, make: MakeRecipe, change: str
) -> None:
    """Nothing of the other content is kept under the name of the first."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", texts(*range(10)))
    data = write_jsonl(tmp_path / "data" / "b.jsonl", texts(*range(10, 20)))
    content = data.read_bytes()
    others = {"cut": content[: len(content) // 2], "grown": content * 2}

    def changing(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 1 and change == "gone":
                data.unlink(missing_ok=True)
            elif number == 1:
                data.write_bytes(others.get(change, content.upper()))
            yield task(item)

    recipe = make(train=str(tmp_path / "data"), curate=["normalise"])
    message = r"b\.jsonl: (changed while it was read; restore it|the file .* cannot be read)"
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path, changing)
    data.write_bytes(content)
    assert left(run(recipe, tmp_path)) == list(range(20))


@pytest.mark.parametrize("curate", [[], EVERY_WRITE])
def test_copies_with_other_times_are_the_same_files(
    tmp_path: Path, make: MakeRecipe, curate: list[Any]
) -> None:
    """As on a node to which they were copied; the content counts."""
    data = write_jsonl(tmp_path / "a.jsonl", texts(*range(10)))
    evals = write_jsonl(tmp_path / "e.jsonl", texts(20, 21))
    recipe = make(train=data, eval=evals, curate=curate)
    whole = run(recipe, tmp_path / "whole")

    def elsewhere(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            for file in (data, evals):
                os.utime(file, (number, number))
            yield task(item)

    there = run(recipe, tmp_path / "there", elsewhere)
    assert there.manifest.train.hashes == whole.manifest.train.hashes


def test_evaluation_data_that_vanishes(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", texts(1, 2))
    bench = write_jsonl(tmp_path / "bench.jsonl", texts(3))
    curate = ["deduplicate", {"kind": "decontaminate", "against": str(bench)}]

    def vanish(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        bench.unlink(missing_ok=True)
        yield from map(task, items)

    with pytest.raises(InputError, match=r"bench\.jsonl: the file is damaged or cannot be read: "):
        run(make(train=data, curate=curate), tmp_path, vanish)


def test_a_disk_that_is_full_at_any_write(
    tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [*texts(1, 2, 3, 4, 2), {"text": f"{text_of(1)} x"}])
    evals = write_jsonl(tmp_path / "e.jsonl", texts(3))
    recipe = make(train=data, eval=evals, curate=EVERY_WRITE)
    write = pq.ParquetWriter.write_table
    writes = 0
    room = 10**6

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    whole = run(recipe, tmp_path / "whole")
    assert writes >= 7
    for room in range(writes):
        folder = tmp_path / f"room {room}"
        writes = 0
        with pytest.raises(RunError, match=r"cannot write the prepared data: .*No space left"):
            run(recipe, folder)
        assert not list(folder.rglob("*.part")) and not list(folder.rglob("work-*"))
    room = 10**6
    again = run(recipe, folder)
    assert again.manifest.train.hashes == whole.manifest.train.hashes


def test_memory_does_not_grow_with_an_array(tmp_path: Path) -> None:
    """Above a window of a few MiB."""

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.json"
        row = json.dumps({"text": "one two three " * 70})
        path.write_text(f"[{', '.join([row] * rows)}]", encoding="utf-8")
        (file,) = find_files(str(path))
        (chunk,) = plan_chunks(file)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_chunk(chunk, 2**20).rows) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(3_000), peak(9_000)  # 3 and 9 MB
    assert large < 1.1 * small and large < 10 * 2**20
