"""Fixtures of the tests of online methods: recipes and models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finray.training.config.recipe import Recipe

from .online_runs import GENERATIONS, REWARD


@pytest.fixture
def online_recipe(tiny_model: Path) -> Callable[..., Recipe]:
    """Makes a recipe of 20 steps with two prompts each, from `method` and `optim` settings."""

    def make(method: dict[str, Any], **optim: Any) -> Recipe:
        settings = {"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0}
        return Recipe.model_validate(
            {
                "name": "x",
                "seed": 5,
                "model": {"base": str(tiny_model), "dtype": "float32"},
                "method": {
                    "rewards": [{"file": "/x/rewards.py:worth", "source": REWARD}],
                    "generations": GENERATIONS,
                    "max_completion": 12,
                    **method,
                },
                "data": {"train": [{"path": "/x"}], "max_length": 64},
                "optim": {
                    "batch_size": 2 * GENERATIONS,
                    "micro_batch_size": 4,
                    "max_steps": 20,
                    **settings,
                    **optim,
                },
            }
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def model(tiny_model: Path, tokenizer: Any) -> Any:
    """A model in which every sixth token ends a completion. Copy it before training."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 6))
    return model
