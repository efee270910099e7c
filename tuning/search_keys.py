"""The keys that a sweep searches: checked, and each after the keys that it depends on."""

from collections.abc import Callable
from typing import Any

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe
from ..training.config.validation import has_key, suggestion
from ..training.config.yaml_file import split_key
from .default_search import ALPHA, LEARNING_RATE, RANK, RSLORA
from .distribution import Distribution, Settings, is_number

_SHARED = ("name", "storage", "scale", "checkpoint", "log")


class SearchKeys:
    """The keys of a search around a base recipe, in an order in which values can be chosen.

    Args:
        search: distributions by dotted key.
        base: the recipe that each trial changes.
        place: returns file:line of a searched key, for messages.

    Raises:
        InputError: a key does not exist or must not differ between trials, or depends on a key
            that is not searched.
    """

    def __init__(
        self, search: dict[str, Distribution], base: Recipe, place: Callable[[str], str]
    ) -> None:
        self.place = place
        self._search = search
        self._base = base
        self._base_values = base.model_dump(mode="json")
        self._check()
        self.in_order = self._ordered()

    def __getitem__(self, key: str) -> Distribution:
        return self._search[key]

    def __contains__(self, key: str) -> bool:
        return key in self._search

    @property
    def searched(self) -> list[str]:
        """The keys that a sampler chooses, each after the keys that it depends on."""
        return [key for key in self.in_order if not self._search[key].is_computed]

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

    def needs(self, key: str) -> set[str]:
        """The searched keys that the value of a key depends on."""
        distribution = self._search[key]
        others = {distribution.of} if distribution.of is not None else set()
        if distribution.at_alpha is not None:
            others |= {RANK, ALPHA, RSLORA}
        return {*(distribution.when or {}), *others & self._search.keys()}

    def _check(self) -> None:
        for key, distribution in self._search.items():
            parts = split_key(key)
            where = f"{self.place(key)}: search.{key}"
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
        if self._base.adapter is None or "adapter" in self._search:
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
                        f"{self.place(other)}: search.{other}: expected {expected}, because "
                        f"at_alpha is computed from it; found {value!r}"
                    )

    def _ordered(self) -> list[str]:
        """The keys, each after the keys that it depends on."""
        ordered: list[str] = []
        waiting = list(self._search)
        while waiting:
            ready = [key for key in waiting if self.needs(key) <= set(ordered)]
            if not ready:
                raise InputError(
                    f"{self.place(waiting[0])}: search: {' and '.join(waiting)} depend on each "
                    "other in a circle; remove one `when` or `of`"
                )
            ordered += ready
            waiting = [key for key in waiting if key not in ready]
        return ordered


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
