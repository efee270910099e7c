"""The interface of objectives, from the rows of a step to a loss, and their common parts."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from ..config.recipe import Recipe
from ..config.sections import FLAT, Isolation, Strategy
from ..data.batching import PADDING_ROW, Batch, Rows, collate, collate_flat
from ..data.microbatches import Division, number_of_parts
from ..data.prepared import Prepared
from ..models.attention import attend_by_documents
from ..models.cpu_group import cpu_group
from ..models.devices import sum_type
from ..models.isolation import kept_columns, outputs_of
from ..models.loading import Model, forward_arguments
from ..models.output_head import OutputHead, find_head
from ..models.rotary import length_border
from ..models.sharding import shard
from .logprobs import cross_entropies


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
    """The device to train on; `place` moves the model there."""
    strategy: Strategy = "ddp"
    isolation: Isolation | None = "positions"
    """How the model keeps texts that share a row apart; None for one text a row."""
    shares_prefixes: bool = False
    """True if texts of a row that begin with the same tokens may share them."""
    evaluation_parts: int = 1
    """Into how many parts an evaluation's batches are divided; 1 for none."""
    beat: Callable[[], object] = lambda: None
    """Reports progress; long computations call it, so that they are not taken for a hang."""

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


@dataclass(frozen=True)
class TokenLosses:
    """Cross-entropies of a batch's trained tokens."""

    losses: torch.Tensor
    """(trained tokens,) in nats, or their sum, with its graph."""
    statistics: torch.Tensor
    """Those of `cross_entropies`."""
    auxiliary: torch.Tensor | None
    """The model's own auxiliary loss, weighted as it does."""


_Traits: TypeAlias = tuple[frozenset[str], OutputHead | None]
"""Parameter names of a model's forward, and its output head."""


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
        self.skips_step = False
        """True if the last `batches` hold nothing to learn: their step changes no weights."""
        self.temperature = 1.0
        """Divides the logits."""
        self._isolation = setup.isolation
        self._shares = setup.isolation == "documents" and setup.shares_prefixes
        self._traits: dict[tuple[int, bool], _Traits] = {}
        self.division = Division.of(
            setup.recipe,
            is_flat=setup.isolation in FLAT,
            packs=setup.recipe.packs and setup.isolation is not None,
            border=length_border(setup.model.config),
        )
        """How the rows of a step are divided into forward passes."""
        self.evaluated = self.division.divided(setup.evaluation_parts)
        """How held-out rows are."""
        # The CPUs exchange the numbers of parts, so that a GPU never waits for them.
        needs_group = self.division.varies and setup.world_size > 1
        self._cpus = cpu_group() if needs_group else None
        if setup.isolation == "documents":
            attend_by_documents(setup.model)

    def collate(self, rows: Rows) -> Batch:
        """The rows as tensors for one forward pass."""
        return self.assemble(rows)

    def assemble(self, sequences: Rows, pad: int = 0) -> Batch:
        """Sequences as tensors: on a flat row, if the model keeps them apart there; else padded."""
        if self.division.is_flat:
            return collate_flat(sequences, self._shares)
        return collate(sequences, pad)

    def parts(self, rows: Rows) -> list[list[int]]:
        """The places of the rows of each forward pass of a step; every worker has equally many, of
        which the last may be empty.

        Args:
            rows: this worker's, with their final lengths.
        """
        parts = self.division.parts(rows)
        if self._cpus is not None:
            most = torch.tensor(len(parts))
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._cpus)
            number = int(most)
        elif self.division.varies:
            number = len(parts)
        else:
            recipe, per_step = self.recipe, self.recipe.rows_per_step
            each = recipe.optim.batch_size // per_step
            number = number_of_parts(per_step, self.division.rows, self.world_size, each)
        return parts + [[] for _ in range(len(parts), number)]

    def prepare(self) -> None:
        """Look for the output head, before anything is counted; called under autocast."""
        training = self.model.training
        self.model.train()
        self._traits_of(self.model)
        self.model.train(training)

    def batches(self, step: int, rows: Rows) -> list[Batch]:
        """The batches for this worker's forward passes in one optimizer step.

        Called without gradients, under autocast, before the step.

        Args:
            step: the step, counted from 0.
            rows: the step's rows on this worker, in their order.
        """
        rows = list(self.division.split(rows))
        return [
            self.collate([rows[place] for place in part] or [PADDING_ROW])
            for part in self.parts(rows)
        ]

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
        wide = sum_type(device)
        total = torch.zeros(1 + len(self.measures), 2, dtype=wide, device=device)
        for rows in microbatches:
            batch = self.collate(rows).to(device)
            loss = self.loss(self.model, batch, measured=True)
            assert loss.measures is not None
            total[0] += torch.stack([loss.total.to(wide), loss.total.new_tensor(batch.loss_units)])
            total[1:] += loss.measures
        return total

    def log_probabilities(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probabilities (nats) of the targets: (sequences, columns), 0 for IGNORED ones.

        Args:
            model: the model, which may be wrapped for training.
            batch: the batch, on the model's device.
        """
        losses = self.token_losses(model, batch).losses
        empty = losses.new_zeros(batch.targets.numel())
        return empty.index_copy(0, batch.trained, -losses).view(batch.targets.shape)

    def token_losses(
        self,
        model: torch.nn.Module,
        batch: Batch,
        *,
        summed: bool = False,
        measured: bool = False,
    ) -> TokenLosses:
        """Cross-entropies of the batch's trained tokens.

        The model's forward pass computes them in place of its logits, because the weights of a
        sharded model exist only there. Arguments as for `log_probabilities` and `cross_entropies`.
        """
        plain = model if isinstance(model, Model) else self.model
        accepted, head = self._traits_of(plain)
        computed: list[tuple[torch.Tensor, torch.Tensor]] = []

        def compute(values: torch.Tensor) -> None:
            kept = kept_columns(values, batch.inputs, accepted).flatten(0, 1)
            if len(batch.trained) < len(kept):
                kept = kept.index_select(0, batch.trained)
            tokens = batch.targets.flatten()[batch.trained]
            of_tokens = cross_entropies(
                kept,
                tokens,
                head,
                temperature=self.temperature,
                summed=summed,
                measured=measured,
            )
            computed.append(of_tokens)

        with nullcontext() if head is None else head.capturing(compute):
            outputs = outputs_of(model, batch, accepted, self._isolation, plain.config)
        if head is None:
            compute(outputs.logits)
        losses, statistics = computed[0]
        if head is not None:
            losses = losses + outputs.logits.sum()
        return TokenLosses(losses, statistics, _auxiliary(outputs, plain.config))

    def _traits_of(self, model: Model) -> _Traits:
        """What the model's forward takes, and its output head, which the first call looks for."""
        key = id(model), model.training
        if key not in self._traits:
            accepted = forward_arguments(model)

            def run() -> torch.Tensor:
                nothing = self.assemble([PADDING_ROW]).to(model.device)
                outputs = outputs_of(model, nothing, accepted, self._isolation, model.config)
                logits: torch.Tensor = outputs.logits
                return logits

            self._traits[key] = accepted, find_head(model, run)
        return self._traits[key]


def _auxiliary(outputs: Any, config: Any) -> torch.Tensor | None:
    """The model's own auxiliary loss, weighted as it does.

    A mixture of experts has one if its configuration sets output_router_logits: it balances the
    load of the experts.
    """
    loss: torch.Tensor | None = outputs.get("aux_loss")
    if loss is None:
        return None
    settings = config.get_text_config().to_dict()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return loss * next((settings[name] for name in names if settings.get(name)), 0.0)
