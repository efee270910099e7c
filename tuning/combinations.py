"""The combinations of values of a space: which are valid recipes, and what data they need."""

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..training.common.errors import InputError
from .distribution import Scalar, Settings, as_label
from .space import Space

_CHECKED = 4096
"""Maximum number of combinations that are validated before a sweep starts; else a sample is."""
_LISTED = 10_000
"""Maximum number of settings of a space that are listed."""
_SHOWN = 20
"""Number of excluded combinations that are kept for sweep.json."""


@dataclass(frozen=True)
class Excluded:
    """A combination of values that is not a valid recipe."""

    settings: Settings
    reason: str


class Combinations:
    """The settings that the values of a space combine to.

    Args:
        space: what is searched.
    """

    def __init__(self, space: Space) -> None:
        self._space = space

    def every_setting(self) -> list[Settings] | None:
        """All possible settings in order; None if there are too many to list."""
        return self._combinations(lambda key: self._space[key].every_value(), _LISTED)

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
                    place = self._space.search.place(key)
                    raise InputError(
                        f"{place}: search.{key}: {label!r} never makes a valid recipe: "
                        f"{item.reason}"
                    )
        return len(refused), refused[:_SHOWN]

    def varied(self, sections: Collection[str]) -> Iterator[Settings]:
        """Typical settings with all combinations of values of the keys in these sections."""
        shown: set[str] = set()
        for settings in self._samples():
            kind = repr([p for p in settings.items() if p[0].partition(".")[0] in sections])
            if kind not in shown:
                shown.add(kind)
                yield settings

    def data_settings(self) -> list[Settings]:
        """Settings for each prepared data set that trials need; of valid recipes.

        Other keys have the base recipe's values, or else the first ones that make a valid recipe.

        Raises:
            InputError: a key that changes the data, or a key that it depends on, has too many
                values to list.
        """
        keys = self._data_keys()
        for key in self._space.keys:
            if key.startswith("data.") and key not in keys:
                raise self._uncountable(key, key)
        varied = self._with_dependencies(keys)
        values = [self._space[key].every_value() or [] for key in varied]
        settings = [
            self._space.complete(dict(zip(varied, combination, strict=True)))
            for combination in itertools.product(*values)
        ]
        valid = {
            self.data_key(each): each for each in settings if self._space.refusal(each) is None
        }
        keys_of_data = list(dict.fromkeys(self.data_key(each) for each in settings))
        if len(valid) < len(keys_of_data):
            for each, reason in self._tried:
                if reason is None:
                    valid.setdefault(self.data_key(each), each)
        return [valid[key] for key in keys_of_data if key in valid]

    def data_key(self, settings: Settings) -> str:
        """A text that is equal for settings that use the same prepared data."""
        return repr([(key, settings[key]) for key in self._data_keys() if key in settings])

    @cached_property
    def _tried(self) -> list[tuple[Settings, str | None]]:
        """Combinations of typical values, and why each is not a valid recipe; None if it is."""
        return [(settings, self._space.refusal(settings)) for settings in self._samples()]

    def _data_keys(self) -> list[str]:
        """Searched keys that change the prepared data.

        Keys of method and model count only if their values can be listed: a range of a number such
        as beta does not change the data.
        """
        sections = ("data", "model", "method")
        return [
            key
            for key in self._space.keys
            if key.partition(".")[0] in sections and self._is_countable(key)
        ]

    def _is_countable(self, key: str) -> bool:
        of = self._space[key].of
        if of is not None:
            return of not in self._space.search or self._is_countable(of)
        return self._space[key].every_value() is not None

    def _with_dependencies(self, keys: list[str]) -> list[str]:
        """The searched keys among `keys`, and the searched keys that these depend on."""
        needed: set[str] = set()
        waiting = [(key, key) for key in keys]
        while waiting:
            key, data_key = waiting.pop()
            if not self._is_countable(key):
                raise self._uncountable(data_key, key)
            needed.add(key)
            waiting += [(other, data_key) for other in self._space.search.needs(key)]
        return [key for key in self._space.searched if key in needed]

    def _uncountable(self, data_key: str, key: str) -> InputError:
        why = "" if key == data_key else f", also of {key}, on which it depends"
        return InputError(
            f"{self._space.search.place(data_key)}: search.{data_key}: data is prepared before the "
            f"first trial, so the number of values must be finite{why}; use choice, int_uniform or "
            "step"
        )

    def _as_labels(self, settings: Settings) -> dict[str, Scalar]:
        return {key: as_label(settings[key]) for key in self._space.searched if key in settings}

    def _samples(self) -> Iterator[Settings]:
        """Combinations of typical values: all of them, or a random sample of `_CHECKED`."""
        every = self._combinations(lambda key: self._space[key].typical_values(), _CHECKED)
        if every is not None:
            yield from every
            return
        values = {key: self._space[key].typical_values() for key in self._space.searched}
        generator = random.Random(0)
        for _ in range(_CHECKED):
            chosen = {key: generator.choice(each) for key, each in values.items()}
            yield self._space.complete(chosen)

    def _combinations(
        self, values_of: Callable[[str], list[Any] | None], most: int
    ) -> list[Settings] | None:
        """Settings for all combinations of the active keys' values, in order.

        Returns:
            None if there are more than `most`, or if the values of an active key are not listed.
        """
        settings: list[Settings] = [{}]
        for key in self._space.keys:
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
        if not self._space.search.is_active(key, given):
            return [given]
        if self._space[key].is_computed:
            return [{**given, key: self._space.computed(key, given)}]
        values = values_of(key)
        return None if values is None else [{**given, key: value} for value in values]
