"""transformers' Trainer with finray's data stream, losses and actions after a step.

The Trainer does the optimizer step: autocast, accumulation, clipping, scheduler, DDP. finray
provides the data, the method's loss over a global batch, and everything after a step.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..data.batching import Batch, Rows
from ..models.cpu_group import cpu_group
from ..models.devices import sum_type
from ..models.loading import Model
from ..models.sharding import defer_gradient_reduction, full_tensors, is_sharded
from ..models.weights import gather_weights, load_weights, save_weights
from ..objectives.objective import Objective
from .expert_load import ExpertLoad
from .failures import reading
from .gradient_sums import GradientSums
from .heartbeat import Phase
from .nonfinite import NonFiniteSteps, nonfinite_flag, propagate_nan
from .optimizer import SkippingAdamW, make_optimizer
from .random_states import load_random_state, random_state_file, save_random_state

_MICRO = 10**6


@dataclass
class Counts:
    """Sums over all workers for one optimizer step."""

    units: int
    """Loss units, which the loss is averaged over: trained tokens, pairs, …"""
    tokens: int
    stop: bool
    """True if a worker got a request to stop after this step."""
    flags: tuple[int, ...] = ()
    """For each flag, the number of workers that set it before the step."""
    data_wait: float = 0.0
    """Seconds that the worker which waited longest waited for its rows."""


@dataclass(frozen=True)
class StepMeasures:
    """Measures of an optimizer step; `take_logged` fetches the others, on logged steps only."""

    step: int
    learning_rate: float
    grad_norm: float | torch.Tensor | None


@dataclass(frozen=True)
class Logged:
    """What a log line says of the steps since the last one, over all workers."""

    loss: float
    """Mean of the steps that were not skipped; NaN if all were."""
    grad_norm: float
    """Of the last step; NaN if it has none."""
    measures: dict[str, float]
    """Means of the objective's measures in the last step, and the load of its experts."""
    skipped: list[int]
    """The skipped steps."""


