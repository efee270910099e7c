"""`import finray`: its public names, what it loads, and that a wheel and a job carry it."""

import ast
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.house import FACE, PACKAGES, ROOT, parse

import finray
from finray.cluster.jobs.staging import add_finray

NAMES = [
    *("Comparison", "EvaluationResult", "FinrayError", "InputError", "Interrupted"),
    *("PreparedData", "Recipe", "Report", "RunError", "RunResult", "SweepResult"),
    *("__version__", "check", "compare", "evaluate", "export", "generate", "import_recipe"),
    *("init_recipe", "load_recipe", "plan", "prepare", "runs", "train", "tune"),
]
USE = (
    "import finray, json\n"
    "recipe = finray.load_recipe({'name': 'a', 'model': {'base': 'owner/name'},"
    " 'data': {'train': [{'path': 'rows.jsonl'}]}})\n"
    "print(json.dumps([finray.__file__, finray.__version__, recipe.optim.batch_size]))"
)


def test_the_public_names() -> None:
    assert finray.__all__ == NAMES and dir(finray) == NAMES
    assert all(getattr(finray, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        importlib.import_module("finray").trian  # noqa: B018


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (["name"], {}, "settings: expected a mapping of settings"),
        (None, {}, "or the Path of a file; found nothing"),
        ({"name": "a"}, "optim.epochs=1", "changes: expected a mapping by dotted key, or a list"),
        ({"name": "a"}, {1: 2}, "changes: the key 1 is not text"),
    ],
)
def test_settings_of_another_type_are_refused(recipe: Any, changes: Any, message: str) -> None:
    with pytest.raises(finray.InputError, match=message):
        finray.load_recipe(recipe, changes)


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    """The imports under TYPE_CHECKING lead to the same objects as the lazy ones."""
    block = next(node for node in parse(FACE).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: f"finray.{node.module}" for node in imports for alias in node.names}
    assert sorted([*seen, "__version__"]) == NAMES
    for name, module in seen.items():
        assert getattr(finray, name) is vars(importlib.import_module(module))[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name[0] != "_"])
def test_each_has_a_docstring_and_types(name: str) -> None:
    item = getattr(finray, name)
    members = [item]
    if inspect.isclass(item):
        members += [
            member.fget if isinstance(member, property) else member
            for key, member in vars(item).items()
            if key[0] != "_" and (inspect.isfunction(member) or isinstance(member, property))
        ]
    for member in members:
        assert (member.__doc__ or "").strip(), member
        if inspect.isfunction(member):
            signature = inspect.signature(member)
            assert signature.return_annotation is not inspect.Signature.empty, member
            typed = [p.annotation is not p.empty for p in signature.parameters.values()]
            assert all(typed[1:]), member


def test_importing_it_loads_the_standard_library_only() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "import finray\n"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert extra == {'finray'}, extra\n"
        "finray.train, finray.tune, finray.RunResult, finray.load_recipe\n"
        "heavy = {'torch', 'ray', 'transformers', 'peft', 'pandas', 'optuna', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def used_from(folder: Path) -> list[object]:
    """What a program prints that finds finray in `folder` first."""
    done = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed: list[object] = json.loads(done.stdout)
    return printed


@pytest.mark.long
def test_a_wheel_holds_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("finray-*.whl"))) as wheel:
        wheel.extractall(target)
    assert used_from(target) == [str(target / "finray/__init__.py"), finray.__version__, 32]
    assert (target / "finray" / "py.typed").is_file()
    assert (target / "finray" / "cluster" / "cli" / "main.py").is_file()


def test_a_job_carries_it(tmp_path: Path) -> None:
    add_finray(tmp_path)
    assert used_from(tmp_path) == [str(tmp_path / "finray/__init__.py"), finray.__version__, 32]


def test_the_image_holds_it() -> None:
    text = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("COPY ")]
    copied = {name for line in lines for name in line.split()[1:-1]}
    assert {*PACKAGES, "__init__.py", "py.typed"} <= copied
