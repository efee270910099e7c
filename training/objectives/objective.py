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
    """The parts of a run that an objective is made from."""

    recipe: Recipe
    model: Model
    """The model that is trained, as it is before the first step, not wrapped by DDP."""
    tokenizer: Any
    prepared: Prepared
    rank: int
    world_size: int
    device: torch.device
    """Where the model will be trained; it is not there yet."""
    strategy: Strategy = "ddp"

    def place(self, model: Model) -> Model:
        """A whole model on the CPU, brought to where it computes as the strategy says."""
        if self.strategy == "fsdp":
            shard(model, self.recipe, self.device)
            return model
        placed: Model = model.to(self.device)
        return placed


@dataclass(frozen=True)
class Loss:
    """The result of a forward pass."""

    total: torch.Tensor
    """Sum of the losses over the batch's loss units, with its graph."""
    measures: torch.Tensor | None
    """(measures, 2) in float64: sum and count of each, where they are requested."""


class Objective:
    """From the rows of a step to a loss. A method overrides what it does differently.

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
        """Tensors for one forward pass."""
        return collate(rows)

    def batches(self, step: int, microbatches: list[Rows]) -> list[Batch]:
        """This worker's forward passes of one optimizer step, as many as it has microbatches.

        Called without a graph, under autocast, before the step.

        Args:
            step: the step, counted from 0.
            microbatches: the step's rows.
        """
        return [self.collate(rows) for rows in microbatches]

    def loss(self, model: torch.nn.Module, batch: Batch, measured: bool) -> Loss:
        """The loss of a batch.

        Args:
            model: the model, wrapped as it is trained.
            batch: on the model's device.
            measured: whether to return the measures too.
        """
        raise NotImplementedError

    def examples(self) -> list[dict[str, Any]]:
        """Examples from the last batches for people to read, as JSON objects."""
        return []

    def evaluate_held_out(self, microbatches: Iterator[Rows], device: torch.device) -> torch.Tensor:
        """Measure this worker's share of the held-out rows; called without a graph.

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
        taken = forward_arguments(model) if is_other else self._forward
        inputs = {name: value for name, value in batch.inputs.items() if name in taken}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        if "logits_to_keep" in taken:
            return logits
        return logits[:, batch.inputs["logits_to_keep"]]
