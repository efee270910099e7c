"""Optuna's study of a sweep, in a file of the sweep's folder.

The file is the truth about the trials: it is written before a trial starts and when anything is
known of one, so that a sweep goes on from it after a crash. A trial that was running then has the
state RUNNING, and is taken up again.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.records.run_folder import Record
from .space import Settings, Space
from .sweep_folder import STUDY_FILE

_SET_UP = "set_up"
_TRIES = 100
"""Suggestions that may be no valid recipe, or known already, one after the other."""
_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Assignment:
    """A trial to run."""

    number: int
    settings: Settings
    until: int | None = None
    """Of a population's member: the turn that it trains up to."""


class StudyFile:
    """The SQLite file; that of an object store is worked on here and copied there."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if folder.local is not None:
            self.path = folder.local / STUDY_FILE
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="finray-study-")
        self.path = Path(self._scratch.name) / STUDY_FILE
        if folder.exists(STUDY_FILE):
            self.path.write_bytes(folder.read(STUDY_FILE))

    def open(self) -> optuna.storages.RDBStorage:
        """Optuna's view of the file; it is made where there is none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.RDBStorage(f"sqlite:///{self.path}")

    def keep(self) -> None:
        """Make what was written durable."""
        if self._scratch is not None:
            self._folder.write(STUDY_FILE, self.path.read_bytes())


class SweepStudy:
    """Asks Optuna for trials, and tells it what became of them.

    Args:
        storage: Optuna's, in the sweep's folder or in memory.
        name: the sweep's.
        metrics: its objectives.
        space: what is searched.
        sampler: chooses settings.
        pruner: judges trials by trained tokens; with several metrics it is not asked.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        metrics: Sequence[Metric],
        space: Space,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.metrics = list(metrics)
        self._space = space
        self.optuna = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize" if one.mode == "min" else "maximize" for one in metrics],
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        self._open = {
            trial.number: optuna.Trial(self.optuna, trial._trial_id)
            for trial in self._frozen((TrialState.RUNNING,))
        }
        self._unfinished = list(self._open)

    @property
    def is_set_up(self) -> bool:
        """Whether the first points have been queued."""
        return bool(self.optuna.user_attrs.get(_SET_UP))

    def set_up(self, points: Sequence[Settings], earlier: Sequence[FrozenTrial]) -> None:
        """Queue the points to try first, and take over the results of earlier sweeps."""
        queued = [trial.system_attrs.get("fixed_params") for trial in self._frozen(None)]
        for point in points:
            labels = self._space.labels(point)
            if labels not in queued:
                queued.append(labels)
                self.optuna.enqueue_trial(labels)
        known = {trial.user_attrs.get("earlier") for trial in self._frozen(None)}
        for trial in earlier:
            if trial.user_attrs["earlier"] not in known:
                self.optuna.add_trial(trial)
        self.optuna.set_user_attr(_SET_UP, True)

    def ask(self, only_queued: bool = False) -> Assignment | None:
        """The next trial; one that an earlier attempt left running comes first.

        Args:
            only_queued: end with the points that were queued, as a grid does.

        Returns:
            None where no further setting is found that is valid and was not tried yet.
        """
        for _ in range(_TRIES):
            trial = self._next(only_queued)
            if trial is None:
                return None
            settings = self._space.suggest(trial)
            reason = self._refusal(trial.number, settings)
            if reason is None:
                trial.set_user_attr("settings", settings)
                self._open[trial.number] = trial
                return Assignment(trial.number, settings)
            trial.set_user_attr("excluded", reason)
            self.optuna.tell(trial, state=TrialState.FAIL)
        return None

    @property
    def has_unfinished(self) -> bool:
        """Whether trials that an earlier attempt left running wait to be taken up."""
        return bool(self._unfinished)

    def _next(self, only_queued: bool) -> optuna.Trial | None:
        if self._unfinished:
            return self._open[self._unfinished.pop(0)]
        if only_queued and not self._frozen((TrialState.WAITING,)):
            return None
        return self.optuna.ask()

    def report(self, number: int, tokens: int, value: float, is_last: bool) -> bool:
        """Note the objective after so many trained tokens; returns whether to prune the trial,
        which a trial at its end never is."""
        trial = self._open[number]
        known = self._frozen_one(number).intermediate_values
        if len(self.metrics) > 1 or tokens in known:
            return False
        trial.report(value, tokens)
        return not is_last and trial.should_prune()

    def reported_tokens(self, number: int) -> int:
        """Tokens of a trial's last measurement that was noted here, or of the one that it goes on
        from."""
        trial = self._frozen_one(number)
        inherited = trial.user_attrs.get("parent", {"tokens": 0})["tokens"]
        return int(max(trial.intermediate_values, default=inherited))

    def finish(self, number: int, measures: Record) -> str | None:
        """Tell the result of a whole trial; returns what is wrong with it, if anything is."""
        values = [measures.get(metric.name) for metric in self.metrics]
        for metric, value in zip(self.metrics, values, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                error = f"the objective {metric.name} is {'nan' if value is None else value}"
                self.fail(number, error, measures)
                return error
        self.note(number, measures)
        self.optuna.tell(
            self._open.pop(number), [float(value) for value in values if value is not None]
        )
        return None

    def prune(self, number: int, reason: str, measures: Record) -> None:
        """Tell that a trial was stopped early."""
        self.note(number, measures, reason=reason)
        self.optuna.tell(self._open.pop(number), state=TrialState.PRUNED)

    def fail(self, number: int, error: str, measures: Record) -> None:
        """Tell that a trial failed."""
        self.note(number, measures, error=error)
        self.optuna.tell(self._open.pop(number), state=TrialState.FAIL)

    def rows(self) -> list[Record]:
        """All trials that ran or run, by number, as plain values."""
        return [
            _row(trial)
            for trial in self._frozen(tuple(_STATES))
            if "settings" in trial.user_attrs and "earlier" not in trial.user_attrs
        ]

    def measures(self, number: int) -> Record:
        """What was noted of a trial last."""
        return dict(self._frozen_one(number).user_attrs.get("measures", {}))

    def best(self) -> list[int]:
        """The best finished trial, or the Pareto front, the best in the first metric first."""
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

    def note(self, number: int, measures: Record, **attributes: Any) -> None:
        """Remember what a trial measured last, and what else is known of it."""
        trial = self._open[number]
        finite = {
            name: value
            for name, value in measures.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        trial.set_user_attr("measures", finite)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)

    def _refusal(self, number: int, settings: Settings) -> str | None:
        if "parent" in self._frozen_one(number).user_attrs:
            return None  # it is not what it is by its settings alone
        for other in self._frozen((TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)):
            attributes = other.user_attrs
            is_own = other.number != number and "earlier" not in attributes
            if is_own and attributes.get("settings") == settings:
                return f"the settings of trial {other.number}"
        try:
            self._space.recipe(settings)
        except InputError as error:
            return str(error)
        return None

    def _frozen(self, states: tuple[TrialState, ...] | None) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self.optuna.get_trials(deepcopy=False, states=states)
        return trials

    def _frozen_one(self, number: int) -> FrozenTrial:
        return self._frozen(None)[number]


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
