"""One step of a run on the small copy, and what follows it: save, load, merge."""

import traceback
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..common.errors import FinrayError, InputError
from ..common.progress import SILENT
from ..config.models import Head
from ..config.recipe import Recipe
from ..config.sections import Isolation
from ..engine.methods import objective_of
from ..export.merge import merge
from ..models.adapter import NoAdapter
from ..models.composite import auto_class
from ..models.left_out import patterns_of, plain_names
from ..models.loading import Model, head_arguments, load_model, load_tokenizer
from ..models.targets import adapted_layers
from ..models.tokens import rows_of
from ..models.weights import save_result
from ..objectives.objective import Setup
from .rows import FIRST_TOKEN, rows_for
from .small_copy import ROWS, VOCABULARY, SmallCopy

_TOLERANCE = 1e-4
"""Of logits, relative to the largest one, between a trained model and its saved files."""


@dataclass(frozen=True)
class Step:
    """A step that was taken."""

    model: Model
    """The model after the step, with its gradients."""
    loss: float
    left_out: list[str]
    """Patterns of parameters that are trained, but get no gradient."""
    is_general: bool
    """True if the patterns hold for the whole model too, which has more layers."""


def train_step(
    recipe: Recipe,
    copy: SmallCopy,
    isolation: Isolation | None,
    left_out: Collection[str] = (),
    shares: bool = False,
) -> Step:
    """One forward and backward pass of the method's loss.

    Args:
        recipe: the recipe of the copy.
        copy: the copy.
        isolation: how texts that share a row are kept apart; None for one text a row.
        left_out: patterns of parameters that are not trained.
        shares: whether texts share what they begin with.

    Raises:
        InputError: the step fails.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = load_model(recipe, recipe.method.head, left_out=left_out)
    except NoAdapter as error:
        if recipe.adapter is None:
            raise
        raise InputError(_unsuitable(copy)) from error
    except FinrayError:
        raise
    except Exception as error:
        raise InputError(
            f"model.base: the architecture {_kind(copy.model)} cannot be loaded with these settings"
            f" ({_place_in_libraries(error)}); choose another model, or other settings of adapter "
            "and quantisation"
        ) from error
    if recipe.model.checkpoints:
        _checkpoint(model)
    try:
        loss = _loss(recipe, copy, model, isolation, shares)
    except FinrayError:
        raise
    except Exception as error:
        raise InputError(_explain(recipe, copy, model, error)) from error
    if not torch.isfinite(loss):
        raise InputError(
            f"model.base: the architecture {_kind(model)} has a loss of {loss.item()} with method "
            f"{recipe.method.kind} on a small random copy; choose another model or method"
        )
    trained = plain_names(model)
    missing = {trained[name] for name in trained if model.get_parameter(name).grad is None}
    return Step(model, float(loss), *patterns_of(missing, trained.values()))


def _checkpoint(model: Model) -> None:
    """Let a model recompute its activations.

    Raises:
        InputError: its code does not.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"model.gradient_checkpointing: the code of the architecture {_kind(model)} does not "
            "recompute activations; set it to false"
        ) from error


def _loss(
    recipe: Recipe, copy: SmallCopy, model: Model, isolation: Isolation | None, shares: bool
) -> Tensor:
    """The step's loss, differentiated."""
    setup = Setup(
        recipe=recipe,
        model=model,
        tokenizer=load_tokenizer(recipe),
        prepared=cast(Any, None),  # only a precomputed reference reads data, and none is used
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        isolation=isolation,
        shares_prefixes=shares,
    )
    objective = objective_of(setup)
    model.train()
    packed = recipe.method.packs and recipe.data.packing is not False and isolation is not None
    rows = rows_for(recipe.method, ROWS, VOCABULARY, copy.longest, packed)
    with torch.no_grad():
        batches = objective.batches(0, rows)
    units = max(1, sum(batch.loss_units for batch in batches))
    total = torch.zeros(())
    for batch in batches:
        loss = objective.loss(model, batch, measured=True).total / units
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def adapted_modules(model: Model) -> dict[str, int] | None:
    """Numbers of modules with an adapter, by the last part of their name."""
    if not isinstance(model, PeftModel):
        return None
    names = (name.removesuffix(".weight") for name in adapted_layers(model))
    return dict(Counter(name.rpartition(".")[2] for name in names))


