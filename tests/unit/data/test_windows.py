"""Streamed data: windows are a function of data and seed, few of them exist, and all rows come."""

import gzip
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from finray.training.common.errors import InputError, RunError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.data import window_plan
from finray.training.data.prepare import Windows, prepare
from finray.training.data.prepared import Prepared
from finray.training.data.producing import MOST_AHEAD, Producer
from finray.training.data.resolve import resolve_data
from finray.training.data.stream import share
from finray.training.data.tasks import run_in_process
from finray.training.data.window_files import read_counts
from finray.training.data.window_reader import StreamedWindows

BATCH = 8


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 4 KiB."""
    sizes = {"FIRST_BYTES": 2048, "WINDOW_BYTES": 4096, "BLOCK_BYTES": 1024, "_SMALLEST_BLOCK": 256}
    for name, size in sizes.items():
        monkeypatch.setattr(window_plan, name, size)
    monkeypatch.setattr(window_plan, "_PACKED_BYTES", 1)


def recipe(model: Path, storage: Path, *sources: dict[str, Any], **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"base": str(model)},
            "adapter": {"rank": 4},
            "data": {
                "train": [*sources],
                "max_length": 96,
                "packing": False,
                "prepare": "streaming",
                **data,
            },
            "optim": {"batch_size": BATCH, "max_steps": 300},
            "scale": {"workers": 0},
            "storage": str(storage),
        }
    )


def prepared_of(settings: Recipe) -> Prepared:
    return prepare(settings, Folder(settings.storage) / "prepared", run_in_process)


class Streaming:
    """A run's windows, with a driver in a thread."""

    def __init__(self, settings: Recipe) -> None:
        self.settings = settings
        self.prepared = prepared_of(settings)
        self.folder = Folder(settings.storage) / "run" / "windows"

    def producer(self) -> Producer:
        return Producer(self.settings, self.prepared, self.folder, run_in_process)

    def windows(self, patience: float = 60.0) -> StreamedWindows:
        return StreamedWindows(self.folder, self.prepared, self.settings.seed, patience)

    def texts(self, world_size: int, steps: tuple[int, int]) -> list[tuple[int, ...]]:
        """The tokens of each sequence in global order, merged from all workers' streams."""
        with self.producer():
            readers = [self.windows() for _ in range(world_size)]
            readers[0].need(steps[0] * BATCH)
            streams = [
                reader.rows(BATCH, rank, world_size, steps, lambda: None)
                for rank, reader in enumerate(readers)
            ]
            return [
                tuple(next(stream).input_ids.tolist())
                for _ in range(*steps)
                for rank, stream in enumerate(streams)
                for _ in range(share(BATCH, rank, world_size))
            ]


