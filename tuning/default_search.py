"""Good settings without any search, and the default search space around them.

The learning rate falls with the model's width: Schulman et al., "LoRA Without Regret" (2025), give
5e-5 (2000 / hidden size)^0.78 for full fine-tuning of Llama models and ten times that for LoRA,
nearly independent of the rank at alpha 32. Preference and online methods need a far lower rate.

The best rate is proportional to 1 / sqrt(alpha). An adapter adds alpha / rank · B · A. If alpha is
multiplied by four, and A, B and the learning rate are halved, the adapter adds the same and learns
the same, because Adam's steps do not depend on the size of the gradient. This is approximate: the
initial A is not halved. rsLoRA divides alpha by sqrt(rank) instead of rank, so its alpha acts like
alpha · sqrt(rank) in plain LoRA.
"""

import functools
import json
import math
from typing import Any

from ..training.config.model_folder import model_folder
from ..training.config.models import ModelSettings
from ..training.config.places import locates
from ..training.config.recipe import Recipe
from .distribution import Distribution

_WIDTH, _EXPONENT = 2000, 0.78
_FULL_RATE, _LORA_FACTOR = 5e-5, 10.0
_PREFERENCE_RATE = 1e-5
"""For LoRA with preference methods; for online methods, papers report 1e-5 to 4e-5."""
RULE_ALPHA = 32.0
"""The alpha for which the rule gives an adapter's rate."""
_SPAN = 10.0
"""The default space reaches from the rule's rate / 10 to the rule's rate · 10."""
SPREAD = math.sqrt(_SPAN)
"""Factor of the first guesses around the rule: half of the way to either end of the space."""
_IMITATION_RANKS = [4, 8, 16, 32, 64]
_PREFERENCE_RANKS = [1, 2, 4, 8, 16, 32]
_ALPHA_PER_RANK = 2.0

LEARNING_RATE, RANK, ALPHA = "optim.learning_rate", "adapter.rank", "adapter.alpha"
RSLORA = "adapter.rslora"


@locates
def suggested_learning_rate(recipe: Recipe) -> float | None:
    """A good learning rate for the recipe's model and method; for an adapter, at alpha 32.

    The alpha of an adapter that training continues (`model.adapter`) is not read.

    Returns:
        None if the model's configuration does not state its width.
    """
    width = _hidden_size(recipe.model)
    if width is None:
        return None
    factor = _LORA_FACTOR if recipe.trains_adapter else 1.0
    share = recipe.method.learning_rate_share
    if share is None:
        return _rounded(_PREFERENCE_RATE * factor / _LORA_FACTOR)
    return _rounded(_FULL_RATE * factor * share * (_WIDTH / width) ** _EXPONENT)


def own_rate(recipe: Recipe) -> float:
    """The recipe's learning rate; for an adapter, the equivalent rate at alpha 32."""
    return recipe.optim.learning_rate / adapter_factor(RULE_ALPHA, recipe)


def adapter_factor(at_alpha: float, recipe: Recipe) -> float:
    """Factor that converts a learning rate for alpha `at_alpha` to the recipe's adapter."""
    own = recipe.adapter
    return 1.0 if own is None else rate_factor(at_alpha, own.rank, own.alpha, own.rslora)


def rate_factor(at_alpha: float, rank: int, alpha: float, rslora: bool) -> float:
    """Factor that converts a learning rate for alpha `at_alpha` to the given adapter."""
    return math.sqrt(at_alpha / (alpha * math.sqrt(rank) if rslora else alpha))


@locates
def default_space(recipe: Recipe) -> dict[str, Distribution]:
    """The space of `search: default`: the learning rate and, for adapters, rank and rsLoRA or not.

    Alpha and learning rate are nearly redundant, so alpha is not searched but follows from the
    rank. The rate is searched at a fixed alpha, so a good rate for one adapter is good for all.
    """
    rate = suggested_learning_rate(recipe) or own_rate(recipe)
    bounds = (_rounded(rate / _SPAN), _rounded(rate * _SPAN))
    at_alpha = RULE_ALPHA if recipe.adapter is not None else None
    space = {LEARNING_RATE: Distribution(log_uniform=bounds, at_alpha=at_alpha)}
    if recipe.adapter is not None:
        imitates = recipe.method.learning_rate_share is not None
        ranks = _IMITATION_RANKS if imitates else _PREFERENCE_RANKS
        space[RANK] = Distribution(choice=sorted({*ranks, recipe.adapter.rank}))
        space[RSLORA] = Distribution(choice=[False, True])
        # rsLoRA's own scaling already grows with the rank.
        space[ALPHA] = Distribution(times=_ALPHA_PER_RANK, of=RANK, when={RSLORA: False})
    return space


@functools.cache  # called for each point, and a call may reach the hub
def _hidden_size(model: ModelSettings) -> int | None:
    folder = model_folder(model)
    if folder is None:
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Multimodal models keep the settings of their language model in text_config.
    width = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
    return int(width) if width else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
