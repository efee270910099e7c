"""The house: floors, packaging, and what the wheel must hold."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ["training", "tuning", "cluster"]
PACKAGES = [*FLOORS, "k8s"]


def imports(path: Path) -> set[str]:
    """Top-level finray packages that a module imports, relative or absolute."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > len(package):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finray."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_point_downward(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    for path in (ROOT / floor).rglob("*.py"):
        assert not imports(path) & above, f"{path} imports from a floor above"


def test_the_floor_test_sees_imports() -> None:
    assert "training" in imports(ROOT / "cluster" / "cli" / "main.py")


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    on_disk = {
        "finray." + ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == on_disk


def test_no_folder_is_called_finray() -> None:
    assert not (ROOT / "finray").exists()


def test_product_code_imports_finray_relatively() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "from finray" not in text and "import finray" not in text, path


def test_no_import_cycle_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            graph[_name(path)] = _module_imports(path)
    done: set[str] = set()
    for module in graph:
        _visit(module, graph, done, [])


def _visit(module: str, graph: dict[str, set[str]], done: set[str], trail: list[str]) -> None:
    assert module not in trail, f"import cycle: {' -> '.join([*trail, module])}"
    if module in done or module not in graph:
        return
    for other in graph[module]:
        _visit(other, graph, done, [*trail, module])
    done.add(module)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_imports(path: Path) -> set[str]:
    """Modules imported when this one is loaded (not those inside functions)."""
    package = list(path.relative_to(ROOT).parts[:-1])
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            stem = [*base, *(node.module or "").split(".")] if node.module else base
            found.add(".".join(stem))
            found.update(".".join([*stem, alias.name]) for alias in node.names)
    return found - {_name(path)}


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
