"""The Optuna study of a sweep, stored in a file of the sweep's folder.

The file holds the state of all trials. It is written before a trial starts and after each change,
so that a sweep resumes from it after a crash. A trial that ran during the crash has the state
RUNNING and is resumed.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..training.common.logs import chosen_level
from ..training.common.scratch import ScratchFolder
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.records.run_folder import Record
from .distribution import Settings
from .samplers import DistinctSampler
from .space import Space
from .sweep_folder import STUDY_FILE
from .untried import Untried

_SET_UP = "set_up"
_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Assignment:
    """A trial to run: its number, its settings, and where it pauses."""

    number: int
    settings: Settings
    until: int | None = None
    """Milestone up to which a member of a population trains; None for a whole trial."""


class StudyFile:
    """The SQLite file of a study; for an object store, a local copy that is uploaded."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._scratch: ScratchFolder | None = None
        if folder.local is not None:
            self.path = folder.local / STUDY_FILE
            return
        self._scratch = ScratchFolder("study")
        weakref.finalize(self, self._scratch.close)
        self.path = self._scratch.path / STUDY_FILE
        if folder.exists(STUDY_FILE):
            self.path.write_bytes(folder.read(STUDY_FILE))

    def open(self) -> optuna.storages.RDBStorage:
        """Optuna's storage of the file, which is created if it does not exist."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.RDBStorage(f"sqlite:///{self.path}")

    def upload(self) -> None:
        """Copy the file to the object store, if the sweep's folder is in one."""
        if self._scratch is not None:
            self._folder.write(STUDY_FILE, self.path.read_bytes())


