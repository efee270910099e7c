"""Optuna's samplers and pruners as a sweep names them."""

import math
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.trial import TrialState

from ..training.common.errors import InputError
from .sweep import Sweep

_STARTUP_TRIALS = 4
"""Before Parzen estimators say anything: guesses of `search: default`, or drawn at random."""


def make_sampler(sweep: Sweep, trials_before: int) -> optuna.samplers.BaseSampler:
    """The sampler of a sweep.

    Args:
        sweep: says which.
        trials_before: of earlier attempts; a resumed sweep must not repeat their random numbers.

    Raises:
        InputError: for a sampler whose library is not installed.
    """
    seed = (sweep.seed + 7919 * trials_before) % 2**32
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
    if sweep.sampler == "cmaes":
        _need("cmaes", "cmaes")
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if sweep.sampler == "gp":
        _need("gp", "scipy")
        return optuna.samplers.GPSampler(seed=seed)
    if sweep.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    # A grid's settings are queued one by one: there is nothing left to choose.
    return optuna.samplers.RandomSampler(seed=seed)


def _need(sampler: str, package: str) -> None:
    if find_spec(package) is None:
        raise InputError(
            f"sampler: {sampler} needs the package {package}; install finray with its extra "
            "'search', or use tpe"
        )


def make_pruner(sweep: Sweep, is_pruned: bool, trial_tokens: int) -> optuna.pruners.BasePruner:
    """The pruner of a sweep; its steps are trained tokens.

    Args:
        sweep: says which.
        is_pruned: whether the objective can be judged before a trial's end.
        trial_tokens: that a whole trial of the base recipe trains on.
    """
    kind = sweep.pruning.kind
    if not is_pruned:
        return optuna.pruners.NopPruner()
    first = first_rung(sweep, trial_tokens)
    if kind == "median":
        return MedianPruner(first)
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first, reduction_factor=sweep.pruning.reduction
    )


def first_rung(sweep: Sweep, trial_tokens: int) -> int:
    """Tokens after which a trial can be pruned first."""
    return sweep.pruning.min_tokens or max(1, trial_tokens // parts(sweep))


def interval(sweep: Sweep, trial_tokens: int, total_steps: int, unit: int) -> int:
    """Steps from one turn of a population to the next.

    Args:
        sweep: says how many tokens.
        trial_tokens: that a whole trial trains on.
        total_steps: of a trial.
        unit: the interval is a multiple of so many steps.
    """
    steps = math.ceil(total_steps * first_rung(sweep, trial_tokens) / trial_tokens)
    return math.ceil(steps / unit) * unit


def parts(sweep: Sweep) -> int:
    """Of a trial, at whose ends it is measured: three rungs lie before its own end."""
    return sweep.pruning.reduction**2 + 1


class MedianPruner(optuna.pruners.BasePruner):
    """Prunes a trial whose best value is worse than the median of the others' best so far.

    Optuna's own compares values of equal steps only; trials with other batch sizes never have
    equal numbers of tokens.

    Args:
        min_tokens: before so many nothing is pruned.
        min_trials: others that must have come as far.
    """

    def __init__(self, min_tokens: int, min_trials: int = 4) -> None:
        self._min_tokens = min_tokens
        self._min_trials = min_trials

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether to stop this trial now."""
        tokens = trial.last_step
        if tokens is None or tokens < self._min_tokens:
            return False
        sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        own = _best_until(trial, tokens, sign)
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        others = [
            _best_until(other, tokens, sign)
            for other in study.get_trials(deepcopy=False, states=states)
            if other.number != trial.number and (other.last_step or 0) >= tokens
        ]
        if len(others) < self._min_trials:
            return False
        ordered = sorted(others)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return own > middle


def _best_until(trial: Any, tokens: int, sign: int) -> float:
    """The best value so far, as one of which less is better; infinite for none."""
    values = [sign * value for step, value in trial.intermediate_values.items() if step <= tokens]
    return min((value for value in values if not math.isnan(value)), default=math.inf)
