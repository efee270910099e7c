"""Keeping secrets out of what finray writes and prints."""

import os
import re
from collections.abc import Iterator
from typing import Any

Key = tuple[str | int, ...]

HIDDEN = "[secret]"
_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)
_NO_VALUES = ("_PATH", "_FILE", "_ID", "_DIR", "_ISSUER")
_SHORTEST = 8
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|wandb_v1_[A-Za-z0-9_]{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|sk-[A-Za-z0-9_-]{20,})\b"
)
_USER_INFO = re.compile(r"(?<=://)[^\s@]*:[^\s@]*(?=@)")
_QUERY = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:token|secret|password|access_key|api_key|signature|credential)[\w-]*)=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without tokens, passwords in URLs, and values of secret environment variables."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _TOKENS.sub(HIDDEN, text)
    text = _USER_INFO.sub(HIDDEN, text)
    return _QUERY.sub(rf"\1{HIDDEN}", text)


def secret_places(values: Any, key: Key = ()) -> Iterator[Key]:
    """Keys of plain settings whose text holds a secret."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from secret_places(value, (*key, str(name)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from secret_places(value, (*key, index))
    elif isinstance(values, str) and redact(values) != values:
        yield key


def _environment_secrets() -> list[str]:
    """Values of this process's secret variables, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name) and not name.upper().endswith(_NO_VALUES) and len(value) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)
