"""A trial that is not stored: it collects the values of one set of settings."""

from collections.abc import Callable
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Choose = Callable[[str, BaseDistribution], Any]


class Draft:
    """Suggests values like an Optuna trial, and collects them with their distributions.

    Args:
        choose: returns a parameter's value, from its name and distribution.
    """

    def __init__(self, choose: Choose) -> None:
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self._choose = choose

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of the choices; the signature is Optuna's, as of the two below."""
        return self._suggest(name, CategoricalDistribution(choices))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """A value in [low, high]."""
        return float(self._suggest(name, FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A value in [low, high]."""
        return int(self._suggest(name, IntDistribution(low, high, log, step)))

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self.distributions[name] = distribution
        self.params[name] = self._choose(name, distribution)
        return self.params[name]
