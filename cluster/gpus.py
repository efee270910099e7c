"""GPUs of a machine, and whether a run fits into their memory."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..training.config.recipe import Recipe

if TYPE_CHECKING:
    from ..training.models.memory_estimate import MemoryEstimate, Sizes

_QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A GPU of a machine."""

    name: str
    bytes: int
    """Size of its memory."""

    def __str__(self) -> str:
        return f"{self.name}, {amount(self.bytes)}"


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a run with a GPU's memory."""

    fits: bool
    """True if it fits, as it is or with a smaller microbatch or gradient checkpointing."""
    is_tight: bool
    """True if the recipe must change before it fits; `text` names the changes."""
    text: str


def amount(count: float) -> str:
    """12.3 GiB, or 34 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def gpus_here() -> tuple[Gpu, ...]:
    """This machine's NVIDIA GPUs; none where nvidia-smi is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    done = subprocess.run([command, *_QUERY], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        return ()
    fields = (line.rpartition(",") for line in done.stdout.strip().splitlines())
    return tuple(Gpu(name.strip(), int(mib) * 2**20) for name, _, mib in fields)


def usable_gpus() -> int:
    """Number of this machine's GPUs that its processes may use."""
    count = len(gpus_here())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",")]
    slices = sum(name.startswith("MIG") for name in names)
    return slices or min(count, sum(name not in ("", "-1") for name in names))


def memory_text(memory: "MemoryEstimate", recipe: Recipe) -> str:
    """about 12.3 GiB of a GPU: …"""
    rows = recipe.optim.micro_batch_size
    return (
        f"about {amount(memory.peak)} of a GPU: weights {amount(memory.weights)}, gradients and "
        f"optimizer {amount(memory.training)}, activations {amount(memory.activations)} at "
        f"microbatch {rows}"
    )


def judge(recipe: Recipe, sizes: "Sizes", gpus: Sequence[Gpu], share: float = 1.0) -> Verdict:
    """Compare a run with the smallest GPU that a worker may get.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        gpus: at least one.
        share: part of a GPU that a worker may use, if several share one.
    """
    from ..training.models.memory_estimate import estimate

    recipe = _with_chosen_strategy(recipe, sizes, min(gpu.bytes for gpu in gpus))
    smallest = min(gpus, key=lambda gpu: gpu.bytes)
    room = round(smallest.bytes * min(share, 1.0))
    memory = estimate(recipe, sizes)
    summary = f"{memory_text(memory, recipe)}; there is {amount(room)} ({smallest.name})"
    if memory.peak <= room:
        return Verdict(True, False, summary)

    def fits(changed: Recipe) -> bool:
        return estimate(changed, sizes).peak <= room

    remedies = [text for text, changed in _smaller(recipe) if fits(changed)]
    if remedies:
        text = f"{summary}: too much at once. It would fit with {', or with '.join(remedies)}"
        return Verdict(True, True, text)
    least = _with(recipe, batch=1, gradient_checkpointing=True)
    remedies = [text for text, changed in _other(least) if fits(changed)]
    most = amount(estimate(least, sizes).peak)
    lines = [f"{summary}; at microbatch 1 with gradient checkpointing it still needs {most}"]
    if remedies:
        lines.append(f"With these it would fit too: {', or '.join(remedies)}")
    return Verdict(False, True, ". ".join(lines))


def _with_chosen_strategy(recipe: Recipe, sizes: "Sizes", room: int) -> Recipe:
    """The recipe with the strategy that `auto` results in; see `choose_strategy`."""
    from ..training.models.memory_estimate import estimate
    from ..training.models.sharding import USABLE

    memory = estimate(recipe, sizes)
    is_large = memory.weights + memory.training > USABLE * room
    return _sharded(recipe) if recipe.scale.strategy == "auto" and is_large else recipe


def _sharded(recipe: Recipe) -> Recipe:
    """The recipe with sharded weights, if it can be sharded over at least two workers."""
    if recipe.scale.least_workers < 2 or recipe.why_not_shardable is not None:
        return recipe
    scale = recipe.scale.model_copy(update={"strategy": "fsdp"})
    return recipe.model_copy(update={"scale": scale})


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(settings, recipe) that train the same in smaller parts, the largest parts first."""
    rows = recipe.optim.micro_batch_size
    if not recipe.model.gradient_checkpointing:
        yield (
            "model.gradient_checkpointing=true",
            _with(recipe, batch=rows, gradient_checkpointing=True),
        )
    while rows > 1:
        rows //= 2
        text = f"optim.micro_batch_size={rows}"
        yield text, _with(recipe, batch=rows)
        if not recipe.model.gradient_checkpointing:
            both = f"{text} and model.gradient_checkpointing=true"
            yield both, _with(recipe, batch=rows, gradient_checkpointing=True)


def _other(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(settings, recipe) that train differently and need less memory."""
    adapter = recipe.adapter
    plain = adapter is None or adapter.init in ("default", "gaussian")
    if recipe.trains_adapter and plain and recipe.model.quantize != "nf4":
        yield "model.quantize=nf4", _with(recipe, quantize="nf4")
    if recipe.scale.strategy != "fsdp" and (sharded := _sharded(recipe)) is not recipe:
        yield "scale.strategy=fsdp", sharded
    for length in (recipe.data.max_length // 2, recipe.data.max_length // 4):
        data = recipe.data.model_copy(update={"max_length": length})
        yield f"data.max_length={length}", recipe.model_copy(update={"data": data})


def _with(recipe: Recipe, batch: int | None = None, **model: Any) -> Recipe:
    update: dict[str, Any] = {"model": recipe.model.model_copy(update=model)}
    if batch is not None:
        update["optim"] = recipe.optim.model_copy(update={"micro_batch_size": batch})
    return recipe.model_copy(update=update)
