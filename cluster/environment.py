"""Environment variables that a run's processes need, found before torch is loaded."""

import os

from ..training.device import SAFE_ISA, probe_bfloat16
from ..training.recipe import Recipe


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Set them here, and return them for the workers.

    Only a run that asks for bfloat16 is probed: `auto` uses it on GPUs alone.
    """
    env = {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true")}
    asked = {recipe.model.dtype, "auto" if recipe.adapter is None else recipe.adapter.dtype}
    if "bfloat16" in asked and not SAFE_ISA.keys() <= os.environ.keys():
        env.update(probe_bfloat16())
    os.environ.update(env)
    return env
