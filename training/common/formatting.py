"""Numbers, values and keys as text for people: the same in messages, reports and tables."""

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

from .secrets import redact

MISSING = "–"
_LONGEST = 60
"""Maximum number of characters of a value or a key in a message."""
_READ = 1000
"""Characters of a text that are looked at for a message."""


def is_number(value: Any) -> TypeGuard[float]:
    """True if a value from a JSON file is a finite number; bool does not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def loss(value: Any) -> str:
    """A loss as 1.234, or as 0.00123 below 0.01; 'nan' for a float that is not finite."""
    if not is_number(value):
        return "nan" if isinstance(value, float) else MISSING
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def percent(share: Any) -> str:
    """A share in [0, 1] as a percentage: 87.5%."""
    return f"{100 * share:.1f}%" if is_number(share) else MISSING


def count(number: Any) -> str:
    """A number with thousands separators: 1,234,567."""
    return f"{number:,.0f}" if is_number(number) else MISSING


def counted(number: float, thing: str) -> str:
    """1 row, or 2 rows."""
    return f"{count(number)} {thing}{'s'[: number != 1]}"


def short_count(number: Any) -> str:
    """A number with three digits and a unit: 950, 12.3k, 1.23M, 7B."""
    if not is_number(number):
        return MISSING
    size = abs(number)
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale * 0.9995:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def short_bytes(number: float) -> str:
    """A size with three digits and a unit: 950 B, 12.3 kB, 1.23 GB."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale * 0.9995:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def exponent(number: Any) -> str:
    """A number such as a learning rate in scientific notation: 1.9e-04."""
    return f"{number:.1e}" if is_number(number) else MISSING


def duration(seconds: Any) -> str:
    """A number of seconds in its two largest units: 45s, 2m10s, 3h05m, 2d04h."""
    if not is_number(seconds):
        return MISSING
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"


def one_line(text: str) -> str:
    """The text on one line: each run of white space is a space, control characters are removed.

    A model's answer may contain escape sequences, which would change the terminal.
    """
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def printable(text: str) -> str:
    """The text with escapes for its control characters, but for line feeds and tabs."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1]
        for letter in text
    )


def shown(value: Any) -> str:
    """A value of the user's in a message: on one line, short, and without secrets."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a mapping ({_cut(', '.join(map(str, value)))})" if value else "an empty mapping"
    if isinstance(value, str):
        return _cut(repr(value[:_READ]))
    if isinstance(value, int) and abs(value) > 10**_LONGEST:
        return "a number that is too large"
    return _cut(str(value))


def dotted(key: Iterable[str | int]) -> str:
    """A key in a message: its parts joined by dots."""
    return _cut(".".join(map(str, key)))


def _cut(text: str) -> str:
    """One line of at most `_LONGEST` characters, without secrets."""
    line = " ".join(printable(redact(text[:_READ])).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
