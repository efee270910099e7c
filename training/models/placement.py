"""Chooses what the memory of a GPU allows: the strategy, the microbatch, checkpointing."""

from collections.abc import Iterator
from typing import Any

from ..config.recipe import Recipe
from .devices import Room
from .dtypes import DtypeName
from .memory_estimate import Sizes, estimate
from .sharding import USABLE

_SHARE = 0.92
"""Share of a GPU's memory that `auto` fills: the allocator's own pieces take some."""
_MOST_ROWS = 64
"""Largest microbatch that `auto` takes: the products of a GPU are full long before."""


def decide(recipe: Recipe, sizes: Sizes, room: Room) -> Recipe:
    """The recipe with a number in `optim.micro_batch_size` and a choice in
    `model.gradient_checkpointing`.

    Checkpointing is taken only where the run does not fit without it: with a microbatch of its own,
    or, if that is `auto` too, with one row. Then as many rows are taken as fit, a power of two of
    them, so that they divide the batch as evenly as they can.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        room: what a worker's GPU offers.
    """
    if not recipe.leaves_open:
        return recipe
    sharded = with_strategy(recipe, sizes, room.bytes, room.compute)

    def fits(rows: int, checkpoints: bool) -> bool:
        changed = sharded.with_placement(rows, checkpoints)
        return estimate(changed, sizes, room.compute).peak <= _SHARE * room.bytes

    is_auto = recipe.optim.micro_batch_size == "auto"
    rows = 1 if is_auto else recipe.microbatch
    checkpoints = recipe.model.checkpoints
    if recipe.model.gradient_checkpointing == "auto":
        checkpoints = not fits(rows, False)
    if is_auto:
        while 2 * rows <= _most_rows(recipe) and fits(2 * rows, checkpoints):
            rows *= 2
    return recipe.with_placement(rows, checkpoints)


def _most_rows(recipe: Recipe) -> int:
    """Largest microbatch that a worker has rows for in a step."""
    workers = max(1, recipe.scale.most_workers)
    return min(_MOST_ROWS, max(1, recipe.optim.batch_size // workers))


def with_strategy(
    recipe: Recipe, sizes: Sizes, room: int, compute: DtypeName | None = None
) -> Recipe:
    """The recipe with the strategy that `auto` results in; see `choose_strategy`.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        room: bytes of a GPU's memory.
        compute: the type that `model.dtype: auto` comes to.
    """
    if recipe.scale.strategy != "auto":
        return recipe
    memory = estimate(recipe.with_placement(1, False), sizes, compute)
    return sharded(recipe) if memory.weights + memory.training > USABLE * room else recipe


def sharded(recipe: Recipe) -> Recipe:
    """The recipe with sharded weights, if it can be sharded over at least two workers."""
    if recipe.scale.least_workers < 2 or recipe.why_not_shardable is not None:
        return recipe
    scale = recipe.scale.model_copy(update={"strategy": "fsdp"})
    return recipe.model_copy(update={"scale": scale})


def smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(settings, recipe) that train the same in smaller parts, the largest parts first."""
    rows = recipe.microbatch
    if not recipe.model.checkpoints:
        yield "model.gradient_checkpointing=true", recipe.with_placement(rows, True)
    while rows > 1:
        rows //= 2
        less = recipe.with_placement(rows, recipe.model.checkpoints)
        text = less.microbatch_setting
        yield text, less
        if not recipe.model.checkpoints:
            both = f"{text} and model.gradient_checkpointing=true"
            yield both, recipe.with_placement(rows, True)


def other(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(settings, recipe) that train differently and need less memory."""
    adapter = recipe.adapter
    plain = adapter is None or adapter.init in ("default", "gaussian")
    if recipe.trains_adapter and plain and recipe.model.quantize != "nf4":
        yield "model.quantize=nf4", with_model(recipe, quantize="nf4")
    if recipe.scale.strategy != "fsdp" and (shared := sharded(recipe)) is not recipe:
        yield "scale.strategy=fsdp", shared
    for length in (recipe.data.max_length // 2, recipe.data.max_length // 4):
        data = recipe.data.model_copy(update={"max_length": length})
        shorter = recipe.model_copy(update={"data": data})
        text = f"data.max_length={length}"
        if recipe.optim.micro_batch_tokens is not None:
            shorter = shorter.with_placement(recipe.microbatch, recipe.model.checkpoints)
            text += f" and {shorter.microbatch_setting}"
        yield text, shorter


def with_model(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other settings of its model."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=settings)})
