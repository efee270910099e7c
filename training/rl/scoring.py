"""Scores rollouts with all rewards of a recipe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config.methods import OnlineMethod
from ..data import stream
from .rewards.reward import Completions, Reward, Turns, columns_of
from .rollouts.rollout import Rollout


@dataclass(frozen=True)
class Scores:
    """Rewards of completions; NaN where no reward has a value."""

    total: torch.Tensor
    """(completions,) in float64: the weighted sum of the rewards."""
    each: torch.Tensor
    """(rewards, completions) in float64: the rewards without weights."""
    failures: int
    """Number of values that are missing because a reward failed."""
    texts: list[str]
    """The completions as text."""


class Scorer:
    """Computes all rewards of a recipe and their weighted sum.

    Args:
        rewards: the rewards in the recipe's order.
        tokenizer: the policy's tokenizer.
    """

    def __init__(self, rewards: list[Reward], tokenizer: Any) -> None:
        self._rewards = rewards
        self._tokenizer = tokenizer

    def score(self, prompts: Sequence[stream.Sequence], rollouts: Sequence[Rollout]) -> Scores:
        """The value of every reward for every completion, and the weighted sums.

        Args:
            prompts: the rows, one for each rollout.
            rollouts: their completions.

        Raises:
            RunError: a reward failed, and `on_reward_error` is fail.
        """
        texts: list[str] = self._tokenizer.batch_decode(
            [rollout.ids for rollout in rollouts], skip_special_tokens=True
        )
        each = torch.full((len(self._rewards), len(texts)), torch.nan, dtype=torch.float64)
        failures = 0
        completions = _completions(prompts, rollouts, texts)
        for number, reward in enumerate(self._rewards if texts else []):
            scored = reward.score(completions)
            failures += scored.failures
            values = [torch.nan if value is None else value for value in scored.values]
            each[number] = torch.tensor(values, dtype=torch.float64)
        weights = torch.tensor([reward.weight for reward in self._rewards], dtype=torch.float64)
        total = (each * weights[:, None]).nansum(0)
        total[each.isnan().all(0)] = torch.nan
        return Scores(total, each, failures, texts)


def sampled_measures(settings: OnlineMethod) -> tuple[str, ...]:
    """Names of the measures that `measure` returns, in its order."""
    names = [f"reward/{reward.name}" for reward in settings.rewards]
    return ("reward", "reward_std", *names, "failed_rewards", "completion_length", "truncated")


def measure(scores: Scores, deviations: torch.Tensor, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Sum and count of each measure of rollouts, (measures, 2) in float64.

    Args:
        scores: the scores of the rollouts.
        deviations: standard deviation of the rewards of each prompt, (prompts,).
        rollouts: the completions.
    """
    values = [scores.total, deviations, *scores.each]
    count = float(len(rollouts))
    rows = [[float(part.nansum()), float((~part.isnan()).sum())] for part in values]
    # Without failures the metric is not logged.
    rows.append([scores.failures, scores.each.numel() if scores.failures else 0.0])
    rows.append([sum(len(rollout.ids) for rollout in rollouts), count])
    rows.append([sum(not rollout.ended for rollout in rollouts), count])
    return torch.tensor(rows, dtype=torch.float64)


def _completions(
    prompts: Sequence[stream.Sequence], rollouts: Sequence[Rollout], texts: list[str]
) -> Completions:
    rows = [json.loads(row.extra or "{}") for row in prompts]
    # A space at the end of a prompt is sampled with the completion's first token.
    texts = [t.removeprefix(row.get("cut", "")) for t, row in zip(texts, rows, strict=True)]
    turns: list[Turns] = [row["prompt"] for row in rows]
    answers: list[Turns] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(turns, texts, strict=True)
    ]
    columns = columns_of([row["columns"] for row in rows])
    return Completions(turns, answers, [rollout.ids for rollout in rollouts], columns)
