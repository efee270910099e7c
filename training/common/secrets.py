"""Secrets in text: one list of patterns, to hide them in output and to refuse them in settings."""

import os
import re
from collections.abc import Iterator
from typing import Any

Key = tuple[str | int, ...]

HIDDEN = "[secret]"
_KINDS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{16,}")),
    ("a Weights & Biases key", re.compile(r"\bwandb_v1_[A-Za-z0-9_]{16,}")),
    ("an AWS access key", re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a GitHub token", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    ("a user name with a password in a URI", re.compile(r"(?<=://)[^\s@]*:[^\s@]*(?=@)")),
    (
        "credentials in the query of a URI",
        re.compile(
            r"(?P<name>[?&][^=&\s]*(token|secret|password|passwd|access[_-]?key|api[_-]?key"
            r"|signature|credential|(?<![a-z])sig(?![a-z]))[^=&\s]*=)[^&\s'\"]+",
            re.IGNORECASE,
        ),
    ),
)
_VARIABLES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE
)
"""An environment variable whose name matches holds a secret…"""
_NO_SECRET = ("_PATH", "_FILE", "_DIR", "_ISSUER", "APPLICATION_CREDENTIALS")
"""… unless its name has one of these endings: then its value names a file or a server."""
_SHORTEST = 8
"""Minimum characters of a secret value; shorter ones also occur in ordinary text."""


def redact(text: str) -> str:
    """The text without tokens, passwords in URIs, and values of secret environment variables."""
    for _, hidden in _hide(text):
        text = hidden
    return text


def secret_kind(text: str) -> str | None:
    """The kind of the first secret in the text, such as "a Hugging Face token", or None."""
    return next((kind for kind, _ in _hide(text)), None)


def secret_places(values: Any) -> Iterator[Key]:
    """Keys of the settings whose text contains a secret."""
    return (key for key, text in texts(values) if secret_kind(text) is not None)


def texts(values: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """(key, text) of every text in nested settings."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from texts(value, (*key, str(name)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from texts(value, (*key, index))
    elif isinstance(values, str):
        yield key, values


def _hide(text: str) -> Iterator[tuple[str, str]]:
    """For each kind of secret in the text: (kind, the text without secrets of this and all
    earlier kinds)."""
    for name, value in _environment_secrets():
        if value in text:
            text = text.replace(value, HIDDEN)
            yield f"the value of ${name}", text
    for kind, pattern in _KINDS:
        hidden = pattern.sub(_replacement, text)
        if hidden != text:
            text = hidden
            yield kind, text


def _replacement(match: re.Match[str]) -> str:
    return match.groupdict().get("name", "") + HIDDEN


def _environment_secrets() -> list[tuple[str, str]]:
    """(name, value) of this process's secret environment variables, the longest value first."""
    variables = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and _VARIABLES.search(name)
        and not name.upper().endswith(_NO_SECRET)
    ]
    return sorted(variables, key=lambda variable: len(variable[1]), reverse=True)
