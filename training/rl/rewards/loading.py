"""Loads the rewards of a recipe."""

from typing import Any, cast

import torch

from ...config.methods import OnlineMethod
from ...config.recipe import Recipe
from ...config.rewards import FunctionReward, RunReward, TrlReward
from ...models.dtypes import choose_dtype, torch_dtype
from .classifiers import load_classifier, load_run
from .functions import UserFunctionReward
from .reward import Reward


def load_rewards(recipe: Recipe, tokenizer: Any, device: torch.device) -> list[Reward]:
    """Every reward of the recipe, in its order.

    Args:
        recipe: a recipe with an online method.
        tokenizer: the policy's tokenizer.
        device: the device that reward models compute on.

    Raises:
        InputError: a reward model cannot be used.
        RunError: a file of functions cannot be imported.
    """
    method = cast(OnlineMethod, recipe.method)
    dtype = torch_dtype(choose_dtype(recipe.model))
    rewards: list[Reward] = []
    for reward in method.rewards:
        if isinstance(reward, FunctionReward | TrlReward):
            rewards.append(UserFunctionReward(reward, may_fail=method.on_reward_error == "missing"))
        elif isinstance(reward, RunReward):
            rewards.append(load_run(reward, tokenizer, dtype, device))
        else:
            rewards.append(load_classifier(reward, dtype, device))
    return rewards
