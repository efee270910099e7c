"""Whether a run fits into the memory of a GPU, and which settings would make it fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..training.config.recipe import Recipe
from ..training.models.devices import Room
from .gpus import Gpu, amount

if TYPE_CHECKING:
    from ..training.models.memory_estimate import MemoryEstimate, Sizes


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
    parts = [
        f"weights {amount(memory.weights)}",
        f"gradients and optimizer {amount(memory.training)}",
        f"activations {amount(memory.activations)} at {size}{with_checkpoints}",
        *([f"vLLM {amount(memory.vllm)}"] if memory.vllm else []),
    ]
    most = "" if phase == "step" else f" (most in the {phase})"
    return f"about {amount(memory.peak)} of a GPU{most}: {', '.join(parts)}"


def judge(recipe: Recipe, sizes: "Sizes", gpus: Sequence[Gpu], share: float = 1.0) -> Verdict:
    """Compare a run with the smallest GPU that a worker may get.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        gpus: at least one, of sizes that are known.
        share: part of a GPU that a worker may use, if several share one.
    """
    from ..training.models.memory_estimate import estimate
    from ..training.models.placement import decide, other, smaller, with_strategy

    smallest = min(gpus, key=lambda gpu: gpu.bytes or 0)
    whole = smallest.bytes or 0
    room = room_of(gpus, share)
    assert room is not None
    recipe = decide(recipe, sizes, room)
    recipe = with_strategy(recipe, sizes, whole, room.compute)
    memory = estimate(recipe, sizes, room.compute)
    summary = f"{memory_text(memory, recipe)}; there is {amount(room.bytes)} ({smallest.name})"
    if memory.peak <= room.bytes:
        return Verdict(True, False, summary)

    def fits(changed: Recipe) -> bool:
        return estimate(changed, sizes, room.compute).peak <= room.bytes

    remedies = [text for text, changed in smaller(recipe) if fits(changed)]
    if remedies:
        text = f"{summary}: too much at once. It would fit with {', or with '.join(remedies)}"
        return Verdict(True, True, text)
    least = recipe.with_placement(1, True)
    remedies = [text for text, changed in other(least) if fits(changed)]
    most = amount(estimate(least, sizes, room.compute).peak)
    lines = [f"{summary}; at microbatch 1 with gradient checkpointing it still needs {most}"]
    if remedies:
        lines.append(f"With these it would fit too: {', or '.join(remedies)}")
    return Verdict(False, True, ". ".join(lines))


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
