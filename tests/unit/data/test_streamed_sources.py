"""Streamed sources of every kind give in an epoch the rows that they give when prepared ahead."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub import serving
from support.streamed import make_windows_small, method_rows, write_lines

from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepare import Windows, prepare
from finray.training.data.prepared import Prepared
from finray.training.data.resolve import resolve_data
from finray.training.data.stream import every_sequence
from finray.training.data.tasks import run_in_process

ROWS = method_rows("sft", 120)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    make_windows_small(monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The same rows in files of several kinds, some of which are in parts."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_lines(folder / "part-1.jsonl", ROWS[:30])
    write_lines(folder / "part-2.jsonl", ROWS[30:40])
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[40:]).encode()
    (folder / "part-3.jsonl.gz").write_bytes(gzip.compress(lines))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "table.parquet", row_group_size=25)
    (folder / "packed.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    (folder / "one.json").write_text(json.dumps(ROWS, indent=1))
    blank = "\n\n".join(json.dumps(row) for row in ROWS)
    (folder / "blank.jsonl").write_text(f"\n{blank}")
    return folder


def recipe(model: Path, storage: Path, *sources: dict[str, Any], **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"base": str(model)},
            "adapter": {"rank": 4},
            "data": {"train": [*sources], "max_length": 96, "packing": False, **data},
            "optim": {"max_steps": 5},
            "storage": str(storage),
        }
    )


def rows_of(prepared: Prepared) -> Counter[tuple[int, ...]]:
    if not prepared.manifest.train.files:
        return Counter()
    rows = every_sequence(prepared.files, prepared.manifest.train, 0, 1)
    return Counter(tuple(row.input_ids.tolist()) for row in rows)


def assert_as_ahead(model: Path, storage: Path, *sources: dict[str, Any], **data: Any) -> None:
    ahead = recipe(model, storage, *sources, **data)
    expected = rows_of(prepare(ahead, Folder(str(storage / "ahead")), run_in_process))
    streamed = recipe(model, storage, *sources, **data, prepare="streaming")
    windows = Windows(streamed, resolve_data(streamed))
    assert windows.plan.windows > 1 and expected
    for epoch in (0, 1):
        counted: Counter[tuple[int, ...]] = Counter()
        for number in range(epoch * windows.plan.windows, (epoch + 1) * windows.plan.windows):
            home = Folder(str(storage / "windows" / str(number)))
            counted += rows_of(windows.prepare(windows.part(number), home, run_in_process, SILENT))
        assert counted == expected


@pytest.mark.parametrize(
    "sources",
    [
        [{"path": "part-*"}],
        [{"path": "part-*", "weight": 0.4}, {"path": "table.parquet", "limit": 70}],
        [{"path": "part-*", "limit": 55, "weight": 2.5}, {"path": "one.json", "limit": 33}],
        [{"path": "packed.jsonl.zst", "limit": 60}, {"path": "blank.jsonl", "weight": 0.5}],
        [{"path": "table.parquet", "weight": 3.2}, {"path": "part-3.jsonl.gz", "limit": 7}],
    ],
    ids=lambda sources: " ".join(source["path"] for source in sources),
)
def test_globs_limits_and_weights(
    tiny_model: Path, tmp_path: Path, files: Path, sources: list[dict[str, Any]]
) -> None:
    placed = [{**source, "path": str(files / source["path"])} for source in sources]
    assert_as_ahead(tiny_model, tmp_path, *placed, holdout=0.1)


def test_a_data_set_of_the_hub(
    tiny_model: Path, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as hub:
        content = {f"train-{n}.jsonl": (files / f"part-{n}.jsonl").read_bytes() for n in (1, 2)}
        hub.datasets["org/rows"] = {
            **content,
            "test.parquet": (files / "table.parquet").read_bytes(),
        }
        hub.use(monkeypatch)
        sources = {"dataset": "org/rows", "split": "train"}, {"path": str(files / "table.parquet")}
        assert_as_ahead(tiny_model, tmp_path, *sources)


FUNCTIONS = """
import sys

def kept(row):
    number = int(row["prompt"].split()[-1][:-1])
    if number % 40 == 0:
        sys.exit(3)
    if number % 50 == 0:
        raise KeyError("no")
    return number % 3 > 0 if number % 45 else "yes"

def value(row):
    return len(row["completion"])
"""


def called(name: str) -> dict[str, str]:
    return {"file": f"/functions.py:{name}", "source": FUNCTIONS}


@pytest.mark.parametrize(
    "stages",
    [
        [{"kind": "normalise"}, {"kind": "filter", "min_tokens": 26}],
        [{"kind": "keep", "with": called("kept")}],
        [{"kind": "redact", "of": ["card", "ip"]}, {"kind": "keep", "with": called("kept")}],
        [{"kind": "decontaminate", "ngram": 5}],
        [{"kind": "score", "with": called("value"), "min": 18}],
    ],
    ids=lambda stages: "-".join(stage["kind"] for stage in stages),
)
def test_stages(
    tiny_model: Path, tmp_path: Path, files: Path, stages: list[dict[str, Any]]
) -> None:
    """Functions that exit, raise and return another type cost only their rows."""
    held = [{"path": str(write_lines(tmp_path / "held.jsonl", ROWS[::7]))}]
    placed = [
        {**stage, **({"against": held} if stage["kind"] == "decontaminate" else {})}
        for stage in stages
    ]
    sources = {"path": str(files / "part-*")}, {"path": str(files / "one.json"), "limit": 60}
    assert_as_ahead(tiny_model, tmp_path, *sources, curate=placed, max_bad_rows=0.2)
