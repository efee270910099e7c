"""Rehearses a recipe: copy, packing, one step, save, load, merge."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

from transformers import PreTrainedModel

from ..common.errors import FinrayError, InputError, in_one_line
from ..config.recipe import Recipe
from ..config.sections import Isolation
from ..models.loading import build_meta_model
from .outcome import Outcome
from .packing import find_isolation, scores_alike, sees_later_tokens, shares_prefixes
from .small_copy import VOCABULARY, SmallCopy, make_copy, names_layers, small_recipe
from .step import Step, adapted_modules, save_and_load, train_step

_SETTINGS = ("attn_type", "attention_type", "use_bidirectional_attention", "is_decoder", "causal")
"""Fields that let tokens see later ones."""


def rehearse_recipe(recipe: Recipe, scratch: Path) -> Outcome:
    """Rehearse a recipe.

    Args:
        recipe: the recipe, its paths absolute.
        scratch: an empty folder.
    """
    try:
        _check_whole(recipe)
    except FinrayError as error:
        return Outcome("refused", message=str(error))
    try:
        copy = make_copy(recipe, _folder(scratch, "copy"), all_layers=names_layers(recipe))
        small = small_recipe(recipe, copy, scratch)
    except Exception as error:  # noqa: BLE001 - the libraries know more kinds than this code
        # Some classifiers have no language model, which the copy is.
        if isinstance(error, InputError) and recipe.method.head == "causal":
            return Outcome("refused", message=str(error))
        return _without_copy(error)
    if (unfit := _unfit(recipe, copy)) is not None:
        return Outcome("refused", message=unfit)
    isolation, reason = _isolation(recipe, copy)
    shares = not recipe.method.packs and isolation == "documents"
    shares = shares and shares_prefixes(copy, VOCABULARY)
    outcome = Outcome("ok", isolation=isolation, shares_prefixes=shares, unpacked_because=reason)
    packs = recipe.method.packs and recipe.data.packing is not False
    try:
        if recipe.method.head == "score" and not scores_alike(small, copy, isolation, shares):
            outcome = replace(outcome, isolation=None, shares_prefixes=False)
        packed_by = outcome.way(packs)
        shares = outcome.shares_prefixes
        small, step = _first_step(small, copy, packed_by, shares)
        outcome = replace(outcome, checkpointing=small.model.gradient_checkpointing != "auto")
        if not step.is_general and not names_layers(recipe):
            copy = make_copy(recipe, _folder(scratch, "deep"), all_layers=True)
            checkpoints = small.model.checkpoints
            small = small_recipe(recipe, copy, scratch)
            small = small.with_placement(small.microbatch, checkpoints)
            step = train_step(small, copy, packed_by, shares=shares)
        if step.left_out:
            outcome = replace(outcome, left_out=tuple(step.left_out))
            step = train_step(small, copy, packed_by, step.left_out, shares)
        outcome = replace(outcome, adapted=adapted_modules(step.model))
        notes = save_and_load(small, copy, step.model, scratch)
    except FinrayError as error:
        return replace(outcome, status="refused", message=_for_the_base(str(error), copy, recipe))
    return replace(outcome, notes=tuple(_for_the_base(note, copy, recipe) for note in notes))


def _isolation(recipe: Recipe, copy: SmallCopy) -> tuple[Isolation | None, str | None]:
    """How texts that share a row are kept apart; or why documents cannot be packed."""
    if recipe.method.packs:
        return find_isolation(copy, VOCABULARY, ways_of(recipe))
    try:
        return find_isolation(copy, VOCABULARY, ways_of(recipe))[0], None
    except Exception:  # noqa: BLE001 - the step that follows names what fails
        return None, None


def _first_step(
    small: Recipe, copy: SmallCopy, packed_by: Isolation | None, shares: bool
) -> tuple[Recipe, Step]:
    """A step, with checkpointing if the run may come to it; without it if that alone fails.

    Returns:
        The recipe of the copy, with checkpointing decided unless that fails; and the step.
    """
    if small.model.gradient_checkpointing == "auto":
        checkpointed = small.with_placement(small.microbatch, True)
        with suppress(FinrayError):
            return checkpointed, train_step(checkpointed, copy, packed_by, shares=shares)
    return small, train_step(small, copy, packed_by, shares=shares)


def _unfit(recipe: Recipe, copy: SmallCopy) -> str | None:
    """Why the architecture cannot be trained as the recipe says; None if it may be."""
    if recipe.method.head == "causal" and _looks_ahead(copy):
        return _no_decoder(copy)
    parts = (part for part in copy.model.modules() if isinstance(part, PreTrainedModel))
    if recipe.model.attention == "flash_attention_2" and not all(
        part._supports_flash_attn for part in parts
    ):
        return (
            f"model.attention: the architecture {copy.model.config.model_type} has no flash "
            "attention; remove the setting: auto takes what it has"
        )
    return None


def _looks_ahead(copy: SmallCopy) -> bool:
    try:
        return sees_later_tokens(copy, VOCABULARY)
    except Exception:  # noqa: BLE001 - the step that follows names what fails
        return False


def _no_decoder(copy: SmallCopy) -> str:
    values = copy.model.config.get_text_config().to_dict()
    cause = next(
        (f" (its config.json has {key}: {values[key]})" for key in _SETTINGS if key in values), ""
    )
    kind = copy.model.config.model_type
    return (
        f"model.base: in the architecture {kind} a token sees those after it{cause}, so "
        "it cannot learn to predict the next one; choose a decoder"
    )


def ways_of(recipe: Recipe) -> tuple[Isolation, ...]:
    """The ways to keep documents apart that the recipe's attention allows.

    The kernels of flash attention take no mask, and read positions of a single row alone.
    """
    ways: tuple[Isolation, ...] = get_args(Isolation)
    if recipe.model.attention == "auto":
        return ways
    if recipe.model.attention == "flash_attention_2":
        return ("borders",)
    return tuple(way for way in ways if way != "documents")


def _check_whole(recipe: Recipe) -> None:
    """Check what follows from the model's sizes, or from files with its names, without weights.

    Raises:
        InputError: much of it would not be quantised, or an existing adapter does not fit it.
    """
    if recipe.model.quantize != "none" or recipe.model.adapter is not None:
        build_meta_model(recipe, recipe.method.head)


def _without_copy(error: Exception) -> Outcome:
    return Outcome(
        "not rehearsed",
        message=f"no small copy of the model can be made ({type(error).__name__}: "
        f"{in_one_line(error)[:200]})",
    )


def _folder(scratch: Path, name: str) -> Path:
    folder = scratch / name
    folder.mkdir()
    return folder


def _for_the_base(message: str, copy: SmallCopy, recipe: Recipe) -> str:
    """A message about the copy, as one about the recipe's model."""
    return message.replace(str(copy.folder), recipe.model.base)
