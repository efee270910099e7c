"""Files of the user's code: read, hashed, tried; and every key of a recipe that names a file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from finray.cluster.jobs.staging import RECIPE_FILE, stage
from finray.cluster.kubernetes.portable import check_reachable
from finray.training.common.errors import InputError, RunError
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.config.user_code import UserFunction, functions_in, try_import

GOOD = "def short(prompts, completions, completion_ids, **columns):\n    return [0.0]\n"


def grpo(folder: Path, code: str = GOOD, **method: Any) -> Path:
    """A recipe in a folder with its data, base model and reward function."""
    (folder / "rewards.py").write_text(code, encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (folder / "base").mkdir(exist_ok=True)
    values = {
        "name": "run",
        "model": {"base": "./base"},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 512},
        "method": {
            "kind": "grpo",
            "max_completion": 8,
            "rewards": [{"file": "rewards.py:short"}],
            **method,
        },
        "optim": {"batch_size": 8},
        "storage": "/mnt/shared/runs",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_the_text_is_part_of_the_recipe(tmp_path: Path) -> None:
    """Later changes of the file have no effect; a recipe with another text is another run."""
    recipe = load_recipe(grpo(tmp_path))
    (key, function), *others = functions_in(recipe)
    assert (key, others) == ("method.rewards.0", [])
    assert function.path == str(tmp_path / "rewards.py") and function.name == "short"
    (tmp_path / "rewards.py").unlink()
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    (_, copy), *_ = functions_in(again)
    assert copy.load()([], [], []) == [0.0] and copy.digest == function.digest
    assert recipe.method.run_facts == {"reward_files": {function.file: function.digest}}
    changed = load_recipe(grpo(tmp_path, GOOD.replace("0.0", "1.0")))
    assert changed.method.run_facts != recipe.method.run_facts


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package_of_mine\n" + GOOD, r"rewards\.py cannot be imported(.|\n)*line 1"),
        ("import beside\n" + GOOD, r"No module named 'beside'\nThe file travels alone, without"),
        ("from . import beside\n" + GOOD, r"relative import(.|\n)*\nThe file travels alone"),
        ("raise SystemExit(0)\n" + GOOD, r"cannot be imported(.|\n)*SystemExit: 0"),
        ("import os\nos._exit(0)\n" + GOOD, r"file: its process ended with exit code 0$"),
        (
            "import os\nprint('loading')\nprint('more')\nos._exit(3)\n" + GOOD,
            r"file: its process ended with exit code 3, after the line: more$",
        ),
        (
            "print('loading')\n1 / 0\n" + GOOD,
            r"file: .*/rewards\.py cannot(.|\n)*ZeroDivisionError",
        ),
    ],
)
def test_it_is_tried_before_anything_heavy(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").touch()
    recipe = load_recipe(grpo(tmp_path, code))
    with pytest.raises(InputError, match=message) as error:
        try_import(recipe)
    assert "recipe.yaml:1: method.rewards.0.file: " in str(error.value)
    assert "user_code.py" not in str(error.value), "the user's part of the traceback only"


def test_a_file_is_tried_once(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write('x')\n" + GOOD + GOOD.replace("short", "brief")
    rewards = [{"file": "rewards.py:short"}, {"file": "rewards.py:brief"}]
    tried: set[str] = set()
    for _ in range(2):
        try_import(load_recipe(grpo(tmp_path, code, rewards=rewards)), tried)
    assert mark.read_text(encoding="utf-8") == "x"


def test_prints_leave_the_commands_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "print('loaded')\ndef f(row):\n    print('called', end='!')\n"
    UserFunction(file=f"{tmp_path}/f.py:f", source=text).load()({})
    assert capsys.readouterr() == ("", "loaded\ncalled!")


def test_a_file_without_a_function_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.file: 'rewards\.py' names a file without a function"):
        load_recipe(grpo(tmp_path, rewards=[{"file": "rewards.py"}]))


def test_trying_needs_nothing_heavy(tmp_path: Path) -> None:
    function = UserFunction(
        file=f"{tmp_path}/f.py:g",
        source="import sys\ndef g(): ...\n"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n",
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finray.training.config.user_code"],
        input=function.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_an_error_names_the_line_of_the_user(tmp_path: Path) -> None:
    function = UserFunction(file=f"{tmp_path}/f.py:g", source="\n\nraise OSError('mine')\n")
    with pytest.raises(RunError, match=r'f\.py", line 3(.|\n)*OSError: mine'):
        function.load()


SOURCES = ("data.train.*", "data.eval.*", "data.curate.*.against.*")
FILES = {
    **{f"{source}.path": "travels" for source in SOURCES},
    **{f"{source}.dataset": "a folder travels" for source in SOURCES},
    **{f"{source}.dataset_info": "inside the recipe" for source in SOURCES},
    **{f"{source}.map.file": "inside the recipe" for source in SOURCES},
    "data.curate.*.with.file": "inside the recipe",
    "data.curate.*.run": "refused",
    "eval.metrics.*.file": "inside the recipe",
    "data.chat_template": "inside the recipe",
    "model.base": "travels",
    "model.adapter": "travels",
    "method.reference_model": "refused",
    "method.rewards.*.run": "refused",
    "method.rewards.*.model": "refused",
    "method.rewards.*.file": "inside the recipe",
    "storage": "of the cluster",
}
"""What a job does with each key that names a file or a folder of this machine."""

PLAIN = {
    *("name", "model.revision", "method.rewards.*.label", "method.rewards.*.source"),
    *("adapter.targets", "adapter.modules_to_save", "freeze.train.*"),
    *("method.margin", "method.margin.*", "data.date"),
    *("data.curate.*.with.source", "data.curate.*.keep", "data.holdout.group_by"),
    *("eval.metrics.*.source", "eval.watch", "log.tags.*", "scale.prepare.resources"),
    *("model.add_tokens.*", "method.rewards.*.options"),
    *(
        f"{source}.{name}"
        for source in SOURCES
        for name in (
            *("subset", "split", "revision", "columns", "message_keys", "roles", "system"),
            "map.source",
        )
    ),
}
"""Keys that hold other text."""


def text_keys(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a recipe's fields that may hold any text."""
    for name, field in settings.model_fields.items():
        yield from _of_annotation(field.annotation, f"{prefix}{name}")


