"""TRL's own trainers with finray's settings, weights and order; for tests and benchmarks.

To add a method: a function from the recipe's method to TRL's trainer, its settings and the columns
where the tokens of a row are found.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from finray.training.config.recipe import Recipe
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence, Slice, stream
from finray.training.models.loading import Model, load_model

Row = dict[str, Any]


@dataclass(frozen=True)
class Counterpart:
    """TRL's trainer for a method of finray."""

    trainer: type[transformers.Trainer]
    config: type[transformers.TrainingArguments]
    settings: dict[str, Any]
    """Settings by TRL's names."""
    texts: Callable[[Row], list[list[int]]]
    """Returns the token ids of the texts that TRL made from a row."""


def _dpo(method: Any) -> Counterpart:
    from trl import DPOConfig, DPOTrainer

    divergences = {"js": "js_divergence", "alpha": "alpha_divergence"}
    settings = {
        "loss_type": list(method.losses),
        "loss_weights": list(method.losses.values()),
        "beta": method.beta,
        "label_smoothing": method.label_smoothing,
        "discopop_tau": method.discopop_tau,
        "f_divergence_type": divergences.get(method.divergence, method.divergence),
        "f_alpha_divergence_coef": method.divergence_alpha,
        "precompute_ref_log_probs": method.precompute_reference,
    }
    return Counterpart(DPOTrainer, DPOConfig, settings, _after_prompt("chosen", "rejected"))


def _kto(method: Any) -> Counterpart:
    from trl import KTOConfig, KTOTrainer

    settings = {
        "loss_type": {"kto": "kto", "apo_zero": "apo_zero_unpaired"}[method.loss],
        "beta": method.beta,
        "desirable_weight": method.desirable_weight,
        "undesirable_weight": method.undesirable_weight,
    }
    return Counterpart(KTOTrainer, KTOConfig, settings, _after_prompt("completion"))


def _orpo(method: Any) -> Counterpart:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return Counterpart(ORPOTrainer, ORPOConfig, {"beta": method.beta}, _input_ids)


def _cpo(method: Any) -> Counterpart:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {
        "beta": method.beta,
        "cpo_alpha": method.sft_weight,
        "label_smoothing": method.label_smoothing,
    }
    if method.kind == "simpo":
        settings |= {"loss_type": "simpo", "simpo_gamma": method.gamma}
    else:
        settings["loss_type"] = method.loss
    return Counterpart(CPOTrainer, CPOConfig, settings, _input_ids)


def _reward(method: Any) -> Counterpart:
    from trl import RewardConfig, RewardTrainer

    centre = method.center_coefficient or None
    settings = {"center_rewards_coefficient": centre}
    return Counterpart(
        RewardTrainer, RewardConfig, settings, lambda row: [row["chosen_ids"], row["rejected_ids"]]
    )


COUNTERPARTS: dict[str, Callable[[Any], Counterpart]] = {
    "dpo": _dpo,
    "kto": _kto,
    "orpo": _orpo,
    "cpo": _cpo,
    "simpo": _cpo,
    "reward": _reward,
}
"""By the recipe's `method.kind`."""


def _after_prompt(*answers: str) -> Callable[[Row], list[list[int]]]:
    return lambda row: [row["prompt_ids"] + row[f"{name}_ids"] for name in answers]


def _input_ids(row: Row) -> list[list[int]]:
    return [row["chosen_input_ids"], row["rejected_input_ids"]]


def in_order(recipe: Recipe, prepared: Prepared, steps: int) -> list[Sequence]:
    """The rows of the run's first steps, in finray's order."""
    part = Slice(
        folder=prepared.files,
        split=prepared.manifest.train,
        seed=recipe.seed,
        batch_size=recipe.rows_per_step,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=steps,
    )
    return list(stream(part, on_ray=False))


def first_model(recipe: Recipe) -> Model:
    """The model with the same initial weights as in finray."""
    transformers.set_seed(recipe.seed)
    return load_model(recipe, recipe.method.head)


def make_trainer(
    recipe: Recipe, model: Model, tokenizer: Any, rows: Iterable[Row], folder: Path
) -> Any:
    """TRL's trainer for source rows in this order, with the recipe's settings.

    `losses` of it holds the loss of every optimizer step.
    """
    counterpart = COUNTERPARTS[recipe.method.kind](recipe.method)
    optim = recipe.optim
    assert optim.max_steps is not None
    config = counterpart.config(
        output_dir=str(folder),
        seed=recipe.seed,
        max_steps=optim.max_steps,
        max_length=recipe.data.max_length,
        per_device_train_batch_size=optim.microbatch,
        gradient_accumulation_steps=optim.batch_size // optim.microbatch,
        learning_rate=optim.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(optim.warmup_ratio * optim.max_steps),
        max_grad_norm=optim.max_grad_norm,
        weight_decay=optim.weight_decay,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=recipe.model.checkpoints,
        logging_steps=recipe.log.every_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **counterpart.settings,
    )
    kind = type("Recording", (_Recording, counterpart.trainer), {})
    data = Dataset.from_list(list(rows))
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def texts_of(recipe: Recipe, trainer: Any) -> list[list[list[int]]]:
    """For each row, the token ids of the texts that TRL made from it."""
    texts = COUNTERPARTS[recipe.method.kind](recipe.method).texts
    return [texts(row) for row in trainer.train_dataset]


class _Recording(transformers.Trainer):
    """Records the loss of each step without the rounding of the log."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.losses: list[float] = []

    def training_step(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        """Record the loss; losses of microbatches are already divided by their number."""
        loss: torch.Tensor = super().training_step(*arguments, **settings)
        if len(self.losses) == self.state.global_step:
            self.losses.append(0.0)
        self.losses[-1] += float(loss)
        return loss
