"""Uploads of a job: files by content, relative paths, a size limit, and a note of hidden files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.cluster.jobs.staging import (
    INPUTS_FOLDER,
    LAUNCHER,
    RECIPE_FILE,
    SWEEP_FILE,
    receive,
    stage,
    stage_sweep,
)
from finray.cluster.kubernetes.portable import check_reachable
from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.training.data.expand import expand
from finray.training.data.resolve import all_rows
from finray.training.data.row_changes import UNCHANGED
from finray.tuning.sweep import LoadedSweep, load_sweep


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    return folder


def make(folder: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "run",
        "model": {"base": "owner/model"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "storage": "/shared/runs",
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_recipe(path)


def staged_recipe(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    return values


def parcel(tmp_path: Path, name: str = "parcel") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_local_data_is_uploaded_by_a_relative_path(tmp_path: Path, rows: Path) -> None:
    target = parcel(tmp_path)
    stage(make(rows), target, ())
    path = staged_recipe(target)["data"]["train"][0]["path"]
    assert path.startswith("./") and str(rows) not in (target / RECIPE_FILE).read_text()
    assert (target / path).read_bytes() == (rows / "rows.jsonl").read_bytes()


def test_evaluation_data_of_a_stage_is_uploaded(tmp_path: Path, rows: Path) -> None:
    (rows / "bench.jsonl").write_text('{"question": "one"}\n', encoding="utf-8")
    (rows / "rows.py").write_text("def good(row): return True\n", encoding="utf-8")
    curate = [
        {"kind": "keep", "with": "rows.py:good"},
        {"kind": "decontaminate", "against": "bench.jsonl"},
    ]
    target = parcel(tmp_path)
    stage(make(rows, data={"train": "rows.jsonl", "curate": curate}), target, ())
    keep, decontaminate = staged_recipe(target)["data"]["curate"]
    (against,) = decontaminate["against"]
    assert (target / against["path"]).read_bytes() == (rows / "bench.jsonl").read_bytes()
    assert keep["with"]["source"] == "def good(row): return True\n"
    recipe_from_dict(staged_recipe(target))


def test_globs_and_folders_keep_their_files(tmp_path: Path, rows: Path) -> None:
    (rows / "more").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (rows / "more" / name).write_text(f'{{"text": "{name}"}}\n', encoding="utf-8")
    target = parcel(tmp_path)
    sources = [{"path": "more"}, {"path": "more/a*.jsonl"}]
    stage(make(rows, data={"train": sources}), target, ())
    folder, glob = (target / source["path"] for source in staged_recipe(target)["data"]["train"])
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert glob.name == "a*.jsonl" and [file.name for file in glob.parent.glob("*")] == ["a.jsonl"]


def test_what_is_on_the_cluster_or_a_uri_stays(tmp_path: Path, rows: Path) -> None:
    target = parcel(tmp_path)
    paths = ["/mnt/share/absent.jsonl", "s3://bucket/rows.jsonl"]
    recipe = make(rows, data={"train": [{"path": path} for path in paths]})
    stage(recipe, target, ("/mnt/share",))
    assert [source["path"] for source in staged_recipe(target)["data"]["train"]] == paths
    assert not (target / INPUTS_FOLDER).exists()


def test_a_job_runs_in_the_interpreter_of_rays_workers(tmp_path: Path, rows: Path) -> None:
    """The raylet among its ancestors names it, whatever `python` is on the head."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    target = parcel(tmp_path)
    stage(make(rows), target, ())
    job = "import subprocess, sys; subprocess.run(sys.argv[1:4], check=True)"
    words = ["sh", str(target / LAUNCHER), "train", f"--python_worker_command={python} worker.py"]
    done = subprocess.run(
        [sys.executable, "-c", job, *words], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{python} -m finray.cluster.cli.job_entry train\n"


def test_a_missing_file_names_the_remedy(tmp_path: Path, rows: Path) -> None:
    recipe = make(rows, data={"train": [{"path": "/mnt/share/absent.jsonl"}]})
    with pytest.raises(InputError, match=r"absent\.jsonl(.|\n)*--on-cluster"):
        stage(recipe, parcel(tmp_path), ())


def test_too_big_names_what_and_where_to_put_it(tmp_path: Path, rows: Path) -> None:
    (rows / "big.jsonl").write_text('{"text": "x"}\n' * 200_000, encoding="utf-8")
    recipe = make(rows, data={"train": [{"path": "rows.jsonl"}, {"path": "big.jsonl"}]})
    with pytest.raises(InputError) as error:
        stage(recipe, parcel(tmp_path), (), limit_mib=2.0)
    lines = str(error.value).splitlines()
    assert "2.7 MiB" in lines[0] and "at most 2 MiB" in lines[0]
    assert "big.jsonl" in lines[1] and "rows.jsonl" in lines[2] and "s3://" in lines[3]
    stage(recipe, parcel(tmp_path, "larger"), (), limit_mib=3.0)


def test_a_file_that_gitignore_hides_is_uploaded_and_noted(tmp_path: Path, rows: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "init", "--quiet", str(rows)], check=True, env=own)
    (rows / ".gitignore").write_text("*.jsonl\n", encoding="utf-8")
    target = parcel(tmp_path)
    staged = stage(make(rows), target, ())
    assert [note for note in staged.notes if ".gitignore" in note and "rows.jsonl" in note]
    archive = tmp_path / "parcel.zip"
    create_package(str(target), archive, include_gitignore=True)
    from zipfile import ZipFile

    with ZipFile(archive) as content:
        assert content.read("inputs/0/rows.jsonl") == (rows / "rows.jsonl").read_bytes()
        assert "finray/training/records/report.html" in content.namelist()


