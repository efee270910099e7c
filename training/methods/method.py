"""What a kind of fine-tuning adds to the common way of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """Asked by the pipeline and the loop, which know no method by name.

    The functions take the method's own settings from the recipe.
    """

    splits_overlong: bool
    """A row that is too long becomes several sequences; otherwise `data.overlong` decides."""
    has_answers: bool
    """A held-out row is a prompt with a reference answer, which can be compared."""
    trains_on_all: Callable[[Any], bool]
    """Whether every token bears loss, or only what an assistant wrote."""
    starts_at_random: Callable[[Any], bool]
    """Whether only the base's configuration is used, with fresh weights."""
