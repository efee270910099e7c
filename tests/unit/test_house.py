"""The house: rooms and floors, where torch and Ray may be imported, and what the wheel holds.

Every import counts: those inside functions, under TYPE_CHECKING, and between floors.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.house import (
    DRAWING,
    FACE,
    PACKAGES,
    RAY_FILES,
    RAY_ROOMS,
    ROOT,
    TORCH_FILES,
    TORCH_ROOMS,
    drawing,
    floor,
    graph,
    imported,
    in_document,
    modules,
    parse,
)


@pytest.mark.long
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
        if path.name == "__init__.py" and path != FACE:
            body = parse(path).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), name


def test_training_has_twelve_rooms_and_two_modules() -> None:
    folders = {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "training").glob("*.py")} - {"__init__"}
    assert len(folders) == 12 and files == {"run", "inspection"}


def loaded_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that are imported when a module is loaded."""
    for node in tree.body:
        for inner in ast.walk(node) if isinstance(node, ast.Try | ast.With) else [node]:
            if isinstance(inner, ast.ImportFrom) and not inner.level:
                yield (inner.module or "").partition(".")[0]
            elif isinstance(inner, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in inner.names)


def attributes_set(function: ast.FunctionDef) -> set[str]:
    """Attributes of self that a method assigns."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


BUILT_ELSEWHERE = {"TrialSlot"}
"""Ray Tune calls `setup` in place of `__init__`."""


def born_late(tree: ast.Module) -> dict[str, list[str]]:
    """Attributes by class that are assigned in methods, but not in `__init__` or as a field."""
    late: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or node.name in BUILT_ELSEWHERE:
            continue
        fields = {
            target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign | ast.Assign)
            for target in (item.targets if isinstance(item, ast.Assign) else [item.target])
            if isinstance(target, ast.Name)
        }
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        made = {method.name: attributes_set(method) for method in methods}
        born = made.pop("__init__", set()) | fields
        if attributes := sorted(set().union(*made.values()) - born):
            late[node.name] = attributes
    return late


def test_objects_are_built_whole() -> None:
    for name, path in modules().items():
        assert not born_late(parse(path)), name
    planted = "class A:\n    def __init__(self): self.a = 1\n    def run(self): self.b = self.a"
    assert born_late(ast.parse(planted)) == {"A": ["b"]}


REGISTERED = {"Nf4Quantiser", "Int8Quantiser"}
"""transformers gets them by a decorator."""


def named_at_top(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Name):
                    yield part.id


def test_nothing_is_left_over() -> None:
    """Each name is used by the product, a private one by its own file; tests do not count."""
    words = {
        path: Counter(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        for path in modules().values()
    }
    everywhere = Counter[str]()
    for counted in words.values():
        everywhere.update(counted)
    left_over = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, counted in words.items()
        for name in named_at_top(parse(path))
        if not name.startswith("__") and name not in REGISTERED
        if (counted if name.startswith("_") else everywhere)[name] < 2
    ]
    assert not left_over, "\n".join(left_over)


HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets"}


def test_where_torch_is_loaded() -> None:
    for name, path in modules().items():
        may = name in TORCH_FILES or any(name.startswith(f"training.{r}.") for r in TORCH_ROOMS)
        heavy = HEAVY & set(loaded_imports(parse(path)))
        assert may or not heavy, f"{name} imports {heavy} when it is loaded"


@pytest.mark.long
def test_where_ray_is_imported() -> None:
    for name, path in modules().items():
        may = name in RAY_FILES or name.startswith(RAY_ROOMS)
        tops = {other.partition(".")[0] for other in imported(parse(path), path)}
        assert may or "ray" not in tops, f"{name} imports Ray"


def test_the_drawing_is_true() -> None:
    assert in_document(DRAWING.read_text(encoding="utf-8")) == drawing(), (
        "renew it: python tests/support/house.py"
    )


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert listed == {"finray", *(f"finray.{name}" for name in packages - {"finray"})}


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


@pytest.mark.long
def test_product_code_imports_finray_relatively() -> None:
    for name, path in modules().items():
        names = set(imported(parse(path), path))
        assert not any(other.partition(".")[0] == "finray" for other in names), name


def test_help_needs_only_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "import finray.cluster.cli.main\n"
        "from finray.cluster.cli.arguments import build_parser; build_parser().format_help()\n"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert extra <= {'finray'}, extra"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


UNCLEAR = {"told", "found", "wanted", "wants", "known", "heard", "bears"}
"""They say what happened to a thing, not what it is."""
OF_TORCH = {"found_inf"}


def names_given(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives: to values, arguments, attributes, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def unclear_names(tree: ast.Module) -> list[str]:
    names = set(names_given(tree)) - OF_TORCH
    return sorted(name for name in names if UNCLEAR & set(name.lower().split("_")))


def test_names_say_what_a_thing_is() -> None:
    for name, path in modules().items():
        assert not unclear_names(parse(path)), name
    assert unclear_names(ast.parse("found = 1\ndef f(known_ids): self.is_wanted = 2")) == [
        "found",
        "is_wanted",
        "known_ids",
    ]


OWN_ERRORS = {"InputError", "RunError", "RowError", "FinrayError", "YamlFault", "AttemptEndedError"}
"""Errors whose text says what to do, or, of a row, is followed by it."""


def without_remedy(tree: ast.Module) -> Iterator[int]:
    """Lines where an error ends with the text of another library's, so no remedy follows it."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        types = {
            node.id for node in ast.walk(handler.type or handler) if isinstance(node, ast.Name)
        }
        if types <= OWN_ERRORS:
            continue
        for call in ast.walk(handler):
            match call:
                case ast.Call(
                    func=ast.Name(id="InputError" | "RunError"),
                    args=[ast.JoinedStr(values=[*_, ast.FormattedValue() as last])],
                ) if any(
                    isinstance(node, ast.Name) and node.id == handler.name
                    for node in ast.walk(last)
                ):
                    yield call.lineno


def test_no_error_ends_with_the_text_of_a_library() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules().values()
        for line in without_remedy(parse(path))
    ]
    assert not lines, "\n".join(lines)
    planted = "try: f()\nexcept OSError as error:\n    raise InputError(f'{p}: no: {error}')"
    assert list(without_remedy(ast.parse(planted))) == [3]