def save_and_load(recipe: Recipe, copy: SmallCopy, model: Model, scratch: Path) -> list[str]:
    """Save the model as a run does, load it with plain PEFT or transformers, and merge it.

    Returns:
        Lines about what fails only after a run: the merge.

    Raises:
        InputError: the saved files do not give the trained model.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:  # new adapters start at zero
                weight.add_(0.02 * torch.randn_like(weight))
    rows = rows_of(_base_of(model))
    try:
        expected = _logits(model, rows)
    except Exception as error:
        raise InputError(
            f"model.base: the architecture {_kind(model)} takes a step with these settings, but "
            f"cannot be evaluated ({_place_in_libraries(error)}); choose another model, or other "
            "settings of adapter and quantisation"
        ) from error
    target = scratch / "result"
    try:
        save_result(recipe, model, load_tokenizer(recipe), target)
        loaded = _plainly_loaded(recipe, copy.folder, target, rows)
    except Exception as error:
        raise InputError(
            f"{_what(recipe)}: what is trained of the architecture {_kind(model)} cannot be saved "
            f"and loaded again with these settings ({_place_in_libraries(error)}); "
            f"{_remedy(recipe)}"
        ) from error
    is_exact = recipe.model.quantize == "none"
    if is_exact and not _close(expected, _logits(loaded, rows)):
        raise InputError(
            f"{_what(recipe)}: the architecture {_kind(model)} computes something else after it is "
            f"saved and loaded; {_remedy(recipe)}"
        )
    if not isinstance(model, PeftModel):
        return []
    return _merge(recipe, copy.folder, target, scratch, expected if is_exact else None)


def _what(recipe: Recipe) -> str:
    return "adapter" if recipe.trains_adapter else "model.base"


def _remedy(recipe: Recipe) -> str:
    return "choose other adapter.targets" if recipe.trains_adapter else "train an adapter instead"


def _plainly_loaded(recipe: Recipe, base: Path, result: Path, rows: int) -> torch.nn.Module:
    """The result without finray, as its user loads it; the trained embedding has so many rows."""
    head, trust = recipe.method.head, recipe.model.trust_remote_code
    if not recipe.trains_adapter:
        whole: torch.nn.Module = _opened(result, head, trust)
        return whole
    model = _opened(base, head, trust)
    if head == "score":
        model.config.get_text_config().pad_token_id = 0
    if rows > rows_of(model):
        model.resize_token_embeddings(rows)
    adapted: torch.nn.Module = PeftModel.from_pretrained(model, result)
    return adapted


def _opened(folder: Path, head: Head, trust: bool = False) -> PreTrainedModel:
    """A whole model, as transformers opens it."""
    arguments = {"trust_remote_code": trust, **head_arguments(head)}
    config = AutoConfig.from_pretrained(folder, **arguments)
    model: PreTrainedModel = auto_class(config, head, "model.base").from_pretrained(
        folder, dtype=torch.float32, **arguments
    )
    return model


def _merge(
    recipe: Recipe, base: Path, adapter: Path, scratch: Path, expected: Tensor | None
) -> list[str]:
    merged = scratch / "merged"
    merged.mkdir()
    try:
        merge(
            base,
            adapter,
            merged,
            SILENT,
            quantize=recipe.model.quantize,
            compute_dtype="float32",
            pad_token_id=0,
        )
        model = _opened(merged, recipe.method.head)
    except InputError as error:
        return [f"the result cannot be merged: {error}"]
    except Exception as error:  # noqa: BLE001 - training is possible, the merge is not
        return [f"the result cannot be merged ({_place_in_libraries(error)})"]
    if expected is not None and not _close(expected, _logits(model, rows_of(model))):
        return ["the merged model would compute something else than base and adapter"]
    return []


@torch.no_grad()
def _logits(model: torch.nn.Module, rows: int = VOCABULARY) -> Tensor:
    """Logits of the first tokens, and of the last ones, which may be added ones."""
    model.eval()
    tokens = torch.cat([torch.arange(FIRST_TOKEN, FIRST_TOKEN + 24), torch.arange(rows - 4, rows)])
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    return logits.float()


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())


def _explain(recipe: Recipe, copy: SmallCopy, model: Model, error: Exception) -> str:
    """What a failed step means for the recipe, in one line."""
    kind = _kind(model)
    if isinstance(model, PeftModel) and not _breaks(copy.another()):
        names = sorted(adapted_modules(model) or {})
        modules = model.targeted_module_names
        of_kind = {kind: [m for m in modules if m.rpartition(".")[2] == kind] for kind in names}
        bad = [kind for kind in names if of_kind[kind] and _breaks(_adapted(copy, of_kind[kind]))]
        if bad:
            good = ", ".join(name for name in names if name not in bad)
            return (
                f"adapter.targets: the architecture {kind} cannot compute with LoRA on "
                f"{', '.join(bad)}; leave them out: adapter.targets: [{good}]"
            )
    return (
        f"model.base: the architecture {kind} cannot take a step of method "
        f"{recipe.method.kind} with these settings: {_place(model, error)} fails "
        f"({_place_in_libraries(error)}); choose another model, or other settings of "
        "adapter and method"
    )


def _unsuitable(copy: SmallCopy) -> str:
    """Which kinds of linear layers take no adapter at all, in one line."""
    head = copy.model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: name
        for name, module in copy.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    bad = []
    for kind, name in linear.items():
        try:
            _adapted(copy, [name])
        except (ValueError, TypeError, RuntimeError):
            bad.append(kind)
    good = ", ".join(sorted(linear.keys() - bad))
    return (
        f"adapter.targets: LoRA cannot be put on {', '.join(sorted(bad)) or 'these modules'} of "
        f"the architecture {_kind(copy.model)}; name the others: adapter.targets: [{good}]"
    )


def _adapted(copy: SmallCopy, targets: list[str]) -> torch.nn.Module:
    """The copy with an adapter on these modules alone."""
    config = LoraConfig(r=2, target_modules=targets)
    adapted: torch.nn.Module = get_peft_model(copy.another(), config)
    return adapted


def _breaks(model: torch.nn.Module) -> bool:
    """True if the model cannot compute logits."""
    try:
        _logits(model)
    except Exception:  # noqa: BLE001 - whatever fails is the answer
        return True
    return False


def _kind(model: Model) -> str:
    kind: str = _base_of(model).config.model_type
    return kind


def _base_of(model: Model) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base)


def _place(model: torch.nn.Module, error: BaseException) -> str:
    """The innermost module in whose method an error was raised; layer numbers become *."""
    names = {id(module): name for name, module in model.named_modules()}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        place = names.get(id(frame.f_locals.get("self")), place) or place
    parts = ["*" if part.isdigit() else part for part in place.split(".")]
    return ".".join(parts).removeprefix("base_model.model.") or "its forward"


def _place_in_libraries(error: BaseException) -> str:
    """Kind of an error, and where it was raised: TypeError at modeling_llama.py:120."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    return f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
