"""What this process computes on, and in which number type."""

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Literal

from ..common.errors import InputError

if TYPE_CHECKING:
    import torch

    from ..config.models import ModelSettings
    from ..config.recipe import Recipe

DtypeName = Literal["float32", "bfloat16", "float16"]

# oneDNN then leaves out AMX, which some virtual CPUs announce and fault on.
SAFE_ISA = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}

_BF16_PROBE = """
import torch
a = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
(a @ a).sum().backward()
"""


def choose_dtype(settings: "ModelSettings") -> DtypeName:
    """The compute type: what the recipe says, or the best that the device can do.

    Raises:
        InputError: for float16 without a GPU.
    """
    import torch

    if settings.dtype == "float16" and not torch.cuda.is_available():
        raise InputError(
            "model.dtype: float16 trains on a GPU only, and there is none; use auto, float32 or "
            "bfloat16"
        )
    if settings.dtype != "auto":
        return settings.dtype
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def choose_adapter_dtype(recipe: "Recipe") -> DtypeName:
    """The type of an adapter's weights: what the recipe says, or one that trains well.

    That is bfloat16 where the model computes in it: its activations take half the memory of
    float32's, and the optimizer keeps float32 copies. Gradients in float16 cannot be unscaled.

    Raises:
        InputError: for bfloat16 beside a model that computes in float16.
    """
    compute = choose_dtype(recipe.model)
    asked = "auto" if recipe.adapter is None else recipe.adapter.dtype
    if asked == "auto":
        return "bfloat16" if compute == "bfloat16" else "float32"
    if asked == "bfloat16" and compute == "float16":
        raise InputError(
            "adapter.dtype: bfloat16 does not go with a model that computes in float16; use auto "
            "or float32"
        )
    return asked


def needs_autocast(recipe: "Recipe") -> bool:
    """Whether trained weights are of a higher type than the one that the model computes in."""
    compute = choose_dtype(recipe.model)
    trained = choose_adapter_dtype(recipe) if recipe.trains_adapter else "float32"
    return compute not in ("float32", trained)


def torch_dtype(name: DtypeName) -> "torch.dtype":
    """torch's own name of a number type."""
    import torch

    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def free_memory() -> None:
    """Give back what no tensor holds any more, to whoever trains next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def probe_bfloat16() -> dict[str, str]:
    """Environment variables that bfloat16 on this machine's CPU needs; mostly none.

    A matrix product is tried in a child process, because on some virtual CPUs it ends the process
    with an illegal instruction. Call it before torch is imported here.
    """
    command = [sys.executable, "-c", _BF16_PROBE]
    died = subprocess.run(command, check=False, capture_output=True, timeout=120).returncode < 0
    return SAFE_ISA if died else {}
