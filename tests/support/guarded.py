"""Whole runs in this process, whose loss a test can spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch
from finray.training.launch.in_process import InProcessLauncher
from finray.training.objectives.cross_entropy import TokenObjective
from finray.training.objectives.objective import Loss
from finray.training.run import train

Spoil = Callable[[Batch, torch.Tensor], torch.Tensor]


def recipe(base: Path, data: Path, storage: Path, name: str, **optim: Any) -> Recipe:
    """Twelve steps of eight rows, one row a sequence, a checkpoint every four steps."""
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"base": str(base)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": str(data)}], "max_length": 96, "packing": False},
            "optim": {
                "learning_rate": 3e-2,
                "max_steps": 12,
                "batch_size": 8,
                "micro_batch_size": 4,
                **optim,
            },
            "scale": {"workers": 0},
            "checkpoint": {"every_steps": 4, "keep": 9},
            "log": {"every_steps": 1, "to": []},
            "storage": str(storage),
        }
    )


def run_to_the_end(settings: Recipe) -> dict[str, Any]:
    """Train in this process; returns run.json of the finished run."""
    return train(settings, InProcessLauncher())


def spoil(monkeypatch: pytest.MonkeyPatch, change: Spoil) -> None:
    """Put what `change` makes of a training batch's loss in its place."""
    original = TokenObjective.loss

    def loss(self: Any, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        honest = original(self, model, batch, measured)
        if not model.training:
            return honest
        return Loss(change(batch, honest.total), honest.measures)

    monkeypatch.setattr(TokenObjective, "loss", loss)


def lines(run: Path) -> dict[int, dict[str, Any]]:
    """The logged steps of a run; a constant that JSON does not know is a fault."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in metrics.jsonl")

    rows = [json.loads(line, parse_constant=refuse) for line in text]
    return {row["step"]: row for row in rows if "loss" in row}


def losses(run: Path) -> dict[int, float]:
    return {step: line["loss"] for step, line in lines(run).items()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return loaded


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert losses(run) == losses(other)
