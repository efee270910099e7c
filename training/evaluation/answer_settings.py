"""How answers are generated; torch is not loaded to find out what means nothing."""

from typing import Any

from ..common.errors import InputError
from ..config.section import Section
from ..config.sections import ANSWERS_AT_ONCE
from ..config.validation import validate
from ..config.yaml_file import Document


class AnswerSettings(Section):
    """How answers are generated."""

    max_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among as many tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of sampled answers; that of a row depends on it and on the row's number alone."""
    at_once: int = ANSWERS_AT_ONCE
    """Answers in a batch."""

    @classmethod
    def of(cls, verb: str, **values: Any) -> "AnswerSettings":
        """The settings that a command or a program gives.

        Args:
            verb: what asks for answers, for messages.
            values: by name.

        Raises:
            InputError: a value has the wrong type, or means nothing.
        """
        settings = validate(cls, Document(values, {(): verb}))
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InputError: naming the option.
        """
        if self.max_tokens < 1:
            raise InputError(f"--max-tokens: {self.max_tokens} is not above 0; give 1 or more")
        if self.temperature < 0:
            raise InputError(
                f"--temperature: {self.temperature} is not 0 or above; give 0 for greedy answers"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: {self.top_p} is not above 0 and at most 1; give 1 for all")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: {self.seed} is not between 0 and 2**32 - 1; correct it")
        if self.at_once < 1:
            raise InputError(f"--batch: {self.at_once} is not above 0; give 1 or more")
