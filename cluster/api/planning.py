"""What a run would need of a kind of GPU: computed from the recipe, without a GPU or a network."""

from itertools import product
from typing import TYPE_CHECKING, Any

from ...training.common.errors import InputError
from ...training.common.formatting import is_number
from ...training.config.model_folder import model_folder
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.config.recipe import load_recipe as load
from ...tuning.sweep import is_sweep
from ..cards import CARDS, Card, link_of, parse_gpus
from ..gpus import Gpu, amount
from ..memory_fit import host_bytes, judge
from ..placements import (
    Placement,
    as_line,
    changed_settings,
    has_whole_gpus,
    nearest,
    placements,
    sizes_by_quantisation,
    with_settings,
)
from .outlook import data_outlook
from .recipes import Changes, RecipeSource, as_changes, prepare_process, read, source_of

if TYPE_CHECKING:
    from ...training.models.devices import Room
    from ...training.models.memory_estimate import MemoryEstimate, Sizes

UTILISATION = 0.4
"""Share of a GPU's operations that training is assumed to reach."""
_MORE = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs to propose, where none of other settings fits so few."""


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
        Plain values: `placements`, each with its peaks by phase, whether it fits and how tightly,
        the bytes that the first worker takes of its machine's memory (`host`) and that each other
        does (`host_of_others`), tokens a second, hours and GPU hours; `best`, the settings of the
        fastest that fits, those that fill the card last, None if none does; and `nearest`, what
        would fit then.

    Raises:
        InputError: there is no such card, or the recipe is wrong.
    """
    card, count = parse_gpus(gpu)
    if not is_number(utilisation) or not 0 < utilisation <= 1:
        raise InputError(f"--utilisation {utilisation}: expected a share above 0 and up to 1")
    prepare_process()
    source = source_of(recipe)
    if is_sweep(source):
        raise InputError(
            "a sweep has no single plan; plan its base recipe, or one with the settings of a trial"
        )
    return _planned(read(recipe, changes), card, count, utilisation)


def place(recipe: RecipeSource, changes: Changes = (), *, gpu: str) -> tuple[Recipe, int]:
    """A recipe with the settings of its best placement on a kind of GPU; `changes` keep theirs.

    Args:
        recipe, changes, gpu: as in `plan`.

    Returns:
        The recipe, and the bytes that a worker takes of its machine's memory.

    Raises:
        InputError: as `plan`, or it does not fit; the message holds the nearest that does.
    """
    planned = plan(recipe, changes, gpu=gpu)
    if planned["best"] is None:
        least = min(row["peak"] for row in planned["placements"])
        near = planned["nearest"] or "no shorter data.max_length, and not 64 GPUs of any card"
        raise InputError(
            f"--gpu {gpu}: the run needs at least {amount(least)} of each GPU; the nearest that "
            f"would fit: {near}"
        )
    return _placed(load(source_of(recipe), [*planned["best"], *as_changes(changes)]), gpu)


@locates
def _placed(recipe: Recipe, gpu: str) -> tuple[Recipe, int]:
    card, count = parse_gpus(gpu)
    gpus = [Gpu(card.title, card.bytes, has_bfloat16=card.has_bfloat16)] * count
    if recipe.scale.most_workers > count:
        raise InputError(
            f"scale.workers: {recipe.scale.most_workers}, and --gpu {gpu} has {count}; lower it, "
            "or give more GPUs"
        )
    sizes = sizes_by_quantisation(recipe)
    verdict = judge(recipe, sizes, gpus)
    if not verdict.fits or verdict.is_tight:
        raise InputError(f"--gpu {gpu}: {verdict.text}")
    return recipe, host_bytes(recipe, sizes[recipe.model.quantize], _room(card).compute)


@locates
def _planned(recipe: Recipe, card: Card, count: int, utilisation: float) -> dict[str, Any]:
    if model_folder(recipe.model, only_cached=True) is None:
        raise InputError(
            f"model.base: the configuration of {recipe.model.base} is not on this machine; "
            "download it, or give a folder with its config.json"
        )
    work, sizes = _work(recipe, card), sizes_by_quantisation(recipe)
    rows = [
        _figures(placement, of_model, card, utilisation, work)
        for quantize, of_model in sizes.items()
        for placement in placements(recipe, quantize, of_model, _room(card), count)
    ]
    rows.sort(
        key=lambda row: (
            *(not row["fits"], row["is_tight"]),
            *(row["seconds_per_step"], row["gpu_hours"] or 0),
        )
    )
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