class StreamTrainer(Trainer):
    """A Trainer that trains on a stream of rows with the loss of a method's objective.

    Args:
        model: the model to train.
        args: transformers' settings; its own logging, evaluation and saving are off.
        objective: the method's objective.
        passes: number of optimizer steps on the same rows.
        rows: returns an iterator over the rows of this worker's remaining steps.
        after_step: called after every optimizer step; returns True to end the training.
        is_logged: returns True if a step (counted from 1) will be logged.
        on_phase: called before the rows of a step become batches ("rollout"), and when all workers
            have theirs ("step").
        stop_requested: returns True if this worker got a stop request.
        flags: returns this worker's flags; `counts` holds their sums over all workers.
        rate_factor: the learning rate's factor by the number of steps done; None for the
            schedule in `args`.
        lora_plus_ratio: see `make_optimizer`.
        max_skipped_steps: number of non-finite steps in a row that raises NonFiniteError.
    """

    # `compute_loss` divides by the units of the whole step. The Trainer would also divide by the
    # number of microbatches, for models whose own loss takes no number of units.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        *,
        objective: Objective,
        passes: int,
        rows: Callable[[], Iterator[Rows]],
        after_step: Callable[[StepMeasures], bool],
        is_logged: Callable[[int], bool],
        stop_requested: Callable[[], bool],
        on_phase: Callable[[Phase], None] = lambda _: None,
        flags: Callable[[], tuple[bool, ...]] = tuple,
        rate_factor: Callable[[int], float] | None = None,
        lora_plus_ratio: float | None = None,
        max_skipped_steps: int = 3,
    ) -> None:
        super().__init__(model=model, args=args)
        self._lora_plus_ratio = lora_plus_ratio
        self.optimizer: torch.optim.Optimizer | None
        self.lr_scheduler: Any
        self._objective = objective
        self._passes = passes
        self._rows = rows
        self._current: list[Batch] = []
        self._after_step = after_step
        self._is_logged = is_logged
        self._stop_requested = stop_requested
        self._on_phase = on_phase
        self._flags = flags
        self._rate_factor = rate_factor
        self._handled_step = 0
        self._tr_loss: torch.Tensor
        self._adamw: SkippingAdamW | None = None
        self._is_skipped = torch.zeros(())
        self.skipped = NonFiniteSteps(args.device, max_skipped_steps, scaled=args.fp16)
        self._measured: list[torch.Tensor] = []
        self._load = ExpertLoad(model)
        self._sums = GradientSums(model.parameters(), args.world_size)
        self._empty_steps: list[int] = []
        self._is_sharded = is_sharded(model)
        self._data_wait = 0.0
        # The CPUs exchange the counts, so that a GPU never waits for them.
        self.cpu_group = cpu_group() if args.world_size > 1 else None
        self.counts = Counts(0, 0, False)
        with self.in_compute_type():
            objective.prepare()

    def in_compute_type(self) -> AbstractContextManager[None]:
        """Inside, autocast computes as in a step: also before the Trainer wraps the model, and in
        an adapted model's generation, which calls another forward."""
        autocast: AbstractContextManager[None] = self.accelerator.autocast()
        return autocast

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The AdamW of `make_optimizer`, made at the first call."""
        if self.optimizer is None:
            args = self.args
            self._adamw = make_optimizer(
                self.model.named_parameters(),
                self.get_decay_parameter_names(self.model),
                learning_rate=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                lora_plus_ratio=self._lora_plus_ratio,
            )
            self.optimizer = self._adamw
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The Trainer's schedule, or the one that `rate_factor` gives."""
        if self._rate_factor is None or self.lr_scheduler is not None:
            scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
            return scheduler
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = made = LambdaLR(optimizer, self._rate_factor)
        return made

    def get_train_dataloader(self) -> Any:
        """An iterable of this worker's steps; `max_steps` ends the training."""
        return _Steps(self._rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], torch.Tensor]:
        """The batches of one step as a single item, because their number may differ from step to
        step; and the loss units of the global batch (at least 1)."""
        step = self.state.global_step
        self.skipped.read_flags(step - 1)
        self.skipped.check()
        waits = [0] * self.args.world_size
        if step % self._passes == 0:
            since = time.monotonic()
            rows = next(epoch_iterator)
            waits[self.args.process_index] = round(_MICRO * (time.monotonic() - since))
            self._on_phase("rollout")
            with torch.no_grad(), self.in_compute_type():
                batches = self._objective.batches(step, rows)
            # Now, while the device may still compute the step before.
            self._current = [batch.to(self.args.device) for batch in batches]
        counts = torch.tensor(
            [
                sum(batch.loss_units for batch in self._current),
                sum(batch.tokens for batch in self._current),
                int(self._stop_requested()),
                *waits,
                *map(int, self._flags()),
            ]
        )
        if self.cpu_group is not None:
            dist.all_reduce(counts, group=self.cpu_group)
        self._on_phase("step")  # not before: until here a worker waits for others that save
        units, tokens, stop, *rest = counts.tolist()
        data_wait = max(rest[: len(waits)]) / _MICRO
        self._data_wait += data_wait
        # No stop between passes on the same rows: a checkpoint does not hold these rows.
        may_stop = (step + 1) % self._passes == 0
        flags = tuple(rest[len(waits) :])
        self.counts = Counts(units, tokens, stop > 0 and may_stop, flags, data_wait)
        # A number that a kernel writes: the host waits for the copy of a tensor.
        return [self._current], torch.full((), max(units, 1), device=device)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        """Always 0: the report counts tokens instead."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """No-op: `after_step` does the logging."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The sum of the objective's losses divided by the loss units of the global batch.

        DDP averages gradients over the workers, so each worker's loss is multiplied by their
        number: the gradient equals that of one process with the global batch.
        """
        assert num_items_in_batch is not None
        is_logged = self._is_logged(self.state.global_step + 1)
        with self._load.counting(is_logged):
            loss = self._objective.loss(model, inputs, is_logged)
        if loss.measures is not None:
            self._measured.append(loss.measures)
        return propagate_nan(loss.total / num_items_in_batch * self.args.world_size)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: list[Batch],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The Trainer's forward and backward pass, of each microbatch; returns their summed loss.

        The last one exchanges gradients with the other workers.
        """
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            is_last = number == len(inputs)
            with nullcontext() if is_last else self._without_exchange(model):
                total += super().training_step(model, batch, num_items_in_batch)
            self._sums.add(is_last)
        return total

    def _without_exchange(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        if self._is_sharded:
            return defer_gradient_reduction(self.model)
        kept: AbstractContextManager[None] = self.accelerator.no_sync(model=model)
        return kept

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Overrides the Trainer's method before the optimizer step.

        Skips a non-finite gradient, and a step in which there is nothing to learn.

        Returns:
            The norm of the gradient over all workers, the same on every rank.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        full_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        assert self._adamw is not None
        self._is_skipped = nonfinite_flag(full_norm)
        is_empty = self._objective.skips_step
        self._adamw.skip = torch.ones_like(self._is_skipped) if is_empty else self._is_skipped
        return full_norm

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *_: Any,
        learning_rate: float | None = None,
        **__: Any,
    ) -> None:
        """Overrides the Trainer's method after a step, which it also calls once at the end."""
        step = self.state.global_step
        if step == self._handled_step:
            return
        self._handled_step = step
        assert learning_rate is not None
        self.skipped.add(step, self._is_skipped, tr_loss)
        if self._objective.skips_step:
            self._empty_steps.append(step)
        self._tr_loss = torch.zeros_like(tr_loss)
        if self._after_step(StepMeasures(step, learning_rate, grad_norm)):
            self.control.should_training_stop = True

    def take_logged(self, steps: int, grad_norm: float | torch.Tensor | None) -> Logged:
        """What is logged after the last `steps` steps; the next call starts new means.

        The workers exchange it at once, and the host waits for one copy of it.

        Args:
            steps: number of steps since the last call.
            grad_norm: of `StepMeasures`.
        """
        self.skipped.read_flags(self.state.global_step)
        skipped = self.skipped.take_steps()
        device, workers = self.args.device, self.args.world_size
        measured = torch.stack(self._measured).sum(0) if self._measured else torch.zeros(0, 2)
        self._measured = []
        parts = [self.skipped.take_loss(), measured, self._load.take(device)]
        wide = sum_type(device)
        sums = torch.cat([part.flatten().to(device, wide) for part in parts])
        if workers > 1:
            dist.all_reduce(sums)
        norm = math.nan if grad_norm is None else grad_norm
        if isinstance(norm, torch.Tensor):
            loss, *values, norm = torch.cat([sums, norm.reshape(1).to(wide)]).tolist()
        else:
            loss, *values = sums.tolist()
        size, taken = measured.numel(), steps - len(skipped)
        means = _means(self._objective.measures, values[:size]) if size else {}
        return Logged(
            loss / workers / taken if taken else math.nan,
            norm,
            means | self._load.measures(values[size:]),
            skipped,
        )

    def take_empty_steps(self) -> list[int]:
        """The steps since the last call in which there was nothing to learn."""
        steps, self._empty_steps = self._empty_steps, []
        return steps

    def take_data_wait(self, steps: int) -> float:
        """Mean over the last `steps` steps of `Counts.data_wait`; the next call starts at zero."""
        total, self._data_wait = self._data_wait, 0.0
        return total / max(1, steps)

    def write_state(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint that `train` can resume from.

        Rank 0 writes the full weights (adapter or model, safetensors), optimizer, scheduler, scaler
        and the Trainer's state; every rank writes the state of its random generators.
        """
        assert self.optimizer is not None
        weights, optimizer = gather_weights(self.model), full_tensors(self.optimizer.state_dict())
        if self.args.process_index == 0:
            save_weights(self.model, folder, weights)
            torch.save(optimizer, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            self._save_scaler(str(folder))
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        args = self.args
        own = random_state_file(folder, args.process_index, args.world_size)
        save_random_state(own, args.device)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with reading(Path(resume_from_checkpoint), "the weights"):
            load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the checkpoint's state, but keep the recipe's settings (rates, decay, betas).

        Population-based training continues from another trial's checkpoint with other settings.
        The state is loaded on the CPU: the Trainer would load all of it on every GPU. A worker of a
        sharded model reads no more than its shard of it.
        """
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        own = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        scheduler = self.lr_scheduler
        for name, part in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, scheduler)):
            file = Path(checkpoint) / name
            with reading(Path(checkpoint), name):
                state = torch.load(file, "cpu", weights_only=True, mmap=is_sharded(self.model))
                part.load_state_dict(state)
        scheduler.base_lrs = [group["initial_lr"] for group in own]
        for group, settings, factor in zip(
            self.optimizer.param_groups, own, scheduler.lr_lambdas, strict=True
        ):
            group.update(settings, lr=settings["initial_lr"] * factor(scheduler.last_epoch))
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load this rank's state; with another number of workers, seed from seed, step and rank."""
        if checkpoint is None:
            return
        args = self.args
        saved = len(list(Path(checkpoint).glob("rng_state*.pth")))
        if saved == args.world_size:
            with reading(Path(checkpoint), "rng_state"):
                own = random_state_file(Path(checkpoint), args.process_index, args.world_size)
                load_random_state(own, args.device)
            return
        words = (args.seed, self.state.global_step, args.process_index)
        transformers.set_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint), SCALER_NAME):
                super()._load_scaler(checkpoint)

    def load_weights(self, folder: str) -> None:
        """Load the weights of a checkpoint, without optimizer and random state."""
        self._load_from_checkpoint(folder)

    @torch.no_grad()
    def evaluate_held_out(self, microbatches: Iterator[Rows]) -> dict[str, float]:
        """eval_loss and the objective's measures over the held-out rows of all workers."""
        model = self.model
        training = model.training
        model.eval()
        with self.in_compute_type():
            total = self._objective.evaluate_held_out(microbatches, self.args.device)
        model.train(training)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        names = ("loss", *self._objective.measures)
        means = _means(names, total.flatten().tolist())
        return {f"eval_{name}": mean for name, mean in means.items()}


def check_state(checkpoint: Path, step: int) -> None:
    """Check that the Trainer can read its state in a checkpoint, and that it is of this step.

    Raises:
        RetryError: it cannot, or it is not.
    """
    with reading(checkpoint, TRAINER_STATE_NAME):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != step:
            raise ValueError(f"it is of step {state.global_step}")


def _means(names: tuple[str, ...], totals: list[float]) -> dict[str, float]:
    """Mean of each measure with values.

    Args:
        names: the measures.
        totals: sum and count of each, one after the other.
    """
    each = zip(names, totals[::2], totals[1::2], strict=True)
    return {name: total / count for name, total, count in each if count > 0}


class _Steps:
    """An iterable without a length, as the Trainer expects for a stream."""

    def __init__(self, rows: Callable[[], Iterator[Rows]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Rows]:
        return self._rows()
