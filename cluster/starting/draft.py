"""A recipe in the making, and what becomes of each setting that it is made from."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from ...training.common.errors import InputError
from ...training.common.formatting import shown
from ...training.config.foreign.dialect import Dialect

_TRUE, _FALSE = (
    ("true", "yes", "on", "1", "auto", "full"),
    ("false", "no", "off", "0", "none", "null", ""),
)
_UNSET: tuple[Any, ...] = (None, "", [], {})
NO_MODEL = "MODEL"
"""In the place of a model that no setting names."""
_LARGEST = 2**53
"""Up to here a float holds each whole number."""


def finite(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class ForeignSettings:
    """The settings of another project, read by name and type.

    Args:
        values: the settings.
        where: their file, or the part of it, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def value(self, name: str) -> Any:
        """The value as it is written; None if there is none, or an empty one."""
        value = self.values.get(name)
        return None if value in _UNSET else value

    def text(self, name: str) -> str | None:
        """A text; a number as it is written."""
        value = self.value(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(name, "a text")
        return str(value)

    def texts(self, name: str) -> list[str]:
        """A list of texts, also written as one with commas."""
        value = self.value(name)
        if value is None:
            return []
        items = value if isinstance(value, list) else str(value).split(",")
        if not all(isinstance(item, str | int | float) for item in items):
            raise self.fault(name, "a list of texts")
        return [text for item in items if (text := str(item).strip())]

    def number(self, name: str) -> float | None:
        """A finite number, also one that YAML 1.1 reads as text: 2e-4."""
        value = self.value(name)
        if value is None or value == "auto":
            return None
        number = finite(value)
        if number is None:
            raise self.fault(name, "a number")
        return number

    def whole(self, name: str, least: int = -_LARGEST) -> int | None:
        """A whole number.

        Args:
            name: the setting.
            least: the smallest number that is possible.
        """
        number = self.number(name)
        if number is None:
            return None
        if number != int(number) or not least <= number <= _LARGEST:
            is_bounded = least > -_LARGEST
            raise self.fault(name, f"a whole number{f' from {least} on' if is_bounded else ''}")
        return int(number)

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers, also written as one text with commas."""
        numbers = [finite(text) for text in self.texts(name)]
        if None in numbers:
            raise self.fault(name, "a list of numbers")
        return [number for number in numbers if number is not None]

    def inside(self, name: str, values: Any) -> "ForeignSettings":
        """The settings of a mapping inside this one.

        Args:
            name: where it stands, dotted.
            values: the mapping.
        """
        if not isinstance(values, dict):
            raise InputError(
                f"{self.where}: {name}: expected a mapping, found {shown(values)}; correct it"
            )
        return ForeignSettings(values, f"{self.where}: {name}")

    def flag(self, name: str) -> bool | None:
        """true or false, also as text; None if it is not set."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        text = str(value).strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        raise self.fault(name, "true or false")

    def fault(self, name: str, expected: str) -> InputError:
        """An error about a setting's value."""
        return InputError(
            f"{self.where}: {name}: expected {expected}, found {shown(self.values.get(name))}; "
            "correct it"
        )


class Draft:
    """The recipe that is made from the settings of another project.

    Args:
        settings: the settings.
        dialect: their table.
    """

    def __init__(self, settings: ForeignSettings, dialect: Dialect) -> None:
        self.settings = settings
        self.dialect = dialect
        self.values: dict[str, Any] = {}
        """By finray's dotted key."""
        self.sources: dict[str, str] = {}
        """The comment at a key: what it is made from."""
        self.mapped: dict[str, str] = {}
        """By their name: finray's key and value."""
        self.changed: dict[str, str] = {}
        """By their name: what is different in finray."""
        self.left: dict[str, str] = {}
        """By their name: what it means, and why it is left out."""
        self.strangers: list[str] = []
        """Settings inside others that the tables do not have, by dotted name."""
        self.streams: list[str] = []
        """Settings of data sets, by dotted name, that read rows while the run trains."""
        self.notes: list[str] = []
        """What is not the matter of one setting."""

    def put(self, to: str, value: Any, *names: str, note: str = "") -> None:
        """Set a value of the recipe.

        Args:
            to: finray's dotted key.
            value: the value.
            names: the settings that it is made from.
            note: more for the comment.
        """
        self.values[to] = value
        present = [name for name in names if name in self.settings.values]
        self.sources[to] = "; ".join(filter(None, [", ".join(present), note]))
        for name in present:
            own = f"{to}: {shown(value)}"
            self.mapped[name] = f"{self.mapped[name]}, {own}" if name in self.mapped else own

    def fulfilled(self, text: str, *names: str) -> None:
        """Settings that need nothing in the recipe, as finray does the same."""
        for name in names:
            if self.settings.value(name) is not None:
                self.mapped[name] = text

    def change(self, name: str, text: str) -> None:
        """Note a setting that finray fulfils in another way, with the difference."""
        self.changed[name] = text

    def leave(self, name: str, text: str) -> None:
        """Note a setting that the recipe leaves out, with the reason."""
        self.left[name] = text

    def refusal(self, name: str, text: str) -> InputError:
        """An error about a setting that no recipe can be made from."""
        value = shown(self.settings.values.get(name))
        return InputError(f"{self.settings.where}: {name}: {value}: {text}")

    def name_others(self, where: str, settings: ForeignSettings, names: Collection[str]) -> None:
        """Name the settings inside another that are none of these, as nothing comes of them."""
        self.strangers += [
            f"{where}.{name}"
            for name in settings.values
            if name not in names and settings.value(name) not in (None, False)
        ]

    def unknown(self) -> list[str]:
        """Settings that the table does not have; the others that nothing read are explained."""
        table = dict(self.dialect.entries())
        explained = {*self.mapped, *self.changed, *self.left}
        unknown = list(self.strangers)
        for name in self.settings.values:
            if name in explained or self.is_off(name):
                continue
            if name not in table:
                unknown.append(name)
            elif table[name].fate == "left":
                self.left[name] = table[name].text
            else:
                meaning = f" ({table[name].text})" if table[name].text else ""
                self.left[name] = f"{table[name].to}{meaning}: this method does not use it"
        return unknown

    def is_off(self, name: str) -> bool:
        """True for a setting without a value, or switched off: finray has nothing to switch off."""
        if name in {**self.mapped, **self.changed, **self.left}:
            return False
        value = self.settings.values[name]
        in_dialect = name in dict(self.dialect.entries())
        return value in _UNSET or (in_dialect and (value is False or value == "false"))

    def nested(self) -> dict[str, Any]:
        """The recipe's values as sections."""
        recipe: dict[str, Any] = {}
        for to, value in self.values.items():
            *parents, last = to.split(".")
            section = recipe
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return recipe
