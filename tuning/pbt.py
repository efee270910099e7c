"""Population-based training: members train in parallel, and copies of the best replace the worst.

All members train for one generation, up to the same milestone. Then the worst quarter is replaced:
for each of them a new trial continues from the checkpoint of a member of the best quarter, with
perturbed settings. A trial keeps its settings from start to end, so Optuna records the replaced
trial as pruned and the new one as a trial of its own.

Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846; here all members wait at each milestone.
The result of a generation depends only on the study and the seed, also if a crash interrupts it.
"""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ..training.common.errors import InputError
from ..training.records.run_folder import Record
from .distribution import Distribution, Settings
from .space import Space
from .study import Assignment, SweepStudy
from .sweep import Sweep

_SHARE = 4
"""One of this many members is replaced, by a copy of one of equally many best."""
_RESAMPLED = 0.25
"""Probability that a value is drawn again from its whole distribution."""
_FACTOR = 1.25
"""Change of a value of a log range; in a linear range, a value changes by a tenth of the range."""

# Optuna's user attributes; the values are names in optuna.db.
_GENERATION, _MILESTONES, _FIRST_GENERATION, _REPLACES = "turned", "stood", "born", "replaces"


class Population:
    """Decides which member trains next, and up to which milestone.

    Args:
        sweep: `trials` is the size of the population.
        study: stores the state of the population.
        space: what is searched.
        inherit: called with (parent, child) to copy the parent's checkpoint to the child; after a
            crash it may be called again for the same child.
    """

    def __init__(
        self, sweep: Sweep, study: SweepStudy, space: Space, inherit: Callable[[int, int], None]
    ) -> None:
        self._size = sweep.trials
        self._seed = sweep.seed
        self._study = study
        self._space = space
        self._inherit = inherit
        self._members: dict[int, Assignment] = {}
        """Trials started by this process, or left unfinished by an earlier one."""
        while study.has_unfinished and (assignment := study.ask()) is not None:
            self._members[assignment.number] = assignment

    @property
    def is_finished(self) -> bool:
        """True if no member is left to train."""
        return not self._is_growing and not self._unfinished()

    def next_trial(self, running: Collection[int]) -> Assignment | None:
        """The next member to train, with its milestone.

        Returns:
            None while it must wait for other members to reach the milestone.
        """
        milestone = self._generation + 1
        if self._is_growing or self._has_queued():
            assignment = self._study.ask()
            if assignment is None:
                self._size = len(self._founders())
                return None
            self._members[assignment.number] = assignment
        else:
            ready = [
                number
                for number in self.paused(running)
                if str(milestone) not in _milestones(self._trial(number))
            ]
            if not ready:
                return None
            assignment = self._members[ready[0]]
        return replace(assignment, until=milestone)

    def paused(self, running: Collection[int]) -> list[int]:
        """Unfinished members that are not running now."""
        return [
            trial.number
            for trial in self._unfinished()
            if trial.state == TrialState.RUNNING and trial.number not in running
        ]

    def reached_milestone(self, number: int, measures: Record) -> None:
        """Record that a member has trained up to the current milestone."""
        value = measures[self._study.metrics[0].name]
        reached = {**_milestones(self._trial(number)), str(self._generation + 1): value}
        self._study.store(number, measures, **{_MILESTONES: reached})

    def finish_generation(self) -> Iterator[tuple[int, str]]:
        """Replace the worst members, if all have reached the current milestone.

        Yields:
            (trial, reason) for each trial that was replaced.
        """
        milestone = self._generation + 1
        missing = [
            trial
            for trial in self._unfinished()
            if _first_generation(trial) < milestone and str(milestone) not in _milestones(trial)
        ]
        if self._is_growing or missing or not self._unfinished():
            return
        best, worst = self._ranked(milestone)
        for replaced in worst:
            generator = random.Random(f"{self._seed}/{milestone}/{replaced.number}")
            parent = generator.choice(best)
            child = self._child(parent, replaced, milestone, generator)
            self._inherit(parent.number, child)
            if replaced.state == TrialState.RUNNING:
                reason = f"replaced by trial {child}, which continues from trial {parent.number}"
                self._study.prune(replaced.number, reason, replaced.user_attrs["measures"])
                yield replaced.number, reason
        self._study.optuna.set_user_attr(_GENERATION, milestone)

    # in detail

    @property
    def _generation(self) -> int:
        """Number of finished generations."""
        return int(self._study.optuna.user_attrs.get(_GENERATION, 0))

    @property
    def _is_growing(self) -> bool:
        return self._generation == 0 and len(self._founders()) < self._size

    def _own(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.optuna.get_trials(deepcopy=False)
        return [
            trial
            for trial in trials
            if ("settings" in trial.user_attrs or _REPLACES in trial.user_attrs)
            and "earlier" not in trial.user_attrs
        ]

    def _founders(self) -> list[FrozenTrial]:
        """Trials that started from the base model, not from another trial's checkpoint."""
        return [trial for trial in self._own() if _REPLACES not in trial.user_attrs]

    def _unfinished(self) -> list[FrozenTrial]:
        states = (TrialState.RUNNING, TrialState.WAITING)
        return [trial for trial in self._own() if trial.state in states]

    def _has_queued(self) -> bool:
        return any(trial.state == TrialState.WAITING for trial in self._unfinished())

    def _trial(self, number: int) -> FrozenTrial:
        trial: FrozenTrial = self._study.optuna.get_trials(deepcopy=False)[number]
        return trial

    def _ranked(self, milestone: int) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The best trials at a milestone, and those to replace: the worst, and failed ones."""
        own = self._own()
        sign = 1 if self._study.metrics[0].mode == "min" else -1

        def value(trial: FrozenTrial) -> float:
            return sign * float(_milestones(trial)[str(milestone)])

        ranking = sorted(
            (trial for trial in own if str(milestone) in _milestones(trial)),
            key=lambda trial: (value(trial), trial.number),
        )
        count = max(1, len(ranking) // _SHARE)
        best = ranking[:count]
        worst = [trial for trial in ranking[count:][-count:] if value(trial) > value(best[-1])]
        earlier = [trial for trial in own if _first_generation(trial) < milestone]
        replaced = {trial.user_attrs.get(_REPLACES) for trial in earlier}
        failed = [
            trial
            for trial in earlier
            if trial.state == TrialState.FAIL and trial.number not in replaced
        ]
        return best, worst + failed if best else []

    def _child(
        self,
        parent: FrozenTrial,
        replaced: FrozenTrial,
        milestone: int,
        generator: random.Random,
    ) -> int:
        """Number of the trial that takes the place of `replaced`, queued if it does not exist."""
        for trial in self._own():
            if trial.user_attrs.get(_REPLACES) == replaced.number:
                return int(trial.number)
        settings = perturbed(self._space, parent.user_attrs["settings"], generator)
        tokens = parent.user_attrs["measures"]["tokens"]
        self._study.optuna.enqueue_trial(
            self._space.labels(settings),
            user_attrs={
                _REPLACES: replaced.number,
                _FIRST_GENERATION: milestone,
                "parent": {"trial": parent.number, "tokens": tokens},
            },
        )
        return len(self._study.optuna.get_trials(deepcopy=False)) - 1


def perturbed(space: Space, settings: Settings, generator: random.Random) -> Settings:
    """Random settings near `settings`; `settings` itself if the result is not a valid recipe."""
    changed = {
        key: space.in_recipe(
            key,
            _perturbed(space[key], space.as_searched(key, settings[key], settings), generator),
            settings,
        )
        for key in space.searched
        if key in settings
    }
    nearby = space.complete(changed)
    try:
        space.recipe(nearby)
    except InputError:
        return settings
    return nearby


def _perturbed(distribution: Distribution, value: Any, generator: random.Random) -> Any:
    is_resampled, is_up = generator.random() < _RESAMPLED, generator.random() < 0.5
    place = generator.random()
    if distribution.choice is not None:
        choices = distribution.choice
        if is_resampled:
            return choices[int(place * len(choices))]
        index = choices.index(value) + (1 if is_up else -1)
        return choices[min(max(index, 0), len(choices) - 1)]
    low, high = distribution.bounds
    if is_resampled:
        drawn = low * (high / low) ** place if distribution.is_log else low + place * (high - low)
        return distribution.nearest(drawn)
    if distribution.is_log:
        return distribution.nearest(value * _FACTOR if is_up else value / _FACTOR)
    step = max((high - low) / 10, distribution.step or 0.0)
    return distribution.nearest(value + step if is_up else value - step)


def _milestones(trial: FrozenTrial) -> dict[str, float]:
    """The trial's objective at each milestone that it reached, by the milestone's number."""
    return dict(trial.user_attrs.get(_MILESTONES, {}))


def _first_generation(trial: FrozenTrial) -> int:
    """The generation in which the trial started; 0 for the first members."""
    return int(trial.user_attrs.get(_FIRST_GENERATION, 0))
