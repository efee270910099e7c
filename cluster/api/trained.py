"""What generate, evaluate and chat share: how a trained model is named, and where it answers."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...training.common.errors import InputError
from ...training.common.formatting import shown
from ...training.common.progress import SILENT, Progress
from ...training.config.paths import resolve_path
from ...training.config.source import Source
from ..environment import common_environment
from ..nodes.ray_session import cluster_address, ray_session
from ..screens.counting import CountingProgress
from .results import RunResult

if TYPE_CHECKING:
    from ...training.data.tasks import RunOnRayData

ModelSource = RunResult | str | os.PathLike[str]
"""A run, its folder, name or URI, a checkpoint of it, a model's folder, or a hub id."""
_WORKERS = 2
"""Processes that answer on a cluster without GPUs, if no number is given."""


def name_of(model: ModelSource) -> str:
    """What `locate` takes."""
    return model.uri if isinstance(model, RunResult) else os.fspath(model)


def source_at(place: str | os.PathLike[str]) -> Source:
    """A file, folder or URI as a source of rows."""
    return Source(path=resolve_path(os.fspath(place), Path.cwd()))


def check_count(option: str, number: int | None) -> None:
    """Refuse a number of rows or processes that means nothing.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    if number is not None and (type(number) is not int or number < 1):
        raise InputError(
            f"{option}: expected a whole number of at least 1, found {shown(number)}; give one, or "
            "leave it out"
        )


def shown_progress(what: str, quiet: bool) -> AbstractContextManager[Progress]:
    """The progress of some work, on stderr unless it is to be quiet."""
    return nullcontext(SILENT) if quiet else CountingProgress(what)


@contextmanager
def elsewhere(
    address: str | None, workers: int | None, progress: Progress
) -> Iterator["RunOnRayData | None"]:
    """Ray Data's workers on a cluster, or on this machine if there is more than one; None if this
    process does the work.

    Raises:
        InputError: no cluster answers.
    """
    where = cluster_address(address) or ("local" if (workers or 1) > 1 else None)
    if where is None:
        yield None
        return
    progress.status("starting Ray")
    with ray_session((workers or _WORKERS) + 1, where, common_environment(), verbose=False):
        from ...training.data.tasks import RunOnRayData

        anywhere = RunOnRayData(actors=workers, in_order=False)
        yield anywhere if workers or anywhere.gpus else replace(anywhere, actors=_WORKERS)
