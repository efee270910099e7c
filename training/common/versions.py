"""Versions of the libraries that affect a result, and of the files that finray writes."""

import platform
from importlib.metadata import version
from typing import Any

from .errors import InputError

_NAMES = ("finray", "ray", "torch", "transformers", "peft")


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the main libraries, by distribution name."""
    return {"python": platform.python_version(), **{name: version(name) for name in _NAMES}}


class NewerFormatError(InputError):
    """A newer finray wrote a file, which is whole."""


def check_format(content: dict[str, Any], latest: int, place: object) -> None:
    """Refuse a file that a newer finray wrote. A file without a format number has format 1.

    Args:
        content: the file's JSON object.
        latest: the newest format that this finray reads.
        place: the file, for the message.

    Raises:
        NewerFormatError: the format is newer than `latest`.
        InputError: it is not a number.
    """
    number = content.get("format", 1)
    if type(number) is not int:
        raise InputError(f"{place}: format: expected a number, not {number!r}")
    if number > latest:
        raise NewerFormatError(
            f"{place}: a newer finray wrote this file (format {number}; finray {version('finray')} "
            f"reads up to {latest}); upgrade finray"
        )