def _of_annotation(annotation: Any, key: str) -> Iterator[str]:
    if annotation is str:
        yield key
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from text_keys(annotation, f"{key}.")
    else:
        is_list = getattr(annotation, "__origin__", None) in (list, tuple)
        for argument in get_args(annotation):
            inner = f"{key}.*" if is_list and argument is not str else key
            yield from _of_annotation(argument, inner)


def test_every_key_that_names_a_file_is_decided() -> None:
    keys = {key for key in text_keys(Recipe) if "pattern" not in key}
    assert keys == FILES.keys() | PLAIN, keys ^ (FILES.keys() | PLAIN)


def test_a_job_carries_code_and_refuses_what_stays_behind(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    stage(load_recipe(grpo(tmp_path)), tmp_path / "job", ())
    text = (tmp_path / "job" / RECIPE_FILE).read_text(encoding="utf-8")
    assert "def short(" in text
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    recipe = load_recipe(grpo(tmp_path, rewards=[{"model": "./classifier"}]))
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r":1: method\.rewards\.0\.model: .* is on this machine"):
        stage(recipe, tmp_path / "other", ())
    (tmp_path / "third").mkdir()
    stage(recipe, tmp_path / "third", (str(classifier),))


def test_a_ray_job_of_kubernetes_carries_code(tmp_path: Path) -> None:
    recipe = load_recipe(grpo(tmp_path))
    with pytest.raises(InputError) as error:
        check_reachable(recipe, "/mnt/shared")
    keys = {line.partition(":")[0] for line in str(error.value).splitlines()}
    assert keys == {"model.base", "data.train.0.path"}, "the reward's file is not among them"
