"""Builds Optuna's sampler and pruner from a sweep's settings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from .distribution import Settings
from .draft import Choose, Draft
from .space import Space
from .sweep import Sweep

_STARTUP_TRIALS = 4
"""Trials before the Parzen estimators are used: guesses of `search: default`, or random ones."""
_SUGGESTIONS = 20
"""A sampler that suggests this many refused settings in a row repeats itself."""
_TRIALS_OF_MEDIAN = 4
"""Other trials that must have trained as many tokens before one is pruned by their median."""


def make_sampler(sweep: Sweep, trials_before: int) -> optuna.samplers.BaseSampler:
    """The sampler of a sweep.

    Args:
        sweep: names the sampler and its seed.
        trials_before: number of trials of earlier attempts; it changes the seed, so that a resumed
            sweep does not repeat their random numbers.
    """
    seed = (sweep.seed + 7919 * trials_before) % 2**32
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
    if sweep.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if sweep.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if sweep.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    # The settings of a grid are taken in order, so its sampler never chooses one.
    return optuna.samplers.RandomSampler(seed=seed)


class DistinctSampler(optuna.samplers.BaseSampler):
    """Takes settings from another sampler, but none that are refused.

    Only the settings that a trial gets are stored in the study. Once the other sampler suggests
    nothing but refused settings, the trial gets `reserve`.

    Args:
        sampler: suggests settings.
        space: what is searched.
        refusal: returns why settings must not be tried; None if they can be.
    """

    def __init__(
        self,
        sampler: optuna.samplers.BaseSampler,
        space: Space,
        refusal: Callable[[Settings], str | None],
    ) -> None:
        self._sampler = sampler
        self._space = space
        self._refusal = refusal
        self.reserve: Settings = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The distributions of all keys: `sample_relative` chooses all of a trial's values."""
        del study, trial
        draft = Draft(lambda _, distribution: _lowest(distribution))
        self._space.suggest_all(draft)
        return draft.distributions

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The values of the first suggestion that is not refused, else those of `reserve`."""
        del search_space
        joint = self._sampler.infer_relative_search_space(study, trial)
        for _ in range(_SUGGESTIONS):
            draft = Draft(self._choose(study, trial, joint))
            if self._refusal(self._space.suggest(draft)) is None:
                return draft.params
        return self._space.labels(self.reserve)

    def _choose(
        self, study: optuna.Study, trial: FrozenTrial, joint: dict[str, BaseDistribution]
    ) -> Choose:
        """Chooses values as an Optuna trial does; those that are `joint` are sampled together."""
        together = self._sampler.sample_relative(study, trial, joint)

        def choose(name: str, distribution: BaseDistribution) -> Any:
            if name in trial.params:  # stored before a crash
                return trial.params[name]
            if distribution.single():
                return _lowest(distribution)
            if name in together:
                return together[name]
            return self._sampler.sample_independent(study, trial, name, distribution)

        return choose

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The other sampler's value."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called when a trial is created."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Called when a trial has ended."""
        self._sampler.after_trial(study, trial, state, values)


def _lowest(distribution: Any) -> Any:
    """The first choice, or the lowest value of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low


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
    """

    def __init__(self, min_tokens: int) -> None:
        self._min_tokens = min_tokens

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
        if len(others) < _TRIALS_OF_MEDIAN:
            return False
        ordered = sorted(others)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return own > middle


def _best_until(trial: Any, tokens: int, sign: int) -> float:
    """The lowest value of sign * objective up to `tokens`; infinite if there is none."""
    values = [sign * value for step, value in trial.intermediate_values.items() if step <= tokens]
    return min((value for value in values if not math.isnan(value)), default=math.inf)
