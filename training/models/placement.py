"""Chooses what the memory of a GPU allows: the strategy, the microbatch, checkpointing."""

from collections.abc import Iterator

from ..config.recipe import Recipe
from .devices import Room
from .dtypes import DtypeName
from .memory_estimate import Sizes, estimate
from .sharding import USABLE

SHARE = 0.92
"""Share of a GPU's memory that `auto` fills: the allocator's own pieces and NCCL take some."""
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
        return estimate(changed, sizes, room.compute).peak <= SHARE * room.bytes

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
    if recipe.scale.strategy != "auto" or sharded(recipe, compute) is recipe:
        return recipe
    memory = estimate(recipe.with_placement(1, False), sizes, compute)
    is_large = memory.weights + memory.training > USABLE * room
    return sharded(recipe, compute) if is_large else recipe


def sharded(recipe: Recipe, compute: DtypeName | None = None) -> Recipe:
    """The recipe with sharded weights, if it can be sharded over at least two workers.

    Args:
        recipe: the run's recipe.
        compute: the type that `model.dtype: auto` comes to; float16 cannot be sharded.
    """
    is_half = recipe.model.dtype == "auto" and compute == "float16"
    if is_half or recipe.scale.least_workers < 2 or recipe.why_not_shardable is not None:
        return recipe
    scale = recipe.scale.model_copy(update={"strategy": "fsdp"})
    return recipe.model_copy(update={"scale": scale})


def fits(recipe: Recipe, sizes: Sizes, room: Room) -> bool:
    """True if a worker of the run fits into its GPU.

    Args:
        recipe: with a strategy, and a microbatch that is no longer `auto`.
        sizes: sizes of its model.
        room: what the worker's GPU offers.
    """
    return estimate(recipe, sizes, room.compute).peak <= room.bytes


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes that train the same in smaller parts, the largest parts first."""
    rows = recipe.microbatch
    if not recipe.model.checkpoints:
        yield recipe.with_placement(rows, True)
    while rows > 1:
        rows //= 2
        yield recipe.with_placement(rows, recipe.model.checkpoints)
        if not recipe.model.checkpoints:
            yield recipe.with_placement(rows, True)
