"""Runs trials with Ray Tune: reused slots, and a searcher and a scheduler that ask the conductor.

Ray Tune's own OptunaSearch reports stopped trials to Optuna as complete, and never ends trials
whose objective is not a number; its schedulers lose their rungs at a restart. So this searcher uses
Optuna's ask and tell, and pruning is decided from Optuna's storage.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..training.common.background import Stop, run_while_watching
from ..training.common.logs import limit
from ..training.common.progress import Progress
from ..training.common.scratch import scratch_folder
from ..training.config.sections import ScaleSettings
from ..training.records.run_folder import Record
from .concurrency import slot_resources
from .conductor import Conductor
from .rehearsals import Refused
from .study import Assignment
from .trial_actor import TrialConfig, TrialSlot

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # finray writes its own records
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # and resumes from those, not from Ray Tune's
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
MakeConfig = Callable[[Assignment], TrialConfig]


def run_trials(
    conductor: Conductor,
    make_config: MakeConfig,
    scale: ScaleSettings,
    stop: Stop,
    progress: Progress,
) -> None:
    """Run trials until the conductor has none left, or `stop` is requested.

    Args:
        conductor: decides which trials run, and records their results.
        make_config: builds the configuration of a trial's slot; a trial that it refuses takes none.
        scale: workers and resources of a trial.
        stop: when requested, running trials save a checkpoint and the sweep can be resumed.
        progress: receives a status line for each lost slot.
    """
    os.environ.update(_ENVIRONMENT)
    # A lost process is reported in one line, without a traceback.
    limit("ray.tune", logging.CRITICAL)
    with scratch_folder("tune") as scratch:
        guard = _Guard(conductor)
        searcher = _ConductedSearch(conductor, make_config, guard)
        tuner = tune.Tuner(
            tune.with_resources(TrialSlot, tune.PlacementGroupFactory([slot_resources(scale)])),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_ConductedPruning(conductor, guard),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[_LossReporter(progress)],
                failure_config=tune.FailureConfig(max_failures=scale.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            run_while_watching(tuner.fit, stop, conductor.interrupt)
        finally:  # an error that follows from it must not hide it
            guard.raise_error()


class _LossReporter(tune.Callback):
    """Reports trials whose process or node was lost."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Called when Ray Tune restarts a trial in another slot."""
        del iteration, trials
        number = trial.config["number"]
        self._progress.status(
            f"trial {number}: its process was lost; resuming the trial in a new process"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Guard:
    """Catches errors in the searcher and the scheduler, which Ray Tune would attribute to a trial.

    The first error interrupts the sweep, so that it can be resumed, and is raised at its end.
    """

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._error: Exception | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised at the end
            if self._error is None:
                self._error = error
                self._conductor.interrupt()

    def raise_error(self) -> None:
        """Raise the first error that was caught, if any."""
        if self._error is not None:
            raise self._error


class _ConductedSearch(Searcher):
    """Gives the conductor's trials to Ray Tune."""

    def __init__(self, conductor: Conductor, make_config: MakeConfig, guard: _Guard) -> None:
        super().__init__()
        self._conductor = conductor
        self._make_config = make_config
        self._guard = guard
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial's configuration, None if none can start now, FINISHED if none will."""
        with self._guard():
            while (assignment := self._conductor.next_trial()) is not None:
                try:
                    config = self._make_config(assignment)
                except Refused as error:
                    self._conductor.refuse_trial(assignment.number, error)
                else:
                    self._numbers[trial_id] = assignment.number
                    return dict(config)
        return Searcher.FINISHED if self._conductor.is_finished else None

    def on_trial_complete(
        self, trial_id: str, result: Record | None = None, error: bool = False
    ) -> None:
        """Report a trial's end to the conductor."""
        lost = "its process was lost more often than scale.max_failures" if error else None
        with self._guard():
            self._conductor.finish_trial(self._numbers[trial_id], _unflattened(result), lost)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study holds the sweep's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _ConductedPruning(FIFOScheduler):
    """Stops trials when the conductor decides so."""

    def __init__(self, conductor: Conductor, guard: _Guard) -> None:
        super().__init__()
        self._conductor = conductor
        self._guard = guard

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Record) -> str:
        """STOP or CONTINUE for a trial after its report."""
        del tune_controller, trial
        tokens, value = result.get("tokens"), result.get("value")
        must_stop = False
        with self._guard():
            must_stop = tokens is not None and self._conductor.report(
                result["number"], int(tokens), value, bool(result["is_last"])
            )
        return str(TrialScheduler.STOP if must_stop else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _unflattened(result: Record | None) -> Record | None:
    """A report as the slot sent it; Ray Tune flattens nested keys with slashes."""
    if result is None:
        return None
    measures = {
        key.removeprefix("measures/"): value
        for key, value in result.items()
        if key.startswith("measures/")
    }
    return {**result, "measures": measures}
