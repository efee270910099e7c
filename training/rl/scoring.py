"""From prompts and rollouts to rewards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config.methods import OnlineMethod
from ..data import stream
from .rewards.reward import Completions, Judge, Turns, columns_of
from .rollouts.rollout import Rollout


@dataclass(frozen=True)
class Judged:
    """What completions are worth; NaN where nothing is known."""

    total: torch.Tensor
    """(completions,) in float64: the weighted sum."""
    each: torch.Tensor
    """(rewards, completions), unweighted."""
    failures: int
    """Judgements that are missing because a reward failed."""
    texts: list[str]
    """The completions as text."""


class Judging:
    """All rewards of a recipe.

    Args:
        judges: in the recipe's order.
        tokenizer: the policy's.
    """

    def __init__(self, judges: list[Judge], tokenizer: Any) -> None:
        self._judges = judges
        self._tokenizer = tokenizer

    def judge(self, prompts: Sequence[stream.Sequence], rollouts: Sequence[Rollout]) -> Judged:
        """Ask every reward about every completion.

        Args:
            prompts: the rows, one for each rollout.
            rollouts: their completions.

        Raises:
            RunError: a reward failed, and the recipe does not let it.
        """
        texts: list[str] = self._tokenizer.batch_decode(
            [rollout.ids for rollout in rollouts], skip_special_tokens=True
        )
        each = torch.full((len(self._judges), len(texts)), torch.nan, dtype=torch.float64)
        failures = 0
        completions = _completions(prompts, rollouts, texts)
        for number, judge in enumerate(self._judges if texts else []):
            judgement = judge.judge(completions)
            failures += judgement.failures
            values = [torch.nan if value is None else value for value in judgement.values]
            each[number] = torch.tensor(values, dtype=torch.float64)
        weights = torch.tensor([judge.weight for judge in self._judges], dtype=torch.float64)
        total = (each * weights[:, None]).nansum(0)
        total[each.isnan().all(0)] = torch.nan
        return Judged(total, each, failures, texts)


def sampled_measures(settings: OnlineMethod) -> tuple[str, ...]:
    """Names of what `measure` tells."""
    names = [f"reward/{reward.name}" for reward in settings.rewards]
    return ("reward", "reward_std", *names, "failed_rewards", "completion_length", "truncated")


def measure(judged: Judged, deviations: torch.Tensor, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Sums and counts of what is measured of rollouts, (measures, 2) in float64.

    Args:
        judged: their rewards.
        deviations: standard deviation of the rewards of each prompt.
        rollouts: the completions.
    """
    known = [judged.total, deviations, *judged.each]
    count = float(len(rollouts))
    rows = [[float(part.nansum()), float((~part.isnan()).sum())] for part in known]
    # Nothing failed: nothing to tell.
    rows.append([judged.failures, judged.each.numel() if judged.failures else 0.0])
    rows.append([sum(len(rollout.ids) for rollout in rollouts), count])
    rows.append([sum(not rollout.ended for rollout in rollouts), count])
    return torch.tensor(rows, dtype=torch.float64)


def _completions(
    prompts: Sequence[stream.Sequence], rollouts: Sequence[Rollout], texts: list[str]
) -> Completions:
    rows = [json.loads(row.extra or "{}") for row in prompts]
    asked: list[Turns] = [row["prompt"] for row in rows]
    answers: list[Turns] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, texts, strict=True)
    ]
    columns = columns_of([row["columns"] for row in rows])
    return Completions(asked, answers, [rollout.ids for rollout in rollouts], columns)