class SweepStudy:
    """Gets trials from Optuna and stores their measurements and results in it.

    Args:
        storage: Optuna's storage, in the sweep's folder or in memory.
        name: the sweep's name.
        metrics: the sweep's objectives.
        space: the search space.
        sampler: chooses settings.
        pruner: decides by trained tokens which trials stop early; unused with several metrics.
        seed: decides which settings a trial gets when the sampler repeats itself.
        refused: why settings that make a valid recipe cannot run, as far as that is known.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        metrics: Sequence[Metric],
        space: Space,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner,
        seed: int = 0,
        refused: Callable[[Settings], str | None] = lambda _: None,
    ) -> None:
        optuna.logging.set_verbosity(chosen_level() or optuna.logging.ERROR)
        self.metrics = list(metrics)
        self._space = space
        self._seed = seed
        self._untried = Untried(space, refused)
        self._sampler = DistinctSampler(sampler, space, self._untried.refusal)
        self.optuna = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize" if metric.mode == "min" else "maximize" for metric in metrics],
            sampler=self._sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        self._open = {
            trial.number: optuna.Trial(self.optuna, trial._trial_id)
            for trial in self._frozen((TrialState.RUNNING,))
        }
        self._unfinished = list(self._open)
        for trial in self._frozen(None):
            if _is_own(trial):
                self._untried.add(trial.user_attrs["settings"])

    @property
    def is_set_up(self) -> bool:
        """True if the first points have been queued."""
        return bool(self.optuna.user_attrs.get(_SET_UP))

    def set_up(self, points: Sequence[Settings], earlier: Sequence[FrozenTrial]) -> None:
        """Queue the valid points to try first, and add the results of earlier sweeps."""
        queued = [trial.system_attrs.get("fixed_params") for trial in self._frozen(None)]
        for point in points:
            labels = self._space.labels(point)
            if labels not in queued and self._untried.refusal(point) is None:
                queued.append(labels)
                self.optuna.enqueue_trial(labels)
        existing = {trial.user_attrs.get("earlier") for trial in self._frozen(None)}
        for trial in earlier:
            if trial.user_attrs["earlier"] not in existing:
                self.optuna.add_trial(trial)
        self.optuna.set_user_attr(_SET_UP, True)

    def ask(self, in_order: bool = False) -> Assignment | None:
        """The next trial: one that an earlier attempt left running, a queued one, or a new one.

        Args:
            in_order: give new trials the settings of the space in their order, as for a grid.

        Returns:
            None if no valid settings are left to try; `exhausted` says so.
        """
        while self._unfinished or self._frozen((TrialState.WAITING,)):
            trial = self._next_existing()
            settings = self._space.suggest(trial)
            reason = self._refusal(trial, settings)
            if reason is None:
                return self._assign(trial, settings)
            trial.set_user_attr("excluded", reason)
            self.optuna.tell(trial, state=TrialState.FAIL)
        if in_order:
            left = self._untried.first()
        else:
            left = self._untried.draw(f"{self._seed}/{len(self._frozen(None))}")
        if left is None:
            return None
        self._sampler.reserve = left
        if in_order:
            self.optuna.enqueue_trial(self._space.labels(left))
        trial = self.optuna.ask()
        return self._assign(trial, self._space.suggest(trial))

    @property
    def exhausted(self) -> str:
        """Why `ask` has returned None."""
        return self._untried.exhausted

    @property
    def has_unfinished(self) -> bool:
        """True if trials that an earlier attempt left running are not resumed yet."""
        return bool(self._unfinished)

    def report(self, number: int, tokens: int, value: float, is_last: bool) -> bool:
        """Store the objective after `tokens` trained tokens. Returns True to prune the trial.

        A trial at its last step (`is_last`) is never pruned.
        """
        trial = self._open[number]
        existing = self._frozen_trial(number).intermediate_values
        if len(self.metrics) > 1 or tokens in existing:
            return False
        trial.report(value, tokens)
        return not is_last and trial.should_prune()

    def reported_tokens(self, number: int) -> int:
        """Tokens at the trial's last stored measurement.

        Without one, the tokens at which the trial was copied from its parent, or 0.
        """
        trial = self._frozen_trial(number)
        inherited = trial.user_attrs.get("parent", {"tokens": 0})["tokens"]
        return int(max(trial.intermediate_values, default=inherited))

    def fault(self, measures: Record) -> str | None:
        """Why a trial with these measures has no result; None if all objectives are finite."""
        for metric in self.metrics:
            if metric.name not in measures:
                return f"the run did not report the objective {metric.name}"
            value = measures[metric.name]
            if not isinstance(value, int | float) or not math.isfinite(value):
                return f"the objective {metric.name} is {'nan' if value is None else value}"
        return None

    def finish(self, number: int, measures: Record) -> str | None:
        """Store the result of a finished trial. Returns an error if an objective is not finite."""
        error = self.fault(measures)
        if error is not None:
            self.fail(number, error, measures)
            return error
        self.store(number, measures)
        values = [float(measures[metric.name]) for metric in self.metrics]
        self.optuna.tell(self._open.pop(number), values)
        return None

    def prune(self, number: int, reason: str, measures: Record) -> None:
        """Store that a trial was stopped early."""
        self.store(number, measures, reason=reason)
        self.optuna.tell(self._open.pop(number), state=TrialState.PRUNED)

    def fail(self, number: int, error: str, measures: Record) -> None:
        """Store that a trial failed."""
        self.store(number, measures, error=error)
        self.optuna.tell(self._open.pop(number), state=TrialState.FAIL)

    def rows(self) -> list[Record]:
        """All trials that have started, by number, as they are written to sweep.json."""
        return [_row(trial) for trial in self._frozen(tuple(_STATES)) if _is_own(trial)]

    def measures(self, number: int) -> Record:
        """The last stored measures of a trial."""
        return dict(self._frozen_trial(number).user_attrs.get("measures", {}))

    def best(self) -> list[int]:
        """Number of the best finished trial; with several metrics, those of the Pareto front.

        They are sorted by the first metric, the best one first.
        """
        own = {row["number"] for row in self.rows() if row["state"] == "finished"}
        if not own:
            return []
        if len(self.metrics) == 1:
            finished = self._frozen((TrialState.COMPLETE,))
            front = [trial for trial in finished if trial.number in own]
        else:
            front = [trial for trial in self.optuna.best_trials if trial.number in own]
        sign = 1 if self.metrics[0].mode == "min" else -1
        ordered = sorted(front, key=lambda trial: (sign * trial.values[0], trial.number))
        numbers = [trial.number for trial in ordered]
        return numbers[:1] if len(self.metrics) == 1 else numbers

    # in detail

    def store(self, number: int, measures: Record, **attributes: Any) -> None:
        """Store a trial's last measures (finite ones only) and further attributes."""
        trial = self._open[number]
        finite = {
            name: value
            for name, value in measures.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        trial.set_user_attr("measures", finite)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)

    def _next_existing(self) -> optuna.Trial:
        if self._unfinished:
            return self._open[self._unfinished.pop(0)]
        return self.optuna.ask()

    def _assign(self, trial: optuna.Trial, settings: Settings) -> Assignment:
        trial.set_user_attr("settings", settings)
        self._untried.add(settings)
        self._open[trial.number] = trial
        return Assignment(trial.number, settings)

    def _refusal(self, trial: optuna.Trial, settings: Settings) -> str | None:
        """Why an existing trial must not run; None if it can."""
        # Started trials go on, and one that starts from a checkpoint is not a repetition.
        if trial.user_attrs.keys() & {"settings", "parent"}:
            return None
        return self._untried.refusal(settings)

    def _frozen(self, states: tuple[TrialState, ...] | None) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self.optuna.get_trials(deepcopy=False, states=states)
        return trials

    def _frozen_trial(self, number: int) -> FrozenTrial:
        return self._frozen(None)[number]


def _is_own(trial: FrozenTrial) -> bool:
    """True for a trial of this sweep that has started, False for one of an earlier sweep."""
    return "settings" in trial.user_attrs and "earlier" not in trial.user_attrs


def _row(trial: FrozenTrial) -> Record:
    attributes = trial.user_attrs
    measures: dict[str, Any] = attributes.get("measures", {})
    curve = sorted(trial.intermediate_values.items())
    tokens = measures.get("tokens") or (curve[-1][0] if curve else 0)
    parent = attributes.get("parent")
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "settings": attributes["settings"],
        "values": trial.values if trial.state == TrialState.COMPLETE else None,
        "latest": curve[-1][1] if curve else None,
        "tokens": tokens - parent["tokens"] if parent and tokens else tokens,
        "parent": parent,
        "measures": measures,
        "curve": [[step, value] for step, value in curve],
        "reason": attributes.get("reason"),
        "error": attributes.get("error"),
        "started": trial.datetime_start.isoformat() if trial.datetime_start else None,
        "ended": trial.datetime_complete.isoformat() if trial.datetime_complete else None,
    }
