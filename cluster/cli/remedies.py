"""What an option that finray does not have stands for: a setting, or an option of finray.

Other tools take settings as options; the schema of recipes and sweeps tells which setting is meant.
"""

import argparse
import difflib
import re
import shlex
from collections.abc import Iterator

from ...training.common.errors import InputError
from ...training.config.foreign.lookup import foreign_key

_OF_SECTIONS = {"model": "model.base", "data.train": "data.train.0.path"}
"""The setting that is meant by a section's name."""
_RECIPE = "recipe."
_SIMILAR = 0.75
_SHORTEST_START = 3


class Remedies:
    """Explains options that a command does not have.

    Args:
        options: the command line, as far as it could be read.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        # The usage names every option once, by the first of its names.
        self._options: list[str] = re.findall(r"--[a-z][a-z-]*", options.parser.format_usage())
        keys = list(_keys(options)) if "overrides" in options else []
        self._keys = [key for key in keys if not any(k.startswith(f"{key}.") for k in keys)]
        self._sections = [key for key in keys if key not in self._keys]

    def setting(self, name: str, value: str | None) -> str | None:
        """`--set KEY=VALUE` where the name is a setting's, in full or without its sections.

        All of them where several settings have the name; None where none has it.
        """
        plain = _plain(name)
        keys = self._whole(plain, value) or self._named(plain) or self._named(_leaf(plain))
        if not keys and (other := foreign_key(_leaf(plain))) is not None:
            own, has_value, text = other.to.partition(": ")
            keys = self._named(own)
            value = text if has_value else value
        keys = keys or self._by_initials(_leaf(plain))
        return " or ".join(_as_option(key, value) for key in keys) or None

    def nearest(self, name: str, value: str | None) -> str | None:
        """The most similar option or setting; None if none is similar."""
        plain = _plain(name)
        options = {option: _plain(option) for option in self._options}
        scores = {option: _similarity(plain, text) for option, text in options.items()}
        for key in self._keys:
            score = max(_similarity(plain, key), _similarity(plain, _leaf(key)))
            scores.setdefault(_as_option(key, value), score)
        best = max(scores, key=lambda text: scores[text])
        if scores[best] >= _SIMILAR:
            return best
        starts = [option for option, text in options.items() if text.startswith(plain)]
        return starts[0] if len(plain) >= _SHORTEST_START and len(starts) == 1 else None

    def _whole(self, name: str, value: str | None) -> list[str]:
        """The key of a list or section that the value stands for: data.curate=[deduplicate]."""
        if not self._sections:
            return []
        from ...training.config.short_forms import is_short_form

        is_meant = "." in name or is_short_form(name, value)
        is_written_out = (value or "").startswith(("[", "{"))
        if not is_written_out and (name in _OF_SECTIONS or not is_meant):
            return []
        own = name.removeprefix(_RECIPE)
        pattern = _pattern(own)
        shorts = {key.removeprefix(_RECIPE): key for key in self._sections}
        key = shorts.get(pattern)
        return [key.removesuffix(pattern) + own] if key is not None else []

    def _named(self, name: str) -> list[str]:
        """Keys that have the name in full, else as their last part."""
        own = _OF_SECTIONS.get(name, name)
        pattern = _pattern(own)
        for key in self._keys:
            short = key.removeprefix(_RECIPE)
            if pattern in (key, short):
                return [key.removesuffix(pattern) + own]
            if short.replace(".", "_") == name:
                return [key]
        return [key for key in self._keys if _leaf(key) == name]

    def _by_initials(self, name: str) -> list[str]:
        """Keys whose last part has these initials."""
        return [key for key in self._keys if _initials(_leaf(key)) == name]


def _keys(options: argparse.Namespace) -> Iterator[str]:
    """Every key that --set of this command takes."""
    from ...training.config.recipe import Recipe
    from ...training.config.validation import dotted_keys
    from ...tuning.sweep import Sweep

    prefix = ""
    if options.command == "tune" or _submits_sweep(options):
        prefix = _RECIPE
        yield from dotted_keys(Sweep)
    yield from (f"{prefix}{key}" for key in dotted_keys(Recipe))


def _submits_sweep(options: argparse.Namespace) -> bool:
    from ...tuning.sweep import is_sweep

    try:
        return options.command == "job" and is_sweep(options.recipe)
    except InputError:  # the message is about the command line, not about the file
        return False


def _as_option(key: str, value: str | None) -> str:
    assignment = f"{key}=VALUE" if value is None else f"{key}={value}"
    return f"--set {shlex.quote(assignment)}"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _pattern(key: str) -> str:
    """The key with 0 for each index of a list."""
    return re.sub(r"\.\d+\b", ".0", key)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _initials(word: str) -> str:
    """lr of learning_rate; empty for a single word."""
    parts = word.split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
