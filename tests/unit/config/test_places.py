"""Messages after the schema have file and line too: the places travel with the recipe."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.cluster.cli.main import main
from finray.cluster.jobs.staging import stage
from finray.cluster.kubernetes.render import Target, render
from finray.training.common.errors import InputError
from finray.training.config.places import about
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.tuning.plan import make_plan
from finray.tuning.sweep import load_sweep

TEXT = """\
name: support
model: {base: some/model}
data:
  train:
  - path: rows.jsonl
optim:
  batch_size: 8
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(TEXT, encoding="utf-8")
    return load_recipe(tmp_path / "recipe.yaml", ["optim.epochs=2"])


def test_places_are_no_settings(recipe: Recipe) -> None:
    same = recipe_from_dict(recipe.model_dump(mode="json"))
    assert recipe.places and not same.places
    assert same == recipe and set(recipe.model_dump()) == set(Recipe.model_fields)
    assert same.located("optim.epochs: no") == "optim.epochs: no"
    for copy in (recipe.model_copy(update={"seed": 1}), pickle.loads(pickle.dumps(recipe))):
        assert copy.places == recipe.places


def test_a_line_that_begins_with_a_key_gets_its_place(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    expected = {
        "data.train.0: there is no x": f"{file}:5: data.train.0: there is no x",
        "data.max_length: too long": f"{file}:3: data.max_length: too long",
        "data.holdout 0.1: too small": f"{file}:3: data.holdout 0.1: too small",
        "optim.batch_size: too large\n  optim.seed: 1": f"{file}:7: optim.batch_size: too large\n"
        "  optim.seed: 1",
        "optim.epochs: too many": "--set optim.epochs=2: optim.epochs: too many",
        "scale: too large": f"{file}:1: scale: too large",
        f"{file}:5: data.train.0: there is no x": f"{file}:5: data.train.0: there is no x",
        "name of the run": "name of the run",
        "data.jsonl:3: not JSON": "data.jsonl:3: not JSON",
        "nothing: no key": "nothing: no key",
    }
    assert {message: recipe.located(message) for message in expected} == expected
    with pytest.raises(InputError) as caught, recipe.locating(), about("data.train.0"):
        raise InputError("gone") from OSError("cause")
    assert str(caught.value) == f"{file}:5: data.train.0: gone"
    assert str(caught.value.__cause__) == "cause"


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, chat_file: Path) -> Path:
    """A folder with a model, variants of it that lack something, and data."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(tiny_model, tmp_path / "no_template")
    for file in (tmp_path / "no_template").glob("*template*"):
        file.unlink()
    config = tmp_path / "no_template" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    config.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name in ("no_tokenizer", "bad_config", "bad_tokenizer"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_model / "config.json", tmp_path / name)
    (tmp_path / "bad_config" / "config.json").write_text("{", encoding="utf-8")
    for name in ("bad_tokenizer", "bad_config"):
        (tmp_path / name / "tokenizer.json").write_text("{}", encoding="utf-8")
    shutil.copy(chat_file, tmp_path / "rows.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def score(prompts):\n    pass\n", encoding="utf-8")
    return tmp_path


GOOD: dict[str, Any] = {
    "name": "support",
    "model": {"base": "model"},
    "adapter": {"rank": 4},
    "method": {"kind": "sft"},
    "data": {"train": [{"path": "rows.jsonl"}], "max_length": 128},
    "optim": {"batch_size": 4},
    "scale": {"workers": 0},
}
GRPO = {"kind": "grpo", "generations": 4, "max_completion": 8}
REFUSED = {
    "data.train.0": [{"path": name} for name in ("gone.jsonl", "empty", "empty.jsonl", "*.csv")],
    "data.max_length": [10**6],
    "optim.batch_size": [10**6],
    "model.base": [f"./{name}" for name in ("gone", "empty", "no_tokenizer", "bad_config")],
    "data.train": [[{"path": "rows.jsonl"}, {"path": "bad.jsonl"}]],
    "data.eval": [[{"path": "gone.jsonl"}]],
    "data.chat_template": ["gone.jinja", "{% if %}"],
    "model.adapter": ["gone", "empty"],
    "model.trust_remote_code": [True],
    "method.reference_model": ["./gone", "empty"],
    "method.rewards.0": [{"run": "gone"}, {"model": "./gone"}, {"file": "rewards.py:score"}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values]
)
def test_check_names_file_line_key_and_remedy(
    folder: Path,
    key: str,
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lines of the recipe are found again by the key that they begin with."""
    monkeypatch.chdir(folder)
    values = json.loads(json.dumps(GOOD))
    if key.startswith("method.reference"):
        values["method"] = {"kind": "dpo"}
    if key.startswith("method.rewards"):
        values["method"] = {**GRPO, "rewards": [{"run": "x"}]}
    if key == "model.adapter":
        del values["adapter"]
    if key == "model.trust_remote_code":
        values["model"] = {"base": "some/model", "revision": "main"}
    section, _, name = key.partition(".")
    if name.endswith(".0"):
        values[section][name.removesuffix(".0")][0] = value
    else:
        values[section][name] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert main(["check", str(path)]) == 2
    message = capsys.readouterr().err
    match = re.match(rf"finray: {re.escape(str(path))}:(\d+): ([\w.]+)[: ]", message)
    assert match is not None, message
    assert match[2].startswith(key)
    line = path.read_text(encoding="utf-8").splitlines()[int(match[1]) - 1]
    last = [part for part in match[2].split(".") if not part.isdigit()][-1]
    written = line.strip(" -").partition(":")[0]
    assert written == last or (match[2][-1].isdigit() and line.startswith("  - ")), (line, message)
    assert ";" in message and "Traceback" not in message


