"""A run of random weights, opened once, and what reads and writes rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.finished_run import finished_run

from finray.training.evaluation.located import locate
from finray.training.evaluation.opened import Opened, open_located


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return finished_run(tmp_path_factory.mktemp("run"), tiny_model)


@pytest.fixture(scope="package")
def opened(run: Path) -> Opened:
    return open_located(locate(str(run), Path.cwd()))


@pytest.fixture(scope="session")
def write() -> Callable[[Path, list[Any]], Path]:
    def write_rows(file: Path, rows: list[Any]) -> Path:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return file

    return write_rows


@pytest.fixture(scope="session")
def read() -> Callable[[Path], list[Any]]:
    def read_rows(file: Path) -> list[Any]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return read_rows
