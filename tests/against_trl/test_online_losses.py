"""GRPO and RLOO, compared with TRL's trainers on the completions that finray sampled."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.cases import mostly_slow
from support.online_runs import REWARD, Trained

from finray.training.config.recipe import Recipe

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo"},
    "grpo-kl": {"kind": "grpo", "beta": 0.5, "loss": "grpo", "temperature": 0.8},
    "grpo-passes": {"kind": "grpo", "passes": 2, "epsilon": 0.01, "epsilon_high": 0.02},
    "grpo-batch": {"kind": "grpo", "loss": "dr_grpo", "scale_rewards": "batch"},
    "grpo-truncated": {"kind": "grpo", "loss": "bnpo", "mask_truncated": True, "max_completion": 6},
    "grpo-all": {
        "kind": "grpo",
        "scale_rewards": "none",
        "beta": 0.02,
        "passes": 2,
        "epsilon": 0.005,
    },
    "rloo": {"kind": "rloo", "beta": 0.05},
    "rloo-passes": {"kind": "rloo", "beta": 0.05, "passes": 2, "epsilon": 0.02},
    "rloo-free": {"kind": "rloo", "beta": 0.0, "normalize_advantages": True},
}


def reference_losses(
    recipe: Recipe, trained: Trained, model: Any, tokenizer: Any, out: Path
) -> Any:
    """The losses that TRL's trainer computes for the same completions."""
    import trl

    method = recipe.method
    is_grpo = method.kind == "grpo"
    base: Any = trl.GRPOTrainer if is_grpo else trl.RLOOTrainer
    waiting = iter(trained.sampled)
    losses: list[float] = []

    class Given(base):  # type: ignore[misc]
        """A trainer that uses finray's completions instead of generating."""

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            requests, rollouts = next(waiting)
            assert [list(ids) for ids in prompt_ids] == [one.prompt_ids for one in requests]
            ids = [rollout.ids for rollout in rollouts]
            return (ids, None) if is_grpo else ids

        def training_step(self, *arguments: Any, **more: Any) -> Any:
            loss = super().training_step(*arguments, **more)
            losses.append(float(loss))
            return loss

    own = (
        {"loss_type": method.loss, "scale_rewards": method.scale_rewards}
        if is_grpo
        else {"normalize_advantages": method.normalize_advantages}
    )
    optim = recipe.optim
    accumulated = optim.batch_size // optim.micro_batch_size
    config = (trl.GRPOConfig if is_grpo else trl.RLOOConfig)(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        shuffle_dataset=False,
        learning_rate=optim.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=optim.max_steps,
        per_device_train_batch_size=optim.micro_batch_size,
        gradient_accumulation_steps=accumulated,
        num_generations=method.generations,
        max_completion_length=method.max_completion,
        temperature=method.temperature,
        num_iterations=method.passes,
        beta=method.beta,
        epsilon=method.epsilon,
        epsilon_high=method.clip_high,
        mask_truncated_completions=method.mask_truncated,
        disable_tqdm=True,
        **own,
    )
    space: dict[str, Any] = {}
    exec(REWARD, space)
    Given(
        model=model,
        reward_funcs=[space["worth"]],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": trained.texts}),
        processing_class=tokenizer,
    ).train()
    return [sum(losses[at : at + accumulated]) for at in range(0, len(losses), accumulated)]


def _flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# TRL's own warnings are not finray's.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", mostly_slow(CASES, quick={"grpo-kl", "rloo-passes"}))
def test_the_first_20_losses(
    case: str,
    online_recipe: Callable[..., Recipe],
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    # What bnpo averages over are forward passes: one holds the whole batch, in any order.
    micro = 8 if CASES[case].get("loss") == "bnpo" else 4
    recipe = online_recipe(CASES[case], micro_batch_size=micro)
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    own, trl_model = copy.deepcopy(model), copy.deepcopy(model)
    trl_model.config._name_or_path = str(base)
    trained = Trained(recipe, own, tokenizer, tmp_path)
    expected = reference_losses(recipe, trained, trl_model, tokenizer, tmp_path / "trl")
    assert len(trained.losses) == len(expected) == 20
    assert trained.losses == pytest.approx(expected, abs=1e-4)
    # Without clipping and divergence, RLOO's loss is 0 by construction: its weights tell.
    assert case in ("rloo", "rloo-free") or max(map(abs, expected)) > 1e-3
    assert {len(rollout.ids) for _, rollouts in trained.sampled for rollout in rollouts} > {1, 2, 3}
    start, ended, expected_end = (_flat(item) for item in (model, own, trl_model))
    assert (ended - expected_end).norm() < 0.02 * (expected_end - start).norm()
    if recipe.method.repeats > 1:
        assert max(step["clipped"] for step in trained.measures) > 0