def test_a_sweeps_recipe_has_the_sweeps_places(folder: Path) -> None:
    path = folder / "sweep.yaml"
    recipe = {**GOOD, "data": {**GOOD["data"], "holdout": 0.1}}
    search = {"model.adapter": {"choice": ["gone"]}, "optim.learning_rate": {"choice": [1e-4]}}
    values = {"name": "sweep", "recipe": recipe, "search": search}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    loaded = load_sweep(path)
    line = path.read_text(encoding="utf-8").splitlines().index("    max_length: 128") + 1
    assert loaded.recipe.located("data.max_length: no") == f"{path}:{line}: data.max_length: no"
    with pytest.raises(InputError) as caught:
        make_plan(loaded)
    assert f"{path}:" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("command", ["check", "prepare", "train"])
@pytest.mark.parametrize("fault", ["a file", "read-only"])
def test_an_unusable_storage_is_refused_before_anything_starts(
    folder: Path,
    command: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "notes.md").touch()
    values = {**GOOD, "storage": str(folder / ("notes.md" if fault == "a file" else "new"))}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if fault == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(folder.rglob("*"))
    assert main([command, str(path)]) == 2
    line = path.read_text(encoding="utf-8").splitlines().index(f"storage: {values['storage']}") + 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"finray: {path}:{line}: storage: {values['storage']}: ")
    assert "give a" in message and sorted(folder.rglob("*")) == before


def test_rendering_and_staging_name_the_place_of_a_local_path(folder: Path, tmp_path: Path) -> None:
    """Two commands that refuse a recipe after it was loaded."""
    path = folder / "recipe.yaml"
    values = {**GOOD, "model": {"base": "some/model"}, "scale": {"workers": 1}}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    recipe = load_recipe(path)
    line = path.read_text(encoding="utf-8").splitlines().index("  - path: rows.jsonl") + 1
    with pytest.raises(InputError) as caught:
        render(recipe, Target("cpu", "finray"))
    assert f"{path}:{line}: data.train.0.path: " in str(caught.value)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        stage(recipe, tmp_path / "job", ())
    assert str(caught.value).startswith(
        f"{path}:{line}: data.train.0: {folder}/rows.jsonl: no such"
    )
