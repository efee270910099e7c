"""The GPUs of a machine, as their drivers and torch describe them."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

_DEVICE_FILES = ("/dev/kfd", "/dev/dri", "/dev/nvidiactl")
"""Of the drivers for AMD's and Intel's GPUs, and for NVIDIA's where nvidia-smi is missing."""
_QUERIES = ("name,memory.total,compute_cap,uuid,mig.mode.current", "name,memory.total")
"""What nvidia-smi is asked for; older drivers refuse the first as a whole."""
_SECONDS = 30.0
"""A driver that hangs must not hang every command."""
_SLICE = re.compile(r"\s*MIG\s+(\S+)\s.*UUID:\s*([^)\s]+)")
_SLICE_SIZE = re.compile(r"\.(\d+)gb")
_OF_SLICE = 0.95
"""GiB that a MIG slice has for each GB of its profile's name, about."""
_EMULATED_BFLOAT16 = 8.0
"""The compute capability (Ampere) from which on bfloat16 is not emulated."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of a machine, or a MIG slice of one."""

    name: str
    bytes: int | None
    """Size of its memory; None if the driver does not say."""
    kind: str = "cuda"
    """As torch names it: cuda (AMD's too), xpu, mps, or one that finray does not train on."""
    has_bfloat16: bool = True
    """False if it is known to emulate bfloat16 only, as T4 and V100 do."""
    uuid: str = ""
    """NVIDIA's name of this very GPU or slice; empty if it is not known."""
    is_slice: bool = False
    """True for a MIG slice: a process sees one, and NCCL joins none."""

    def __str__(self) -> str:
        return f"{self.name}, {amount(self.bytes)}" if self.bytes else self.name


def amount(count: float) -> str:
    """12.3 GiB, or 34 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def gpus_here() -> tuple[Gpu, ...]:
    """This machine's GPUs in the order in which CUDA counts them, the newest and largest first:
    NVIDIA's by nvidia-smi, others as torch has them."""
    return _nvidia_gpus() or _other_gpus()


def kind_here() -> str:
    """The kind of this machine's GPUs; cpu if there are none."""
    gpus = gpus_here()
    return gpus[0].kind if gpus else "cpu"


def _other_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch has here; it takes seconds to load, so only where there may be any."""
    if sys.platform != "darwin" and not any(Path(file).exists() for file in _DEVICE_FILES):
        return ()
    from ..training.models.devices import accelerators

    return tuple(Gpu(name, size, kind) for kind, name, size in accelerators())


def _nvidia_gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    return () if command is None else _listed(command, Path(command).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _listed(command: str, changed_ns: int) -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists, asked once by a process."""
    del changed_ns
    for fields in _QUERIES:
        text = _output(command, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        if text is not None:
            break
    else:
        return ()
    cards: list[tuple[float, Gpu, list[Gpu]]] = []
    for line in text.splitlines():
        name, *values = (part.strip() for part in line.split(","))
        if not values:  # a warning, or "No devices were found"
            continue
        size, capability, uuid, mig = (*values, "", "", "", "")[:4]
        compute = _number(capability)
        has_bfloat16 = compute is None or compute >= _EMULATED_BFLOAT16
        gpu = Gpu(name, _mebibytes(size), has_bfloat16=has_bfloat16, uuid=uuid)
        slices = _slices(command, gpu) if mig == "Enabled" else []
        cards.append((compute or 0.0, gpu, slices or [gpu]))
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # CUDA counts the fastest first, nvidia-smi by their slots.
        cards.sort(key=lambda card: (-card[0], -(card[1].bytes or 0)))
    return tuple(gpu for _, _, parts in cards for gpu in parts)


def _output(command: str, *arguments: str) -> str | None:
    """What a command prints; None if it fails, hangs or cannot be started."""
    try:
        done = subprocess.run(
            [command, *arguments],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _mebibytes(text: str) -> int | None:
    """Bytes; None for answers such as [N/A], which a GPU with shared memory gives."""
    return int(text) * 2**20 if text.isdecimal() and int(text) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def _slices(command: str, gpu: Gpu) -> list[Gpu]:
    """The MIG slices of a GPU, in the order in which processes see them."""
    slices: list[Gpu] = []
    is_own = False
    for line in (_output(command, "-L") or "").splitlines():
        if line.startswith("GPU "):
            is_own = gpu.uuid in line
        elif is_own and (match := _SLICE.match(line)):
            profile, uuid = match.groups()
            size = _SLICE_SIZE.search(profile)
            room = round(int(size[1]) * _OF_SLICE * 2**30) if size else None
            name = f"{gpu.name} MIG {profile}"
            slices.append(replace(gpu, name=name, bytes=room, uuid=uuid, is_slice=True))
    return slices


def visible_gpus() -> tuple[Gpu, ...]:
    """This machine's GPUs that its processes may use, as CUDA_VISIBLE_DEVICES says.

    Of MIG slices a process sees one.
    """
    gpus = gpus_here()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        gpus = _chosen(gpus, [name.strip() for name in names.split(",")])
    slices = [gpu for gpu in gpus if gpu.is_slice]
    return tuple(slices[:1]) or gpus


def _chosen(gpus: tuple[Gpu, ...], names: list[str]) -> tuple[Gpu, ...]:
    """The GPUs of these names; like CUDA, none after the first name that there is not, and none at
    all where a name stands twice."""
    if len({*names}) < len(names):
        return ()
    chosen: list[Gpu] = []
    for name in names:
        if name.startswith(("GPU-", "MIG")):
            match = [gpu for gpu in gpus if gpu.uuid.startswith(name)] or [
                replace(gpu, is_slice=name.startswith("MIG")) for gpu in gpus if not gpu.uuid
            ]
        else:
            match = [gpus[int(name)]] if name.isdecimal() and int(name) < len(gpus) else []
        if not match:
            break
        chosen += match[:1]
    return tuple(chosen)


def usable_gpus() -> int:
    """Number of this machine's GPUs that its processes may use."""
    return len(visible_gpus())