def _work(recipe: Recipe, card: Card) -> dict[str, Any]:
    """Steps of the run, tokens of its data, and the share of a full step that holds tokens; None
    where the data is not at hand. Completions count as long as they may be."""
    sampled = recipe.data.max_length - recipe.row_length if recipe.method.samples_online else 0
    length = recipe.tokens_per_row
    work: dict[str, Any] = {"steps": None, "tokens": None, "filled": 1.0, "note": None}
    try:
        data = data_outlook(recipe)
    except InputError as error:  # the memory can be planned all the same
        data = {"sequences": None, "tokens": None}
        work["note"] = str(error)
    if recipe.model.dtype == "bfloat16" and not card.has_bfloat16:
        slow = f"model.dtype: {card.title} emulates bfloat16, many times slower; auto takes float16"
        work["note"] = slow if work["note"] is None else f"{work['note']}\n{slow}"
    if data["sequences"]:
        work |= {
            "steps": recipe.total_steps(data["sequences"]),
            "tokens": data["tokens"],
            "filled": min(1.0, (data["tokens"] / data["sequences"] + sampled) / length),
        }
    elif recipe.optim.max_steps is not None:
        work["steps"] = recipe.optim.max_steps
    return work


def _room(card: Card) -> "Room":
    from ...training.models.devices import Room

    return Room(card.bytes, card.has_bfloat16)


def _memory(recipe: Recipe, sizes: "Sizes", card: Card) -> "MemoryEstimate":
    from ...training.models.memory_estimate import estimate

    return estimate(recipe, sizes, _room(card).compute)


def _figures(
    placement: Placement, sizes: "Sizes", card: Card, utilisation: float, work: dict[str, Any]
) -> dict[str, Any]:
    from ...training.models.placement import SHARE, fits
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
        "fits": fits(recipe, sizes, _room(card)),
        "is_tight": memory.peak > SHARE * card.bytes,
        "host": host_bytes(recipe, sizes, _room(card).compute),
        "host_of_others": host_bytes(recipe, sizes, _room(card).compute, is_first=False),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * workers,
        "settings": placement.settings,
    }


def _nearest(recipe: Recipe, sizes: dict[str, "Sizes"], card: Card, count: int) -> str | None:
    """What would fit instead: other settings, the smallest card that does, more GPUs, or both; then
    shorter rows there."""
    own = _settings_on(recipe, sizes, card, count)
    if own is not None:
        return own
    if (larger := _on_another_card(recipe, sizes, count)) is not None:
        return larger
    more = [number for number in _MORE if number > count]
    for number in more:
        if (settings := _settings_on(recipe, sizes, card, number)) is not None:
            return f"--gpu {card.name}:{number} {settings}"
    others = (_on_another_card(recipe, sizes, number) for number in more)
    at_full_length = next(filter(None, others), None)
    return at_full_length or _shorter_on_another_card(recipe, sizes, card, [count, *more])


def _settings_on(recipe: Recipe, sizes: dict[str, "Sizes"], card: Card, count: int) -> str | None:
    """The settings of the nearest recipe that fits on so many GPUs of a card."""
    from ...training.models.placement import decide

    own, room = recipe.model.quantize, _room(card)
    on_gpus = recipe
    if not has_whole_gpus(recipe.scale):
        on_gpus = with_settings(recipe, "scale", gpus_per_worker="auto")
    near = nearest(decide(on_gpus, sizes[own], room), sizes, room, count)
    return None if near is None else as_line(changed_settings(recipe, near))


def _shorter_on_another_card(
    recipe: Recipe, sizes: dict[str, "Sizes"], card: Card, counts: list[int]
) -> str | None:
    larger = [one for one in _smallest_first() if one.bytes > card.bytes]
    if not larger or _settings_on(recipe, sizes, larger[-1], counts[-1]) is None:
        return None
    for count, one in product(counts, larger):
        if (settings := _settings_on(recipe, sizes, one, count)) is not None:
            return f"--gpu {one.name}:{count} {settings}"
    return None


def _smallest_first() -> list[Card]:
    return sorted(CARDS.values(), key=lambda one: one.bytes)


def _on_another_card(recipe: Recipe, sizes: dict[str, "Sizes"], count: int) -> str | None:
    """The smallest card of which up to so many GPUs hold the run; None if none does."""
    from ...training.models.placement import fits

    for card, quantize in product(_smallest_first(), sorted(sizes, key=lambda one: one != "nf4")):
        least = placements(recipe, quantize, sizes[quantize], _room(card), count)
        for placement in filter(lambda one: one.checkpoints, least):
            if fits(placement.recipe, sizes[quantize], _room(card)):
                peak = _memory(placement.recipe, sizes[quantize], card).peak
                return f"--gpu {card.name}:{placement.workers} ({amount(peak)} of each)"
    return None
