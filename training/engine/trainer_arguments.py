"""Translates the recipe into transformers' TrainingArguments."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

from ..config.recipe import Recipe
from ..models.devices import device_kind
from ..models.dtypes import choose_dtype, needs_autocast
from ..records.resume import warmup_steps

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class OneDeviceArguments(TrainingArguments):
    """Settings of a process that trains on one device, however many it sees.

    The Trainer would wrap the model in DataParallel, which copies it for every step and splits the
    microbatch in ways that its documents do not allow.
    """

    @property
    def n_gpu(self) -> int:
        """1 on a GPU, 0 elsewhere."""
        return min(1, int(super().n_gpu))


def training_arguments(recipe: Recipe, total_steps: int, scratch: Path) -> TrainingArguments:
    """Settings for the Trainer's step; finray does data, accumulation, logging, evaluation and
    saving itself."""
    optim = recipe.optim
    autocast_type = choose_dtype(recipe.model) if needs_autocast(recipe) else None
    return OneDeviceArguments(
        output_dir=str(scratch / "trainer"),
        seed=recipe.seed,
        max_steps=total_steps,
        per_device_train_batch_size=recipe.microbatch,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=_SCHEDULES[optim.schedule],
        warmup_steps=warmup_steps(recipe, total_steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        optim="adamw_torch",
        bf16=autocast_type == "bfloat16",
        fp16=autocast_type == "float16",
        use_cpu=device_kind() == "cpu",
        activation_checkpointing=recipe.model.checkpoints,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,  # the stream itself starts at the checkpoint's position
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def rate_factor(recipe: Recipe, ends: Sequence[int]) -> Callable[[int], float] | None:
    """The learning rate's factor by the number of steps done, for schedules one after the other.

    Args:
        recipe: holds the kind of schedule, and the share of warm-up steps of each.
        ends: the last step of each schedule.

    Returns:
        None for a single schedule, which `training_arguments` holds.
    """
    if len(ends) < 2:
        return None
    starts = [0, *ends[:-1]]
    factors = [
        get_scheduler(
            _SCHEDULES[recipe.optim.schedule],
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=warmup_steps(recipe, end - start),
            num_training_steps=end - start,
        ).lr_lambdas[0]
        for start, end in pairwise([0, *ends])
    ]

    def factor(step: int) -> float:
        index = min(bisect_right(starts, step) - 1, len(factors) - 1)
        return float(factors[index](step - starts[index]))

    return factor
