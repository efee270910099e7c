"""What a sweep may say of one searched key."""

import json
import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..training.config.section import Section

Scalar = None | bool | int | float | str
Bounds = Annotated[tuple[float, float], Field(description="[lowest, highest], both included")]
IntBounds = Annotated[tuple[int, int], Field(description="[lowest, highest], both included")]

_RANGES = ("uniform", "log_uniform", "int_uniform", "log_int_uniform")
_KINDS = ("choice", *_RANGES, "times")


class Distribution(Section):
    """Where the values of one key come from: exactly one of choice, the ranges and times."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values; a whole section (a mapping) can be a value too."""
    uniform: Bounds | None = None
    log_uniform: Bounds | None = None
    """Uniform in the logarithm: for learning rates and other scales."""
    int_uniform: IntBounds | None = None
    log_int_uniform: IntBounds | None = None
    times: Annotated[float, Field(gt=0)] | None = None
    """Not searched but computed: so many times the value of `of`."""
    of: str | None = None
    """The key that `times` refers to."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Values lie on this grid, counted from the lowest; for uniform and int_uniform."""
    at_alpha: Annotated[float, Field(gt=0)] | None = None
    """Of a learning rate that is searched beside adapter.rank, alpha or rslora: its range holds at
    this alpha, and moves with the adapter's own (see tuning/rule.py)."""
    when: dict[str, Any] | None = None
    """{other key: value, or list of values}: searched only where the other key has it."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"expected exactly one of {', '.join(_KINDS)}; found {found}")
        if (self.of is None) != (self.times is None):
            raise ValueError("times and of belong together, as in {times: 2, of: adapter.rank}")
        if self.step is not None and given[0] not in ("uniform", "int_uniform"):
            raise ValueError(f"step does not go with {given[0]}; only with uniform, int_uniform")
        if self.at_alpha is not None and given[0] != "log_uniform":
            raise ValueError(f"at_alpha does not go with {given[0]}; only with log_uniform")
        self._check_values(given[0])
        return self

    def _check_values(self, kind: str) -> None:
        if kind == "choice":
            labels = self.labels()
            if len(set(labels)) < len(labels):
                raise ValueError("choice names a value twice")
        if kind in _RANGES:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{kind}: the bounds are reversed or equal: [{low:g}, {high:g}]")
            if kind.startswith("log") and low <= 0:
                raise ValueError(f"{kind}: the lowest value must be above 0, found {low:g}")
        if kind == "int_uniform" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"step of int_uniform must be a whole number, found {self.step:g}")

    @property
    def is_computed(self) -> bool:
        """Whether the value follows from another key's."""
        return self.times is not None

    @property
    def is_integer(self) -> bool:
        """Whether a range holds whole numbers only."""
        return self.int_uniform is not None or self.log_int_uniform is not None

    @property
    def is_log(self) -> bool:
        """Whether a range is uniform in the logarithm."""
        return self.log_uniform is not None or self.log_int_uniform is not None

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a range: lowest and highest value."""
        found = self.uniform or self.log_uniform or self.int_uniform or self.log_int_uniform
        assert found is not None
        return found

    def parameter(self, key: str) -> str:
        """What a sampler searches, by name."""
        return key if self.at_alpha is None else f"{key} at alpha {self.at_alpha:g}"

    def labels(self) -> list[Scalar]:
        """The choices as Optuna keeps them: scalars as they are, sections as JSON."""
        assert self.choice is not None
        return [as_label(value) for value in self.choice]

    def every_value(self) -> list[Any] | None:
        """All values there are; None where they are too many to tell."""
        if self.choice is not None:
            return list(self.choice)
        if self.log_uniform is not None or (self.uniform is not None and self.step is None):
            return None
        low, high = self.bounds
        step = self.step or 1
        count = math.floor((high - low) / step + 1e-9) + 1
        if count > 1000:
            return None
        values = [low + index * step for index in range(count)]
        return [int(value) for value in values] if self.is_integer else values

    def typical_values(self) -> list[Any]:
        """All choices; of a range the ends and two values between them, neither of them round."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.bounds
        inner = self.nearest(low + 0.381966 * (high - low))
        values = [self.nearest(low), inner, self.middle(), self.nearest(high)]
        return list(dict.fromkeys(values))

    def middle(self) -> Any:
        """The middle choice, or the middle of the range (in the logarithm where it is one)."""
        if self.choice is not None:
            return self.choice[(len(self.choice) - 1) // 2]
        low, high = self.bounds
        value = math.sqrt(low * high) if self.is_log else (low + high) / 2
        return self.nearest(value)

    def nearest(self, value: float) -> Any:
        """The number in a range, or among the choices, that comes closest."""
        if self.choice is not None:
            numbers = [one for one in self.choice if is_number(one)]
            return min(numbers, key=lambda one: abs(one - value)) if numbers else self.middle()
        low, high = self.bounds
        value = min(max(value, low), high)
        if self.step is not None:
            value = min(low + round((value - low) / self.step) * self.step, high)
        return round(value) if self.is_integer else value

    def own(self, value: Any) -> Scalar:
        """A value that it holds, as Optuna keeps it: as the choice is written (0, not 0.0), and rid
        of rounding errors."""
        if self.choice is not None:
            return next(label for label in self.labels() if _is_equal(label, as_label(value)))
        nearest: float = self.nearest(value)
        return nearest

    def holds(self, value: Any) -> bool:
        """Whether the value can come from here."""
        if self.choice is not None:
            return any(_is_equal(label, as_label(value)) for label in self.labels())
        return is_number(value) and math.isclose(self.nearest(value), value, rel_tol=1e-9)


def is_number(value: Any) -> bool:
    """Whether it is one, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_equal(one: Scalar, other: Scalar) -> bool:
    """1 and True are not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def is_same(one: Any, other: Any) -> bool:
    """Whether values are equal, but for rounding errors."""
    if is_number(one) and is_number(other):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def as_label(value: Any) -> Scalar:
    """A scalar as it is; a list or a mapping as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, sort_keys=True)
    assert value is None or isinstance(value, bool | int | float | str)
    return value
