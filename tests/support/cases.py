"""Parameters of a test of which a few are enough for every change."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """The cases, of which all but the quick ones are marked slow; a tuple is several arguments."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]
