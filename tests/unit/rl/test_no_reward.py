"""Steps in which no completion has a reward: they change nothing, and are recorded."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.online_runs import Trained

from finray.training.config.recipe import Recipe
from finray.training.engine.trainer import StepMeasures

# Two prompts a step: those of step 2 get no reward, and one of step 3 does.
REWARD = """
def worth(prompts, completions, completion_ids, number, **columns):
    scores = [sum(token % 7 for token in ids) / 20 for ids in completion_ids]
    return [None if 2 <= n <= 4 else score for n, score in zip(number, scores)]
"""


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "grpo", "beta": 0.5},
        {"kind": "rloo", "beta": 0.5},
        {"kind": "grpo", "passes": 2, "scale_rewards": "batch"},
    ],
    ids=["grpo", "rloo", "passes"],
)
def test_the_step_changes_no_weights(
    online_recipe: Callable[..., Recipe],
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    method: dict[str, Any],
) -> None:
    """Neither the divergence nor weight decay nor the moments of earlier steps move them."""
    rewards = [{"file": "/x/rewards.py:worth", "source": REWARD}]
    passes = method.get("passes", 1)
    recipe = online_recipe({**method, "rewards": rewards}, max_steps=3 * passes, weight_decay=0.1)
    states: list[dict[str, torch.Tensor]] = []

    class Watched(Trained):
        def _after_step(self, measures: StepMeasures) -> bool:
            weights = self.trainer.model.state_dict()
            states.append({name: value.clone() for name, value in weights.items()})
            return super()._after_step(measures)

    trained = Watched(recipe, copy.deepcopy(model), tokenizer, tmp_path)
    first, second, third = states[passes - 1 :: passes]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    assert trained.trainer.take_empty_steps() == [*range(passes + 1, 2 * passes + 1)]
    assert ["reward" in measures for measures in trained.measures[::passes]] == [True, False, True]
