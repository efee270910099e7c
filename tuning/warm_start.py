"""Results of an earlier sweep, as trials that a new one's sampler starts from.

A trial is taken over where it had a value of the new space in every key that is searched now, also
where the earlier sweep did not search it, and the new base recipe's in all others that were.
"""

import copy
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from ..training.common.errors import InputError
from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.config.yaml_file import Change, Document, apply_changes
from ..training.records.run_folder import Record
from .default_search import ALPHA, RANK, RSLORA
from .distribution import is_number, is_same
from .space import Settings, Space, value_at
from .study import StudyFile
from .sweep_folder import STUDY_FILE, read_sweep

_ADAPTER = (RANK, ALPHA, RSLORA)


def earlier_trials(folder: Folder, space: Space, metrics: Sequence[Metric]) -> list[FrozenTrial]:
    """What another sweep found, as far as its settings lie in this space.

    Raises:
        InputError: where there is no sweep, or one with other objectives.
    """
    record = read_sweep(folder)
    if record is None or not folder.exists(STUDY_FILE):
        raise InputError(f"warm_start: {folder} holds no sweep (it has no {STUDY_FILE})")
    study = optuna.load_study(study_name=None, storage=StudyFile(folder).open())
    directions = ["MINIMIZE" if one.mode == "min" else "MAXIMIZE" for one in metrics]
    if [direction.name for direction in study.directions] != directions:
        raise InputError(f"warm_start: {folder} looked for another objective")
    found = []
    for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        settings = trial.user_attrs.get("settings")
        if settings is None:
            continue
        place = _place(settings, _as_it_was(record["settings"]["recipe"], settings), space)
        if place is not None:
            params, distributions = place
            found.append(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values if trial.state == TrialState.COMPLETE else None,
                    params=params,
                    distributions=distributions,
                    intermediate_values=trial.intermediate_values,
                    user_attrs={"settings": settings, "earlier": f"{folder}#{trial.number}"},
                )
            )
    return found


def _as_it_was(base: Record, settings: Settings) -> Record:
    """The values of an earlier trial's recipe."""
    document = Document(copy.deepcopy(base), {(): "warm_start"})
    apply_changes(document, [Change(key, value, "warm_start") for key, value in settings.items()])
    return document.values


def _place(
    settings: Settings, recipe: Record, space: Space
) -> tuple[dict[str, Any], dict[str, BaseDistribution]] | None:
    """Parameters of an earlier trial in this space, and their distributions; None for any outside.

    Args:
        settings: what was searched then.
        recipe: all that it was.
        space: what is searched now.
    """
    elsewhere = [key for key in settings if key not in space.keys]
    if not all(is_same(space.written(key), settings[key]) for key in elsewhere):
        return None
    own = {key: value_at(recipe, key) for key in (*space.keys, *_ADAPTER)}
    probe = _Probe(_parameters(own, space))
    try:
        reached = space.suggest(probe)
    except KeyError:
        return None
    computed = [key for key in reached if space[key].is_computed]
    if not all(is_same(reached[key], own[key]) for key in computed):
        return None
    return {name: probe.params[name] for name in probe.seen}, probe.seen


def _parameters(own: Settings, space: Space) -> dict[str, Any]:
    """By the names that Optuna has for them, those values that lie in the space."""
    has_adapter = is_number(own[RANK]) and is_number(own[ALPHA])
    found = {}
    for key in space.searched:
        distribution = space[key]
        if distribution.at_alpha is not None and not has_adapter:
            continue
        value = space.as_searched(key, own[key], own)
        if distribution.holds(value):
            found[distribution.parameter(key)] = distribution.own(value)
    return found


class _Probe:
    """Answers as a trial with known parameters would, and notes the distributions."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.seen: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.seen[name] = CategoricalDistribution(choices)
        return self.params[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        self.seen[name] = FloatDistribution(low, high, log=log, step=step)
        return float(self.params[name])

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.seen[name] = IntDistribution(low, high, log, step)
        return int(self.params[name])
