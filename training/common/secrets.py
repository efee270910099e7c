"""Secrets in text: one list of patterns, to hide them in output and to refuse them in settings.

The patterns are finray's own: detect-secrets has few of the tokens that a recipe may hold, and its
test of entropy also hits digests, commits and names of models.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from .secret_patterns import PATTERNS

Key = tuple[str | int, ...]

HIDDEN = "[secret]"

_STRONG = re.compile(
    r"TOKEN(?!IZ|S$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS(?:$|_)|API_?KEY|(?:ACCESS|PRIVATE|"
    r"ACCOUNT|SIGNING|ENCRYPTION|MASTER)_?KEY|CREDENTIAL|WEBHOOK|CONNECTION_?STRING",
    re.IGNORECASE,
)
"""An environment variable whose name matches holds a secret…"""
_WEAK = re.compile(r"KEY(?!BOARD|CLOAK|MAP|RING)|(?<!X)AUTH(?!OR)|PASS", re.IGNORECASE)
"""… and one whose name matches this, if its value is neither a path nor an ordinary word."""
_ORDINARY = re.compile(r"(?:~?/|\.{1,2}/|[A-Za-z]:[\\/]).*|[a-z]+(?:[_-][a-z]+)?|[\w.-]+://[^@?]*")
_NO_SECRET = (
    *("_PATH", "_FILE", "_DIR", "_SOCK", "_ISSUER", "_MODE", "_TYPE", "_HOST", "_PORT"),
    *("_METHOD", "_DOMAIN", "_REGION", "_ENABLED", "_TIMEOUT", "APPLICATION_CREDENTIALS"),
)
"""… unless its name has one of these endings: then its value names a file or a server."""
_SHORTEST = 8
"""Minimum characters of a secret value; shorter ones also occur in ordinary text."""
_LONGEST_ORDINARY = 16
"""Characters up to which lower-case letters may be an ordinary word."""


def redact(text: str) -> str:
    """The text without tokens, passwords in URIs, and values of secret environment variables."""
    for _, hidden in _hide(text):
        text = hidden
    return text


def secret_kind(text: str) -> str | None:
    """The kind of the first secret in the text, such as "a Hugging Face token", or None."""
    return next((kind for kind, _ in _hide(text)), None)


def secret_places(values: Any, key: Key = ()) -> Iterator[Key]:
    """Keys of the settings that are, or whose text contains, a secret."""
    if isinstance(values, dict):
        for name, value in values.items():
            if secret_kind(str(name)) is not None:
                yield (*key, str(name))
            else:
                yield from secret_places(value, (*key, str(name)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from secret_places(value, (*key, index))
    elif isinstance(values, str) and secret_kind(values) is not None:
        yield key


def texts(values: Any) -> Iterator[tuple[Key, str]]:
    """(key, text) of every text in nested settings."""
    return ((key, value) for key, value in leaves(values) if isinstance(value, str))


def leaves(values: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(key, value) of every value in nested settings that is no list or mapping."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, (*key, str(name)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from leaves(value, (*key, index))
    else:
        yield key, values


def _hide(text: str) -> Iterator[tuple[str, str]]:
    """For each kind of secret in the text: (kind, the text without secrets of this and all
    earlier kinds)."""
    for name, value in _environment_secrets():
        if value in text:
            text = text.replace(value, HIDDEN)
            yield f"the value of ${name}", text
    for kind, needed, expression in PATTERNS:
        hidden = expression.sub(_replacement, text) if needed in text else text
        if hidden != text:
            text = hidden
            yield kind, text


def _replacement(match: re.Match[str]) -> str:
    return (match.groupdict().get("name") or "") + HIDDEN


def _environment_secrets() -> list[tuple[str, str]]:
    """(name, value) of this process's secret environment variables, the longest value first."""
    variables = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _is_secret(name, value)
    ]
    return sorted(variables, key=lambda variable: len(variable[1]), reverse=True)


def _is_secret(name: str, value: str) -> bool:
    if name.upper().endswith(_NO_SECRET):
        return False
    if _STRONG.search(name):
        return True
    is_ordinary = _ORDINARY.fullmatch(value) and (
        len(value) <= _LONGEST_ORDINARY or not value.isalpha()
    )
    return _WEAK.search(name) is not None and not is_ordinary
