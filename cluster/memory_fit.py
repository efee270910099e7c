"""Whether a run fits into the memory of a GPU, and which settings would make it fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..training.config.recipe import Recipe
from ..training.models.devices import Room
from .gpus import Gpu, amount
from .placements import as_line, changed_settings, nearest, with_settings

if TYPE_CHECKING:
    from ..training.models.dtypes import DtypeName
    from ..training.models.memory_estimate import MemoryEstimate, Sizes

_PROCESS_BYTES = 8 * 2**30
"""Of a worker's libraries, the rows that it reads ahead, and its part of Ray's object store."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a run with a GPU's memory."""

    fits: bool
    """True if it fits, as it is or with a smaller microbatch or gradient checkpointing."""
    is_tight: bool
    """True if the recipe must change before it fits; `text` names the changes."""
    text: str


def memory_text(memory: "MemoryEstimate", recipe: Recipe) -> str:
    """about 12.3 GiB of a GPU: …"""
    budget, phase = recipe.optim.micro_batch_tokens, memory.largest_phase
    size = f"microbatch {recipe.microbatch}" if budget is None else f"{budget} tokens"
    with_checkpoints = " with gradient checkpointing" if recipe.model.checkpoints else ""
    names = {
        "training": "gradients and optimizer",
        "vllm": "vLLM",
        "transient": "a weight while it computes",
        "context": "CUDA itself",
    }
    parts = [
        f"{names.get(name, name)} {amount(part)}"
        + (f" at {size}{with_checkpoints}" if name == "activations" else "")
        for name, part in memory.parts(phase).items()
        if part
    ]
    most = "" if phase == "step" else f" (most in the {phase})"
    return f"about {amount(memory.peak)} of a GPU{most}: {', '.join(parts)}"


def judge(
    recipe: Recipe, sizes: Mapping[str, "Sizes"], gpus: Sequence[Gpu], share: float = 1.0
) -> Verdict:
    """Compare a run with the smallest GPU that a worker may get.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model, by quantisation: its own, and others that it allows.
        gpus: at least one, of sizes that are known.
        share: part of a GPU that a worker may use, if several share one.
    """
    from ..training.models.memory_estimate import estimate
    from ..training.models.placement import decide, fits, smaller, with_strategy

    room = room_of(gpus, share)
    assert room is not None
    name, own = min(gpus, key=lambda gpu: gpu.bytes or 0).name, sizes[recipe.model.quantize]
    placed = with_strategy(decide(recipe, own, room), own, room.bytes, room.compute)
    summary = f"{memory_text(estimate(placed, own, room.compute), placed)}; there is "
    summary += f"{amount(room.bytes)} ({name})"
    if fits(placed, own, room):
        return Verdict(True, False, summary)
    count = max(len(gpus) if share >= 1 else 1, placed.scale.most_workers)
    near = nearest(placed, sizes, room, count)
    line = None if near is None else as_line(changed_settings(recipe, near))
    if any(fits(changed, own, room) for changed in smaller(placed)):
        return Verdict(True, True, f"{summary}: too much at once; the nearest that fits: {line}")
    most = amount(estimate(placed.with_placement(1, True), own, room.compute).peak)
    text = f"{summary}; at microbatch 1 with gradient checkpointing it still needs {most}"
    end = "no other settings fit" if line is None else f"the nearest that fits: {line}"
    return Verdict(False, True, f"{text}; {end}")


def host_bytes(
    recipe: Recipe, sizes: "Sizes", compute: "DtypeName", *, is_first: bool = True
) -> int:
    """Bytes that a worker on a GPU takes of its machine's memory.

    The whole weights pass through it when they are loaded, and what is trained when it is saved.
    Of shards that is so on the first worker alone.

    Args:
        recipe: the run's recipe, with its strategy.
        sizes: sizes of its model.
        compute: type that the model computes in.
        is_first: False for a worker other than the first.
    """
    from ..training.models.memory_estimate import estimate

    if recipe.scale.strategy == "fsdp" and not is_first and not recipe.model.trust_remote_code:
        return _PROCESS_BYTES

    whole = with_settings(recipe, "scale", workers=1, strategy="ddp")
    memory = estimate(whole, sizes, compute)
    return max(memory.weights, memory.training) + _PROCESS_BYTES


def room_of(gpus: Sequence[Gpu], share: float = 1.0) -> Room | None:
    """What the smallest of these GPUs offers a worker; None if there is none of a known size.

    Args:
        gpus: those that a worker may get.
        share: part of a GPU that a worker may use, if several share one.
    """
    measured = [gpu for gpu in gpus if gpu.bytes]
    if not measured:
        return None
    smallest = min(measured, key=lambda gpu: gpu.bytes or 0)
    low = all(gpu.has_bfloat16 for gpu in measured)
    return Room(round((smallest.bytes or 0) * min(share, 1.0)), low)