def test_a_model_folder_needs_a_storage_that_is_a_folder(tmp_path: Path, rows: Path) -> None:
    (rows / "base").mkdir()
    (rows / "base" / "config.json").write_text("{}", encoding="utf-8")
    target = parcel(tmp_path)
    stage(make(rows, model={"base": "base"}), target, ())
    assert (target / staged_recipe(target)["model"]["base"] / "config.json").read_text() == "{}"
    recipe = make(rows, model={"base": "base"}, storage="s3://bucket/runs")
    with pytest.raises(InputError, match="hub id"):
        stage(recipe, parcel(tmp_path, "other"), ())


def test_the_digest_is_of_content_alone(tmp_path: Path, rows: Path) -> None:
    first = stage(make(rows), parcel(tmp_path, "a"), ()).digest
    moved = tmp_path / "elsewhere"
    rows.rename(moved)
    assert stage(make(moved), parcel(tmp_path, "b"), ()).digest == first
    (moved / "rows.jsonl").write_text('{"text": "two"}\n', encoding="utf-8")
    assert stage(make(moved), parcel(tmp_path, "c"), ()).digest != first
    assert stage(make(moved, seed=1), parcel(tmp_path, "d"), ()).digest != first


def test_the_same_files_give_the_same_recipe(tmp_path: Path, rows: Path) -> None:
    """A resumed run must find its data at the same path, wherever Ray puts the job."""
    storage = tmp_path / "shared"
    received = []
    for name in ("first", "second"):
        target = parcel(tmp_path, name)
        stage(make(rows, storage=str(storage)), target, ())
        received.append(receive(target, RECIPE_FILE))
    assert received[0] == received[1]
    path = Path(received[0]["data"]["train"][0]["path"])
    assert path.is_relative_to(storage / "run" / INPUTS_FOLDER)
    assert path.read_bytes() == (rows / "rows.jsonl").read_bytes()


