"""What a run's processes need in place before torch is loaded: environment variables, filters."""

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from ..training.common.logs import limit, log_environment
from ..training.models.devices import DETERMINISTIC
from ..training.models.dtypes import SAFE_ISA, probe_bfloat16

if TYPE_CHECKING:  # pydantic takes longer to load than `finray runs` takes
    from ..training.config.recipe import Recipe

_ALWAYS = {
    # Operations that Apple's GPUs lack run on the CPU.
    **({"PYTORCH_ENABLE_MPS_FALLBACK": "1"} if sys.platform == "darwin" else {}),
    "TOKENIZERS_PARALLELISM": "true",
    # Arrow's own allocators keep freed memory: up to 50 MB more for 500 MB of rows.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The allocator's settings: by their present name, and by the earlier ones that torch reads too."""
_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Batches differ in length: fixed segments would break the memory into pieces that none fills."""


def set_environment() -> None:
    """Set the variables that every process needs, unless the user has set them.

    Call it before pyarrow is imported.
    """
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)


def common_environment() -> dict[str, str]:
    """The variables that every worker needs, whatever it runs."""
    env = {name: os.environ.get(name, value) for name, value in _ALWAYS.items()}
    return {**env, **log_environment()}


def worker_environment(recipe: "Recipe") -> dict[str, str]:
    """Set the variables that this recipe needs here, and return all of them for the workers.

    bfloat16 is probed only if the recipe requests it, because `auto` uses it on GPUs only.
    `deterministic` counts from a process's first product on, which the data's stages may compute.
    """
    env = {name: os.environ.get(name, value) for name, value in _ALWAYS.items()}
    own = {name: os.environ[name] for name in _ALLOCATOR_NAMES if name in os.environ}
    env.update(own or _ALLOCATOR)
    env.update(log_environment())
    env.update(DETERMINISTIC if recipe.deterministic else {})
    dtypes = {recipe.model.dtype, "auto" if recipe.adapter is None else recipe.adapter.dtype}
    if "bfloat16" in dtypes and not SAFE_ISA.keys() <= os.environ.keys():
        env.update(probe_bfloat16())
    os.environ.update(env)
    return env


def quiet_libraries() -> None:
    """Hide warnings and, unless a level was chosen, log lines that a user cannot act on."""
    # It reports optional kernels that no run here uses.
    limit("bitsandbytes", logging.ERROR)
    # It says which cache it reads, as the run's own report does.
    limit("datasets", logging.ERROR)
    # peft still uses names that transformers renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
