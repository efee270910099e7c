"""The house: rooms and floors, where torch and Ray may be imported, and what the wheel holds.

Every import counts: those inside functions, under TYPE_CHECKING, and between floors.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["training", "tuning", "cluster", "k8s"]

FLOORS = [
    "k8s",
    "training.common",
    "training.config",
    "training.data",
    "training.records",
    "training.models",
    "training.export",
    "training.objectives",
    "training.rl",
    "training.engine",
    "training.launch",
    "training.inspection",
    "training.run",
    "tuning",
    "cluster.environment",
    "cluster.interrupts",
    "cluster.gpus",
    "cluster.nodes",
    "cluster.kubernetes",
    "cluster.jobs",
    "cluster.preflight",
    "cluster.launcher",
    "cluster.cli",
]
"""From the ground up: a room imports from rooms before it, never from one behind it."""

TORCH_ROOMS = ("models", "export", "objectives", "rl", "engine")
TORCH_FILES = {"training.data.batching"}
"""Beside the rooms that compute: where torch may be imported when a module is loaded."""
RAY_ROOMS = ("training.launch", "tuning", "cluster")
RAY_FILES = {"training.data.tasks", "training.data.stream"}
"""Where Ray may be imported at all."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the product, by its name without `finray`."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in paths}


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names that a module's imports may mean: `from .a import b` gives a and a.b."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module or "").split(".")] if node.module else base
            yield ".".join(stem)
            yield from (".".join([*stem, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def graph() -> dict[str, frozenset[str]]:
    """Modules of the product that each of them imports, at any place in its file."""
    arrows: dict[str, frozenset[str]] = {}
    for name, path in modules().items():
        matches = {other for other in imported(parse(path), path) if other in modules()}
        # A package beside one of its modules is not meant itself: its file holds a docstring.
        packages = {other for other in matches if modules()[other].name == "__init__.py"}
        arrows[name] = frozenset(matches - packages - {name})
    return arrows


def floor(name: str) -> int:
    return next(
        number for number, room in enumerate(FLOORS) if name == room or name.startswith(f"{room}.")
    )


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(reversed(error.args[1]))}")


def test_arrows_point_downward() -> None:
    upward = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if floor(other) > floor(name)
    ]
    assert not upward, "\n".join(sorted(upward))


def test_late_imports_are_seen() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..run import train\n"
    source += "def late():\n    from .worker import run_worker\n"
    names = set(imported(ast.parse(source), ROOT / "training" / "engine" / "x.py"))
    assert {"training.run", "training.engine.worker"} <= names


def test_package_files_hold_a_docstring_only() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py":
            body = parse(path).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), name


def test_training_has_ten_rooms_and_two_modules() -> None:
    folders = {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "training").glob("*.py")} - {"__init__"}
    assert len(folders) == 10 and files == {"run", "inspection"}


def loaded_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that are imported when a module is loaded."""
    for node in tree.body:
        for inner in ast.walk(node) if isinstance(node, ast.Try | ast.With) else [node]:
            if isinstance(inner, ast.ImportFrom) and not inner.level:
                yield (inner.module or "").partition(".")[0]
            elif isinstance(inner, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in inner.names)


HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets"}


def test_where_torch_is_loaded() -> None:
    for name, path in modules().items():
        may = name in TORCH_FILES or any(name.startswith(f"training.{r}.") for r in TORCH_ROOMS)
        heavy = HEAVY & set(loaded_imports(parse(path)))
        assert may or not heavy, f"{name} imports {heavy} when it is loaded"


def test_where_ray_is_imported() -> None:
    for name, path in modules().items():
        may = name in RAY_FILES or name.startswith(RAY_ROOMS)
        tops = {other.partition(".")[0] for other in imported(parse(path), path)}
        assert may or "ray" not in tops, f"{name} imports Ray"


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    on_disk = {"finray." + name for name, path in modules().items() if path.name == "__init__.py"}
    assert listed == on_disk


def test_every_data_file_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*")):
        if not path.is_file() or path.suffix in (".py", ".pyc"):
            continue
        folders = [folder for folder in path.parents if (folder / "__init__.py").exists()]
        package = "finray." + ".".join(folders[0].relative_to(ROOT).parts)
        relative = path.relative_to(folders[0])
        assert any(_matches(relative, pattern) for pattern in patterns.get(package, ())), path


def _matches(path: Path, pattern: str) -> bool:
    """`**/` means any folders, none included."""
    return path.match(pattern) or path.match(pattern.removeprefix("**/"))


def test_no_folder_is_called_finray() -> None:
    assert not (ROOT / "finray").exists()


def test_product_code_imports_finray_relatively() -> None:
    for name, path in modules().items():
        names = set(imported(parse(path), path))
        assert not any(other.partition(".")[0] == "finray" for other in names), name


def test_help_needs_only_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "from finray.cluster.cli.main import _parser; _parser().format_help()\n"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert extra <= {'finray'}, extra"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
