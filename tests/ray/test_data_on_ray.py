"""Ray Data does what this process does: the same prepared data, the same stream."""

import json
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.recorded import RecordedProgress

from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data import window_plan
from finray.training.data.prepare import Windows, prepare
from finray.training.data.prepared import DamagedDataError, Prepared
from finray.training.data.resolve import resolve_data
from finray.training.data.stream import Slice, _in_ray_tasks, share, stream
from finray.training.data.tasks import RunOnRayData, run_in_process

pytestmark = [
    pytest.mark.ray,
    # Ray Data and pandas warn of their own deprecations while tasks run.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
BATCH = 12


def make_recipe(
    model: Path,
    files: list[Path],
    storage: Path,
    method: str | dict[str, str] = "sft",
    max_steps: int | None = None,
    **data: Any,
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(model)},
            "method": method,
            "data": {
                "train": [{"path": str(file)} for file in files],
                "holdout": 0.1,
                "max_length": 128,
                "packing": False,
                **data,
            },
            "optim": {"max_steps": max_steps},
            "storage": str(storage),
        }
    )


@pytest.fixture(scope="module")
def prepared(
    tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    storage = tmp_path_factory.mktemp("here")
    recipe = make_recipe(tiny_model, [chat_file], storage)
    return prepare(recipe, Folder(str(storage)), run_in_process)


def rows(prepared: Prepared) -> list[dict[str, object]]:
    return [
        row
        for split in (prepared.manifest.train, prepared.manifest.eval)
        if split is not None
        for file in split.files
        for row in pq.read_table(prepared.files.file(file)).to_pylist()
    ]


@pytest.mark.usefixtures("local_ray")
def test_ray_data_prepares_the_same(
    prepared: Prepared, tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_model, [chat_file], tmp_path)
    progress = RecordedProgress()
    on_ray = prepare(recipe, Folder(str(tmp_path)), RunOnRayData(), progress)
    assert on_ray.manifest.fingerprint == prepared.manifest.fingerprint
    assert rows(on_ray) == rows(prepared) and progress.statuses
    progress = RecordedProgress()
    prepare(recipe, Folder(str(tmp_path)), RunOnRayData(), progress)
    assert not progress.statuses, "the second preparation did work"


@pytest.mark.usefixtures("local_ray")
def test_ray_data_curates_the_same(tiny_model: Path, tmp_path: Path) -> None:
    draw, words = random.Random(0), [f"w{n}" for n in range(300)]
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(200)]
    copies = [f"{text} more" for text in texts[::3]]
    for name, part in (("a", [*texts[:150], *texts[:50]]), ("b", [*copies, *texts[150:]])):
        rows = "".join(json.dumps({"text": text, "of": text[1:3]}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    values = {
        "curate": ["normalise", {"kind": "deduplicate", "near": {"jaccard": 0.9}}, "redact"],
        "holdout": {"share": 0.2, "group_by": "of"},
        "mix": {"temperature": 0.5},
        "train": [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")],
    }
    recipe = make_recipe(tiny_model, [], tmp_path, method={"kind": "pretrain"}, **values)
    here = prepare(recipe, Folder(str(tmp_path / "here")), run_in_process)
    on_ray = prepare(recipe, Folder(str(tmp_path / "ray")), RunOnRayData())
    assert here.manifest.funnel == on_ray.manifest.funnel
    assert here.manifest.train.hashes == on_ray.manifest.train.hashes
    assert here.manifest.eval is not None and on_ray.manifest.eval is not None
    assert here.manifest.eval.hashes == on_ray.manifest.eval.hashes
    assert here.manifest.funnel[1]["dropped"].keys() == {
        "equal to an earlier row",
        "nearly equal to an earlier row",
    }


def _texts(folder: Path) -> list[Path]:
    draw, words = random.Random(0), [f"w{n}" for n in range(300)]
    files = []
    for name in "abc":
        rows = [{"text": " ".join(draw.choices(words, k=40)), "n": n % 7} for n in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(folder / f"{name}.jsonl")
    return files


@pytest.mark.usefixtures("local_ray")
def test_ray_data_scores_the_same(tiny_model: Path, tmp_path: Path) -> None:
    function = {"file": "/s.py:f", "source": "def f(row):\n    return row['n']\n"}
    curate = [{"kind": "score", "with": function, "keep_top": 0.4}]
    recipe = make_recipe(
        *(tiny_model, _texts(tmp_path), tmp_path), {"kind": "pretrain"}, curate=curate
    )
    here = prepare(recipe, Folder(str(tmp_path / "here")), run_in_process)
    on_ray = prepare(recipe, Folder(str(tmp_path / "ray")), RunOnRayData())
    assert here.manifest.funnel == on_ray.manifest.funnel
    assert here.manifest.funnel[-1]["rows_out"] == 72
    assert here.manifest.train.hashes == on_ray.manifest.train.hashes


@pytest.mark.usefixtures("local_ray")
def test_tasks_stay_within_the_bounds_of_the_recipe() -> None:
    def span(_: int) -> tuple[float, float]:
        started = time.time()
        time.sleep(0.1)
        return started, time.time()

    # a resource that each cluster's first node has
    tasks = RunOnRayData(cpus=1, resources={"node:__internal_head__": 0.001})
    times = list(tasks(span, list(range(6))))
    assert times == sorted(times) and len(times) == 6
    assert all(one[1] <= two[0] for one, two in pairwise(times)), "two tasks ran at once"
    message = r"^scale\.prepare\.resources: no node has \{cpu_node: 0\.001\}; .* are: none; start"
    with pytest.raises(InputError, match=message):
        list(RunOnRayData(resources={"cpu_node": 0.001})(span, [1]))


@pytest.mark.usefixtures("local_ray")
def test_a_bad_row_in_a_task_is_reported_as_in_this_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    bad.write_text(good * 10 + "{oops\n" * 10, encoding="utf-8")
    recipe = make_recipe(tiny_model, [bad], tmp_path)
    with pytest.raises(InputError, match=r"bad\.jsonl:11"):
        prepare(recipe, Folder(str(tmp_path)), RunOnRayData())


@pytest.mark.usefixtures("local_ray")
def test_windows_are_made_beside_workers_that_hold_all_cpus(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Worker:
        def hold(self) -> None:
            """Return once the worker has its CPUs."""

    for name, size in (("FIRST_BYTES", 8192), ("WINDOW_BYTES", 8192), ("BLOCK_BYTES", 2048)):
        monkeypatch.setattr(window_plan, name, size)
    monkeypatch.setattr(window_plan, "_PACKED_BYTES", 1)
    recipe = make_recipe(tiny_model, [chat_file], tmp_path, prepare="streaming", max_steps=9)
    windows = Windows(recipe, resolve_data(recipe))
    worker = ray.remote(num_cpus=4)(Worker).remote()
    ray.get(worker.hold.remote())
    here, on_ray = (
        windows.prepare(windows.part(1), Folder(str(tmp_path / name)), run, SILENT).manifest
        for name, run in (("here", run_in_process), ("ray", RunOnRayData.beside_workers(None)))
    )
    assert here.train.hashes == on_ray.train.hashes and here.train.sequences
    ray.kill(worker)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 0), (3, 0), (3, 25)])
def test_ray_data_streams_the_same_order(prepared: Prepared, world_size: int, start: int) -> None:
    """Sample ids of steps start..30 (over an epoch and a half), from every rank's stream."""

    def part(rank: int, size: int, first: int) -> Slice:
        split = prepared.manifest.train
        return Slice(prepared.files, split, 3, BATCH, rank, size, first, 30)

    alone = [int(s.rows[0]) for s in stream(part(0, 1, 0), on_ray=False)]
    streams = [stream(part(rank, world_size, start), on_ray=True) for rank in range(world_size)]
    together = [
        int(next(streams[rank]).rows[0])
        for _ in range(start, 30)
        for rank in range(world_size)
        for _ in range(share(BATCH, rank, world_size))
    ]
    assert together == alone[start * BATCH :]
    assert all(next(each, None) is None for each in streams)


@pytest.mark.usefixtures("local_ray")
def test_a_rank_that_has_no_row_in_the_last_window(prepared: Prepared) -> None:
    """A step over the end of an epoch, whose other epoch's rows are those of other ranks."""
    split = prepared.manifest.train
    step, places = divmod(split.sequences, BATCH)
    world_size = BATCH
    assert places, "the epoch ends with a step"
    for rank in (0, world_size - 1):
        part = Slice(prepared.files, split, 3, BATCH, rank, world_size, step, step + 1)
        assert len(list(part.windows())) == 2
        here = [int(row.rows[0]) for row in stream(part, on_ray=False)]
        assert [int(row.rows[0]) for row in stream(part, on_ray=True)] == here and len(here) == 1


@pytest.mark.usefixtures("local_ray")
def test_damage_that_a_task_finds_is_named_by_the_worker(
    tiny_model: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The task renames the file, so the next one misses it."""
    recipe = make_recipe(tiny_model, [chat_file], tmp_path)
    data = prepare(recipe, Folder(str(tmp_path)), run_in_process)
    part = Slice(data.files, data.manifest.train, 3, BATCH, 0, 1, 0, 30)
    window = next(part.windows())
    file = Path(data.files.file(data.manifest.train.files[0]))
    file.write_bytes(file.read_bytes()[:-1])
    for message in ("damaged: this file .* is not as it was written", "this file .* is missing"):
        with pytest.raises(DamagedDataError, match=f"^{file}: {message}"):
            list(_in_ray_tasks(part, [window]))
