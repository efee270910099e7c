"""Reward functions of the user."""

import math
from collections.abc import Collection
from numbers import Real
from typing import Any

from ...common.errors import RunError
from ...config.rewards import FunctionReward
from ...config.user_code import traceback_of
from .reward import Completions, RewardValues, as_text

_SHOWN = 2000


class _Unusable(Exception):
    """The function raised, or returned something that is not a reward."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index
        """The completion at fault; None where it is not clear which."""


class UserFunctionReward:
    """A function out of a Python file.

    Args:
        settings: with the file's text.
        may_fail: a failure leaves a completion without a value; otherwise it ends the run.

    Raises:
        RunError: the file raises when it is imported.
    """

    def __init__(self, settings: FunctionReward, may_fail: bool) -> None:
        self.name = settings.name
        self.weight = settings.weight
        self._may_fail = may_fail
        self._path = settings.path
        self._function = settings.load()

    def score(self, completions: Completions) -> RewardValues:
        """Call the function once for all; one by one where that fails."""
        values = self._tried(completions)
        if not isinstance(values, _Unusable):
            return RewardValues(values)
        if not self._may_fail:
            raise RunError(self._message(completions, values))
        alone = [self._alone(completions.only(index)) for index in range(len(completions))]
        failed = sum(isinstance(value, _Unusable) for value in alone)
        return RewardValues([None if isinstance(v, _Unusable) else v for v in alone], failed)

    def _call(self, completions: Completions) -> list[float | None]:
        try:
            values = self._function(
                prompts=completions.prompts,
                completions=completions.completions,
                completion_ids=completions.completion_ids,
                **completions.columns,
            )
        except Exception as error:  # noqa: BLE001 — the user's code may raise anything
            raise _Unusable(traceback_of(error, self._path)) from None
        if isinstance(values, str | bytes | dict) or not isinstance(values, Collection):
            raise _Unusable(f"it returned {type(values).__name__}; expected a list of floats")
        if len(values) != len(completions):
            raise _Unusable(f"it returned {len(values)} rewards for {len(completions)} completions")
        return [_as_reward(value, index) for index, value in enumerate(values)]

    def _tried(self, completions: Completions) -> list[float | None] | _Unusable:
        try:
            return self._call(completions)
        except _Unusable as error:
            return error

    def _alone(self, completion: Completions) -> float | _Unusable | None:
        values = self._tried(completion)
        return values if isinstance(values, _Unusable) else values[0]

    def _message(self, completions: Completions, error: _Unusable) -> str:
        """The message with the completion at fault."""
        index, note = error.index, ""
        if index is None:
            alone = [self._alone(completions.only(i)) for i in range(len(completions))]
            index = next((i for i, v in enumerate(alone) if isinstance(v, _Unusable)), None)
            if index is None:
                index, note = 0, " (the first of the batch: none of them fails alone)"
            elif isinstance(failure := alone[index], _Unusable):
                error = failure
        prompt, completion = completions.prompts[index], completions.completions[index]
        return (
            f"the reward function {self.name} of {self._path} failed: {error.reason.rstrip()}\n"
            f"prompt{note}:\n{_indented(as_text(prompt))}\n"
            f"completion:\n{_indented(as_text(completion))}\n"
            "method.on_reward_error: missing leaves such a completion without a value"
        )


def _as_reward(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        kind = type(value).__name__
        raise _Unusable(f"it returned {value!r} of type {kind}; expected a float or None", index)
    if not math.isfinite(value):
        raise _Unusable(f"it returned {value!r}; expected a finite number or None", index)
    return float(value)


def _indented(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
    return "\n".join(f"  {line}" for line in shown.splitlines() or [""])
