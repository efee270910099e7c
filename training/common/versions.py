"""The versions that decide what a run computes."""

import platform
from importlib.metadata import version

_NAMES = ("finray", "ray", "torch", "transformers", "peft")


def installed_versions() -> dict[str, str]:
    """By distribution name, and Python's own."""
    return {"python": platform.python_version(), **{name: version(name) for name in _NAMES}}
