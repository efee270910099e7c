"""Population-based training: members train side by side, and the worst learn from the best.

All train for an interval. The worst quarter then gives way: in place of each, a new trial goes on
from the checkpoint of one of the best quarter, with settings perturbed around that one's. A trial
has one setting from its birth to its end, so Optuna is told the truth: who gave way is pruned.

Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846; with a turn at which all members stand.
What a turn does follows from the study and the seed alone, also where a crash cut it off.
"""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ..training.common.errors import InputError
from ..training.records.run_folder import Record
from .distribution import Distribution
from .space import Settings, Space
from .study import Assignment, SweepStudy
from .sweep import Sweep

_SHARE = 4
"""One of so many gives way, to one of as many of the best."""
_RESAMPLED = 0.25
"""Share of the values that are drawn anew."""
_FACTOR = 1.25
"""Up or down, on a logarithmic scale; on a linear one it is a tenth of the range."""

_TURNED, _STOOD, _BORN, _REPLACES = "turned", "stood", "born", "replaces"


class Population:
    """Who trains next, and up to where.

    Args:
        sweep: `trials` is the size of the population.
        study: its memory.
        space: what is searched.
        inherit: called with (parent, child) to give the child the parent's checkpoint; after a
            crash it may be called again.
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
        """Those that were started here, or were open when this began."""
        while study.has_unfinished and (one := study.ask()) is not None:
            self._members[one.number] = one

    @property
    def is_finished(self) -> bool:
        """Whether nobody is left to train."""
        return not self._is_growing and not self._alive()

    def next(self, running: Collection[int]) -> Assignment | None:
        """The next to train, with the turn that it trains up to; None while others must come
        there first."""
        turned = self._turned
        if self._is_growing or self._waits_to_be_born():
            assignment = self._study.ask()
            if assignment is None:
                self._size = len(self._first())
                return None
            self._members[assignment.number] = assignment
        else:
            ready = [
                number
                for number in self.parked(running)
                if str(turned + 1) not in _stood(self._trial(number))
            ]
            if not ready:
                return None
            assignment = self._members[ready[0]]
        return replace(assignment, until=turned + 1)

    def parked(self, running: Collection[int]) -> list[int]:
        """Members that live and do not run."""
        return [
            trial.number
            for trial in self._alive()
            if trial.state == TrialState.RUNNING and trial.number not in running
        ]

    def stands(self, number: int, measures: Record) -> None:
        """A member came to the next turn."""
        value = measures[self._study.metrics[0].name]
        stood = {**_stood(self._trial(number)), str(self._turned + 1): value}
        self._study.note(number, measures, stood=stood)

    def turn(self) -> Iterator[tuple[int, str]]:
        """Where all members stand at the next turn, let the worst give way; yields (trial, what
        became of it) for each that did."""
        turn = self._turned + 1
        waited_for = [
            trial
            for trial in self._alive()
            if _born(trial) < turn and str(turn) not in _stood(trial)
        ]
        if self._is_growing or waited_for or not self._alive():
            return
        best, losers = self._ranked(turn)
        for loser in losers:
            chance = random.Random(f"{self._seed}/{turn}/{loser.number}")
            parent = chance.choice(best)
            child = self._child(parent, loser, turn, chance)
            self._inherit(parent.number, child)
            if loser.state == TrialState.RUNNING:
                reason = f"gave way to trial {child}, which goes on from trial {parent.number}"
                self._study.prune(loser.number, reason, loser.user_attrs["measures"])
                yield loser.number, reason
        self._study.optuna.set_user_attr(_TURNED, turn)

    # in detail

    @property
    def _turned(self) -> int:
        """Turns that are over."""
        return int(self._study.optuna.user_attrs.get(_TURNED, 0))

    @property
    def _is_growing(self) -> bool:
        return self._turned == 0 and len(self._first()) < self._size

    def _own(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.optuna.get_trials(deepcopy=False)
        return [
            one
            for one in trials
            if ("settings" in one.user_attrs or _REPLACES in one.user_attrs)
            and "earlier" not in one.user_attrs
        ]

    def _first(self) -> list[FrozenTrial]:
        """Those that started with nothing."""
        return [one for one in self._own() if _REPLACES not in one.user_attrs]

    def _alive(self) -> list[FrozenTrial]:
        states = (TrialState.RUNNING, TrialState.WAITING)
        return [one for one in self._own() if one.state in states]

    def _waits_to_be_born(self) -> bool:
        return any(one.state == TrialState.WAITING for one in self._alive())

    def _trial(self, number: int) -> FrozenTrial:
        found: FrozenTrial = self._study.optuna.get_trials(deepcopy=False)[number]
        return found

    def _ranked(self, turn: int) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The best at a turn, and those that give way: the worst, and who failed since the last."""
        own = self._own()
        sign = 1 if self._study.metrics[0].mode == "min" else -1

        def value(trial: FrozenTrial) -> float:
            return sign * float(_stood(trial)[str(turn)])

        standing = sorted(
            (one for one in own if str(turn) in _stood(one)),
            key=lambda one: (value(one), one.number),
        )
        count = max(1, len(standing) // _SHARE)
        best = standing[:count]
        worst = [one for one in standing[count:][-count:] if value(one) > value(best[-1])]
        replaced = {one.user_attrs.get(_REPLACES) for one in own if _born(one) < turn}
        failed = [
            one
            for one in own
            if one.state == TrialState.FAIL and _born(one) < turn and one.number not in replaced
        ]
        return best, worst + failed if best else []

    def _child(
        self, parent: FrozenTrial, loser: FrozenTrial, turn: int, chance: random.Random
    ) -> int:
        """The number of the trial in a loser's place; it is there already after a crash."""
        born = [one for one in self._own() if one.user_attrs.get(_REPLACES) == loser.number]
        if born:
            return int(born[0].number)
        settings = perturbed(self._space, parent.user_attrs["settings"], chance)
        tokens = parent.user_attrs["measures"]["tokens"]
        self._study.optuna.enqueue_trial(
            self._space.labels(settings),
            user_attrs={
                _REPLACES: loser.number,
                _BORN: turn,
                "parent": {"trial": parent.number, "tokens": tokens},
            },
        )
        return len(self._study.optuna.get_trials(deepcopy=False)) - 1


def perturbed(space: Space, settings: Settings, chance: random.Random) -> Settings:
    """Settings a little away from others; those themselves where that makes no valid recipe."""
    given = {
        key: space.in_recipe(
            key,
            _perturbed(space[key], space.as_searched(key, settings[key], settings), chance),
            settings,
        )
        for key in space.searched
        if key in settings
    }
    around = space.complete(given)
    try:
        space.recipe(around)
    except InputError:
        return settings
    return around


def _perturbed(distribution: Distribution, value: Any, chance: random.Random) -> Any:
    is_anew, is_up = chance.random() < _RESAMPLED, chance.random() < 0.5
    place = chance.random()
    if distribution.choice is not None:
        choices = distribution.choice
        if is_anew:
            return choices[int(place * len(choices))]
        index = choices.index(value) + (1 if is_up else -1)
        return choices[min(max(index, 0), len(choices) - 1)]
    low, high = distribution.bounds
    if is_anew:
        far = low * (high / low) ** place if distribution.is_log else low + place * (high - low)
        return distribution.nearest(far)
    if distribution.is_log:
        return distribution.nearest(value * _FACTOR if is_up else value / _FACTOR)
    step = max((high - low) / 10, distribution.step or 0.0)
    return distribution.nearest(value + step if is_up else value - step)


def _stood(trial: FrozenTrial) -> dict[str, float]:
    """Its objective at each turn, by the turn's number."""
    return dict(trial.user_attrs.get(_STOOD, {}))


def _born(trial: FrozenTrial) -> int:
    """The turn at which it began."""
    return int(trial.user_attrs.get(_BORN, 0))
