"""Settings that are good without any search, and the space around them.

The learning rate falls with the model's width: Schulman et al., "LoRA Without Regret" (2025), give
5e-5 (2000 / hidden size)^0.78 for full fine-tuning of Llama models and ten times that for LoRA,
nearly independent of the rank at alpha 32. Preference and online methods want far less.

The best rate falls with the root of alpha. An adapter adds alpha / rank · B · A. With alpha four
times larger and A, B and the learning rate halved it is the same, and learns the same, because
Adam's steps do not see how large a gradient is. It is not exact, as A starts where it starts. In
rsLoRA alpha is divided by the root of the rank, which is as good as a plain alpha times that root.
"""

import functools
import json
import math
from typing import Any

from ..training.config.model_folder import model_folder
from ..training.config.models import ModelSettings
from ..training.config.recipe import Recipe
from .distribution import Distribution

_WIDTH, _EXPONENT = 2000, 0.78
_FULL_RATE, _LORA_FACTOR = 5e-5, 10.0
_PREFERENCE_RATE = 1e-5
"""DPO and its kin; online methods have been reported between 1e-5 and 4e-5."""
RULE_ALPHA = 32.0
"""At which the rule holds for adapters."""
_SPAN = 10.0
"""The default space reaches from the rule's rate divided by this to its product."""
SPREAD = math.sqrt(_SPAN)
"""Of the first guesses around the rule: half of the way to either end."""
_IMITATION_RANKS = [4, 8, 16, 32, 64]
_PREFERENCE_RANKS = [1, 2, 4, 8, 16, 32]
_ALPHA_PER_RANK = 2.0

LEARNING_RATE, RANK, ALPHA = "optim.learning_rate", "adapter.rank", "adapter.alpha"
RSLORA = "adapter.rslora"


def suggested_learning_rate(recipe: Recipe) -> float | None:
    """A learning rate that suits the recipe's model and method; of an adapter, one of alpha 32.

    The alpha of an adapter that training continues (`model.adapter`) is not read.

    Returns:
        None where the model's configuration has no width.
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
    """The recipe's learning rate; of an adapter, what makes it at alpha 32."""
    return recipe.optim.learning_rate / adapter_factor(RULE_ALPHA, recipe)


def adapter_factor(at_alpha: float, recipe: Recipe) -> float:
    """What a rate that suits `at_alpha` is to be multiplied by for the recipe's adapter."""
    own = recipe.adapter
    return 1.0 if own is None else rate_factor(at_alpha, own.rank, own.alpha, own.rslora)


def rate_factor(at_alpha: float, rank: int, alpha: float, rslora: bool) -> float:
    """What a rate that suits `at_alpha` is to be multiplied by for an adapter."""
    return math.sqrt(at_alpha / (alpha * math.sqrt(rank) if rslora else alpha))


def default_space(recipe: Recipe) -> dict[str, Distribution]:
    """Learning rate around the rule's, and for LoRA rsLoRA or not, and the rank, with alpha tied
    to it.

    Alpha and learning rate are nearly redundant, so alpha is not searched, and the rate is given
    at one alpha: what suits one adapter then suits the others.
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
        # rsLoRA's own scale grows with the rank already.
        space[ALPHA] = Distribution(times=_ALPHA_PER_RANK, of=RANK, when={RSLORA: False})
    return space


@functools.cache  # called for each guess, and a call may reach the hub
def _hidden_size(model: ModelSettings) -> int | None:
    folder = model_folder(model)
    if folder is None:
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Models of several modalities keep the language model's settings one level down.
    width = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
    return int(width) if width else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
