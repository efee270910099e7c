"""LoRA adapters on a frozen base: new ones, and existing ones that are trained further."""

import re
import warnings
from collections.abc import Collection, Container
from dataclasses import replace
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.adapter_folder import TASKS, WEIGHTS_FILE
from ..config.models import Head, LoraAdapter
from ..config.weight_files import read_header
from .composite import is_in_towers, towers, towers_pattern
from .left_out import kept
from .targets import Targets, check_adapted, choose_targets, patterns_for, shorten, shortest
from .tokens import room_for_adapter, token_rows

TRAINED = "default"
"""PEFT's name for the adapter that is trained."""

# PEFT adds these modules to the adapter of a model with a score head by itself.
_SCORE_HEADS = ("classifier", "score")


class NoAdapter(InputError):
    """PEFT cannot put an adapter on these modules."""


def new_adapter(
    model: PreTrainedModel,
    settings: LoraAdapter,
    head: Head,
    tokens: Collection[int] = (),
    left_out: Collection[str] = (),
    *,
    weights: bool = True,
) -> PeftModel:
    """Freeze the model and add a new LoRA adapter to its target modules.

    Args:
        model: the base; `init` pissa and olora change its weights.
        settings: the recipe's adapter. `initialise_loftq` handles `init` loftq.
        head: causal for next-token logits, score for one number per text.
        tokens: ids of the tokens whose rows of embedding and head are trained.
        left_out: patterns of modules that get no adapter, because it would get no gradient.
        weights: False for a model on the meta device, whose adapter needs no initial values.

    Raises:
        InputError: a name or pattern matches nothing; the message lists the existing names.
    """
    _check_names(model, settings)
    targets = choose_targets(model, settings)
    targets = Targets(kept(targets.modules, left_out), kept(targets.parameters, left_out))
    if targets.modules & (tied := _tied(model)):
        targets = replace(targets, modules=targets.modules | tied)  # they stay one matrix
    init: bool | str = settings.init
    if not weights or init in ("default", "loftq"):
        init = True
    ties = _ties(model, settings, targets)
    config = LoraConfig(
        task_type=TASKS[head],
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(targets.modules),
        target_parameters=_parameters(model, targets),
        exclude_modules=towers_pattern(towers(model)),
        modules_to_save=_modules_to_save(model, settings) or None,
        trainable_token_indices=_token_rows(model, settings, tokens) or None,
        rank_pattern=patterns_for(targets, settings.rank_pattern),
        alpha_pattern=patterns_for(targets, settings.alpha_pattern),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights=init,
        ensure_weight_tying=ties,
    )
    adapted = _attach(model, config)
    check_adapted(adapted, targets)
    adapted_names = {name.removesuffix(".weight") for name in targets.names}
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted_names):
                raise InputError(
                    f"adapter.{field}: {pattern!r} matches no target module; the target modules "
                    f"are {shorten(adapted_names)}"
                )
    return adapted


def existing_adapter(
    model: PreTrainedModel, folder: Path, head: Head, *, weights: bool = True
) -> PeftModel:
    """Freeze the model and add an adapter that an earlier run trained.

    A model with a new score head also accepts the adapter of a causal language model.

    Raises:
        InputError: the adapter's tensors do not match its configuration on this model.
        NoAdapter: PEFT refuses one of its modules.
    """
    room_for_adapter(model, folder)
    config = LoraConfig.from_pretrained(folder)
    config.task_type = TASKS[head]
    config.inference_mode = False
    config.init_lora_weights = True
    config.base_model_name_or_path = None
    if head == "score":  # its model has no head for tokens that an embedding could be tied to
        config.ensure_weight_tying = False
    saved = [name for name in config.modules_to_save or () if _has_module(model, name)]
    config.modules_to_save = saved or None
    config.trainable_token_indices = _rows_on(model, config)
    adapted = _attach(model, config)
    if not weights:
        check_fits(adapted, folder, "model.adapter", _need_not_fit(adapted, folder, head))
        return adapted
    stored = load_file(folder / WEIGHTS_FILE)
    tensors = _without_base(stored, adapted)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    new_head = {name for name in expected if head == "score" and _is_score_head(name)}
    if head == "score":
        tensors = {name: value for name, value in tensors.items() if not _is_token_head(name)}
    check_fits(adapted, folder, "model.adapter", new_head | (stored.keys() - tensors.keys()))
    head_weights = {name: expected[name] for name in new_head}
    set_peft_model_state_dict(adapted, {**head_weights, **tensors}, adapter_name=TRAINED)
    return adapted


