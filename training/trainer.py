"""transformers' Trainer, fed by finray's stream and stripped of what a step does not need.

The optimizer step is the Trainer's own: autocast, accumulation, clipping, scheduler, DDP. Ours
are the data, the loss over a global batch, and what happens after a step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from .data.batching import IGNORED, Batch
from .errors import RunError
from .model import Model, forward_arguments

_SLICE = 32


@dataclass
class Counts:
    """What one optimizer step saw, over all workers."""

    trainable: int
    tokens: int
    stop: bool
    """Somebody asked for the run to stop after this step."""


@dataclass(frozen=True)
class StepMeasures:
    """What is known after an optimizer step; the loss is fetched only where it is wanted."""

    step: int
    learning_rate: float
    grad_norm: float | torch.Tensor | None


class StreamTrainer(Trainer):
    """A Trainer whose batches come from an iterator of `Batch`.

    Args:
        model: what to train.
        args: transformers' settings; its own logging, evaluation and saving are off.
        batches: makes the iterator over all remaining microbatches of this worker.
        after_step: called after every optimizer step; returns True to end the training.
        is_logged: whether a step (counted from 1) will be logged.
        stop_requested: whether this worker was asked to stop.
    """

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        *,
        batches: Callable[[], Iterator[Batch]],
        after_step: Callable[[StepMeasures], bool],
        is_logged: Callable[[int], bool],
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(model=model, args=args)
        self._batches = batches
        self._after_step = after_step
        self._is_logged = is_logged
        self._stop_requested = stop_requested
        self._forward = forward_arguments(model)
        self._handled_step = 0
        self._tr_loss: torch.Tensor
        self._measured: list[torch.Tensor] = []
        # Counts are exchanged between CPUs, so that a GPU never waits for them.
        self._cpu_group = dist.new_group(backend="gloo") if args.world_size > 1 else None
        self.counts = Counts(0, 0, False)

    def get_train_dataloader(self) -> Any:
        """This worker's microbatches, without a length: `max_steps` ends the training."""
        return _Microbatches(self._batches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The microbatches of one step, and the trainable tokens of the whole global batch."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.tensor(
            [
                sum(batch.trainable for batch in batches),
                sum(batch.tokens for batch in batches),
                int(self._stop_requested()),
            ]
        )
        if self._cpu_group is not None:
            dist.all_reduce(counts, group=self._cpu_group)
        trainable, tokens, stop = counts.tolist()
        self.counts = Counts(trainable, tokens, stop > 0)
        return batches, torch.tensor(max(trainable, 1), device=device)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the report speaks of tokens."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Silent: `after_step` tells what there is to tell."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of the token losses over the trainable tokens of the global batch.

        DDP averages gradients over the workers, so each worker's share is scaled by their number:
        the gradient is that of one process that sees the whole batch.
        """
        assert num_items_in_batch is not None
        log_probabilities = to_log_probabilities(self.kept_logits(model, inputs))
        loss = token_loss(log_probabilities, inputs.targets)
        if self._is_logged(self.state.global_step + 1):
            self._measured.append(measure(log_probabilities.detach(), inputs.targets))
        share: torch.Tensor = loss / num_items_in_batch * self.args.world_size
        return share

    def kept_logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the columns that bear loss: (sequences, columns, vocabulary)."""
        inputs = {name: value for name, value in batch.inputs.items() if name in self._forward}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        if "logits_to_keep" in self._forward:
            return logits
        return logits[:, batch.inputs["logits_to_keep"]]

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *_: Any,
        learning_rate: float | None = None,
        **__: Any,
    ) -> None:
        """The Trainer's seam for what follows a step; it also calls it once at the end."""
        step = self.state.global_step
        if step == self._handled_step:
            return
        self._handled_step = step
        assert learning_rate is not None
        if self._after_step(StepMeasures(step, learning_rate, grad_norm)):
            self.control.should_training_stop = True

    def take_loss(self, steps: int) -> float:
        """Mean loss of the last `steps` steps over all workers; starts a new mean.

        Raises:
            RunError: where it is not finite.
        """
        mean = self._tr_loss / steps
        self._tr_loss = torch.zeros_like(self._tr_loss)
        if self.args.world_size > 1:
            dist.all_reduce(mean)
            mean = mean / self.args.world_size
        loss = float(mean)
        if not torch.isfinite(mean):
            raise RunError(
                f"step {self.state.global_step}: the loss is {loss}; a lower "
                "optim.learning_rate or a longer optim.warmup_ratio usually cures it"
            )
        return loss

    def take_measures(self) -> dict[str, float]:
        """token_accuracy and entropy (nats) of the logged step, over all workers."""
        if not self._measured:
            return {}
        total = torch.stack(self._measured).sum(0)
        self._measured = []
        if self.args.world_size > 1:
            dist.all_reduce(total)
        correct, entropy, count = total.tolist()
        count = max(count, 1.0)
        return {"token_accuracy": correct / count, "entropy": entropy / count}

    def write_state(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint that `train` can resume from.

        Rank 0 writes weights (adapter or model, safetensors), optimizer, scheduler, scaler and
        the Trainer's state; every rank its random generators.
        """
        if self.args.process_index == 0:
            self.model.save_pretrained(folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._save_rng_state(str(folder))

    def load_weights(self, folder: str) -> None:
        """Take the weights of a checkpoint, and nothing else of it."""
        self._load_from_checkpoint(folder)

    @torch.no_grad()
    def held_out_loss(self, batches: Iterator[Batch]) -> dict[str, float]:
        """eval_loss and eval_token_accuracy over all workers' batches."""
        model = self.model
        training = model.training
        model.eval()
        total = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        with self.accelerator.autocast():
            for batch in batches:
                here = batch.to(self.args.device)
                log_probabilities = to_log_probabilities(self.kept_logits(model, here))
                loss = token_loss(log_probabilities, here.targets).double()
                total += torch.stack([loss, *measure(log_probabilities, here.targets)[[0, 2]]])
        model.train(training)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        loss, correct_sum, count_sum = total.tolist()
        count_sum = max(count_sum, 1.0)
        return {"eval_loss": loss / count_sum, "eval_token_accuracy": correct_sum / count_sum}


class _Microbatches:
    """Re-iterable without a length, as the Trainer asks of a stream."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


def to_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax in float32, flattened to (tokens, vocabulary); loss and measures share it."""
    return F.log_softmax(logits.flatten(0, 1).float(), dim=-1)


def token_loss(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies (nats) of all targets that are not IGNORED."""
    return F.nll_loss(log_probabilities, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def measure(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(correct tokens, sum of entropies in nats, tokens) as float64, of targets not IGNORED."""
    flat = targets.flatten()
    wanted = flat != IGNORED
    chosen = log_probabilities.gather(1, flat.clamp(min=0)[:, None]).squeeze(1)
    correct = (chosen >= log_probabilities.amax(-1)) & wanted
    # In slices that stay in the processor's cache: the whole would be written out twice.
    entropies = torch.cat(
        [-torch.linalg.vecdot(rows.exp(), rows) for rows in torch.split(log_probabilities, _SLICE)]
    )
    return torch.stack([correct.sum(), entropies[wanted].sum(), wanted.sum()]).double()
