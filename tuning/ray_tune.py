"""Running trials with Ray Tune: slots that are reused, and a searcher and a scheduler that pass
everything on to the conductor.

Ray Tune's own OptunaSearch tells Optuna that stopped trials are complete and leaves those whose
objective is not a number running for ever, and its schedulers forget their rungs at a restart. So
this searcher keeps to Optuna's ask and tell, and pruning is decided from Optuna's storage.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..training.common.background import Stop, run_while_watching
from ..training.common.progress import Progress
from ..training.config.sections import ScaleSettings
from ..training.records.run_folder import Record
from .concurrency import slot_resources
from .conductor import Conductor
from .study import Assignment
from .trial_actor import TrialConfig, TrialSlot

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # finray keeps its own books
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # and resumes from them, not from Ray Tune's
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
MakeConfig = Callable[[Assignment], TrialConfig]


def execute(
    conductor: Conductor,
    make_config: MakeConfig,
    scale: ScaleSettings,
    stop: Stop,
    progress: Progress,
) -> None:
    """Run trials until the conductor has none left, or `stop` is requested.

    Args:
        conductor: says which, and hears of them.
        make_config: what a slot is told of a trial.
        scale: the size of a trial.
        stop: ends the sweep so that it can be taken up again.
        progress: receives what happens to slots.
    """
    os.environ.update(_ENVIRONMENT)
    # A lost process is told in a line, without a traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="finray-tune-") as scratch:
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
                storage_path=scratch,
                verbose=0,
                callbacks=[_LossReporter(progress)],
                failure_config=tune.FailureConfig(max_failures=scale.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            run_while_watching(tuner.fit, stop, conductor.interrupt)
        finally:  # else what that led to would hide it
            guard.raise_error()


class _LossReporter(tune.Callback):
    """Reports trials whose process was lost, with its node or alone."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """The trial will run in another slot."""
        del iteration, trials
        number = trial.config["number"]
        self._progress.status(f"trial {number}: its process was lost; it resumes in another one")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Guard:
    """Ray Tune takes an error in its searcher or its scheduler for a trial's. Here it ends the
    sweep, so that it can be taken up again, and is raised then."""

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
        """The first one, where there was one."""
        if self._error is not None:
            raise self._error


class _ConductedSearch(Searcher):
    """Ray Tune's trials are the conductor's."""

    def __init__(self, conductor: Conductor, make_config: MakeConfig, guard: _Guard) -> None:
        super().__init__()
        self._conductor = conductor
        self._make_config = make_config
        self._guard = guard
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial's configuration, None for none now, FINISHED for none any more."""
        with self._guard():
            assignment = self._conductor.next()
            if assignment is not None:
                self._numbers[trial_id] = assignment.number
                return dict(self._make_config(assignment))
        return Searcher.FINISHED if self._conductor.is_finished else None

    def on_trial_complete(
        self, trial_id: str, result: Record | None = None, error: bool = False
    ) -> None:
        """Pass a trial's end on."""
        lost = "its process was lost more often than scale.max_failures" if error else None
        with self._guard():
            self._conductor.ended(self._numbers[trial_id], _unflattened(result), lost)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the sweep's memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _ConductedPruning(FIFOScheduler):
    """Stops the trials that the conductor gives up."""

    def __init__(self, conductor: Conductor, guard: _Guard) -> None:
        super().__init__()
        self._conductor = conductor
        self._guard = guard

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Record) -> str:
        """Whether a trial goes on after a report."""
        del tune_controller, trial
        tokens, value = result.get("tokens"), result.get("value")
        gives_up = False
        with self._guard():
            gives_up = tokens is not None and self._conductor.reported(
                result["number"], int(tokens), value, bool(result["is_last"])
            )
        return str(TrialScheduler.STOP if gives_up else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _unflattened(result: Record | None) -> Record | None:
    """A report as the slot made it; Ray Tune writes nested keys with slashes."""
    if result is None:
        return None
    measures = {
        key.removeprefix("measures/"): value
        for key, value in result.items()
        if key.startswith("measures/")
    }
    return {**result, "measures": measures}
