"""Streamed data: windows are a function of data and seed, few of them exist, and all rows come."""

import gzip
import json
import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import wait_until
from support.streamed import make_windows_small, method_of, method_rows, write_lines
from tokenizers import Tokenizer

from finray.cluster.api import outlook
from finray.cluster.screens.curation import render_curation
from finray.training.common.errors import InputError, RunError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.methods import METHODS
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.data import window_plan, window_reader
from finray.training.data.prepare import Windows, prepare
from finray.training.data.prepared import MANIFEST, Prepared
from finray.training.data.producing import MOST_AHEAD, Producer
from finray.training.data.resolve import resolve_data
from finray.training.data.stream import Sequence, every_sequence, share
from finray.training.data.tasks import run_in_process
from finray.training.data.window_files import WindowCounts, read_counts, window_name, write_json
from finray.training.data.window_reader import StreamedWindows
from finray.training.run import curate_data

BATCH = 8


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    make_windows_small(monkeypatch)


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
        return [tuple(each.input_ids.tolist()) for each in self.sequences(world_size, steps)]

    def sequences(self, world_size: int, steps: tuple[int, int]) -> list[Sequence]:
        """Sequences in global order, merged from all workers' streams."""
        with self.producer():
            readers = [self.windows() for _ in range(world_size)]
            readers[0].need(steps[0] * BATCH)
            streams = [
                reader.rows(BATCH, rank, world_size, steps, lambda: None)
                for rank, reader in enumerate(readers)
            ]
            return [
                next(stream)
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
    assert streaming.prepared.manifest.longest == 96  # rows of other windows may be longer
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


@pytest.mark.long
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_gets_its_rows(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """An epoch holds each row once, as if it were prepared ahead; two workers that begin in the
    middle get the same as one, though nothing is known of earlier windows."""
    data = write_lines(tmp_path / "rows.jsonl", method_rows(kind, 160))
    ahead = every_row(prepared_of(of_method(tiny_model, tmp_path, data, kind, prepare="ahead")))
    assert len(ahead) == 160 and len(set(ahead)) > 100
    streaming = Streaming(of_method(tiny_model, tmp_path, data, kind))
    assert (streaming.prepared.manifest.windows or 0) > 1
    whole = [content(row) for row in streaming.sequences(1, (0, 30))]
    assert Counter(whole[:160]) == Counter(ahead)
    assert whole[160:] != whole[:80] and not Counter(whole[160:]) - Counter(ahead)
    (tmp_path / "run/windows/counts.json").unlink()
    later = [content(row) for row in streaming.sequences(2, (13, 30))]
    assert later == whole[13 * BATCH :]


def of_method(model: Path, storage: Path, data: Path, kind: str, **changes: Any) -> Recipe:
    values = recipe(model, storage, {"path": str(data)}, **changes).model_dump()
    del values["data"]["packing"]
    packing = {"packing": False} if kind in ("sft", "pretrain") else {}
    return Recipe.model_validate(
        {**values, "method": method_of(kind), "data": {**values["data"], **packing}}
    )


def content(row: Sequence) -> tuple[Any, ...]:
    """All that a worker gets of a row, but for its number."""
    arrays = (row.input_ids, row.lengths, row.trainable)
    return *(tuple(array.tolist()) for array in arrays), row.extra


def every_row(prepared: Prepared) -> list[tuple[Any, ...]]:
    train = prepared.manifest.train
    return [content(row) for row in every_sequence(prepared.files, train, 0, 1)]


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_packed_rows_are_near_the_bound(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_windows_small(monkeypatch, _PACKED_BYTES=1024)
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
    """A driver that is gone; a file that changes."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    text = data.read_bytes()
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(data)}))
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
        # The driver compares the files with the first window once, before it makes another one.
        second = f"{window_name(1)}/{MANIFEST}"
        wait_until(lambda: streaming.folder.exists(second), "the second window")
        data.write_bytes(text + text)
        with pytest.raises(InputError, match=f"{data}: changed while it was read; restore it"):
            list(rows)


def test_an_epoch_of_which_stages_leave_nothing(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", "row", 300)
    stages = [{"kind": "filter", "min_tokens": 1000}]
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(data)}, curate=stages))
    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        with pytest.raises(
            InputError, match=r"300 rows read, dropped: filter: too short 300; chan"
        ):
            list(windows.rows(BATCH, 0, 1, (0, 9), lambda: None))


def spoilt(path: Path, first: int, last: int) -> Path:
    """Lines [first, last) of a file become rows that cannot be used."""
    lines = path.read_text().splitlines(keepends=True)
    lines[first:last] = ["[]\n"] * (last - first)
    path.write_text("".join(lines))
    return path


def one_epoch(settings: Recipe) -> Recipe:
    """The recipe with as many steps as 280 rows take."""
    optim = settings.optim.model_copy(update={"max_steps": 280 // BATCH})
    return settings.model_copy(update={"optim": optim})


def test_bad_rows_count_once(tiny_model: Path, tmp_path: Path) -> None:
    """Those of a window that is made again were allowed; those of the next one are not, and a list
    of them is left. Bad rows of the evaluation data count among its own rows."""
    data = spoilt(write_rows(tmp_path / "rows.jsonl", "row", 300), 150, 170)
    held = spoilt(write_rows(tmp_path / "held.jsonl", "held", 300), 0, 12)
    changes: dict[str, Any] = {"eval": [{"path": str(held)}]}
    source = {"path": str(data)}
    streaming = Streaming(
        one_epoch(recipe(tiny_model, tmp_path, source, **changes, max_bad_rows=0.1))
    )
    assert streaming.prepared.manifest.dropped["bad_row"] == 12
    whole = streaming.texts(1, (0, 35))
    folder = tmp_path / "run/windows"
    counts = read_counts(streaming.folder)
    assert counts is not None and counts.dropped["bad_row"] == 32 and counts.rows == 300
    lines = "".join(path.read_text() for path in folder.glob("*.jsonl")).splitlines()
    listed = [json.loads(line) for line in lines]
    assert sorted(row["line"] for row in listed) == [*range(151, 171)]

    streaming.settings = one_epoch(
        recipe(tiny_model, tmp_path, source, **changes, max_bad_rows=0.0)
    )
    assert streaming.texts(2, (14, 35)) == whole[14 * BATCH :]
    counts.sequences.pop()
    counts.write(streaming.folder)
    with pytest.raises(InputError, match=r"allows 0.0%, and \d+ of \d+ rows") as raised:
        streaming.texts(1, (14, 35))
    path = Path(str(raised.value).rpartition("All of them: ")[2])
    assert path.parent == folder and any(folder.glob("*-quarantine.jsonl"))


def test_rows_of_a_step_are_named(tiny_model: Path, tmp_path: Path) -> None:
    """By their numbers in files that are cut by bytes, by rows and by groups; bad rows count."""
    kinds = ("jsonl", "jsonl.gz", "parquet")
    paths = [write_rows(tmp_path / f"rows.{kind}", kind, 120) for kind in kinds]
    spoilt(paths[0], 3, 5)
    sources = [{"path": str(path)} for path in paths]
    streaming = Streaming(recipe(tiny_model, tmp_path, *sources, max_bad_rows=0.1))
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        rows = windows.rows(BATCH, 0, 1, (0, 44), lambda: None)
        for step in range(44):
            expected: dict[str, list[int]] = {}
            for row in islice(rows, BATCH):
                text = tokenizer.decode(row.input_ids.tolist())
                kind, number = re.findall(r"([a-z.]+) (\d+?)\2 is", text)[0]
                expected.setdefault(f"{tmp_path}/rows.{kind}", []).append(int(number) + 1)
            if step % 6:
                continue
            named = windows.rows_at(step * BATCH, (step + 1) * BATCH)
            assert named == {path: sorted(numbers) for path, numbers in expected.items()}


def test_a_report_takes_the_first_window(tiny_model: Path, tmp_path: Path) -> None:
    """Of data that streams, nothing is written whole, nor left."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    stages: dict[str, Any] = {"curate": [{"kind": "filter", "min_tokens": 18}]}
    settings = recipe(tiny_model, tmp_path / "runs", {"path": str(data)}, **stages)
    report = curate_data(settings)
    assert list((tmp_path / "runs/prepared").iterdir()) == []
    manifest = prepared_of(settings).manifest
    assert report["funnel"] == list(manifest.funnel) and report["windows"] == manifest.windows
    assert 0 < report["sources"][0]["left"] < report["sources"][0]["rows"] < 100
    assert f"the first of {manifest.windows} windows of an epoch" in render_curation(report)


def test_a_worker_that_cannot_write_says_it_again(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is the driver's to tell; once there is room, the rows come."""
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(chat_file)}))
    failures = [OSError(28, "No space left")] * 3

    def write(*arguments: Any, **values: Any) -> None:
        if failures:
            raise failures.pop()
        write_json(*arguments, **values)

    with streaming.producer():
        windows = streaming.windows()
        monkeypatch.setattr(window_reader, "write_json", write)
        windows.need(0)
        rows = windows.rows(BATCH, 0, 1, (0, 20), lambda: None)
        assert len(list(rows)) == 20 * BATCH


def test_a_check_names_a_file_that_is_too_large(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large data, of which no window is made."""
    data = write_rows(tmp_path / "rows.csv", "row", 60)
    monkeypatch.setattr(window_plan, "LARGEST_BLOCK", 1000)
    monkeypatch.setattr(outlook, "_TRIED_BYTES", 0)
    with pytest.raises(InputError, match=rf"data.prepare: {data}: it is read as a whole"):
        outlook.data_outlook(recipe(tiny_model, tmp_path, {"path": str(data)}))


class _Cancelled(BaseException):
    """An error that is no Exception."""


def test_any_end_of_the_driver_ends_the_workers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unusual error; a full disk, which is met in the middle of a window, or at its end."""
    data = write_rows(tmp_path / "rows.jsonl", "row", 600)
    cases: list[tuple[type, str, BaseException, str]] = [
        (Windows, "part", _Cancelled("no"), r"preparing the data failed: .*no"),
        (Windows, "part", OSError(28, "No space left"), r"cannot write the prepared data: .* room"),
        (WindowCounts, "write", OSError(28, "No space left"), r"cannot write .* make room"),
    ]
    for number, (owner, name, error, message) in enumerate(cases):
        streaming = Streaming(recipe(tiny_model, tmp_path / str(number), {"path": str(data)}))
        streaming.texts(1, (0, 1))
        with monkeypatch.context() as patch:
            producer = streaming.producer()
            with producer, pytest.raises(RunError, match=message):
                patch.setattr(owner, name, Mock(side_effect=error))
                windows = streaming.windows()
                windows.need(0)
                list(windows.rows(BATCH, 0, 1, (0, 200), lambda: None))


def test_files_that_come_while_the_run_starts(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/a.jsonl", "row", 300)
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(tmp_path / "data/*.jsonl")}))
    write_rows(tmp_path / "data/b.jsonl", "row", 300)
    with pytest.raises(InputError, match="files changed while the run started"):
        streaming.texts(1, (0, 60))


def test_a_file_that_vanishes_is_named(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", "row", 1200)
    streaming = Streaming(recipe(tiny_model, tmp_path, {"path": str(data)}))
    with streaming.producer():
        windows = streaming.windows()
        windows.need(0)
        rows = windows.rows(BATCH, 0, 1, (0, 290), lambda: None)
        next(rows)
        data.unlink()
        with pytest.raises(InputError, match=str(data)):
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
