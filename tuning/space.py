"""The search space of a sweep: settings that a sampler or a person chooses, and their recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe
from .default_search import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    RSLORA,
    RULE_ALPHA,
    SPREAD,
    adapter_factor,
    own_rate,
    rate_factor,
    suggested_learning_rate,
)
from .distribution import Distribution, Scalar, Settings, is_number
from .search_keys import SearchKeys, value_at
from .trial_recipes import TrialRecipes


class Suggests(Protocol):
    """The methods of an Optuna trial that suggest values."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


class Space:
    """The keys that a sweep searches, and their distributions, around a base recipe.

    Args:
        search: distributions by dotted key.
        base: the recipe that each trial changes.
        folder: base folder of relative paths among the values.
        place: returns file:line of a searched key, for messages.
        check: raises an InputError for a valid recipe that a trial must not have.

    Raises:
        InputError: a key does not exist or must not differ between trials, or depends on a key
            that is not searched.
    """

    def __init__(
        self,
        search: dict[str, Distribution],
        base: Recipe,
        folder: Path,
        place: Callable[[str], str],
        check: Callable[[Recipe], None] = lambda recipe: None,
    ) -> None:
        self.base = base
        self.search = SearchKeys(search, base, place)
        self._recipes = TrialRecipes(base, folder, place, check)
        self._alikes: Settings = {}

    def __getitem__(self, key: str) -> Distribution:
        return self.search[key]

    @property
    def keys(self) -> list[str]:
        """The keys, each after the keys that it depends on."""
        return self.search.in_order

    @property
    def searched(self) -> list[str]:
        """Those of the keys that a sampler chooses."""
        return self.search.searched

    def suggest(self, trial: Suggests) -> Settings:
        """The sampler's value for each active key."""
        settings: Settings = {}
        for key in self.keys:
            if self.search.is_active(key, settings):
                settings[key] = self._value(
                    key,
                    settings,
                    lambda k: self.in_recipe(k, _suggest(trial, k, self[k]), settings),
                )
        return settings

    def suggest_all(self, trial: Suggests) -> None:
        """Suggest a value for every key, also for keys that are not active together."""
        for key in self.searched:
            _suggest(trial, key, self[key])

    def complete(self, given: Settings) -> Settings:
        """Values for all active keys.

        A key that is not `given` has the base recipe's value, or the nearest one in the space.
        """
        settings: Settings = {}
        for key in self.keys:
            if self.search.is_active(key, settings):
                settings[key] = self._value(
                    key,
                    settings,
                    lambda k: self[k].spelled(given[k]) if k in given else self._own(k, settings),
                )
        return settings

    def rule_of_thumb(self, given: Settings | None = None, times: float = 1.0) -> Settings:
        """Settings of the base recipe, with the suggested learning rate if the rate is searched.

        Args:
            given: values that differ from the base recipe's.
            times: factor on the suggested rate.
        """
        settings = self.complete(given or {})
        if LEARNING_RATE not in self.searched or LEARNING_RATE not in settings:
            return settings
        try:
            recipe = self.recipe(settings)
        except InputError:  # not valid, so no trial will use it
            recipe = self.base
        rate = (suggested_learning_rate(recipe) or own_rate(self.base)) * adapter_factor(
            RULE_ALPHA, recipe
        )
        nearest = self._nearest(LEARNING_RATE, times * rate, settings)
        return self.complete({**(given or {}), LEARNING_RATE: nearest})

    def variations_of_the_rule(self) -> list[Settings]:
        """The first guesses of `search: default` after the rule of thumb.

        These are the other adapter kind (LoRA or rsLoRA) at the largest rank, and a higher and a
        lower learning rate for both kinds.
        """
        around = (SPREAD, 1 / SPREAD)
        if self.base.adapter is None:
            return [self.rule_of_thumb(times=times) for times in around]
        ranks = self[RANK].choice
        assert ranks is not None, "the default space has a choice of ranks"
        other_kind = {RSLORA: not self.base.adapter.rslora, RANK: max(ranks)}
        kinds: tuple[Settings, ...] = ({}, other_kind)
        rates = [self.rule_of_thumb(kind, times) for times in around for kind in kinds]
        return [self.rule_of_thumb(other_kind), *rates]

    def point(self, given: Settings, place: str) -> Settings:
        """One of the sweep's `points` as complete settings.

        Raises:
            InputError: a key is not searched, a value lies outside the space, or the settings are
                not a valid recipe.
        """
        for key, value in given.items():
            if key not in self.searched:
                searched = ", ".join(self.searched)
                raise InputError(f"{place}: {key} is not searched; the sweep searches {searched}")
            if self[key].at_alpha is None:
                self._check_in_space(key, value, {}, place)
        settings = self.complete(given)
        for key, value in given.items():
            self._check_in_space(key, value, settings, place)
        self.recipe(settings)
        return settings

    def labels(self, settings: Settings) -> dict[str, Scalar]:
        """The searched values as Optuna stores them, by Optuna's parameter names."""
        labels = {}
        for key in self.searched:
            if key in settings:
                value = self.as_searched(key, settings[key], settings)
                if self[key].at_alpha is not None:
                    value = float(f"{value:.12g}")  # equal but for rounding: one value
                labels[self[key].parameter(key)] = self[key].label_of(value)
        return labels

    def identity(self, settings: Settings) -> str:
        """A text that is equal for equal settings, up to the notation of numbers."""
        return json.dumps(self.labels(settings), sort_keys=True)

    def recipe(self, settings: Settings, **fixed: Any) -> Recipe:
        """The recipe with these settings; for arguments and errors see `TrialRecipes.recipe`."""
        return self._recipes.recipe(settings, **fixed)

    def refusal(self, settings: Settings) -> str | None:
        """Why the settings are not a valid recipe; None if they are."""
        return self._recipes.refusal(settings)

    def in_recipe(self, key: str, searched: Any, settings: Settings) -> Any:
        """Convert a searched value to the recipe's, given the values of the keys before it."""
        at_alpha = self[key].at_alpha
        return searched if at_alpha is None else searched * self._factor(at_alpha, settings)

    def as_searched(self, key: str, value: Any, settings: Settings) -> Any:
        """Convert a recipe's value to the searched one, given the values of the keys before it."""
        at_alpha = self[key].at_alpha
        if at_alpha is None or not is_number(value):
            return value
        return value / self._factor(at_alpha, settings)

    def computed(self, key: str, settings: Settings) -> Any:
        """The value of a key with `times`, given the values of the keys before it."""
        distribution = self[key]
        assert distribution.times is not None and distribution.of is not None
        factor = settings.get(distribution.of, self.search.base_value(distribution.of))
        value = distribution.times * factor
        return int(value) if value == int(value) else value

    # in detail

    def _value(self, key: str, settings: Settings, choose: Callable[[str], Any]) -> Any:
        return self.computed(key, settings) if self[key].is_computed else choose(key)

    def _own(self, key: str, settings: Settings) -> Any:
        """The base recipe's value if it is in the space, else the nearest one, else the middle."""
        own = self.search.base_value(key)
        if self._contains(key, own, settings):
            return self[key].spelled(own)
        return self._nearest(key, own, settings) if is_number(own) else self._alike(key)

    def _alike(self, key: str) -> Any:
        """The choice that is the base recipe's value, written in another form; else the middle."""
        if key not in self._alikes:
            alike = (value for value in self[key].choice or () if self._makes_base(key, value))
            self._alikes[key] = next(alike, self[key].middle())
        return self._alikes[key]

    def _makes_base(self, key: str, value: Any) -> bool:
        try:
            made = self.recipe({key: value}).model_dump(mode="json")
        except InputError:
            return False
        return bool(value_at(made, key) == self.search.base_value(key))

    def _check_in_space(self, key: str, value: Any, settings: Settings, place: str) -> None:
        if not self._contains(key, value, settings):
            raise InputError(
                f"{place}: {key}: {value!r} is not in the search space; give a value of it, or "
                "widen search"
            )

    def _contains(self, key: str, value: Any, settings: Settings) -> bool:
        return self[key].contains(self.as_searched(key, value, settings))

    def _nearest(self, key: str, value: Any, settings: Settings) -> Any:
        searched = self[key].nearest(self.as_searched(key, value, settings))
        return self.in_recipe(key, searched, settings)

    def _factor(self, at_alpha: float, settings: Settings) -> float:
        """Factor from a learning rate at alpha `at_alpha` to one for the settings' adapter."""
        rank, alpha, rslora = (
            settings.get(k, self.search.base_value(k)) for k in (RANK, ALPHA, RSLORA)
        )
        return rate_factor(at_alpha, rank, alpha, rslora)


def _suggest(trial: Suggests, key: str, distribution: Distribution) -> Any:
    if distribution.choice is not None:
        labels = distribution.labels()
        chosen = trial.suggest_categorical(key, labels)
        # Compare types too: 1 == True, but they are different choices.
        kinds = [(type(label), label) for label in labels]
        return distribution.choice[kinds.index((type(chosen), chosen))]
    low, high = distribution.bounds
    if distribution.is_integer:
        step = int(distribution.step or 1)
        return trial.suggest_int(key, int(low), int(high), step=step, log=distribution.is_log)
    name, grid = distribution.parameter(key), distribution.step
    value = trial.suggest_float(name, low, high, step=grid, log=distribution.is_log)
    return value if grid is None else distribution.nearest(value)
