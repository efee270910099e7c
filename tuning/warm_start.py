"""Results of an earlier sweep, as trials with which a new sweep's sampler starts.

An earlier trial is used if its recipe has, for every key that is searched now, a value in the new
space, and for every other key that was searched then, the value of the new base recipe.
"""

import copy
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from ..training.common.storage import Folder
from ..training.config.metric import Metric
from ..training.config.short_forms import write_out
from ..training.config.yaml_file import Change, Document, apply_changes
from ..training.records.run_folder import Record
from .default_search import ALPHA, RANK, RSLORA
from .distribution import Settings, is_number, is_same
from .draft import Draft
from .search_keys import value_at
from .space import Space
from .study import StudyFile
from .sweep_folder import read_earlier

_ADAPTER = (RANK, ALPHA, RSLORA)


def earlier_trials(folder: Folder, space: Space, metrics: Sequence[Metric]) -> list[FrozenTrial]:
    """The finished and pruned trials of another sweep whose settings lie in this space.

    Raises:
        InputError: the folder holds no sweep, or one with other objectives.
    """
    record = read_earlier(folder, metrics)
    study = optuna.load_study(study_name=None, storage=StudyFile(folder).open())
    trials = []
    for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        settings = trial.user_attrs.get("settings")
        if settings is None:
            continue
        position = _position(
            settings, _recipe_values(record["settings"]["recipe"], settings), space
        )
        if position is not None:
            params, distributions = position
            trials.append(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values if trial.state == TrialState.COMPLETE else None,
                    params=params,
                    distributions=distributions,
                    intermediate_values=trial.intermediate_values,
                    user_attrs={"settings": settings, "earlier": f"{folder}#{trial.number}"},
                )
            )
    return trials


def _recipe_values(base: Record, settings: Settings) -> Record:
    """The plain values of an earlier trial's recipe."""
    document = Document(copy.deepcopy(base), {(): "warm_start"}, write_out)
    apply_changes(document, [Change(key, value, "warm_start") for key, value in settings.items()])
    return document.values


def _position(
    settings: Settings, recipe: Record, space: Space
) -> tuple[dict[str, Any], dict[str, BaseDistribution]] | None:
    """Optuna parameters of an earlier trial in this space, and their distributions.

    Args:
        settings: the trial's values of the keys that were searched then.
        recipe: all values of the trial's recipe.
        space: the space that is searched now.

    Returns:
        None if the trial lies outside the space.
    """
    fixed = [key for key in settings if key not in space.keys]
    if not all(is_same(space.search.base_value(key), settings[key]) for key in fixed):
        return None
    values = {key: value_at(recipe, key) for key in (*space.keys, *_ADAPTER)}
    params = _parameters(values, space)
    draft = Draft(lambda name, kind: kind.to_external_repr(kind.to_internal_repr(params[name])))
    try:
        reached = space.suggest(draft)
    except KeyError:
        return None
    computed = [key for key in reached if space[key].is_computed]
    if not all(is_same(reached[key], values[key]) for key in computed):
        return None
    return draft.params, draft.distributions


def _parameters(values: Settings, space: Space) -> dict[str, Any]:
    """The values that lie in the space, as Optuna stores them, by Optuna's parameter names."""
    has_adapter = is_number(values[RANK]) and is_number(values[ALPHA])
    params = {}
    for key in space.searched:
        distribution = space[key]
        if distribution.at_alpha is not None and not has_adapter:
            continue
        value = space.as_searched(key, values[key], values)
        if distribution.contains(value):
            params[distribution.parameter(key)] = distribution.label_of(value)
    return params
