"""Where each setting was written. A recipe carries its places, for messages after validation."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar

from pydantic import PrivateAttr

from ..common.errors import InputError
from ..common.yaml_text import Key
from .section import Section
from .validation import has_key
from .yaml_file import place_of, split_key

_KEY = re.compile(r"(?P<key>[a-z_]\w*(?:\.\w+)*)(?P<end>: | )")

P = ParamSpec("P")
R = TypeVar("R")


class Places:
    """file:line of each key; empty for settings that no file holds.

    All places are equal: settings are the same wherever they are written.
    """

    def __init__(self, places: dict[Key, str] | None = None) -> None:
        self.by_key = places or {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    def __hash__(self) -> int:
        return hash(Places)


class PlacedSection(Section):
    """Settings that know the file and line of each key, if they were read from a file.

    Copies keep the places. They are neither compared nor dumped.
    """

    _places: Places = PrivateAttr(default_factory=Places)

    def with_places(self, places: dict[Key, str]) -> Self:
        """The same settings with the places of their keys."""
        placed = self.model_copy()
        placed._places = Places(places)
        return placed

    @property
    def places(self) -> dict[Key, str]:
        """file:line of each key that a file holds; () is the file itself."""
        return self._places.by_key

    def located(self, message: str) -> str:
        """A message with file and line before each line that begins with a key of the settings."""
        return "\n".join(self._located_line(line) for line in message.split("\n"))

    def _located_line(self, line: str) -> str:
        match = _KEY.match(line)
        if match is None or not self.places:
            return line
        key = split_key(match["key"])
        begins_with_key = has_key(type(self), key[:1]) and (len(key) > 1 or match["end"] == ": ")
        return f"{place_of(self.places, key)}: {line}" if begins_with_key else line

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Add file and line to an InputError whose message begins with a key of the settings."""
        try:
            yield
        except InputError as error:
            raise InputError(self.located(str(error))) from error.__cause__


Placed = TypeVar("Placed", bound=PlacedSection)


def locates(
    function: Callable[Concatenate[Placed, P], R],
) -> Callable[Concatenate[Placed, P], R]:
    """Decorates a function of a recipe or sweep: see `PlacedSection.locating`."""

    @wraps(function)
    def call(settings: Placed, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with settings.locating():
            return function(settings, *args, **kwargs)

    return call


@contextmanager
def about(key: str) -> Iterator[None]:
    """Put a key before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from error.__cause__
