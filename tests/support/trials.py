"""A sweep's trial in this process, without Ray."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.rehearsed import OK

from finray.training.config.recipe import Recipe
from finray.training.models.base_cache import BaseCache
from finray.training.run import prepare_data
from finray.tuning.trial_actor import RunningTrial, TrialConfig


@contextmanager
def trial_of(settings: Recipe, sweep: Path, reported_tokens: int = 0) -> Iterator[RunningTrial]:
    prepared = prepare_data(settings)
    config = TrialConfig(
        number=0,
        recipe=settings.model_dump(mode="json"),
        prepared=prepared.folder.uri,
        rehearsal=OK.to_json(),
        sweep=str(sweep),
        env={},
        room=None,
        watched=["loss"],
        total_steps=12,
        reported_tokens=reported_tokens,
        until=None,
    )
    trial = RunningTrial(config, BaseCache(), threading.Event())
    try:
        yield trial
    finally:
        trial.abort()


def reports_of(trial: RunningTrial) -> list[dict[str, Any]]:
    reports = [trial.next_report()]
    while not reports[-1]["done"]:
        reports.append(trial.next_report())
    return reports
