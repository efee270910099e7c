"""The real command, with a tiny model and data at hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forking import ForkServer
from support.harness import Finray


@pytest.fixture
def finray(
    tmp_path: Path, tiny_model: Path, chat_file: Path, fork_server: ForkServer
) -> Iterator[Finray]:
    """For one test."""
    runner = Finray(tmp_path, tiny_model, chat_file, fork_server)
    yield runner
    runner.end_all()


@pytest.fixture(scope="module")
def shared_finray(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    chat_file: Path,
    fork_server: ForkServer,
) -> Iterator[Finray]:
    """For a run that several tests compare with."""
    runner = Finray(tmp_path_factory.mktemp("finray"), tiny_model, chat_file, fork_server)
    yield runner
    runner.end_all()
