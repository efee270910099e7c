"""The search space of a sweep: turns values that a sampler suggests into valid recipes."""

import copy
import itertools
import json
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe, build_recipe, resolve_recipe
from ..training.config.short_forms import write_out
from ..training.config.user_code import functions_in, with_texts
from ..training.config.validation import has_key, suggestion
from ..training.config.yaml_file import Change, Document, apply_changes, split_key
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
"""Maximum number of combinations that are validated before a sweep starts; else a sample is."""
_LISTED = 10_000
"""Maximum number of settings of a space that are listed."""
_SHOWN = 20
"""Number of excluded combinations that are kept for sweep.json."""


class Suggests(Protocol):
    """The methods of an Optuna trial that suggest values."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Excluded:
    """A combination of values that is not a valid recipe."""

    settings: Settings
    reason: str


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
        self._folder = folder
        self._place = place
        self._check = check
        self._search = search
        self._values = base.model_dump(mode="json", exclude_unset=True)
        # `kind` selects the section's class, so it must be present also if it is the default.
        self._values["method"] = {"kind": base.method.kind, **self._values.get("method", {})}
        self._base_values = base.model_dump(mode="json")
        self._alikes: Settings = {}
        self._texts: dict[str, str] = {}
        self._templates: dict[str | None, str | None] = {}
        self._note_texts(base)
        self._check_keys()
        self.keys = self._in_order()

    def __getitem__(self, key: str) -> Distribution:
        return self._search[key]

    @property
    def searched(self) -> list[str]:
        """The keys that a sampler chooses, each after the keys that it depends on."""
        return [key for key in self.keys if not self._search[key].is_computed]

    def suggest(self, trial: Suggests) -> Settings:
        """The sampler's value for each active key."""
        settings: Settings = {}
        for key in self.keys:
            if self.is_active(key, settings):
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
            if self.is_active(key, settings):
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
        """The recipe with these settings; a file of code, and a chat template's, has the text that
        was first read of it.

        Args:
            settings: values by dotted key.
            fixed: further top-level values, such as the name.

        Raises:
            InputError: the settings are not a valid recipe.
        """
        valid = with_texts(self._validated(settings, fixed), self._texts, self._folder)
        template = valid.data.chat_template
        data = valid.data.model_copy(
            update={"chat_template": self._templates.get(template, template)}
        )
        recipe = resolve_recipe(valid.model_copy(update={"data": data}), self._folder)
        self._templates.setdefault(template, recipe.data.chat_template)
        self._note_texts(recipe)
        return recipe

    def every_setting(self) -> list[Settings] | None:
        """All possible settings in order; None if there are too many to list."""
        return self._combinations(lambda key: self[key].every_value(), _LISTED)

    def excluded(self) -> tuple[int, list[Excluded]]:
        """Number of tried combinations that are not valid recipes, and the first of them.

        Raises:
            InputError: a value is not part of any valid recipe.
        """
        valid: set[tuple[str, Scalar]] = set()
        refused: list[Excluded] = []
        for settings, reason in self._tried:
            if reason is not None:
                refused.append(Excluded(settings, reason))
            else:
                valid.update(self._as_labels(settings).items())
        for item in refused:
            for key, label in self._as_labels(item.settings).items():
                if (key, label) not in valid:
                    raise InputError(
                        f"{self._place(key)}: search.{key}: {label!r} never makes a valid "
                        f"recipe: {item.reason}"
                    )
        return len(refused), refused[:_SHOWN]

    def data_settings(self) -> list[Settings]:
        """Settings for each prepared data set that trials need; of valid recipes.

        Other keys have the base recipe's values, or else the first ones that make a valid recipe.

        Raises:
            InputError: a key that changes the data, or a key that it depends on, has too many
                values to list.
        """
        keys = self._data_keys()
        for key in self.keys:
            if key.startswith("data.") and key not in keys:
                raise self._uncountable(key, key)
        varied = self._with_dependencies(keys)
        values = [self[key].every_value() or [] for key in varied]
        settings = [
            self.complete(dict(zip(varied, combination, strict=True)))
            for combination in itertools.product(*values)
        ]
        valid = {self.data_key(each): each for each in settings if self._refusal(each) is None}
        keys_of_data = list(dict.fromkeys(self.data_key(each) for each in settings))
        if len(valid) < len(keys_of_data):
            for each, reason in self._tried:
                if reason is None:
                    valid.setdefault(self.data_key(each), each)
        return [valid[key] for key in keys_of_data if key in valid]

    @cached_property
    def _tried(self) -> list[tuple[Settings, str | None]]:
        """Combinations of typical values, and why each is not a valid recipe; None if it is."""
        return [(settings, self._refusal(settings)) for settings in self._samples()]

    def _refusal(self, settings: Settings) -> str | None:
        try:
            self._validated(settings, {})
        except InputError as error:
            return str(error)
        return None

    def _data_keys(self) -> list[str]:
        """Searched keys that change the prepared data.

        Keys of method and model count only if their values can be listed: a range of a number such
        as beta does not change the data.
        """
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

    def _with_dependencies(self, keys: list[str]) -> list[str]:
        """The searched keys among `keys`, and the searched keys that these depend on."""
        needed: set[str] = set()
        waiting = [(key, key) for key in keys]
        while waiting:
            key, data_key = waiting.pop()
            if not self._is_countable(key):
                raise self._uncountable(data_key, key)
            needed.add(key)
            waiting += [(other, data_key) for other in self._needs(key)]
        return [key for key in self.searched if key in needed]

    def _uncountable(self, data_key: str, key: str) -> InputError:
        why = "" if key == data_key else f", also of {key}, on which it depends"
        return InputError(
            f"{self._place(data_key)}: search.{data_key}: data is prepared before the first trial, "
            f"so the number of values must be finite{why}; use choice, int_uniform or step"
        )

    def data_key(self, settings: Settings) -> str:
        """A text that is equal for settings that use the same prepared data."""
        return repr([(key, settings[key]) for key in self._data_keys() if key in settings])

    def is_active(self, key: str, settings: Settings) -> bool:
        """True if the key's `when` holds, given the values of the keys before it."""
        condition = self._search[key].when or {}
        return all(
            other in settings and settings[other] in (value if isinstance(value, list) else [value])
            for other, value in condition.items()
        )

    def base_value(self, key: str) -> Any:
        """The base recipe's value of a key."""
        return value_at(self._base_values, key)

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

    # in detail

    def _note_texts(self, recipe: Recipe) -> None:
        for _, function in functions_in(recipe):
            if function.source is not None:
                self._texts.setdefault(function.path, function.source)

    def _value(self, key: str, settings: Settings, choose: Callable[[str], Any]) -> Any:
        return self._computed(key, settings) if self[key].is_computed else choose(key)

    def _computed(self, key: str, settings: Settings) -> Any:
        """The value of a key with `times`, given the values of the keys before it."""
        distribution = self._search[key]
        assert distribution.times is not None and distribution.of is not None
        factor = settings.get(distribution.of, self.base_value(distribution.of))
        value = distribution.times * factor
        return int(value) if value == int(value) else value

    def _own(self, key: str, settings: Settings) -> Any:
        """The base recipe's value if it is in the space, else the nearest one, else the middle."""
        own = self.base_value(key)
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
        return bool(value_at(made, key) == self.base_value(key))

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
        rank, alpha, rslora = (settings.get(k, self.base_value(k)) for k in (RANK, ALPHA, RSLORA))
        return rate_factor(at_alpha, rank, alpha, rslora)

    def _as_labels(self, settings: Settings) -> dict[str, Scalar]:
        return {key: as_label(settings[key]) for key in self.searched if key in settings}

    def _validated(self, settings: Settings, fixed: dict[str, Any]) -> Recipe:
        values = {**copy.deepcopy(self._values), **fixed}
        places = dict(self.base.places) or {(): "the base recipe"}
        document = Document(values, places, write_out)
        changes = [Change(key, value, self._place(key)) for key, value in settings.items()]
        apply_changes(document, changes)
        recipe = build_recipe(document)
        self._check(recipe)
        return recipe

    def _check_keys(self) -> None:
        for key, distribution in self._search.items():
            parts = split_key(key)
            where = f"{self._place(key)}: search.{key}"
            if not has_key(Recipe, parts):
                raise InputError(f"{where}: unknown key{suggestion(Recipe, parts)}")
            if parts[0] in _SHARED:
                raise InputError(
                    f"{where}: {parts[0]} must be the same for all trials; remove it from search"
                )
            required = [*(distribution.when or {})]
            if distribution.of is not None and self.base_value(distribution.of) is None:
                required.append(distribution.of)
            for other in required:
                if other not in self._search:
                    raise InputError(
                        f"{where}: it depends on {other}, which is not searched; search that, too"
                    )
            if distribution.at_alpha is not None:
                self._check_at_alpha(key, where)

    def _check_at_alpha(self, key: str, where: str) -> None:
        if key != LEARNING_RATE:
            raise InputError(f"{where}: at_alpha belongs to {LEARNING_RATE}; remove it here")
        if self.base.adapter is None or "adapter" in self._search:
            raise InputError(
                f"{where}: at_alpha needs a base recipe with a section adapter, which is not "
                "searched; add that, or remove at_alpha"
            )
        for other in {RANK, ALPHA, RSLORA} & self._search.keys():
            is_valid = _is_bool if other == RSLORA else is_number
            for value in self._search[other].choice or []:
                if not is_valid(value):
                    expected = "true or false" if other == RSLORA else "a number"
                    raise InputError(
                        f"{self._place(other)}: search.{other}: expected {expected}, because "
                        f"at_alpha is computed from it; found {value!r}"
                    )

    def _in_order(self) -> list[str]:
        """The keys, each after the keys that it depends on."""
        ordered: list[str] = []
        waiting = list(self._search)
        while waiting:
            ready = [key for key in waiting if self._needs(key) <= set(ordered)]
            if not ready:
                raise InputError(
                    f"{self._place(waiting[0])}: search: {' and '.join(waiting)} depend on each "
                    "other in a circle; remove one `when` or `of`"
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

    def varied(self, sections: Collection[str]) -> Iterator[Settings]:
        """Typical settings with all combinations of values of the keys in these sections."""
        shown: set[str] = set()
        for settings in self._samples():
            kind = repr([p for p in settings.items() if p[0].partition(".")[0] in sections])
            if kind not in shown:
                shown.add(kind)
                yield settings

    def _samples(self) -> Iterator[Settings]:
        """Combinations of typical values: all of them, or a random sample of `_CHECKED`."""
        every = self._combinations(lambda key: self[key].typical_values(), _CHECKED)
        if every is not None:
            yield from every
            return
        values = {key: self[key].typical_values() for key in self.searched}
        generator = random.Random(0)
        for _ in range(_CHECKED):
            chosen = {key: generator.choice(each) for key, each in values.items()}
            yield self.complete(chosen)

    def _combinations(
        self, values_of: Callable[[str], list[Any] | None], most: int
    ) -> list[Settings] | None:
        """Settings for all combinations of the active keys' values, in order.

        Returns:
            None if there are more than `most`, or if the values of an active key are not listed.
        """
        settings: list[Settings] = [{}]
        for key in self.keys:
            longer: list[Settings] = []
            for given in settings:
                values = self._branches(key, given, values_of)
                if values is None or len(longer) + len(values) > most:
                    return None
                longer += values
            settings = longer
        return settings

    def _branches(
        self, key: str, given: Settings, values_of: Callable[[str], list[Any] | None]
    ) -> list[Settings] | None:
        """`given` with each value of a key; as it is where the key is not active."""
        if not self.is_active(key, given):
            return [given]
        if self[key].is_computed:
            return [{**given, key: self._computed(key, given)}]
        values = values_of(key)
        return None if values is None else [{**given, key: value} for value in values]


def value_at(values: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts and lists; None if there is none."""
    for part in split_key(key):
        if isinstance(values, list):
            values = values[part] if isinstance(part, int) and part < len(values) else None
        else:
            values = values.get(str(part)) if isinstance(values, dict) else None
    return values


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


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
