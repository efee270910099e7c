"""What is measured of a run, as people read it: titles, formats, and which figures tell most."""

from dataclasses import dataclass
from typing import Any

from ..common import formatting as figures
from .charts import Format


@dataclass(frozen=True)
class Shown:
    """How a measure is written."""

    title: str
    format: Format = "loss"

    def write(self, value: Any) -> str:
        """The value as text."""
        return {
            "loss": figures.loss,
            "percent": figures.percent,
            "count": figures.count,
            "exponent": figures.exponent,
        }[self.format](value)

    def difference(self, old: Any, new: Any) -> str:
        """By how much it changed: percentage points for a share; empty where one is unknown."""
        if not (figures.is_number(old) and figures.is_number(new)):
            return ""
        return f"{100 * (new - old):+.1f}" if self.format == "percent" else f"{new - old:+.3f}"


SHOWN = {
    "loss": Shown("loss"),
    "exact_match": Shown("exact match", "percent"),
    "token_accuracy": Shown("token accuracy", "percent"),
    "entropy": Shown("entropy"),
    "reward": Shown("reward"),
    "reward_std": Shown("reward spread in a group"),
    "reward_accuracy": Shown("prefers chosen", "percent"),
    "reward_margin": Shown("reward margin"),
    "kl": Shown("KL to the reference"),
    "completion_length": Shown("completion length", "count"),
    "clipped": Shown("clipped share", "percent"),
    "truncated": Shown("truncated share", "percent"),
}
"""By the measure's name; held-out values have the same name after `eval_`."""

HEADLINES = ("exact_match", "eval_reward", "eval_reward_accuracy", "eval_kl", "eval_loss")
"""What tells most of a run, the plainest first."""


def shown(name: str) -> Shown:
    """How a measure is written, also one that a user's reward function named."""
    bare = name.removeprefix("eval_")
    known = SHOWN.get(bare) or Shown(bare.replace("_", " "))
    return Shown(f"held-out {known.title}", known.format) if name != bare else known