def test_the_order_depends_on_neither_workers_nor_kills(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Two epochs and more, by one worker and by three, and from steps in the middle of windows."""
    settings = recipe(tiny_model, tmp_path / "a", {"path": str(chat_file)})
    streaming = Streaming(settings)
    assert (streaming.prepared.manifest.windows or 0) > 4
    whole = streaming.texts(1, (0, 62))
    assert len(whole) == 62 * BATCH
    epochs = [whole[:240], whole[240:480]]
    assert Counter(epochs[0]) == Counter(epochs[1]) and len(set(epochs[0])) == 240
    assert epochs[0] != epochs[1]
    assert streaming.texts(3, (7, 40)) == whole[7 * BATCH : 40 * BATCH]
    # Without what the driver noted of earlier windows.
    (tmp_path / "a/run/windows/counts.json").unlink()
    assert streaming.texts(2, (33, 40)) == whole[33 * BATCH : 40 * BATCH]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "json", "parquet", "arrow"])
def test_every_row_comes_as_often_as_its_weight_says(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Also of a small source of any kind of file beside a large one, which both stand in nearly
    all windows, in their shares."""
    small = write_rows(tmp_path / f"small.{kind}", "small", 60)
    large = write_rows(tmp_path / "large.jsonl", "large", 600)
    sources = {"path": str(small), "weight": 2.0}, {"path": str(large)}
    settings = recipe(tiny_model, tmp_path, *sources)
    windows = Windows(settings, resolve_data(settings))
    count = windows.plan.windows
    assert count > 7
    seen: Counter[int] = Counter()
    shares = []
    for number in range(count, 2 * count):
        home = Folder(str(tmp_path / "w" / str(number)))
        made = windows.prepare(windows.part(number), home, run_in_process, SILENT)
        rows = [len(ids) for ids in tokens_of(made)]
        sizes = {source.path: source.documents for source in made.manifest.sources}
        seen.update(sizes)
        shares.append(sizes[str(small)] / len(rows))
    assert seen == {str(small): 120, str(large): 600}
    assert np.std(shares) < 0.1 and np.mean(shares) == pytest.approx(1 / 6, abs=0.02)


def write_rows(path: Path, name: str, count: int) -> Path:
    rows = [{"prompt": f"{name} {n}", "completion": f"{n} is {name}"} for n in range(count)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".csv":
        path.write_text(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows), max_chunksize=50)
    else:
        path.write_text(lines)
    return path


def tokens_of(prepared: Prepared) -> list[list[int]]:
    split = prepared.manifest.train
    return [
        ids
        for file in split.files
        for ids in pq.read_table(prepared.files.file(file))["input_ids"].to_pylist()
    ]


def test_few_windows_exist_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    """A source of twenty windows, read slowly and as fast as possible."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 1800)
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(data)}))
    assert (streaming.prepared.manifest.windows or 0) > 18
    most = 0
    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        for n, _ in enumerate(windows.rows(BATCH, 0, 1, (0, 200), lambda: None)):
            folders = [name for name in streaming.folder.names() if name.isdigit()]
            most = max(most, len(folders))
            if n < 200 and n % 50 == 0:
                time.sleep(0.3)
        counts = read_counts(streaming.folder)
    assert 2 <= most <= MOST_AHEAD + 3
    assert counts is not None and len(counts.sequences) > most
    assert [name for name in streaming.folder.names() if name.isdigit()] == []


@pytest.mark.parametrize(("kind", "batch"), [("jsonl", 256), ("csv", 8)])
def test_a_step_may_take_more_windows_than_are_made_ahead(
    tiny_model: Path, tmp_path: Path, kind: str, batch: int
) -> None:
    """A large batch; a file in one piece, which fills the first window and no other."""
    data = write_rows(tmp_path / f"rows.{kind}", "row", 603)
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(data)}))
    assert (streaming.prepared.manifest.windows or 0) > 3
    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        rows = windows.rows(batch, 0, 1, (0, 1280 // batch), lambda: None)
        texts = [tuple(row.input_ids.tolist()) for row in rows]
    assert len(texts) == 1280
    epochs = Counter(texts[:603]), Counter(texts[603:1206])
    assert epochs[0] == epochs[1] and len(epochs[0]) == 603


def test_only_first_windows_rows_are_held_out(tiny_model: Path, tmp_path: Path) -> None:
    """Rows of the held-out share are trained on in no window; some of them measure the model."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    settings = recipe(tiny_model, tmp_path, {"path": str(data)}, holdout=0.2)
    streaming = Streaming(settings)
    manifest = streaming.prepared.manifest
    assert manifest.eval is not None and manifest.in_train_too is None
    ahead = recipe(tiny_model, tmp_path, {"path": str(data)}, holdout=0.2, prepare="ahead")
    whole = prepared_of(ahead).manifest
    assert whole.eval is not None and 0 < manifest.eval.documents < whole.eval.documents
    steps = whole.train.sequences // BATCH
    texts = streaming.texts(1, (0, steps))
    trained = Counter(map(tuple, tokens_of(prepared_of(ahead))))
    assert len(texts) == steps * BATCH and not Counter(texts) - trained


def test_stages_look_at_each_window(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    held = write_rows(tmp_path / "held.jsonl", "row", 300)
    stages = [{"kind": "filter", "min_tokens": 4}, {"kind": "decontaminate", "ngram": 3}]
    sources = {"path": str(data)}
    changes: dict[str, Any] = {"eval": [{"path": str(held)}], "curate": stages}
    whole = prepared_of(recipe(tiny_model, tmp_path, sources, **changes, prepare="ahead"))
    expected = Counter(map(tuple, tokens_of(whole)))
    assert 0 < sum(expected.values()) < 600
    streaming = Streaming(recipe(tiny_model, tmp_path, sources, **changes))
    steps = sum(expected.values()) // BATCH
    texts = streaming.texts(2, (0, steps))
    assert len(texts) == steps * BATCH and not Counter(texts) - expected


def test_packed_rows_are_near_the_bound(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("WINDOW_BYTES", 4096), ("_PACKED_BYTES", 1024)):
        monkeypatch.setattr(window_plan, name, size)
    draw = np.random.default_rng(0)
    words = ["w" * n for n in draw.integers(1, 60, 3000)]
    rows = "".join(json.dumps({"prompt": "say", "completion": text}) + "\n" for text in words)
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = recipe(tiny_model, tmp_path, {"path": str(tmp_path / "rows.jsonl")}, packing=True)
    windows = Windows(settings, resolve_data(settings))
    sequences = tokens = 0
    for number in range(windows.plan.windows):
        home = Folder(str(tmp_path / str(number)))
        train = windows.prepare(windows.part(number), home, run_in_process, SILENT).manifest.train
        sequences, tokens = sequences + train.sequences, tokens + train.tokens
    assert windows.plan.windows > 2
    assert sequences <= 1.01 * tokens / 96


def test_what_the_driver_refuses_ends_the_workers(tiny_model: Path, tmp_path: Path) -> None:
    """Bad rows behind the first window; a driver that is gone; a file that changes."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    first = recipe(tiny_model, tmp_path / "a", {"path": str(data)}, max_bad_rows=0.01)
    streaming = Streaming(first)
    text = data.read_bytes()
    listed = data.stat()
    data.write_bytes(text.replace(b"completion", b"completiox"))
    os.utime(data, ns=(listed.st_atime_ns, listed.st_mtime_ns))
    with pytest.raises(InputError, match=r"data.max_bad_rows allows 1.0%, and \d+ of \d+ rows"):
        streaming.texts(1, (0, 40))
    data.write_bytes(text)

    streaming = Streaming(recipe(tiny_model, tmp_path / "b", {"path": str(data)}))
    streaming.folder.create()
    windows = streaming.windows(patience=0.5)
    rows = windows.rows(BATCH, 0, 1, (0, 40), lambda: None)
    with pytest.raises(RunError, match=r"window 1 of the data is missing, and for 0\.5 s"):
        list(rows)

    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        rows = windows.rows(BATCH, 0, 1, (0, 200), lambda: None)
        next(rows)
        data.write_bytes(text + text)
        with pytest.raises(InputError, match=f"{data}: changed while it was read; restore it"):
            list(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"epochs": 2}}, "optim.epochs counts all rows"),
        ({"optim": {}}, "data.prepare streaming needs optim.max_steps"),
        ({"mix": {"temperature": 0.5}}, "data.mix counts all rows"),
        ({"curate": ["normalise", "deduplicate"]}, "data.curate.1 deduplicate compares all rows"),
        ({"curate": [{"kind": "score", "with": "r.py:f", "keep_top": 0.5}]}, "data.curate.0.keep_"),
        ({"holdout": {"share": 0.1, "group_by": "of"}}, "data.holdout groups all rows"),
        ({"method": {"kind": "dpo", "precompute_reference": True}}, "method.precompute_reference"),
    ],
)
def test_settings_that_need_all_rows_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    own = {key: changes[key] for key in ("optim", "method") if key in changes}
    data = {key: value for key, value in changes.items() if key not in own}
    values: dict[str, Any] = {
        "name": "x",
        "model": "base",
        "data": {"train": "rows.jsonl", "prepare": "streaming", **data},
        "optim": {"max_steps": 5},
        **own,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "r.py").write_text("def f(row):\n    return 1.0\n")
    with pytest.raises(InputError, match=rf"r\.yaml:\d+: {message}.*prepare ahead") as raised:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value)
