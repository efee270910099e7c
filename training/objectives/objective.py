"""The interface of objectives, from the rows of a step to a loss, and their common parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config.recipe import Recipe
from ..data.batching import Batch, Rows, collate
from ..data.prepared import Prepared
from ..models.loading import Model, forward_arguments
from ..models.sharding import Strategy, shard


@dataclass(frozen=True)
class Setup:
    """The parts of a run that an objective needs."""

    recipe: Recipe
    model: Model
    """The model to train, in its state before the first step, not wrapped by DDP."""
    tokenizer: Any
    prepared: Prepared
    rank: int
    world_size: int
    device: torch.device
    """The device to train on; the model is not on it yet."""
    strategy: Strategy = "ddp"

    def place(self, model: Model) -> Model:
        """Move a full model from the CPU to the device, or shard it, as the strategy says."""
        if self.strategy == "fsdp":
            shard(model, self.recipe, self.device)
            return model
        placed: Model = model.to(self.device)
        return placed


@dataclass(frozen=True)
class Loss:
    """The result of a forward pass."""

    total: torch.Tensor
    """Sum of the losses over the batch's loss units, a scalar with its graph."""
    measures: torch.Tensor | None
    """(measures, 2) in float64: sum and count of each; None if they are not requested."""


class Objective:
    """Computes a loss from the rows of a step. A method overrides the parts that differ.

    All ranks call the same functions in the same order, so that they may communicate.
    """

    def __init__(self, setup: Setup) -> None:
        self.recipe = setup.recipe
        self.world_size = setup.world_size
        self.device = setup.device
        self.measures = setup.recipe.method.measures
        self.model = setup.model
        self._forward = forward_arguments(setup.model)

    def collate(self, rows: Rows) -> Batch:
        """The rows as tensors for one forward pass."""
        return collate(rows)

    def batches(self, step: int, microbatches: list[Rows]) -> list[Batch]:
        """The batches for this worker's forward passes in one optimizer step, one per microbatch.

        Called without gradients, under autocast, before the step.

        Args:
            step: the step, counted from 0.
            microbatches: the step's rows.
        """
        return [self.collate(rows) for rows in microbatches]

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """The loss of a batch.

        Args:
            model: the model, wrapped for training.
            batch: the batch, on the model's device.
            measured: True to return the measures too.
        """
        raise NotImplementedError

    def examples(self) -> list[dict[str, Any]]:
        """Examples from the last batches for the report, as JSON objects."""
        return []

    def evaluate_held_out(self, microbatches: Iterator[Rows], device: torch.device) -> torch.Tensor:
        """Measure this worker's share of the held-out rows; called without gradients.

        Returns:
            (1 + measures, 2) in float64: sum and count of the loss, then of each measure.
        """
        total = torch.zeros(1 + len(self.measures), 2, dtype=torch.float64, device=device)
        for rows in microbatches:
            batch = self.collate(rows).to(device)
            loss = self.loss(self.model, batch, measured=True)
            assert loss.measures is not None
            total[0] += torch.stack([loss.total.double(), loss.total.new_tensor(batch.loss_units)])
            total[1:] += loss.measures
        return total

    def kept_logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the columns with trained tokens: (sequences, columns, vocabulary)."""
        is_other = isinstance(model, Model) and model is not self.model
        accepted = forward_arguments(model) if is_other else self._forward
        inputs = {name: value for name, value in batch.inputs.items() if name in accepted}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        if "logits_to_keep" in accepted:
            return logits
        return logits[:, batch.inputs["logits_to_keep"]]
