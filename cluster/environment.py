"""What a run's processes need in place before torch is loaded: environment variables, filters."""

import logging
import os
import warnings

from ..training.config.recipe import Recipe
from ..training.models.dtypes import SAFE_ISA, probe_bfloat16

_ALWAYS = {
    "TOKENIZERS_PARALLELISM": "true",
    # Arrow's own allocators keep what they freed: up to 50 MB more on 500 MB of rows.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def set_environment() -> None:
    """What every process needs, unless the user set it; before pyarrow is loaded."""
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Set what this recipe needs here, and return all of it for the workers.

    Only a run that asks for bfloat16 is probed: `auto` uses it on GPUs alone.
    """
    env = {name: os.environ.get(name, value) for name, value in _ALWAYS.items()}
    asked = {recipe.model.dtype, "auto" if recipe.adapter is None else recipe.adapter.dtype}
    if "bfloat16" in asked and not SAFE_ISA.keys() <= os.environ.keys():
        env.update(probe_bfloat16())
    os.environ.update(env)
    return env


def quiet_libraries() -> None:
    """Hide log lines and warnings of libraries that a user of finray cannot act on."""
    # It reports optional kernels that no run here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft still uses names that transformers renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
