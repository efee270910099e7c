"""Builds Optuna's sampler and pruner from a sweep's settings."""

import math
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.trial import TrialState

from ..training.common.errors import InputError
from .sweep import Sweep

_STARTUP_TRIALS = 4
"""Trials before the Parzen estimators are used: guesses of `search: default`, or random ones."""


def make_sampler(sweep: Sweep, trials_before: int) -> optuna.samplers.BaseSampler:
    """The sampler of a sweep.

    Args:
        sweep: names the sampler and its seed.
        trials_before: number of trials of earlier attempts; it changes the seed, so that a resumed
            sweep does not repeat their random numbers.

    Raises:
        InputError: the sampler needs a package that is not installed.
    """
    seed = (sweep.seed + 7919 * trials_before) % 2**32
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
    if sweep.sampler == "cmaes":
        _check_installed("cmaes", "cmaes")
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if sweep.sampler == "gp":
        _check_installed("gp", "scipy")
        return optuna.samplers.GPSampler(seed=seed)
    if sweep.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    # All settings of a grid are queued as points, so its sampler never chooses one.
    return optuna.samplers.RandomSampler(seed=seed)


def _check_installed(sampler: str, package: str) -> None:
    if find_spec(package) is None:
        raise InputError(
            f"sampler: {sampler} needs the package {package}; install finray[search], or use "
            "sampler: tpe"
        )


def make_pruner(sweep: Sweep, is_pruned: bool, trial_tokens: int) -> optuna.pruners.BasePruner:
    """The pruner of a sweep; its steps are trained tokens.

    Args:
        sweep: its pruning settings.
        is_pruned: False if trials are never stopped early.
        trial_tokens: tokens that a whole trial of the base recipe trains on.
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
    """Trained tokens at which a trial can be pruned for the first time."""
    return sweep.pruning.min_tokens or max(1, trial_tokens // parts(sweep))


def interval(sweep: Sweep, trial_tokens: int, total_steps: int, unit: int) -> int:
    """Steps from one milestone of a population to the next.

    Args:
        sweep: its pruning settings.
        trial_tokens: tokens that a whole trial trains on.
        total_steps: optimizer steps of a whole trial.
        unit: the interval is a multiple of this many steps.
    """
    steps = math.ceil(total_steps * first_rung(sweep, trial_tokens) / trial_tokens)
    return math.ceil(steps / unit) * unit


def parts(sweep: Sweep) -> int:
    """Number of equal parts of a trial; it is evaluated at the end of each.

    The first rung is the end of the first part, so three rungs lie before the trial's end.
    """
    return sweep.pruning.reduction**2 + 1


class MedianPruner(optuna.pruners.BasePruner):
    """Prunes a trial whose best value so far is worse than the median of the other trials' best.

    Optuna's MedianPruner compares values at equal steps only. Here steps are trained tokens, and
    trials with different batch sizes never have equal numbers of them.

    Args:
        min_tokens: trained tokens before which no trial is pruned.
        min_trials: number of other trials that must have trained as many tokens.
    """

    def __init__(self, min_tokens: int, min_trials: int = 4) -> None:
        self._min_tokens = min_tokens
        self._min_trials = min_trials

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """True if the trial must stop now."""
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
    """The lowest value of sign * objective up to `tokens`; infinite if there is none."""
    values = [sign * value for step, value in trial.intermediate_values.items() if step <= tokens]
    return min((value for value in values if not math.isnan(value)), default=math.inf)
