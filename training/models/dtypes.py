"""The number types that this process computes and trains in."""

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Literal

from ..common.errors import InputError
from .devices import device_kind, empty_cache, has_bfloat16

if TYPE_CHECKING:
    import torch

    from ..config.models import ModelSettings
    from ..config.recipe import Recipe

DtypeName = Literal["float32", "bfloat16", "float16"]

# oneDNN then does not use AMX, which some virtual CPUs announce but do not support.
SAFE_ISA = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}

_BF16_PROBE = """
import torch
a = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
(a @ a).sum().backward()
"""


def choose_dtype(settings: "ModelSettings") -> DtypeName:
    """The compute type: the recipe's, or for `auto` the best that the device supports.

    Raises:
        InputError: float16 without a GPU.
    """
    kind = device_kind() if settings.dtype in ("auto", "float16") else ""
    if settings.dtype == "float16" and kind == "cpu":
        raise InputError(
            "model.dtype: float16 needs a GPU, and this machine has none; use auto, float32 or "
            "bfloat16"
        )
    if settings.dtype != "auto":
        return settings.dtype
    if kind == "cpu":
        return "float32"
    if has_bfloat16(kind):
        return "bfloat16"
    return "float32" if kind == "mps" else "float16"


def choose_adapter_dtype(recipe: "Recipe") -> DtypeName:
    """The type of an adapter's weights: the recipe's, or for `auto` one that trains well.

    `auto` is bfloat16 if the model computes in it: the activations take half the memory of
    float32, and the optimizer keeps float32 copies. It is never float16, because GradScaler cannot
    unscale float16 gradients.

    Raises:
        InputError: bfloat16 for a model that computes in float16.
    """
    compute = choose_dtype(recipe.model)
    requested = "auto" if recipe.adapter is None else recipe.adapter.dtype
    if requested == "auto":
        return "bfloat16" if compute == "bfloat16" else "float32"
    if requested == "bfloat16" and compute == "float16":
        raise InputError(
            "adapter.dtype: a model that computes in float16 cannot train a bfloat16 adapter; use "
            "auto or float32"
        )
    return requested


def needs_autocast(recipe: "Recipe") -> bool:
    """True if the trained weights have a wider type than the one that the model computes in."""
    compute = choose_dtype(recipe.model)
    trained = choose_adapter_dtype(recipe) if recipe.trains_adapter else "float32"
    return compute not in ("float32", trained)


def torch_dtype(name: DtypeName) -> "torch.dtype":
    """The torch dtype of this name."""
    import torch

    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def free_memory() -> None:
    """Release unused memory on the host and the GPU, for the next training in this process."""
    gc.collect()
    empty_cache()


def probe_bfloat16() -> dict[str, str]:
    """Environment variables that bfloat16 needs on this machine's CPU; usually none.

    A child process tries a matrix product, because on some virtual CPUs an illegal instruction
    ends the process. Call this before torch is imported in this process.
    """
    command = [sys.executable, "-c", _BF16_PROBE]
    code = subprocess.run(command, check=False, capture_output=True, timeout=120).returncode
    was_killed = code < 0
    return SAFE_ISA if was_killed else {}
