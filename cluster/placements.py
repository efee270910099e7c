"""The ways to run a recipe on some GPUs, and the nearest that fits where the recipe does not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..training.common.errors import InputError
from ..training.config.recipe import Recipe
from ..training.config.sections import ScaleSettings
from ..training.models.devices import Room
from .cards import NODE

if TYPE_CHECKING:
    from ..training.models.memory_estimate import Sizes

_SHORTEST = 256
"""Tokens; no shorter `data.max_length` is proposed."""
_CHANGED = (
    "scale.workers",
    "scale.gpus_per_worker",
    "scale.strategy",
    "optim.micro_batch_size",
    "optim.micro_batch_tokens",
    "model.gradient_checkpointing",
    "model.quantize",
    "data.max_length",
)
"""The settings in which a nearest recipe may differ."""


@dataclass(frozen=True)
class Placement:
    """One way to run a recipe."""

    strategy: str
    """one GPU, ddp or fsdp."""
    workers: int
    quantize: str
    rows: int
    """Rows of a microbatch."""
    checkpoints: bool
    recipe: Recipe
    own_scale: ScaleSettings
    """The section `scale` of the recipe that is planned."""

    @property
    def settings(self) -> list[str]:
        """The settings that lead to it, as --set takes them."""
        made = [
            f"scale.workers={self.workers}",
            self.recipe.microbatch_setting,
            f"model.gradient_checkpointing={str(self.checkpoints).lower()}",
        ]
        if self.workers > 1 or self.own_scale.strategy == "fsdp":
            made.append(f"scale.strategy={self.recipe.scale.strategy}")
        if not has_whole_gpus(self.own_scale):
            made.append("scale.gpus_per_worker=auto")
        if self.recipe.trains_adapter:
            made.append(f"model.quantize={self.quantize}")
        return made


def has_whole_gpus(scale: ScaleSettings) -> bool:
    """True if each worker gets a GPU of its own, as placements have it."""
    return scale.gpus_per_worker in ("auto", 1)


def quantisations(recipe: Recipe) -> list[str]:
    """The recipe's own, and the other of none and nf4 where an adapter allows it."""
    own = recipe.model.quantize
    plain = recipe.adapter is not None and recipe.adapter.init in ("default", "gaussian")
    uses_vllm = recipe.method.samples_online and not recipe.method.completions_at_once
    other = {"none": "nf4", "nf4": "none"}.get(own)
    return [own, *([other] if other and plain and not uses_vllm else [])]


def sizes_by_quantisation(recipe: Recipe) -> dict[str, "Sizes"]:
    """The model's sizes by quantisation, which are the same; without one that it does not allow.

    Raises:
        InputError: as `sizes_of`, for the recipe's own.
    """
    from ..training.models import import_peft  # noqa: F401 - before what loads peft
    from ..training.models.loading import check_quantisation
    from ..training.models.memory_estimate import sizes_of

    own, *others = quantisations(recipe)
    sizes = {own: sizes_of(recipe)}
    for quantize in others:
        with suppress(InputError):
            check_quantisation(with_settings(recipe, "model", quantize=quantize))
            sizes[quantize] = sizes[own]
    return sizes


def placements(
    recipe: Recipe, quantize: str, sizes: "Sizes", room: Room, count: int
) -> Iterator[Placement]:
    """One GPU, ddp and fsdp, with and without checkpointing, at the largest fitting microbatch.

    Args:
        recipe: the recipe to place.
        quantize: `model.quantize`.
        sizes: of its model, so quantised.
        room: what each GPU offers.
        count: number of GPUs.
    """
    recipe = with_settings(recipe, "model", quantize=quantize)
    for strategy, workers in _strategies(recipe, sizes, room, count):
        placed = with_settings(recipe, "scale", workers=workers, strategy=strategy)
        for checkpoints in (False, True):
            rows = _rows(placed, checkpoints, sizes, room)
            name = strategy if workers > 1 else "one GPU"
            chosen = placed.with_placement(rows, checkpoints)
            yield Placement(name, workers, quantize, rows, checkpoints, chosen, recipe.scale)


