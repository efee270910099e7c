"""Bases, rows and storage that the tests of this folder share."""

import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families.case import Case
from families.matrix import make_base
from families.results import NAMES, begin

from finray.training.config.recipe import Recipe
from finray.training.rehearsal import child
from finray.training.rehearsal.outcome import Outcome
from finray.training.rehearsal.rehearse import rehearse_recipe

WORDS = "the quick brown fox jumps over the lazy dog a tiny model learns for ever".split()


class InThisProcess:
    """A rehearsal without the seconds that a new process needs for its libraries."""

    def start(self, recipe: Recipe) -> None:
        """Take a recipe."""
        self._recipe = recipe

    def close(self) -> None:
        """No other recipe follows."""

    def outcome(self) -> Outcome:
        """Rehearse now."""
        with tempfile.TemporaryDirectory() as scratch:
            return rehearse_recipe(self._recipe, Path(scratch))

    def end(self) -> None:
        """No process runs."""


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture is rehearsed, which decides whether it is packed."""
    monkeypatch.setattr(child, "_Child", InThisProcess)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs' storage: equal data is prepared once."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def conversations(storage: Path) -> Path:
    """Twelve rows of different lengths, the longest several times as long as a copy's window."""
    path = storage / "rows.jsonl"
    rows = []
    for number in range(12):
        answer = " ".join(
            WORDS[(number * 5 + place) % len(WORDS)] for place in range(3 + number % 4)
        )
        messages = [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def case(
    request: pytest.FixtureRequest, tiny_model: Path, storage: Path, conversations: Path
) -> Case:
    kind = request.param
    aspect = request.node.originalname.removeprefix("test_").removeprefix("two_")
    if aspect in NAMES:
        begin(kind, aspect)
    base = storage / f"base-{kind}"
    if not base.exists():
        make_base(kind, tiny_model, base)
    return Case(kind, base, conversations, storage)


@pytest.fixture(scope="module", autouse=True)
def libraries_stay() -> Iterator[None]:
    """Collecting garbage passes over what is loaded by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing by a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
