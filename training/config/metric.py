"""The metrics that a run reports, and which direction of each is better."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]

MODES: dict[str, Mode] = {
    "loss": "min",
    "token_accuracy": "max",
    "entropy": "min",
    "exact_match": "max",
    "reward_accuracy": "max",
    "reward_margin": "max",
    "chosen_reward": "max",
    "rejected_reward": "min",
    "reward": "max",
    "reward_std": "max",  # a prompt whose completions all have one reward teaches nothing
    "completion_length": "min",
    "truncated": "min",
    "clipped": "min",
    "kl": "min",
    "grad_norm": "min",
    "tokens_per_second": "max",
    "data_wait": "min",
    "tokens": "min",
    "seconds": "min",
    "wall_seconds": "min",
    "adapter_bytes": "min",
    "trainable_parameters": "min",
}
"""The direction of each metric; its held-out value, with the prefix `eval_`, has the same."""


@dataclass(frozen=True)
class Metric:
    """The name of a reported value, and which direction is better."""

    name: str
    mode: Mode

    def better(self, value: float, other: float) -> bool:
        """True if `value` is strictly better than `other`."""
        return value < other if self.mode == "min" else value > other


def declared(name: str) -> Metric:
    """The metric of that name, with its direction in `MODES`."""
    return Metric(name, MODES[name.removeprefix("eval_")])
