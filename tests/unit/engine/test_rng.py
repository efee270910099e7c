"""Random states after a resume with the same and with a larger number of workers."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from transformers import AutoModelForCausalLM

from finray.training.config.recipe import Recipe
from finray.training.engine.trainer import StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments


def trainer(base: Path, scratch: Path, rank: int, world_size: int) -> StreamTrainer:
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}}
    )
    arguments: Any = training_arguments(recipe, 10, scratch)
    made = StreamTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        objective=Mock(),
        passes=1,
        rows=lambda: iter([]),
        after_step=lambda _: False,
        is_logged=lambda _: False,
        stop_requested=lambda: False,
    )
    made.state.global_step = 7
    made.args = Mock(seed=0, world_size=world_size, process_index=rank)
    return made


def test_a_resumed_run_draws_what_it_would_have_drawn(tiny_model: Path, tmp_path: Path) -> None:
    def draw(rank: int, world_size: int) -> float:
        resumed = trainer(tiny_model, tmp_path, rank, world_size)
        torch.manual_seed(1)
        resumed._load_rng_state(str(tmp_path))
        return float(torch.rand(()))

    expected = []
    for rank in range(2):
        interrupted = trainer(tiny_model, tmp_path, rank, 2)
        torch.manual_seed(100 + rank)
        interrupted._save_rng_state(str(tmp_path))
        expected.append(float(torch.rand(())))
    assert [draw(rank, 2) for rank in range(2)] == expected
    # With another number of workers: none repeats another's, and all are the same next time.
    fresh = [draw(rank, 3) for rank in range(3)]
    assert len({*fresh, *expected}) == 5
    assert draw(0, 1) == draw(0, 1)
