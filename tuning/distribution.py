"""The distribution of one searched key, as it is written in a sweep file."""

import json
import math
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..training.config.section import Section

Scalar = None | bool | int | float | str
Settings = dict[str, Any]
"""Values by dotted key of the recipe."""
Bounds = tuple[float, float]
IntBounds = tuple[int, int]

_RANGES = ("uniform", "log_uniform", "int_uniform", "log_int_uniform")
_KINDS = ("choice", *_RANGES, "times")
_LISTED = 1000
"""Maximum number of values of a range that are listed."""


class Distribution(Section):
    """Where the values of one key come from: exactly one of choice, the ranges and times."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values; a whole section (a mapping) can be a value too."""
    uniform: Bounds | None = None
    """Any number from [lowest, highest], both included."""
    log_uniform: Bounds | None = None
    """[lowest, highest], uniform in the logarithm: for learning rates and other scales."""
    int_uniform: IntBounds | None = None
    """Any whole number from [lowest, highest], both included."""
    log_int_uniform: IntBounds | None = None
    """[lowest, highest], whole numbers, uniform in the logarithm: for ranks and other sizes."""
    times: Annotated[float, Field(gt=0)] | None = None
    """Computed, not searched: this factor times the value of the key `of`."""
    of: str | None = None
    """The key that `times` refers to."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Values lie on this grid, counted from the lowest; for uniform and int_uniform."""
    at_alpha: Annotated[float, Field(gt=0)] | None = None
    """For a learning rate that is searched together with adapter.rank, alpha or rslora: the range
    is for this alpha, and a trial's rate is scaled by 1 / sqrt(alpha) of its own adapter."""
    when: dict[str, Any] | None = None
    """{other key: value, or list of values}: searched only if the other key has such a value."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            actual = " and ".join(given) or "none of them"
            raise ValueError(
                f"expected exactly one of {', '.join(_KINDS)}; found {actual}; keep one of them"
            )
        if (self.of is None) != (self.times is None):
            raise ValueError("times and of belong together, as in {times: 2, of: adapter.rank}")
        if self.step is not None and given[0] not in ("uniform", "int_uniform"):
            raise ValueError(f"step cannot be combined with {given[0]}; use uniform or int_uniform")
        if self.at_alpha is not None and given[0] != "log_uniform":
            raise ValueError(f"at_alpha cannot be combined with {given[0]}; use log_uniform")
        self._check_values(given[0])
        return self

    def _check_values(self, kind: str) -> None:
        if kind == "choice":
            labels = self.labels()
            if len(set(labels)) < len(labels):
                raise ValueError("choice contains the same value twice; remove one of them")
        if kind in _RANGES:
            low, high = self._written_bounds
            if low >= high:
                raise ValueError(
                    f"{kind}: the bounds are reversed or equal: [{low:g}, {high:g}]; write "
                    "[lowest, highest]"
                )
            if kind.startswith("log") and low <= 0:
                raise ValueError(f"{kind}: the lowest must be above 0, found {low:g}; raise it")
        if kind == "int_uniform" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"step of int_uniform must be whole, found {self.step:g}; round it")

    @property
    def is_computed(self) -> bool:
        """True if the value is computed from that of another key."""
        return self.times is not None

    @property
    def is_integer(self) -> bool:
        """True for a range of integers."""
        return self.int_uniform is not None or self.log_int_uniform is not None

    @property
    def is_log(self) -> bool:
        """True for a range that is uniform in the logarithm."""
        return self.log_uniform is not None or self.log_int_uniform is not None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a range; with a step, the highest one on the grid."""
        low, high = self._written_bounds
        return (low, high) if self.step is None else (low, self._on_grid(self._last_place))

    @property
    def _written_bounds(self) -> tuple[float, float]:
        bounds = self.uniform or self.log_uniform or self.int_uniform or self.log_int_uniform
        assert bounds is not None
        return bounds

    @property
    def _last_place(self) -> int:
        """The place of the highest value on the grid, counted from 0."""
        low, high = (Decimal(str(bound)) for bound in self._written_bounds)
        return int((high - low) // Decimal(str(self.step or 1)))

    def _on_grid(self, place: int) -> Any:
        """A value of the grid, computed in decimals as Optuna does: 0.3, not 0.1 + 2 * 0.1."""
        low, step = (Decimal(str(item)) for item in (self._written_bounds[0], self.step or 1))
        value = low + place * step
        return int(value) if self.is_integer else float(value)

    def parameter(self, key: str) -> str:
        """Name of the Optuna parameter for this key."""
        return key if self.at_alpha is None else f"{key} at alpha {self.at_alpha:g}"

    def labels(self) -> list[Scalar]:
        """The choices as Optuna stores them: scalars unchanged, sections as JSON."""
        assert self.choice is not None
        return [as_label(value) for value in self.choice]

    def every_value(self) -> list[Any] | None:
        """All possible values; None if there are infinitely many or too many to list."""
        if self.choice is not None:
            return list(self.choice)
        is_continuous = not self.is_integer and self.step is None
        if is_continuous or self._last_place >= _LISTED:
            return None
        return [self._on_grid(place) for place in range(self._last_place + 1)]

    def typical_values(self) -> list[Any]:
        """All choices; for a range, both ends, the middle and a value between them."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.bounds
        inner = self.nearest(low + 0.381966 * (high - low))
        values = [self.nearest(low), inner, self.middle(), self.nearest(high)]
        return list(dict.fromkeys(values))

    def middle(self) -> Any:
        """The middle choice, or the middle of the range (of a log range, the geometric mean)."""
        if self.choice is not None:
            return self.choice[(len(self.choice) - 1) // 2]
        low, high = self.bounds
        value = math.sqrt(low * high) if self.is_log else (low + high) / 2
        return self.nearest(value)

    def nearest(self, value: float) -> Any:
        """The value of the range, or the number among the choices, that is closest to `value`."""
        if self.choice is not None:
            numbers = [item for item in self.choice if is_number(item)]
            return min(numbers, key=lambda item: abs(item - value)) if numbers else self.middle()
        low, high = self.bounds
        value = min(max(value, low), high)
        if self.step is not None:
            return self._on_grid(round((value - low) / self.step))
        return round(value) if self.is_integer else value

    def spelled(self, value: Any) -> Any:
        """A value of the distribution as it is written there: 0 for 0.0, if the choice is 0."""
        if self.choice is not None:
            label = as_label(value)
            return next((item for item in self.choice if _is_equal(as_label(item), label)), value)
        return self.nearest(value) if self.step is not None and self.contains(value) else value

    def label_of(self, value: Any) -> Scalar:
        """A value of the distribution as Optuna stores it.

        Equal to the choice as written (0, not 0.0), and without rounding errors.
        """
        if self.choice is not None:
            return next(label for label in self.labels() if _is_equal(label, as_label(value)))
        nearest: float = self.nearest(value)
        return nearest

    def contains(self, value: Any) -> bool:
        """True if the distribution can produce the value, up to rounding errors."""
        if self.choice is not None:
            return any(_is_equal(label, as_label(value)) for label in self.labels())
        return is_number(value) and math.isclose(self.nearest(value), value, rel_tol=1e-9)


def is_number(value: Any) -> bool:
    """True for an int or float; bool does not count."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_equal(left: Scalar, right: Scalar) -> bool:
    """Equality that distinguishes 1 from True."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def is_same(left: Any, right: Any) -> bool:
    """True if the values are equal, up to rounding errors."""
    if is_number(left) and is_number(right):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)


def as_label(value: Any) -> Scalar:
    """A scalar unchanged; a list or a mapping as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, sort_keys=True)
    assert value is None or isinstance(value, bool | int | float | str)
    return value
