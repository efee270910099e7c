"""What a run would need of a kind of GPU: computed from the recipe, without a GPU or a network."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...training.common.errors import InputError
from ...training.config.model_folder import model_folder
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.config.sections import ScaleSettings
from ..cards import CARDS, Card, link_of, parse_gpus
from ..gpus import amount
from .outlook import data_outlook
from .recipes import Changes, RecipeSource, prepare_process, read

if TYPE_CHECKING:
    from ...training.models.devices import Room
    from ...training.models.memory_estimate import MemoryEstimate, Sizes

UTILISATION = 0.4
"""Share of a GPU's operations that training is assumed to reach."""


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
    """Of the recipe that is planned."""

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
        if self.own_scale.gpus_per_worker == 0:
            made.append("scale.gpus_per_worker=auto")
        if self.recipe.trains_adapter:
            made.append(f"model.quantize={self.quantize}")
        return made


def plan(
    recipe: RecipeSource,
    changes: Changes = (),
    *,
    gpu: str,
    utilisation: float = UTILISATION,
) -> dict[str, Any]:
    """Every sensible placement of a run on a kind of GPU, the fastest first.

    Args:
        recipe, changes: as in `train`.
        gpu: the card and how many: `h100:8`.
        utilisation: share of the card's 16-bit operations that training reaches.

    Returns:
        Plain values: `placements`, each with its peaks by phase, whether it fits, tokens a second,
        hours and GPU hours; `best`, the settings of the fastest that fits, None if none does; and
        `nearest`, what would fit then.

    Raises:
        InputError: there is no such card, or the recipe is wrong.
    """
    card, count = parse_gpus(gpu)
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation {utilisation:g}: expected a share above 0 and up to 1")
    prepare_process()
    return _planned(read(recipe, changes), card, count, utilisation)


@locates
def _planned(recipe: Recipe, card: Card, count: int, utilisation: float) -> dict[str, Any]:
    if model_folder(recipe.model, only_cached=True) is None:
        raise InputError(
            f"model.base: the configuration of {recipe.model.base} is not on this machine; "
            "download it, or give a folder with its config.json"
        )
    work, sizes = _work(recipe), _sizes(recipe)
    rows = [
        _figures(placement, of_model, card, utilisation, work)
        for quantize, of_model in sizes.items()
        for placement in _placements(recipe, quantize, of_model, card, count)
    ]
    rows.sort(key=lambda row: (not row["fits"], row["seconds_per_step"], row["gpu_hours"] or 0))
    fitting = [row for row in rows if row["fits"]]
    return {
        "name": recipe.name,
        "base": recipe.model.base,
        "gpu": card.title,
        "gpus": count,
        "utilisation": utilisation,
        **work,
        "placements": rows,
        "best": fitting[0]["settings"] if fitting else None,
        "nearest": None if fitting else _nearest(recipe, sizes, card, count),
    }


def _work(recipe: Recipe) -> dict[str, Any]:
    """Steps of the run, and tokens of a step; None where the data is not at hand."""
    length = recipe.data.max_length * recipe.method.sequences_per_row
    work: dict[str, Any] = {"steps": None, "tokens": None, "filled": 1.0, "note": None}
    try:
        data = data_outlook(recipe)
    except InputError as error:  # the memory can be planned all the same
        data = {"sequences": None, "tokens": None}
        work["note"] = str(error)
    if data["sequences"]:
        work |= {
            "steps": recipe.total_steps(data["sequences"]),
            "tokens": data["tokens"],
            "filled": min(1.0, data["tokens"] / (data["sequences"] * length)),
        }
    elif recipe.optim.max_steps is not None:
        work["steps"] = recipe.optim.max_steps
    return work


def _sizes(recipe: Recipe) -> dict[str, "Sizes"]:
    """The model's sizes by quantisation; without another that the model does not allow."""
    from ...training.models import import_peft  # noqa: F401 - before what loads peft
    from ...training.models.memory_estimate import sizes_of

    own, *others = _quantisations(recipe)
    sizes = {own: sizes_of(recipe)}
    for quantize in others:
        with suppress(InputError):
            sizes[quantize] = sizes_of(_with(recipe, "model", quantize=quantize))
    return sizes


def _quantisations(recipe: Recipe) -> list[str]:
    """The recipe's own, and the other of none and nf4 where an adapter allows it."""
    own = recipe.model.quantize
    plain = recipe.adapter is not None and recipe.adapter.init in ("default", "gaussian")
    uses_vllm = recipe.method.samples_online and not recipe.method.completions_at_once
    other = {"none": "nf4", "nf4": "none"}.get(own)
    return [own, *([other] if other and plain and not uses_vllm else [])]


