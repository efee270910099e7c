"""Rewards from the user's own functions."""

import math
from collections.abc import Collection, Mapping, MappingView, Set
from numbers import Real
from typing import Any

import numpy as np
import torch

from ...common.errors import RunError
from ...config.rewards import FunctionReward, TrlReward
from ...config.user_code import traceback_of
from .reward import Completions, RewardValues, as_text

_SHOWN = 2000
_NO_LISTS = (str, bytes, bytearray, Set, Mapping, MappingView, np.ndarray, torch.Tensor)
"""Collections that are refused: a set has an order of its own, a mapping's keys are no rewards."""


class _RewardFunctionError(Exception):
    """The function raised an error, or returned something that is not a reward."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index
        """Index of the completion that caused it; None if that is unknown."""


class UserFunctionReward:
    """A reward function from a Python file, or of TRL.

    Args:
        settings: the recipe's reward, with the file's text.
        may_fail: True if a failure leaves a completion without a value; else it ends the run.

    Raises:
        RunError: importing the file raises an error.
    """

    def __init__(self, settings: FunctionReward | TrlReward, may_fail: bool) -> None:
        self.name = settings.name
        self.weight = settings.weight
        self._may_fail = may_fail
        self._path = settings.path
        self._function = settings.load()

    def score(self, completions: Completions) -> RewardValues:
        """Call the function once for all completions; if that fails, once for each."""
        values = self._try_call(completions)
        if not isinstance(values, _RewardFunctionError):
            return RewardValues(values)
        if not self._may_fail:
            raise RunError(self._message(completions, values))
        results = self._call_for_each(completions)
        values = [None if isinstance(v, _RewardFunctionError) else v for v in results]
        return RewardValues(values, sum(isinstance(v, _RewardFunctionError) for v in results))

    def _call(self, completions: Completions) -> list[float | None]:
        # What the function changes must reach neither the training nor other functions.
        own = completions.copied()
        try:
            returned = self._function(
                prompts=own.prompts,
                completions=own.completions,
                completion_ids=own.completion_ids,
                **own.columns,
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything
            raise _RewardFunctionError(traceback_of(error, self._path)) from None
        values = _as_list(returned)
        if len(values) != len(completions):
            raise _RewardFunctionError(
                f"it returned {len(values)} rewards for {len(completions)} completions"
            )
        return [_as_reward(value, index) for index, value in enumerate(values)]

    def _try_call(self, completions: Completions) -> list[float | None] | _RewardFunctionError:
        try:
            return self._call(completions)
        except _RewardFunctionError as error:
            return error

    def _call_for_each(self, completions: Completions) -> list[float | _RewardFunctionError | None]:
        """The value, or the error, of each completion when the function gets it alone."""
        results: list[float | _RewardFunctionError | None] = []
        for index in range(len(completions)):
            values = self._try_call(completions.only(index))
            results.append(values if isinstance(values, _RewardFunctionError) else values[0])
        return results

    def _message(self, completions: Completions, error: _RewardFunctionError) -> str:
        """The message for the user, with the completion that caused the error."""
        index, note = error.index, ""
        if index is None:
            results = enumerate(self._call_for_each(completions))
            failures = [(i, v) for i, v in results if isinstance(v, _RewardFunctionError)]
            if failures:
                index, error = failures[0]
            else:
                index, note = 0, " (the first of the batch: none of them fails alone)"
        prompt, completion = completions.prompts[index], completions.completions[index]
        return (
            f"the reward function {self.name} of {self._path} failed: {error.reason.rstrip()}\n"
            f"prompt{note}:\n{_indented(as_text(prompt))}\n"
            f"completion:\n{_indented(as_text(completion))}\n"
            "method.on_reward_error: missing leaves such a completion without a value"
        )


def _as_list(values: Any) -> list[Any]:
    """What a function returned, in its order."""
    if isinstance(values, np.ndarray | torch.Tensor) and values.ndim:
        return list(values.tolist())
    if isinstance(values, _NO_LISTS) or not isinstance(values, Collection):
        raise _RewardFunctionError(
            f"it returned {type(values).__name__}; expected a list of floats: a number or None for "
            "each completion, in their order"
        )
    return list(values)


def _as_reward(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        kind = type(value).__name__
        raise _RewardFunctionError(
            f"it returned {value!r} of type {kind}; expected a float or None", index
        )
    number = _as_float(value)
    if not math.isfinite(number):
        raise _RewardFunctionError(
            f"it returned {number!r}; expected a finite number or None", index
        )
    return number


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _indented(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
    return "\n".join(f"  {line}" for line in shown.splitlines() or [""])
