"""The rooms of the house and the imports between them, read from the source.

    python tests/support/house.py

writes the drawing into docs/architecture.md.
"""

import ast
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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
    "training.evaluation",
    "training.engine",
    "training.rehearsal",
    "training.launch",
    "training.inspection",
    "training.run",
    "tuning",
    "cluster.environment",
    "cluster.interrupts",
    "cluster.cards",
    "cluster.gpus",
    "cluster.placements",
    "cluster.memory_fit",
    "cluster.nodes",
    "cluster.kubernetes",
    "cluster.jobs",
    "cluster.preflight",
    "cluster.launcher",
    "cluster.starting",
    "cluster.screens",
    "cluster.api",
    "cluster.cli",
    "finray",
]
"""From the ground up: a room imports from rooms before it, never from one behind it."""

TORCH_ROOMS = (
    *("models", "export", "objectives", "rl"),
    *("evaluation", "engine", "rehearsal"),
)
TORCH_FILES = {"training.data.batching", "training.data.documents"}
"""Beside the rooms that compute: where torch may be imported when a module is loaded."""
RAY_ROOMS = ("training.launch", "tuning", "cluster")
RAY_FILES = {"training.data.tasks", "training.data.stream"}
"""Where Ray may be imported at all."""


FACE = ROOT / "__init__.py"
"""What `import finray` loads: names that lead to the rooms."""


def module_name(path: Path) -> str:
    if path == FACE:
        return "finray"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the product, by its name without `finray`."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in [*paths, FACE]}


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
        if path.name == "__init__.py" and path != FACE:
            continue
        matches = {other for other in imported(parse(path), path) if other in modules()}
        # A package beside one of its modules is not meant itself: its file holds a docstring.
        packages = {other for other in matches if modules()[other].name == "__init__.py"}
        arrows[name] = frozenset(matches - packages - {name})
    return arrows


def floor(name: str) -> int:
    return next(
        number for number, room in enumerate(FLOORS) if name == room or name.startswith(f"{room}.")
    )


DRAWING = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: begin -->", "<!-- rooms: end -->"
_WIDTH = 96


def room(name: str) -> str:
    return FLOORS[floor(name)]


def drawing() -> str:
    """Every room from the top floor down: its files, and the rooms that it imports from."""
    lines: list[str] = []
    for place in reversed(FLOORS[1:]):
        members = sorted(name for name in graph() if room(name) == place)
        used = {room(other) for name in members for other in graph()[name]} - {place}
        files = [name.removeprefix(place).lstrip(".") for name in members]
        lines += _wrapped(place, " · ".join(file for file in files if file))
        below = " ".join(sorted(used, key=FLOORS.index, reverse=True))
        lines += [*_wrapped("", f"→ {below or 'nothing'}"), ""]
    return "\n".join(["```", *lines[:-1], "```"])


def _wrapped(label: str, text: str) -> list[str]:
    margin = " " * 24
    return textwrap.wrap(
        text or "(one file)", _WIDTH, initial_indent=f"{label:24}", subsequent_indent=margin
    )


def in_document(text: str) -> str:
    """The drawing that a document holds."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    text = DRAWING.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DRAWING.write_text(f"{before}{BEGIN}\n{drawing()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
