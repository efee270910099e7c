"""Chooses what the memory of a GPU allows: the strategy, the microbatch, checkpointing."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..common.errors import InputError
from ..config.recipe import Recipe
from ..config.sections import Strategy
from .devices import Room, memory_of
from .dtypes import DtypeName, choose_dtype
from .memory_estimate import Sizes, estimate, sizes_of

SHARE = 0.92
"""Share of a GPU's memory that `auto` fills: the allocator's own pieces and NCCL take some."""
USABLE = 0.8
"""Share of a GPU's memory for weights and what trains them; the rest is for activations."""
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


def choose_strategy(recipe: Recipe, world_size: int, device: torch.device) -> Strategy:
    """The strategy of a worker; `auto` is fsdp if the weights and what trains them do not fit.

    A single worker always uses ddp. All ranks call this together and get the same result.

    Args:
        recipe: the run's recipe.
        world_size: number of workers.
        device: the device that this worker trains on.

    Raises:
        InputError: fsdp for weights that cannot be sharded.
    """
    requested = recipe.scale.strategy
    if world_size == 1 or requested == "ddp":
        return "ddp"
    compute = choose_dtype(recipe.model)
    if requested == "fsdp":
        reason = _computing_in(compute, recipe).why_not_shardable
        if reason is not None:
            raise InputError(f"scale.strategy fsdp: {reason}")
        return "fsdp"
    if recipe.why_not_shardable is not None or device.type == "cpu":
        return "ddp"
    of_all: list[tuple[int, DtypeName]] = [(0, compute)] * world_size
    dist.all_gather_object(of_all, (memory_of(device), compute))
    if any(of_rank == "float16" for _, of_rank in of_all):  # GPUs of several kinds
        compute = "float16"
    scale = recipe.scale.model_copy(update={"workers": world_size})
    own = recipe.model_copy(update={"scale": scale})
    chosen = with_strategy(own, sizes_of(recipe), min(memory for memory, _ in of_all), compute)
    return "fsdp" if chosen.scale.strategy == "fsdp" else "ddp"


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
    few = recipe.scale.least_workers < 2
    if recipe.scale.strategy != "auto" or few or not can_shard(recipe, sizes, compute):
        return recipe
    memory = estimate(recipe.with_placement(1, False), sizes, compute)
    is_large = memory.weights + memory.training > USABLE * room
    return recipe.with_strategy("fsdp") if is_large else recipe


def can_shard(recipe: Recipe, sizes: Sizes, compute: DtypeName | None = None) -> bool:
    """True if workers can hold shards of the weights.

    Args:
        recipe, sizes, compute: as for `with_strategy`.
    """
    is_packed = recipe.model.quantize != "none" and sizes.packs_parameters
    return not is_packed and _computing_in(compute, recipe).why_not_shardable is None


def _computing_in(compute: DtypeName | None, recipe: Recipe) -> Recipe:
    """The recipe with the type that its `model.dtype: auto` comes to."""
    if compute is None or recipe.model.dtype != "auto":
        return recipe
    model = recipe.model.model_copy(update={"dtype": compute})
    return recipe.model_copy(update={"model": model})


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
