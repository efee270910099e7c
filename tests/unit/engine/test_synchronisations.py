"""How often a step makes the host wait for the device, counted as operations on the CPU."""

import traceback
from pathlib import Path
from typing import Any

import torch
from support.steps import make_sequences, make_setup
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finray.training.config.recipe import recipe_from_dict
from finray.training.data.batching import collate, in_batches
from finray.training.engine.methods import objective_of
from finray.training.engine.trainer import StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments

STEPS = 4
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}


class Counter(TorchDispatchMode):
    """Counts operations whose result the host needs, or whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        chosen = args[1] if func is aten.index.Tensor else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
        if func in WAITING or by_mask:
            frames = [frame.filename for frame in traceback.extract_stack()]
            # transformers asks of every mask whether documents are packed.
            if not any(name.endswith("masking_utils.py") for name in frames):
                self.places.append(f"{func} in {frames[-2]}")
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_flag_of_an_earlier_one(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(tiny_model)},
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": 6, "micro_batch_size": 2},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    counter, by_step = Counter(), []

    def after_step(_: StepMeasures) -> bool:
        by_step.append(list(counter.places))
        counter.places.clear()
        return False

    trainer = StreamTrainer(
        model,
        training_arguments(recipe, STEPS, tmp_path),
        objective=objective_of(make_setup(recipe, model, tmp_path, 0, 1)),
        passes=1,
        rows=lambda: in_batches(iter(make_sequences(6 * STEPS)), 6),
        after_step=after_step,
        is_logged=lambda step: False,
        stop_requested=lambda: False,
    )
    with counter:
        trainer.train()
    assert len(by_step) == STEPS
    assert all(len(places) <= 1 for places in by_step[1:]), by_step


def test_a_batch_knows_its_trained_tokens() -> None:
    """From the host, so that no device has to look for them."""
    batch = collate(make_sequences(3))
    assert batch.trained.tolist() == (batch.targets.flatten() >= 0).nonzero().flatten().tolist()
