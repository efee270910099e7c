"""The searched space: from what a sampler suggests to valid recipes."""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe, resolve_recipe
from ..training.config.yaml_file import (
    Change,
    Document,
    apply_changes,
    is_known,
    suggestion,
    validate,
)
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
from .distribution import Distribution, Scalar, as_label, is_number

Settings = dict[str, Any]
"""Values by dotted key of the recipe."""

_SHARED = ("name", "storage", "scale", "checkpoint", "log")
_CHECKED = 4096
"""So many combinations are tried before a sweep starts; of more, a random part."""
_TOLD = 20


class Suggests(Protocol):
    """What an Optuna trial does."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Excluded:
    """A combination that makes no valid recipe."""

    settings: Settings
    reason: str


class Space:
    """What is searched around a base recipe.

    Args:
        search: distributions by dotted key.
        base: what every trial starts from.
        folder: what relative paths among the values are relative to.
        place: file:line of a searched key, for messages.

    Raises:
        InputError: for keys that no recipe has or no trial may change, conditions on keys that
            are not searched, and values that make no valid recipe.
    """

    def __init__(
        self,
        search: dict[str, Distribution],
        base: Recipe,
        folder: Path,
        place: Callable[[str], str],
    ) -> None:
        self.base = base
        self._folder = folder
        self._place = place
        self._search = search
        self._values = base.model_dump(mode="json", exclude_unset=True)
        # A variant is found by its kind, also where that is the default.
        self._values["method"] = {"kind": base.method.kind, **self._values.get("method", {})}
        self._written = base.model_dump(mode="json")
        self._check_keys()
        self.keys = self._in_order()

    def __getitem__(self, key: str) -> Distribution:
        return self._search[key]

    @property
    def searched(self) -> list[str]:
        """The keys that a sampler decides, each after those that it depends on."""
        return [key for key in self.keys if not self._search[key].is_computed]

    def suggest(self, trial: Suggests) -> Settings:
        """One setting of all keys that are active together."""
        settings: Settings = {}
        for key in self.keys:
            if self.is_active(key, settings):
                settings[key] = self._value(
                    key,
                    settings,
                    lambda k: self.in_recipe(k, _suggest(trial, k, self[k]), settings),
                )
        return settings

    def complete(self, given: Settings) -> Settings:
        """A whole setting from a partial one: the rest as in the base recipe, where that lies in
        the space, or as near to it as the space allows."""
        settings: Settings = {}
        for key in self.keys:
            if self.is_active(key, settings):
                settings[key] = self._value(
                    key, settings, lambda k: given[k] if k in given else self._own(k, settings)
                )
        return settings

    def rule_of_thumb(self, given: Settings | None = None, times: float = 1.0) -> Settings:
        """The base recipe with the learning rate that suits its model, as far as it is searched.

        Args:
            given: what shall be different.
            times: of the rate that suits.
        """
        settings = self.complete(given or {})
        if LEARNING_RATE not in self.searched or LEARNING_RATE not in settings:
            return settings
        try:
            recipe = self.recipe(settings)
        except InputError:  # a combination that no trial will have
            recipe = self.base
        rate = (suggested_learning_rate(recipe) or own_rate(self.base)) * adapter_factor(
            RULE_ALPHA, recipe
        )
        suits = self._nearest(LEARNING_RATE, times * rate, settings)
        return self.complete({**(given or {}), LEARNING_RATE: suits})

    def around_the_rule(self) -> list[Settings]:
        """What tells most beside the rule of thumb, of `search: default`: the other kind of
        adapter, as large as it may be, and for both kinds a faster and a slower rate."""
        around = (SPREAD, 1 / SPREAD)
        if self.base.adapter is None:
            return [self.rule_of_thumb(times=times) for times in around]
        ranks = self[RANK].choice
        assert ranks is not None, "as the default space has it"
        other = {RSLORA: not self.base.adapter.rslora, RANK: max(ranks)}
        kinds: tuple[Settings, ...] = ({}, other)
        rates = [self.rule_of_thumb(kind, times) for times in around for kind in kinds]
        return [self.rule_of_thumb(other), *rates]

    def point(self, given: Settings, place: str) -> Settings:
        """A user's own guess as a whole setting.

        Raises:
            InputError: for a key that is not searched, a value outside the space, and settings
                that make no valid recipe.
        """
        for key, value in given.items():
            if key not in self.searched:
                known = ", ".join(self.searched)
                raise InputError(f"{place}: {key} is not searched; searched are {known}")
            if self[key].at_alpha is None:
                self._check_holds(key, value, {}, place)
        settings = self.complete(given)
        for key, value in given.items():
            self._check_holds(key, value, settings, place)
        self.recipe(settings)
        return settings

    def labels(self, settings: Settings) -> dict[str, Scalar]:
        """The searched part of a setting as Optuna keeps it, by the names that it has there."""
        labels = {}
        for key in self.searched:
            if key in settings:
                value = self.as_searched(key, settings[key], settings)
                if self[key].at_alpha is not None:
                    value = float(f"{value:.12g}")  # a rounding error must not make two of one
                labels[self[key].parameter(key)] = self[key].own(value)
        return labels

    def recipe(self, settings: Settings, **fixed: Any) -> Recipe:
        """The recipe of a setting.

        Args:
            settings: values by dotted key.
            fixed: further top-level values, such as the name.

        Raises:
            InputError: where it is no valid recipe.
        """
        return resolve_recipe(self._validated(settings, fixed), self._folder)

    def every_setting(self) -> list[Settings] | None:
        """All settings there are, in order; None where a key has endlessly many values."""
        values = {key: self[key].every_value() for key in self.searched}
        if any(each is None for each in values.values()):
            return None
        return self._combinations({key: each for key, each in values.items() if each is not None})

    def excluded(self) -> tuple[int, list[Excluded]]:
        """How many of the combinations tried make no valid recipe, and the first of them.

        Raises:
            InputError: where a value is never part of a valid recipe.
        """
        valid: set[tuple[str, Scalar]] = set()
        refused: list[Excluded] = []
        for settings in self._trial_balloons():
            try:
                self._validated(settings, {})
            except InputError as error:
                refused.append(Excluded(settings, str(error)))
            else:
                valid.update(self._as_labels(settings).items())
        for one in refused:
            for key, label in self._as_labels(one.settings).items():
                if (key, label) not in valid:
                    raise InputError(
                        f"{self._place(key)}: search.{key}: {label!r} never makes a valid "
                        f"recipe: {one.reason}"
                    )
        return len(refused), refused[:_TOLD]

    def data_settings(self) -> list[Settings]:
        """A setting for each prepared data set that trials need.

        Raises:
            InputError: where a key that decides the data, or one that it depends on, has endlessly
                many values.
        """
        keys = self._data_keys()
        for key in self.keys:
            if key.startswith("data.") and key not in keys:
                raise self._uncountable(key, key)
        varied = self._with_what_they_need(keys)
        values = [self[key].every_value() or [] for key in varied]
        settings = [
            self.complete(dict(zip(varied, combination, strict=True)))
            for combination in itertools.product(*values)
        ]
        return list({self.data_key(each): each for each in settings}.values())

    def _data_keys(self) -> list[str]:
        """Of a method and a model only countable values decide the data, not a number like beta."""
        sections = ("data", "model", "method")
        return [
            key
            for key in self.keys
            if key.partition(".")[0] in sections and self._is_countable(key)
        ]

    def _is_countable(self, key: str) -> bool:
        of = self[key].of
        if of is not None:
            return of not in self._search or self._is_countable(of)
        return self[key].every_value() is not None

    def _with_what_they_need(self, keys: list[str]) -> list[str]:
        """The searched ones of data keys, and those that decide whether or what they are."""
        found: dict[str, None] = {}
        waiting = [(key, key) for key in keys]
        while waiting:
            key, data_key = waiting.pop()
            if not self._is_countable(key):
                raise self._uncountable(data_key, key)
            found[key] = None
            waiting += [(other, data_key) for other in self._needs(key)]
        return [key for key in self.searched if key in found]

    def _uncountable(self, data_key: str, key: str) -> InputError:
        why = "" if key == data_key else f", and with it those of {key}"
        return InputError(
            f"{self._place(data_key)}: search.{data_key}: data is prepared before the first trial, "
            f"so its values must be countable{why}; use choice, int_uniform or step"
        )

    def data_key(self, settings: Settings) -> str:
        """Equal for settings that prepare the same data."""
        return repr([(key, settings[key]) for key in self._data_keys() if key in settings])

    def is_active(self, key: str, settings: Settings) -> bool:
        """Whether a key is searched beside these values of the keys before it."""
        condition = self._search[key].when or {}
        return all(
            other in settings and settings[other] in (value if isinstance(value, list) else [value])
            for other, value in condition.items()
        )

    def written(self, key: str) -> Any:
        """The base recipe's value."""
        return value_at(self._written, key)

    def in_recipe(self, key: str, searched: Any, settings: Settings) -> Any:
        """The recipe's value for a searched one, beside the values of the keys before it."""
        at_alpha = self[key].at_alpha
        return searched if at_alpha is None else searched * self._factor(at_alpha, settings)

    def as_searched(self, key: str, value: Any, settings: Settings) -> Any:
        """The searched value for the recipe's, beside the values of the keys before it."""
        at_alpha = self[key].at_alpha
        if at_alpha is None or not is_number(value):
            return value
        return value / self._factor(at_alpha, settings)

    # in detail

    def _value(self, key: str, settings: Settings, choose: Callable[[str], Any]) -> Any:
        distribution = self._search[key]
        if not distribution.is_computed:
            return choose(key)
        assert distribution.times is not None and distribution.of is not None
        factor = settings.get(distribution.of, self.written(distribution.of))
        value = distribution.times * factor
        return int(value) if value == int(value) else value

    def _own(self, key: str, settings: Settings) -> Any:
        """The base recipe's value, or the nearest in the space, or the middle of the space."""
        own = self.written(key)
        if self._holds(key, own, settings):
            return own
        return self._nearest(key, own, settings) if is_number(own) else self[key].middle()

    def _check_holds(self, key: str, value: Any, settings: Settings, place: str) -> None:
        if not self._holds(key, value, settings):
            raise InputError(f"{place}: {key}: {value!r} is not in the searched space")

    def _holds(self, key: str, value: Any, settings: Settings) -> bool:
        return self[key].holds(self.as_searched(key, value, settings))

    def _nearest(self, key: str, value: Any, settings: Settings) -> Any:
        searched = self[key].nearest(self.as_searched(key, value, settings))
        return self.in_recipe(key, searched, settings)

    def _factor(self, at_alpha: float, settings: Settings) -> float:
        """The rate of the settings' adapter by the one at an alpha."""
        rank, alpha, rslora = (settings.get(k, self.written(k)) for k in (RANK, ALPHA, RSLORA))
        return rate_factor(at_alpha, rank, alpha, rslora)

    def _as_labels(self, settings: Settings) -> dict[str, Scalar]:
        return {key: as_label(settings[key]) for key in self.searched if key in settings}

    def _validated(self, settings: Settings, fixed: dict[str, Any]) -> Recipe:
        values = {**copy.deepcopy(self._values), **fixed}
        document = Document(values, {(): "the base recipe"})
        changes = [Change(key, value, self._place(key)) for key, value in settings.items()]
        apply_changes(document, changes)
        return validate(Recipe, document)

    def _check_keys(self) -> None:
        for key, distribution in self._search.items():
            parts = tuple(int(part) if part.isdigit() else part for part in key.split("."))
            where = f"{self._place(key)}: search.{key}"
            if not is_known(Recipe, parts):
                raise InputError(f"{where}: unknown key{suggestion(Recipe, parts)}")
            if parts[0] in _SHARED:
                raise InputError(f"{where}: {parts[0]} is the same for all trials of a sweep")
            others = [*(distribution.when or {})]
            if distribution.of is not None and self.written(distribution.of) is None:
                others.append(distribution.of)
            for other in others:
                if other not in self._search:
                    raise InputError(f"{where}: it depends on {other}, which is not searched")
            if distribution.at_alpha is not None:
                self._check_at_alpha(key, where)

    def _check_at_alpha(self, key: str, where: str) -> None:
        if key != LEARNING_RATE:
            raise InputError(f"{where}: at_alpha is for {LEARNING_RATE} alone")
        if self.base.adapter is None or "adapter" in self._search:
            raise InputError(f"{where}: at_alpha needs a base recipe with an adapter of its own")
        for other in {RANK, ALPHA, RSLORA} & self._search.keys():
            fits = _is_bool if other == RSLORA else is_number
            for value in self._search[other].choice or []:
                if not fits(value):
                    expected = "true or false" if other == RSLORA else "a number"
                    raise InputError(
                        f"{self._place(other)}: search.{other}: expected {expected}, as at_alpha "
                        f"counts with it; found {value!r}"
                    )

    def _in_order(self) -> list[str]:
        """The keys, each after those that it depends on."""
        ordered: list[str] = []
        waiting = list(self._search)
        while waiting:
            ready = [key for key in waiting if self._needs(key) <= set(ordered)]
            if not ready:
                raise InputError(
                    f"{self._place(waiting[0])}: search: {' and '.join(waiting)} depend on each "
                    "other in a circle"
                )
            ordered += ready
            waiting = [key for key in waiting if key not in ready]
        return ordered

    def _needs(self, key: str) -> set[str]:
        distribution = self._search[key]
        others = {distribution.of} if distribution.of is not None else set()
        if distribution.at_alpha is not None:
            others |= {RANK, ALPHA, RSLORA}
        return {*(distribution.when or {}), *others & self._search.keys()}

    def _trial_balloons(self) -> Iterator[Settings]:
        values = {key: self[key].typical_values() for key in self.searched}
        if math.prod(map(len, values.values())) <= _CHECKED:
            yield from self._combinations(values)
            return
        generator = random.Random(0)
        for _ in range(_CHECKED):
            chosen = {key: generator.choice(each) for key, each in values.items()}
            yield self.complete(chosen)

    def _combinations(self, values: dict[str, list[Any]]) -> list[Settings]:
        """Every setting of these values; those that differ in inactive keys alone count once."""
        found: dict[str, Settings] = {}
        for combination in itertools.product(*values.values()):
            settings = self.complete(dict(zip(values, combination, strict=True)))
            found.setdefault(repr(settings), settings)
        return list(found.values())


def value_at(values: Any, key: str) -> Any:
    """What plain values have at a dotted key; None where they have nothing."""
    for part in key.split("."):
        if isinstance(values, list):
            values = values[int(part)] if part.isdigit() and int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _suggest(trial: Suggests, key: str, distribution: Distribution) -> Any:
    if distribution.choice is not None:
        labels = distribution.labels()
        chosen = trial.suggest_categorical(key, labels)
        # 1 and True are equal, and other values.
        kinds = [(type(label), label) for label in labels]
        return distribution.choice[kinds.index((type(chosen), chosen))]
    low, high = distribution.bounds
    if distribution.is_integer:
        step = int(distribution.step or 1)
        return trial.suggest_int(key, int(low), int(high), step=step, log=distribution.is_log)
    name = distribution.parameter(key)
    return trial.suggest_float(name, low, high, step=distribution.step, log=distribution.is_log)
