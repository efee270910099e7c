"""The device that this process trains on; the one place that asks torch which ones there are.

An AMD GPU is a `cuda` device for torch (ROCm).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..common.errors import InputError

if TYPE_CHECKING:
    import torch

    from ..config.recipe import Recipe

KINDS = ("cuda", "xpu", "mps")
"""Kinds of accelerators that finray trains on."""
VARIABLE = "ACCELERATE_TORCH_DEVICE"
"""The device that was chosen for this process, for accelerate too."""
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}
"""Variables with which a GPU computes the same every time. torch reads the first one only once, at
a process's first matrix product on a GPU; transformers reads the second one for its kernels."""


@dataclass(frozen=True)
class Room:
    """What the GPU of a worker offers."""

    bytes: int
    """Bytes of its memory that this worker may use."""
    has_bfloat16: bool = True

    @property
    def compute(self) -> Literal["bfloat16", "float16"]:
        """The type that `model.dtype: auto` comes to there."""
        return "bfloat16" if self.has_bfloat16 else "float16"


def accelerator_kind() -> str:
    """The kind of this machine's accelerator, as torch names it; cpu if torch has none here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return "cpu" if accelerator is None else accelerator.type


def accelerators() -> list[tuple[str, str, int]]:
    """(kind, name, bytes of memory) of each accelerator that torch has on this machine."""
    import torch

    kind = accelerator_kind()
    if kind == "mps":  # it shares the machine's memory
        return [(kind, "Apple GPU", torch.mps.recommended_max_memory())]
    if kind not in KINDS:
        return [] if kind == "cpu" else [(kind, kind, 0)]
    module = _module(kind)
    properties = [module.get_device_properties(i) for i in range(module.device_count())]
    return [(kind, str(one.name), int(one.total_memory)) for one in properties]


def device_kind() -> str:
    """cpu, cuda, xpu or mps: what this process trains on, by choice or as torch has it."""
    chosen = os.environ.get(VARIABLE)
    return accelerator_kind() if chosen is None else chosen.partition(":")[0]


def own_device() -> "torch.device":
    """What this process trains on; with its number, where one was chosen."""
    import torch

    return torch.device(os.environ.get(VARIABLE) or accelerator_kind())


def decomposing_device() -> "torch.device":
    """Where matrices are decomposed: a GPU takes a second for one, a CPU a minute.

    On Apple's GPUs torch has no QR, or one that takes the square of a matrix's height in memory.
    """
    import torch

    own = own_device()
    return torch.device("cpu") if own.type == "mps" else own


def has_bfloat16(kind: str) -> bool:
    """True if an accelerator of this kind computes in bfloat16 here, rather than emulates it.

    CUDA emulates it on GPUs before Ampere (T4, V100, RTX 20xx), many times slower than float16.
    """
    import torch

    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return bool(_module(kind).is_bf16_supported(including_emulation=False))


@contextmanager
def on_cpu(chosen: bool) -> Iterator[None]:
    """Inside, this process trains on its CPU if `chosen`."""
    before = os.environ.get(VARIABLE)
    if chosen:
        os.environ[VARIABLE] = "cpu"
    try:
        yield
    finally:
        if chosen and before is None:
            del os.environ[VARIABLE]
        elif chosen and before is not None:
            os.environ[VARIABLE] = before


def use(device: str) -> None:
    """Make a device the current one of this process: cuda:1, xpu:0. No-op for cpu and mps.

    Raises:
        InputError: torch finds no such device.
    """
    kind = device.partition(":")[0]
    if kind in ("cuda", "xpu"):
        check_torch(kind)
        _module(kind).set_device(device)


def check_torch(kind: str) -> None:
    """Check that torch computes on the accelerators that a driver lists.

    Raises:
        InputError: it finds none: it is built for CPUs, or for a newer driver.
    """
    import torch

    if kind != "cpu" and accelerator_kind() == "cpu":
        raise InputError(
            f"scale.gpus_per_worker: the driver lists a GPU of kind {kind}, and torch "
            f"{torch.__version__} finds none; install a torch built for it (nvidia-smi shows the "
            "newest CUDA that the driver takes), or set 0 to train on the CPU"
        )


def empty_cache() -> None:
    """Give back the device's memory that torch holds and does not use."""
    if (kind := accelerator_kind()) in KINDS:
        _module(kind).empty_cache()


