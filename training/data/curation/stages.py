"""The stages that decide about each row on its own, by their kind."""

from collections.abc import Callable
from typing import Any

from .decontaminate import decontaminate
from .filtering import filter_rows
from .keep import keep
from .languages import language
from .normalise import normalise
from .redact import redact
from .stage import Apply, StageContext

ROW_STAGES: dict[str, Callable[[Any, StageContext], Apply]] = {
    "normalise": normalise,
    "filter": filter_rows,
    "keep": keep,
    "language": language,
    "redact": redact,
    "decontaminate": decontaminate,
}
REWRITING = frozenset({"normalise", "redact"})
"""Stages that change rows."""