def _rows_on(model: PreTrainedModel, config: LoraConfig) -> dict[str, list[int]] | None:
    """The rows that an adapter trains, of the matrices that this model has."""
    rows = config.trainable_token_indices
    if not rows:
        return None
    if not isinstance(rows, dict):
        return token_rows(model, rows)
    return {name: ids for name, ids in rows.items() if _has_module(model, name)}


def _without_base(tensors: dict[str, torch.Tensor], adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Without the base's own weights: PEFT saves an embedding beside its adapter."""
    own = adapted.state_dict()
    return {
        name: value
        for name, value in tensors.items()
        if name not in own or own[name].shape != value.shape or not own[name].cpu().equal(value)
    }


def _need_not_fit(adapted: PeftModel, folder: Path, head: Head) -> set[str]:
    """Tensors in an adapter's file that may be the base's own, and those of a head."""
    own = {name: tuple(value.shape) for name, value in adapted.state_dict().items()}
    stored = _header(folder)
    names = {name for name, shape in stored.items() if own.get(name) == shape}
    if head == "score":
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        names |= {name for name in expected if _is_score_head(name)}
        names |= {name for name in stored if _is_token_head(name)}
    return names


def _header(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an adapter's file."""
    header = read_header(Folder(str(folder.absolute())), WEIGHTS_FILE)
    return {name: entry.shape for name, entry in header.items()}


def _has_module(model: PreTrainedModel, name: str) -> bool:
    """True if the model has a module of this name; PEFT adds a score head by itself."""
    if name in _SCORE_HEADS:
        return False
    return any(_ends_with(module, name) for module, _ in model.named_modules())


def check_fits(
    adapted: PeftModel, folder: Path, where: str, new: Container[str] = frozenset()
) -> None:
    """Check that an adapter's file holds exactly the tensors of the adapter on this model.

    Args:
        adapted: the model with the adapter.
        folder: the adapter's folder.
        where: the key in the recipe, for messages.
        new: names of tensors that need not fit.

    Raises:
        InputError: tensors are missing, unexpected or of another shape.
    """
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored = {
        name: shape
        for name, shape in _header(folder).items()
        # But for the frozen weight of an adapted embedding.
        if ".base_layer." not in name or ".lora_" in name
    }
    mismatches = [
        name
        for name in sorted(expected.keys() | stored.keys())
        if expected.get(name) != stored.get(name) and name not in new
    ]
    if mismatches:
        raise InputError(
            f"{where}: {folder} does not fit the model: {', '.join(mismatches[:5])} "
            f"({len(mismatches)} tensors in all) are missing, unexpected or of another shape"
        )


def cast_trainable_parameters(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast all trainable parameters to `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # new_adapter refuses a pattern that matches nothing.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, RuntimeError) as error:  # whatever PEFT refuses
        raise NoAdapter(
            f"adapter.targets: LoRA cannot be put on {shorten(config.target_modules or ())} of the "
            f"architecture {model.config.model_type}; name other modules"
        ) from error
    # The initial values are set now: loading the saved adapter must not compute them again.
    config.init_lora_weights = True
    return adapted


def _reached(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The modules that text may reach, by name."""
    outside = towers(model)
    return [item for item in model.named_modules() if not is_in_towers(item[0], outside)]


def _modules_to_save(model: PreTrainedModel, settings: LoraAdapter) -> list[str]:
    """The recipe's names; in a composite model the whole names of what they match in text's part,
    as PEFT excludes nothing from them. Of embedding and head that are one matrix always both: PEFT
    keeps them one by the names of only some architectures."""
    saved = list(settings.modules_to_save)
    if towers(model):
        saved = [n for n, _ in _reached(model) if any(_ends_with(n, ending) for ending in saved)]
    tied = _tied(model)
    alone = {name for name in tied if not any(_ends_with(name, ending) for ending in saved)}
    return [*saved, *sorted(alone)] if alone != tied else saved


def _token_rows(
    model: PreTrainedModel, settings: LoraAdapter, tokens: Collection[int]
) -> dict[str, list[int]]:
    """The rows to train by themselves, of the matrices that are not trained whole.

    Raises:
        InputError: a matrix is to be trained through an adapter too, or has a bias.
    """
    rows = token_rows(model, tokens) if tokens else {}
    targets = settings.targets
    for name in {*rows, *(_tied(model) if rows else ())}:
        if isinstance(targets, list):
            is_target = any(_ends_with(name, target) for target in targets)
        else:
            is_target = targets != "all-linear" and re.fullmatch(targets, name) is not None
        if is_target:
            raise InputError(
                f"adapter.targets: {name} has rows of model.add_tokens, which are trained whole; "
                "take it out of targets, or into modules_to_save"
            )
    whole = _modules_to_save(model, settings)
    rows = {
        name: ids
        for name, ids in rows.items()
        if not any(_ends_with(name, saved) for saved in whole)
    }
    for name in rows:
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise InputError(
                f"model.add_tokens: {name} has a bias, which is lost where some of its rows are "
                f"trained; add {name} to adapter.modules_to_save, which trains all of it"
            )
    return rows


def _check_names(model: PreTrainedModel, settings: LoraAdapter) -> None:
    modules = {name: module for name, module in _reached(model) if name}
    leaves = (name for name, module in modules.items() if not list(module.children()))
    for saved in settings.modules_to_save:
        if not any(name.endswith(saved) for name in modules):
            raise InputError(
                f"adapter.modules_to_save: {saved!r} matches no module of the model; its modules "
                f"are {shorten(leaves)}"
            )


def _parameters(model: PreTrainedModel, targets: Targets) -> list[str] | None:
    """The names in the adapter's configuration of the parameters that it is added to."""
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return shortest(targets.parameters, names) or None


def _ties(model: PreTrainedModel, settings: LoraAdapter, targets: Targets) -> bool:
    """True if embedding and head stay one matrix with what the adapter adds.

    Raises:
        InputError: a module is to be trained whole and through an adapter, or the first values
            cannot be those of a tied matrix.
    """
    tied = _tied(model)
    names = [name for name, _ in _reached(model)]
    saved = {n for n in names for s in settings.modules_to_save if _ends_with(n, s)}
    adapted = targets.modules
    twice = (adapted & saved) | (tied if adapted & tied and saved & tied else set())
    if twice:
        raise InputError(
            f"adapter: {', '.join(sorted(twice))} would be trained whole (modules_to_save) and "
            "through an adapter (targets); take it out of one of them"
        )
    if (adapted | saved) & tied:
        _check_tied_init(settings, tied)
    return bool((adapted | saved) & tied)


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of embedding and head, if they are one matrix."""
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    if pair[1] is None or pair[0].weight is not pair[1].weight:
        return set()
    return {name for name, module in model.named_modules() if module in pair}


def _check_tied_init(settings: LoraAdapter, tied: set[str]) -> None:
    if settings.init not in ("default", "gaussian"):
        raise InputError(
            f"adapter.init {settings.init}: {' and '.join(sorted(tied))} are one matrix in this "
            "model, which such a start would part; use init default, or leave both out of targets "
            "and modules_to_save"
        )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _is_token_head(name: str) -> bool:
    return "lm_head" in name.split(".")


def _is_score_head(name: str) -> bool:
    return any(part in _SCORE_HEADS for part in name.split("."))
