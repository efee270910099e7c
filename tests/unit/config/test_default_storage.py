"""$FINRAY_STORAGE: used where nothing else names a storage, and only there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import recipe_text

from finray.cluster.api.sweeps import _trial
from finray.cluster.cli.main import main
from finray.cluster.jobs.staging import RECIPE_FILE, SWEEP_FILE, receive, stage, stage_sweep
from finray.training.common.errors import InputError
from finray.training.common.storage import Folder
from finray.training.config.default_storage import VARIABLE
from finray.training.config.recipe import load_recipe, recipe_from_dict
from finray.training.records.run_folder import write_run
from finray.tuning.plan import make_plan
from finray.tuning.results import best_recipe
from finray.tuning.sweep import load_sweep


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where commands run; recipes lie below it."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "shared")
    return tmp_path


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "model": {"base": "owner/model"},
        "data": {"train": [{"path": "/data/rows.jsonl"}], "holdout": 0.1},
        **changes,
    }


def write(content: dict[str, Any], name: str = "recipe.yaml") -> Path:
    path = Path("recipes") / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_of_a_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, named = write(values()), write(values(storage="own"), "named.yaml")
    assert load_recipe(path).storage == str(here / "shared")
    assert load_recipe(path, ("storage=s3://b/r",)).storage == "s3://b/r"
    assert load_recipe(named).storage == str(here / "own")
    monkeypatch.setenv(VARIABLE, "gs://bucket/runs")
    assert load_recipe(path).storage == "gs://bucket/runs"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv(VARIABLE)
        else:
            monkeypatch.setenv(VARIABLE, unset)
        assert load_recipe(path).storage == str(here / "runs")


def test_what_finray_wrote_is_not_redirected(here: Path) -> None:
    written = load_recipe(write(values())).model_dump(mode="json")
    assert recipe_from_dict(written).storage == str(here / "shared")
    assert recipe_from_dict(values()).storage == "runs"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("s3://user:password@bucket/runs", "storage: holds a secret"),
        ("s4://bucket/runs", "storage: s4:// is not a kind of storage"),
    ],
)
def test_a_bad_value_names_its_place(
    value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    recipe, sweep = write(values()), write({"name": "s", "recipe": values()}, "sweep.yaml")
    for load, path in ((load_recipe, recipe), (load_sweep, sweep)):
        with pytest.raises(InputError) as error:
            load(path)
        assert str(error.value).startswith(f"$FINRAY_STORAGE: {reason}")
        assert "password" not in str(error.value)
    with pytest.raises(InputError, match=r"^--set storage=s4://b: storage: s4://"):
        load_recipe(recipe, ("storage=s4://b",))


@pytest.mark.parametrize("inline", [True, False])
def test_of_a_sweep_and_its_trials(here: Path, inline: bool) -> None:
    base = values() if inline else write(values()).name
    search = {"optim.weight_decay": {"choice": [0.0, 0.1]}}
    path = write({"name": "s", "recipe": base, "search": search}, "sweep.yaml")
    loaded = load_sweep(path)
    assert loaded.sweep.storage == loaded.recipe.storage == str(here / "shared")
    plan = make_plan(load_sweep(path, ("storage=own",)))
    assert plan.folder.uri == str(here / "own" / "s")
    assert {recipe.storage for recipe in plan.data_recipes().values()} == {str(here / "own")}
    assert best_recipe(plan, dict(plan.points[0]), "best").storage == str(here / "own")
    assert _trial(plan).storage == str(here / "own")
    trial = plan.space.recipe(dict(plan.points[0]), name="t", storage="/own/s/trials")
    assert trial.storage == "/own/s/trials"


def test_the_submitting_machine_decides(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = write({"name": "s", "recipe": values()}, "sweep.yaml")
    for name in ("recipe", "sweep"):
        (here / name).mkdir()
    stage(load_recipe(write(values())), here / "recipe", ("/data",))
    stage_sweep(load_sweep(sweep), here / "sweep", ("/data",))
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    monkeypatch.chdir(here / "sweep")
    received = write_again(here, receive(here / "recipe", RECIPE_FILE))
    assert load_recipe(received).storage == str(here / "shared")
    loaded = load_sweep(write_again(here, receive(here / "sweep", SWEEP_FILE)))
    assert loaded.sweep.storage == loaded.recipe.storage == str(here / "shared")


def write_again(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "received.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_of_commands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for storage in ("shared", "other"):
        write_run(Folder(str(here / storage / f"in-{storage}")).create(), {"status": "finished"})
    for arguments, name in ((["runs"], "in-shared"), (["runs", "--storage", "other"], "in-other")):
        assert main([*arguments, "--json"]) == 0
        assert [run["name"] for run in json.loads(capsys.readouterr().out)] == [name]
    monkeypatch.setenv(VARIABLE, "s3://bucket/runs")
    recipe = values(data={"train": [{"path": "s3://bucket/rows.jsonl"}]})
    assert main(["k8s", "render", str(write(recipe))]) == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert yaml.safe_load(recipe_text(job))["storage"] == "s3://bucket/runs"
