"""The settings of a space that a sweep has not tried."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from ..training.common.errors import InputError
from .combinations import Combinations
from .distribution import Scalar, Settings
from .space import Space

_DRAWN = 10_000
"""Number of random settings that are looked at where a space is too large to list."""


class Untried:
    """Knows which settings of a space are valid and which were tried, and finds others.

    Args:
        space: what is searched.
        refused: why settings that make a valid recipe cannot run, as far as that is known.
    """

    def __init__(
        self, space: Space, refused: Callable[[Settings], str | None] = lambda _: None
    ) -> None:
        self._space = space
        self._refused = refused
        every = Combinations(space).every_setting()
        self._every = None if every is None else {space.identity(each): each for each in every}
        """All settings by their identity; None if they are too many to list."""
        self._tried: set[str] = set()
        self._faults: dict[str, str | None] = {}
        """By identity: why settings are not a valid recipe; None for valid ones."""

    def add(self, settings: Settings) -> None:
        """Settings that are tried from now on."""
        self._tried.add(self._space.identity(settings))

    def refusal(self, settings: Settings) -> str | None:
        """Why settings must not be tried: done before, no valid recipe, or refused; else None."""
        identity = self._space.identity(settings)
        if identity in self._tried:
            return "these settings have been tried"
        return self._fault(identity, settings) or self._refused(settings)

    def first(self) -> Settings | None:
        """The first in the order of `Combinations.every_setting`; None if none are left."""
        return next((each for each in self._left() if self.refusal(each) is None), None)

    def draw(self, seed: str) -> Settings | None:
        """Random settings; None if none are left.

        In a space that is too large to list, None if none of 10,000 random settings is valid and
        new.
        """
        generator = random.Random(seed)
        drawn = self._drawn(generator) if self._every is None else self._shuffled(generator)
        return next((each for each in drawn if self.refusal(each) is None), None)

    @property
    def exhausted(self) -> str:
        """Why no settings are left, once `first` or `draw` has returned None."""
        if self._every is None:
            return f"none of {_DRAWN:,} random settings is valid and new"
        return f"all {self.valid} valid settings have been tried"

    @property
    def valid(self) -> int | None:
        """Number of valid settings, tried or not; None if the settings are too many to list."""
        if self._every is None:
            return None
        every = self._every.items()
        return sum((self._fault(*item) or self._refused(item[1])) is None for item in every)

    def _left(self) -> list[Settings]:
        """Settings that were neither tried nor refused, in order."""
        assert self._every is not None, "the plan of a grid lists its settings"
        return [
            settings
            for identity, settings in self._every.items()
            if identity not in self._tried and self._faults.get(identity) is None
        ]

    def _shuffled(self, generator: random.Random) -> Iterator[Settings]:
        left = self._left()
        while left:
            place = generator.randrange(len(left))
            left[place], left[-1] = left[-1], left[place]
            yield left.pop()

    def _drawn(self, generator: random.Random) -> Iterator[Settings]:
        return (self._space.suggest(_Uniform(generator)) for _ in range(_DRAWN))

    def _fault(self, identity: str, settings: Settings) -> str | None:
        """Why settings are not a valid recipe; None if they are."""
        if identity not in self._faults:
            self._faults[identity] = None
            try:
                self._space.recipe(settings)
            except InputError as error:
                self._faults[identity] = str(error)
        return self._faults[identity]


class _Uniform:
    """Suggests values at random, each of a distribution with the same probability."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        del name
        return self._generator.choice(choices)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        del name
        if step is not None:
            return low + step * self._generator.randint(0, round((high - low) / step))
        return self._between(low, high, log)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        del name
        if log:
            return round(self._between(low, high, log))
        return self._generator.randrange(low, high + 1, step)

    def _between(self, low: float, high: float, log: bool) -> float:
        if not log:
            return self._generator.uniform(low, high)
        value = math.exp(self._generator.uniform(math.log(low), math.log(high)))
        return min(max(value, low), high)