def sum_type(device: "torch.device") -> "torch.dtype":
    """The type in which sums are added up on a device: float64 where it has that."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def memory_of(device: "torch.device") -> int:
    """Bytes of a device's memory: cuda or xpu."""
    return int(_module(device.type).get_device_properties(device).total_memory)


def _module(kind: str) -> Any:
    import torch

    return {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}[kind]


def check_device(recipe: "Recipe", kind: str, present: str) -> None:
    """Check that the run can train on the device that was chosen, and that none lies idle.

    Args:
        recipe: what to run.
        kind: the kind of device that the run trains on.
        present: the kind of this machine's accelerator; cpu if there is none.

    Raises:
        InputError: the recipe or finray does not allow it.
    """
    _check_kernel(recipe, kind)
    if kind == "cpu":
        if present != "cpu" and recipe.scale.gpus_per_worker != 0:
            raise InputError(
                f"scale.gpus_per_worker: torch has a device of kind {present} here, which this "
                "worker does not get; set 0 to train on the CPU, or run without a cluster"
            )
        return
    reason = _unfit(recipe, kind)
    if reason is not None:
        raise InputError(
            f"scale.gpus_per_worker: the device here is of kind {kind}: {reason}; set 0 to train "
            "on the CPU"
        )


def _check_kernel(recipe: "Recipe", kind: str) -> None:
    """Check that the attention that the recipe names is here.

    Raises:
        InputError: it is not.
    """
    if recipe.model.attention != "flash_attention_2":
        return
    missing = None
    if kind != "cuda":
        missing = f"a GPU of kind cuda, and the run trains on {kind} here"
    elif not any(find_spec(package) for package in ("flash_attn", "kernels")):
        missing = "the package flash-attn, which is not installed here"
    if missing is not None:
        raise InputError(
            f"model.attention: flash_attention_2 needs {missing}; remove the setting: auto takes "
            "torch's own kernels"
        )


def _unfit(recipe: "Recipe", kind: str) -> str | None:
    """Why the run cannot train on a device of this kind; None if it can."""
    is_mps = kind == "mps"
    reasons = {
        f"finray trains on {', '.join(KINDS)} and cpu": kind not in KINDS,
        "workers cannot exchange gradients there, so scale.workers must be 1": (
            is_mps and recipe.scale.least_workers > 1
        ),
        f"model.quantize {recipe.model.quantize} is not supported there": (
            is_mps and recipe.model.quantize != "none"
        ),
        f"method {recipe.method.kind} computes in float64, which it lacks": (
            is_mps and recipe.method.learns_from != "documents"
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


RandomState: TypeAlias = tuple["torch.Tensor", "torch.Tensor | None"]
"""States of torch's generators for the CPU, and for this process's GPU."""


def get_random_state(device: "torch.device") -> RandomState:
    """The states of torch's generators for the CPU and a device, the current one of its kind."""
    import torch

    own = None if device.type == "cpu" else _module(device.type).get_rng_state()
    return torch.get_rng_state(), own


def set_random_state(device: "torch.device", state: RandomState) -> None:
    """Set the generators to a state of `get_random_state` for the same kind of device; without a
    GPU's, to the CPU's alone."""
    import torch

    of_cpu, own = state
    torch.set_rng_state(of_cpu)
    if own is not None and device.type != "cpu":
        _module(device.type).set_rng_state(own)


@contextmanager
def random_state(device: "torch.device", start: RandomState | None = None) -> Iterator[RandomState]:
    """Afterwards, torch's generators for a device and the CPU are in the state of before.

    Args:
        device: the device.
        start: a state that this yielded before, to start from; None changes nothing.
    """
    before = get_random_state(device)
    if start is not None:
        set_random_state(device, start)
    try:
        yield before
    finally:
        set_random_state(device, before)
