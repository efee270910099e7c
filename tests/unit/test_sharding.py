"""Shards on several workers: one process's gradients, checkpoints of any number of workers."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from steps import by_workers, make_sequences, make_setup, one_step
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from finray.training.arguments import accumulation, training_arguments
from finray.training.data.batching import Rows, microbatches
from finray.training.data.stream import share
from finray.training.methods import method_of
from finray.training.model import load_model, load_tokenizer
from finray.training.recipe import Recipe
from finray.training.saving import gather_weights, save_result
from finray.training.strategy import shard, static_bytes
from finray.training.trainer import StepMeasures, StreamTrainer

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"freeze": {"last_layers": 1}},
    "lora": {"adapter": {"rank": 4}},
    "dora": {"adapter": {"rank": 4, "dora": True, "modules_to_save": ["embed_tokens"]}},
    "nf4": {"adapter": {"rank": 4}, "model": {"quantize": "nf4"}},
}


def make_recipe(base: Path, kind: str, workers: int, **optim: Any) -> Recipe:
    parts = KINDS[kind]
    return Recipe.model_validate(
        {
            "name": "x",
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": BATCH, "micro_batch_size": 1, **optim},
            "scale": {"workers": workers, "strategy": "fsdp" if workers > 1 else "auto"},
            **parts,
            "model": {"base": str(base), **parts.get("model", {})},
        }
    )


def make_model(settings: Recipe) -> Any:
    """Its adapter does something, so that all of it has a gradient."""
    torch.manual_seed(4)
    model = load_model(settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def assert_close(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 4])
def test_the_step_is_that_of_one_process(
    tiny_model: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    """Gradients clipped to a tenth of their norm, over several microbatches."""
    whole = make_recipe(tiny_model, kind, 0, max_grad_norm=0.1)
    rows = make_sequences(BATCH)
    expected, logged, _ = one_step(make_model(whole), whole, rows, tmp_path, 0, 1)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert float(norm) == pytest.approx(0.1, rel=1e-4)
    settings = make_recipe(tiny_model, kind, workers, max_grad_norm=0.1)

    def work(rank: int, world_size: int) -> dict[str, Any]:
        model = make_model(settings)
        measured, told, _ = one_step(model, settings, rows, tmp_path, rank, world_size)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        return {"gradients": measured, "logged": told}

    for saved in by_workers(workers, tmp_path, work):
        assert saved["logged"] == pytest.approx(logged, abs=1e-5)
        assert_close(saved["gradients"], expected, atol=1e-5, rtol=1e-4)