def nearest(recipe: Recipe, sizes: Mapping[str, "Sizes"], room: Room, count: int) -> Recipe | None:
    """The recipe that fits with the least change, where this one does not.

    First a step in smaller parts, then shards, 4 bits, and rows half as long, again and again.

    Args:
        recipe: its microbatch is no longer `auto`.
        sizes: of its model, by quantisation.
        room: what each GPU offers.
        count: number of GPUs.

    Returns:
        None if none of these fits.
    """
    from ..training.models.placement import fits, smaller

    own = recipe.model.quantize
    for changed in smaller(recipe):
        if recipe.scale.most_workers <= count and fits(changed, sizes[own], room):
            return changed
    least = [
        (with_settings(placed, "scale", workers=workers, strategy=strategy), quantize)
        for quantize in sizes
        for placed in [with_settings(recipe.with_placement(1, True), "model", quantize=quantize)]
        for strategy, workers in _near_strategies(placed, sizes[quantize], room, count)
    ]
    length = recipe.data.max_length
    while length >= min(_SHORTEST, recipe.data.max_length):
        for placed, quantize in least:
            shorter = with_settings(placed, "data", max_length=length).with_placement(1, True)
            if fits(shorter, sizes[quantize], room):
                return shorter
        length //= 2
    return None


def _near_strategies(
    recipe: Recipe, sizes: "Sizes", room: Room, count: int
) -> list[tuple[str, Any]]:
    """(strategy, workers): the recipe's own if it has so many GPUs, then others of them."""
    scale = recipe.scale
    if scale.most_workers > max(1, scale.least_workers):  # as many as fit
        shards = [("fsdp", scale.workers)] if _is_shardable(recipe, sizes, room) else []
        return [(scale.strategy, scale.workers), *shards]
    own = [(scale.strategy, scale.workers)] if scale.most_workers <= count else []
    return list(dict.fromkeys([*own, *_strategies(recipe, sizes, room, count)]))


def _strategies(recipe: Recipe, sizes: "Sizes", room: Room, count: int) -> list[tuple[str, int]]:
    """(strategy, workers) on so many GPUs: one, a node's, and as many as have rows in a step.

    Shards that travel between nodes can take longer than the GPUs of one node would.
    """
    strategies = [("ddp", 1)]
    most = min(count, recipe.rows_per_step)
    for workers in sorted({min(most, NODE), most} - {1}):
        strategies.append(("ddp", workers))
        if _is_shardable(recipe, sizes, room):
            strategies.append(("fsdp", workers))
    return strategies


def _is_shardable(recipe: Recipe, sizes: "Sizes", room: Room) -> bool:
    from ..training.models.placement import can_shard

    return can_shard(recipe, sizes, room.compute)


def _rows(recipe: Recipe, checkpoints: bool, sizes: "Sizes", room: Room) -> int:
    """The largest microbatch that fits, of the powers of two; 1 if none does.

    The recipe's own where the loss depends on it.
    """
    from ..training.models.placement import decide

    if recipe.method.averages_by_pass:
        return recipe.microbatch
    open_ = recipe.with_placement(1, checkpoints)
    open_ = with_settings(open_, "optim", micro_batch_size="auto", micro_batch_tokens=None)
    return decide(open_, sizes, room).microbatch


def changed_settings(own: Recipe, changed: Recipe) -> list[str]:
    """The settings of `changed` that differ from the recipe as it is written, as --set has them."""
    return [
        f"{key}={_text(_value(changed, key))}"
        for key in _CHANGED
        if _value(changed, key) != _value(own, key)
    ]


def as_line(settings: Sequence[str]) -> str:
    """--set KEY=VALUE for each."""
    return " ".join(f"--set {setting}" for setting in settings)


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    """The recipe with other settings of a section."""
    part = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: part})
