"""Random states after a resume with the same and with a larger number of workers."""

import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finray.training.config.recipe import Recipe
from finray.training.engine.random_states import (
    load_random_state,
    random_state_file,
    save_random_state,
)
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
    device = torch.device("cpu")
    made.args = Mock(seed=0, world_size=world_size, process_index=rank, device=device)
    return made


def test_a_resumed_run_draws_what_it_would_have_drawn(tiny_model: Path, tmp_path: Path) -> None:
    def draw(rank: int, world_size: int) -> float:
        resumed = trainer(tiny_model, tmp_path, rank, world_size)
        torch.manual_seed(1)
        resumed._load_rng_state(str(tmp_path))
        return float(torch.rand(()))

    expected = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        save_random_state(random_state_file(tmp_path, rank, 2), torch.device("cpu"))
        expected.append(float(torch.rand(())))
    assert [draw(rank, 2) for rank in range(2)] == expected
    # With another number of workers: none repeats another's, and all are the same next time.
    fresh = [draw(rank, 3) for rank in range(3)]
    assert len({*fresh, *expected}) == 5
    assert draw(0, 1) == draw(0, 1)


def test_a_worker_goes_on_with_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it has then, and however many it sees."""
    on_gpu, on_cpu, file = torch.device("cuda", 3), torch.device("cpu"), tmp_path / "rng_state.pth"
    current = torch.tensor([7, 8], dtype=torch.uint8)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    save_random_state(file, on_gpu)
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    for device in (torch.device("cuda", 0), on_cpu):
        load_random_state(file, device)
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn
    assert len(given) == 1 and given[0].equal(current)


STATE = torch.arange(16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("saved", "expected"), [(STATE, [STATE]), ([STATE], [STATE]), ([STATE] * 8, [])]
)
def test_states_as_transformers_saved_them_are_read(
    saved: Any, expected: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of several GPUs that a process saw do not say which is its own."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": saved,
    }
    torch.save(states, tmp_path / "rng_state.pth")
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    load_random_state(tmp_path / "rng_state.pth", torch.device("cuda", 0))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn
    torch.testing.assert_close(given, expected)