def _placements(
    recipe: Recipe, quantize: str, sizes: "Sizes", card: Card, count: int
) -> Iterator[Placement]:
    """One GPU, ddp and fsdp, with and without checkpointing, at the largest fitting microbatch."""
    recipe = _with(recipe, "model", quantize=quantize)
    strategies = [("ddp", 1)]
    if count > 1 and recipe.rows_per_step >= count:
        strategies.append(("ddp", count))
        if _is_shardable(recipe, count):
            strategies.append(("fsdp", count))
    for strategy, workers in strategies:
        placed = _with(recipe, "scale", workers=workers, strategy=strategy)
        for checkpoints in (False, True):
            rows = _rows(placed, checkpoints, sizes, _room(card))
            name = strategy if workers > 1 else "one GPU"
            chosen = placed.with_placement(rows, checkpoints)
            yield Placement(name, workers, quantize, rows, checkpoints, chosen, recipe.scale)


def _is_shardable(recipe: Recipe, count: int) -> bool:
    """True if workers can shard the model; packed weights of a few architectures cannot be."""
    if recipe.why_not_shardable is not None or recipe.model.quantize == "none":
        return recipe.why_not_shardable is None
    from ...training.models.loading import build_meta_model

    try:
        sharded = _with(recipe, "scale", workers=count, strategy="fsdp")
        build_meta_model(sharded, recipe.method.head)
    except InputError:
        return False
    return True


def _rows(recipe: Recipe, checkpoints: bool, sizes: "Sizes", room: "Room") -> int:
    """The largest microbatch that fits, of the powers of two; 1 if none does."""
    from ...training.models.placement import decide

    size = {"micro_batch_size": "auto", "micro_batch_tokens": None}
    open_ = _with(recipe.with_placement(1, checkpoints), "optim", **size)
    return decide(open_, sizes, room).microbatch


def _room(card: Card) -> "Room":
    from ...training.models.devices import Room

    return Room(card.bytes, card.has_bfloat16)


def _memory(recipe: Recipe, sizes: "Sizes", card: Card) -> "MemoryEstimate":
    from ...training.models.memory_estimate import estimate

    return estimate(recipe, sizes, _room(card).compute)


def _figures(
    placement: Placement, sizes: "Sizes", card: Card, utilisation: float, work: dict[str, Any]
) -> dict[str, Any]:
    from ...training.models.speed import Device, seconds_per_step

    recipe, workers = placement.recipe, placement.workers
    memory = _memory(recipe, sizes, card)
    full = recipe.rows_per_step * recipe.method.sequences_per_row * recipe.data.max_length
    if recipe.method.samples_online:
        full = recipe.optim.batch_size * recipe.data.max_length
    device = Device(card.tflops * 1e12, card.bandwidth * 1e12, link_of(card, workers))
    tokens = full * work["filled"]
    seconds = seconds_per_step(recipe, sizes, device, utilisation, tokens, workers)
    hours = None if work["steps"] is None else work["steps"] * seconds / 3600
    return {
        "strategy": placement.strategy,
        "workers": workers,
        "quantize": placement.quantize,
        "micro_batch_size": placement.rows,
        "gradient_checkpointing": placement.checkpoints,
        "phases": memory.phases,
        "peak": memory.peak,
        "fits": memory.peak <= card.bytes,
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * workers,
        "settings": placement.settings,
    }


def _nearest(recipe: Recipe, sizes: dict[str, "Sizes"], card: Card, count: int) -> str | None:
    """What would fit instead: a shorter length, or the smallest card that holds the run."""
    quantize = "nf4" if "nf4" in sizes else recipe.model.quantize
    of_model = sizes[quantize]
    least = [
        placement
        for placement in _placements(recipe, quantize, of_model, card, count)
        if placement.checkpoints
    ]
    length = recipe.data.max_length // 2
    while length >= 256:
        for placement in least:
            shorter = _with(placement.recipe, "data", max_length=length)
            shorter = shorter.with_placement(placement.rows, placement.checkpoints)
            if _memory(shorter, of_model, card).peak <= card.bytes:
                settings = replace(placement, recipe=shorter).settings
                return " ".join(f"--set {one}" for one in settings) + (
                    f" --set data.max_length={length}"
                )
        length //= 2
    for larger in sorted(CARDS.values(), key=lambda one: one.bytes):
        for placement in least:
            peak = _memory(placement.recipe, of_model, larger).peak
            if peak <= larger.bytes:
                return f"--gpu {larger.name}:{placement.workers} ({amount(peak)} of each)"
    return None


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: part})
