"""Translates the recipe into transformers' TrainingArguments."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..config.recipe import Recipe
from ..data.batching import accumulation_steps
from ..models.dtypes import choose_dtype, needs_autocast

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Number of microbatches in one optimizer step on every worker."""
    optim = recipe.optim
    rows = recipe.rows_per_step
    return accumulation_steps(rows, optim.micro_batch_size, world_size, optim.batch_size // rows)


def training_arguments(
    recipe: Recipe, total_steps: int, world_size: int, scratch: Path
) -> TrainingArguments:
    """Settings for the Trainer's step; finray does data, logging, evaluation and saving itself."""
    optim = recipe.optim
    autocast_type = choose_dtype(recipe.model) if needs_autocast(recipe) else None
    return TrainingArguments(
        output_dir=str(scratch / "trainer"),
        seed=recipe.seed,
        max_steps=total_steps,
        per_device_train_batch_size=optim.micro_batch_size,
        gradient_accumulation_steps=accumulation(recipe, world_size),
        learning_rate=optim.learning_rate,
        lr_scheduler_type=_SCHEDULES[optim.schedule],
        warmup_steps=math.floor(optim.warmup_ratio * total_steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        optim="adamw_torch",
        bf16=autocast_type == "bfloat16",
        fp16=autocast_type == "float16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=recipe.model.gradient_checkpointing,
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
