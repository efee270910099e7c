"""Online methods without the pipeline: rows made here, and the real trainer."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Rows, in_batches
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence
from finray.training.engine.trainer import StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.objectives.objective import Setup
from finray.training.rl.grpo import GrpoObjective
from finray.training.rl.online import OnlineObjective
from finray.training.rl.rloo import RlooObjective
from finray.training.rl.rollouts.rollout import Request, Rollout

REWARD = '''
def worth(prompts, completions, completion_ids, **columns):
    """None for a few: those are left out of the baseline."""
    scores = [sum(token % 7 for token in ids) / 20 for ids in completion_ids]
    return [None if ids[0] % 11 == 0 else s for ids, s in zip(completion_ids, scores)]
'''
GENERATIONS = 4


def prompts(count: int) -> list[str]:
    """Texts of several lengths."""
    return [f"The {'quick ' * (number % 3)}fox number {number}" for number in range(count)]


def rows_of(texts: list[str], tokenizer: Any) -> list[Sequence]:
    """The prompts as the stream gives them."""
    made = []
    for number, text in enumerate(texts):
        ids = np.array(tokenizer(text)["input_ids"], np.int32)
        nothing = np.zeros(len(ids), np.bool_)
        extra = f'{{"prompt": "{text}", "columns": {{"number": {number}}}}}'
        size = np.array([len(ids)], np.int32)
        made.append(Sequence(ids, size, nothing, np.array([number]), extra))
    return made


def setup_of(recipe: Recipe, model: Any, tokenizer: Any, rank: int = 0, workers: int = 1) -> Setup:
    """For an objective on the CPU."""
    return Setup(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        prepared=Prepared(Folder("/nowhere"), Mock()),
        rank=rank,
        world_size=workers,
        device=torch.device("cpu"),
    )


def objective_of(setup: Setup) -> OnlineObjective:
    """The recipe's method's."""
    kind = {"grpo": GrpoObjective, "rloo": RlooObjective}[setup.recipe.method.kind]
    return kind(setup)


class Trained:
    """A run of all steps over prompts, with everything that was sampled."""

    def __init__(self, recipe: Recipe, model: Any, tokenizer: Any, scratch: Path) -> None:
        assert recipe.optim.max_steps is not None
        generations = recipe.optim.max_steps // recipe.method.repeats
        self.texts = prompts(generations * recipe.rows_per_step)
        self.losses: list[float] = []
        self.measures: list[dict[str, float]] = []
        self.sampled: list[tuple[list[Request], list[Rollout]]] = []
        objective = objective_of(setup_of(recipe, model, tokenizer))
        original = objective._rollouts

        def recorded(requests: list[Request], rows: Rows) -> Any:
            rollouts, scores = original(requests, rows)
            self.sampled.append((requests, rollouts))
            return rollouts, scores

        objective._rollouts = recorded  # type: ignore[method-assign]
        self.trainer = StreamTrainer(
            model,
            training_arguments(recipe, recipe.optim.max_steps, scratch),
            objective=objective,
            passes=recipe.method.repeats,
            rows=lambda: in_batches(iter(rows_of(self.texts, tokenizer)), recipe.rows_per_step),
            after_step=self._after_step,
            is_logged=lambda step: True,
            stop_requested=lambda: False,
        )
        self.trainer.train()

    def _after_step(self, step: StepMeasures) -> bool:
        logged = self.trainer.take_logged(1, step.grad_norm)
        self.losses.append(logged.loss)
        self.measures.append(logged.measures)
        return False