def make_sweep(folder: Path, storage: Path, **changes: Any) -> LoadedSweep:
    make(folder)
    values = {
        "name": "sweep",
        "recipe": "recipe.yaml",
        "set": {"optim.max_steps": 5},
        "search": {"method.kind": {"choice": ["sft", "orpo"]}},
        "storage": str(storage),
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_sweep(path)


def test_a_sweep_is_uploaded_with_its_base_recipe_and_data(tmp_path: Path, rows: Path) -> None:
    loaded = make_sweep(rows, tmp_path / "shared", trials=7)
    target = parcel(tmp_path)
    stage_sweep(loaded, target, ())
    there = tmp_path / "resolved.yaml"
    there.write_text(yaml.safe_dump(receive(target, SWEEP_FILE)), encoding="utf-8")
    arrived = load_sweep(there)
    sent = Path(arrived.recipe.data.train[0].path)
    assert sent.is_relative_to(tmp_path / "shared" / "sweep" / INPUTS_FOLDER)
    assert sent.read_bytes() == (rows / "rows.jsonl").read_bytes()
    assert arrived.recipe.optim.max_steps == 5 and arrived.sweep.search == loaded.sweep.search
    # unset stays unset: written defaults of one method would contradict another's
    assert arrived.recipe.method.model_fields_set == {"kind"}

    more = parcel(tmp_path, "more")
    stage_sweep(make_sweep(rows, tmp_path / "shared", trials=9), more, ())
    again = receive(more, SWEEP_FILE)["recipe"]["data"]["train"][0]["path"]
    assert again == str(sent), "a sweep that grows would find its data elsewhere"


def test_reward_functions_are_inside_the_sweep(tmp_path: Path, rows: Path) -> None:
    (rows / "rewards.py").write_text("def good(**columns):\n    return [1.0]\n", encoding="utf-8")
    method = {"kind": "grpo", "rewards": [{"file": "rewards.py:good"}], "generations": 2}
    search = {"optim.learning_rate": {"log_uniform": [1e-5, 1e-4]}}
    grpo = {"optim.batch_size": 4, "optim.micro_batch_size": 2, "method": method}
    loaded = make_sweep(rows, tmp_path / "shared", search=search, objective="reward", set=grpo)
    target = parcel(tmp_path)
    stage_sweep(loaded, target, ())
    (rows / "rewards.py").unlink()
    there = tmp_path / "resolved.yaml"
    there.write_text(yaml.safe_dump(receive(target, SWEEP_FILE)), encoding="utf-8")
    assert "return [1.0]" in load_sweep(there).recipe.method.rewards[0].source


def test_searched_files_are_not_uploaded(tmp_path: Path, rows: Path) -> None:
    search = {"data.train.0.path": {"choice": ["rows.jsonl", "s3://bucket/rows.jsonl"]}}
    loaded = make_sweep(rows, tmp_path, search=search)
    with pytest.raises(InputError, match=r"sweep\.yaml:\d+: search\.data\.train\.0\.path.*rows"):
        stage_sweep(loaded, parcel(tmp_path), ())
    (rows / "rows.py").write_text("def good(row):\n    return True\n", encoding="utf-8")
    stages = [[], [{"kind": "keep", "with": "rows.py:good"}]]
    loaded = make_sweep(rows, tmp_path, search={"data.curate": {"choice": stages}})
    with pytest.raises(InputError, match=r"choice\.1\.0\.with: rows\.py is on this machine"):
        stage_sweep(loaded, parcel(tmp_path, "code"), ())


def test_splits_of_a_folder_are_uploaded_together(tmp_path: Path, rows: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list([{"text": f"row {n}"} for n in range(20)])
    parts = {"train": range(8), "test": range(8, 12), "validation": range(12, 20)}
    splits = {name: made.select(part) for name, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(rows / "saved"))
    for name in parts:
        (rows / "plain" / "data").mkdir(parents=True, exist_ok=True)
        splits[name].to_json(rows / "plain" / "data" / f"{name}.jsonl")
    for folder in ("saved", "plain"):
        recipe = make(rows, data={"train": folder, "eval": {"split": "test[:3]"}})
        target = parcel(tmp_path, folder)
        stage(recipe, target, ())
        values = {**staged_recipe(target), "storage": str(tmp_path / f"{folder}-runs")}
        (target / RECIPE_FILE).write_text(yaml.safe_dump(values))
        there = recipe_from_dict(receive(target, RECIPE_FILE))
        texts = {
            split: [row["text"] for _, row in all_rows(expand(source).files, UNCHANGED, 2**20)]
            for split, (source, *_) in (("train", there.data.train), ("eval", there.data.eval))
        }
        assert texts["train"] == [f"row {n}" for n in range(8)]
        assert texts["eval"] == [f"row {n}" for n in range(8, 11)]
        assert not list((target / INPUTS_FOLDER).rglob("*validation*"))


def test_hub_data_and_row_functions_go_along(tmp_path: Path, rows: Path) -> None:
    (rows / "rows.py").write_text("def shorten(row):\n    return row\n")
    data = {"train": {"dataset": "org/name", "map": "rows.py:shorten", "system": "/no_think"}}
    recipe = make(rows, data=data)
    target = parcel(tmp_path)
    stage(recipe, target, ())
    (source,) = staged_recipe(target)["data"]["train"]
    assert source["dataset"] == "org/name" and source["map"]["source"].startswith("def shorten")
    assert check_reachable(recipe.model_copy(update={"storage": "s3://bucket"}), "/mnt") is False
