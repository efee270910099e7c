"""What a run's processes need in place before torch is loaded: environment variables, filters."""

import logging
import os
import warnings

from ..training.config.recipe import Recipe
from ..training.models.dtypes import SAFE_ISA, probe_bfloat16

_ALWAYS = {
    "TOKENIZERS_PARALLELISM": "true",
    # Arrow's own allocators keep freed memory: up to 50 MB more for 500 MB of rows.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def set_environment() -> None:
    """Set the variables that every process needs, unless the user has set them.

    Call it before pyarrow is imported.
    """
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Set the variables that this recipe needs here, and return all of them for the workers.

    bfloat16 is probed only if the recipe requests it, because `auto` uses it on GPUs only.
    """
    env = {name: os.environ.get(name, value) for name, value in _ALWAYS.items()}
    dtypes = {recipe.model.dtype, "auto" if recipe.adapter is None else recipe.adapter.dtype}
    if "bfloat16" in dtypes and not SAFE_ISA.keys() <= os.environ.keys():
        env.update(probe_bfloat16())
    os.environ.update(env)
    return env


def quiet_libraries() -> None:
    """Hide log lines and warnings of libraries that a user of finray cannot act on."""
    # It reports optional kernels that no run here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft still uses names that transformers renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
