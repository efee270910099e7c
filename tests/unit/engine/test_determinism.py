"""The recipe's `deterministic`: torch's switches while a worker runs."""

import os
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.steps import make_sequences, one_step
from transformers import AutoModelForCausalLM

from finray.training.config.recipe import recipe_from_dict
from finray.training.engine.determinism import deterministic
from finray.training.models.devices import DETERMINISTIC


def test_the_switches_hold_inside_and_return() -> None:
    before = {name: os.environ.get(name) for name in DETERMINISTIC}
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert {name: os.environ.get(name) for name in DETERMINISTIC} == DETERMINISTIC
    assert not torch.are_deterministic_algorithms_enabled()
    assert {name: os.environ.get(name) for name in DETERMINISTIC} == before
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_step_on_a_cpu_is_the_same_with_it(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(tiny_model)},
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": 4, "micro_batch_size": 2},
        }
    )
    taken = []
    for active in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with deterministic(active):
            taken.append(one_step(model, recipe, make_sequences(4), tmp_path, 0, 1)[0])
    assert all(gradient.equal(taken[1][name]) for name, gradient in taken[0].items())


def test_vllm_contradicts_it() -> None:
    values = {
        "name": "x",
        "deterministic": True,
        "model": {"base": "org/model"},
        "adapter": {"rank": 4},
        "method": {
            "kind": "grpo",
            "rollout": "vllm",
            "rewards": [{"model": "org/reward"}],
        },
        "data": {"train": [{"path": "/x"}]},
    }
    with pytest.raises(ValidationError, match="deterministic contradicts"):
        recipe_from_dict(values)
