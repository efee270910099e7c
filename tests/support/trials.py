"""A sweep's trial in this process, without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finray.training.config.recipe import Recipe
from finray.training.models.base_cache import forget_bases
from finray.training.run import Listener, prepare_data
from finray.tuning.trial_actor import RunningTrial, TrialConfig, _stop_event


@contextmanager
def trial_of(settings: Recipe, sweep: Path, heard: int = 0) -> Iterator[RunningTrial]:
    prepared = prepare_data(settings, Listener(lambda _: None, lambda _: None))
    config = TrialConfig(
        number=0,
        recipe=settings.model_dump(mode="json"),
        prepared=prepared.folder.uri,
        sweep=str(sweep),
        env={},
        watched=["loss"],
        total_steps=12,
        heard=heard,
        until=None,
    )
    trial = RunningTrial(config)
    try:
        yield trial
    finally:
        trial.give_up()
        forget_bases()
        _stop_event(config["sweep"]).set()  # ends its watcher, which a slot's process keeps


def reports_of(trial: RunningTrial) -> list[dict[str, Any]]:
    reports = [trial.next_report()]
    while not reports[-1]["done"]:
        reports.append(trial.next_report())
    return reports
