"""Loads the model of a run: base weights, tokenizer, adapter."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..common.errors import InputError
from ..config.models import Head, ModelSettings
from ..config.places import locates
from ..config.recipe import Recipe
from ..config.weight_checks import embedding_rows
from ..data.added_tokens import add_tokens
from ..data.chat import CHATML
from .adapter import TRAINED, cast_trainable_parameters, existing_adapter, new_adapter
from .adapter_reference import add_reference, check_reference_copy, is_reference_copy
from .base_cache import BaseCache
from .composite import freeze_towers, model_from_config, towers
from .devices import decomposing_device, device_kind
from .dtypes import choose_adapter_dtype, choose_dtype, torch_dtype
from .freezing import freeze
from .left_out import freeze_left_out
from .pretrained import Notify, load_pretrained
from .quantisation import (
    initialise_loftq,
    keep_from_broadcast,
    numel,
    prepare_for_training,
    quantisation_config,
)
from .quantiser import check_quantisable, check_saved
from .tokens import check_trained, make_room, rows_of

Model: TypeAlias = PreTrainedModel | PeftModel


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template and its added tokens."""
    tokenizer = _base_tokenizer(recipe)
    if recipe.model.add_tokens:
        add_tokens(tokenizer, recipe.model.add_tokens, recipe.data.chat_template)
    template = recipe.data.chat_template
    if template is not None:
        tokenizer.chat_template = CHATML if template == "chatml" else template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _base_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    settings = recipe.model
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        settings.base,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    return tokenizer


@dataclass(frozen=True)
class AddedTokens:
    """Ids of the tokens of `model.add_tokens`."""

    trained: list[int]
    names: list[str]
    """The tokens' texts."""
    fresh: list[int]
    """Those that the base's tokenizer lacks."""

    @classmethod
    def of(cls, recipe: Recipe) -> "AddedTokens":
        requested = recipe.model.add_tokens
        if not requested:
            return cls([], [], [])
        tokenizer = _base_tokenizer(recipe)
        before = {*tokenizer.get_vocab().values()}
        trained = add_tokens(tokenizer, requested, recipe.data.chat_template)
        names = [str(tokenizer.convert_ids_to_tokens(index)) for index in trained]
        return cls(trained, names, [index for index in trained if index not in before])


def grown_embedding(recipe: Recipe, model: Model) -> dict[str, int]:
    """`embedding_rows` for run.json, if the embedding has more rows than that of the base."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before, rows = embedding_rows(recipe.model), rows_of(base)
    return {"embedding_rows": rows} if before is not None and rows > before else {}


@locates
def load_model(
    recipe: Recipe,
    head: Head = "causal",
    bases: BaseCache | None = None,
    notify: Notify = lambda _: None,
    left_out: Collection[str] = (),
) -> Model:
    """The model to train, with its adapter if the recipe has one.

    The model is on the CPU. On this process's GPU, if there is one, is a quantised base, unless the
    strategy is fsdp, and one that the adapter's first values change.
    Trained weights of the base are float32 (autocast computes in lower types), those of an adapter
    have the type of `choose_adapter_dtype`, and a frozen base has the compute type.

    Args:
        recipe: the run's recipe.
        head: causal returns logits of the next token; score returns one number for the whole text
            through a new linear layer `score`, which is trained and saved.
        bases: keeps the frozen base for the next run of this process; None keeps nothing.
        notify: receives a line about tensors of the base that are not used.
        left_out: patterns of parameters that get no gradient (`left_out`); they are not trained.

    Raises:
        InputError: the weights cannot be read or do not fit the model, or a name of a module or
            parameter matches nothing.
    """
    added = AddedTokens.of(recipe)
    if recipe.method.starts_at_random:
        model = _random_model(recipe, head)
        make_room(model, added.trained, added.fresh)
    else:
        cached = bases.take(recipe) if bases is not None and head == "causal" else None
        model = cached or _load_base(recipe, head, added, notify)
    if added.trained:
        notify(f"model.add_tokens: {', '.join(added.names)} get rows of their own")
    if left := towers(model):
        notify(f"model.base: text does not reach {', '.join(left)}; they stay as they are")
    model.config.get_text_config().use_cache = False
    if head == "score":
        model.config.get_text_config().pad_token_id = load_tokenizer(recipe).pad_token_id
    if recipe.trains_adapter:
        adapted = _with_adapter(model, recipe, head, added, left_out)
        if bases is not None and head == "causal":
            bases.put(recipe, adapted)
        return adapted
    if recipe.freeze is not None:
        freeze(model, recipe.freeze)
    freeze_towers(model)
    check_trained(model, added.trained)
    freeze_left_out(model, left_out)
    return model


def _random_model(recipe: Recipe, head: Head) -> PreTrainedModel:
    config = _config(recipe.model, head)
    return model_from_config(
        config,
        head,
        "model.base",
        dtype=torch.float32,
        trust_remote_code=recipe.model.trust_remote_code,
        **_attention(recipe.model),
    )


def _config(settings: ModelSettings, head: Head) -> Any:
    return AutoConfig.from_pretrained(
        settings.base,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        **head_arguments(head),
    )


def _load_base(recipe: Recipe, head: Head, added: AddedTokens, notify: Notify) -> PreTrainedModel:
    dtype = torch_dtype(choose_dtype(recipe.model)) if recipe.trains_adapter else torch.float32
    model = _load_weights(
        recipe.model,
        head,
        dtype=dtype,
        quantization_config=quantisation_config(recipe.model),
        notify=notify,
        **_place_of_packed(recipe),
    )
    prepare_for_training(model)
    make_room(model, added.trained, added.fresh)
    return model


def _load_weights(settings: ModelSettings, head: Head, **more: Any) -> PreTrainedModel:
    return load_pretrained(
        settings.base,
        head,
        "model.base",
        new_head=head == "score",
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        **_attention(settings),
        **head_arguments(head),
        **more,
    )


def _with_adapter(
    model: PreTrainedModel,
    recipe: Recipe,
    head: Head,
    added: AddedTokens,
    left_out: Collection[str],
) -> PeftModel:
    """The frozen model with the recipe's adapter, in the state before the first step."""
    dtype = torch_dtype(choose_adapter_dtype(recipe))
    if recipe.adapter is not None and recipe.adapter.changes_base:
        model.to(decomposing_device())
    adapted = _attach(model, recipe, head, added.trained, left_out)
    freeze_left_out(adapted, left_out)
    if recipe.adapter is not None and recipe.adapter.init == "loftq":
        full = _load_weights(recipe.model, head, dtype=torch.float32)
        initialise_loftq(adapted, full)
    cast_trainable_parameters(adapted, dtype)
    keep_from_broadcast(adapted)
    if recipe.adapter is not None and recipe.adapter.changes_base:
        add_reference(adapted, recipe)  # the saved adapter is the difference from this state
    return adapted


def _attach(
    model: PreTrainedModel,
    recipe: Recipe,
    head: Head,
    tokens: list[int],
    left_out: Collection[str],
    *,
    weights: bool = True,
) -> PeftModel:
    if recipe.model.adapter is not None:
        folder = Path(recipe.model.adapter)
        adapted = existing_adapter(model, folder, head, weights=weights)
    else:
        assert recipe.adapter is not None
        adapted = new_adapter(model, recipe.adapter, head, tokens, left_out, weights=weights)
    freeze_towers(adapted.get_base_model())  # an adapter from elsewhere may reach into them
    return adapted


def _place_of_packed(recipe: Recipe) -> dict[str, Any]:
    """A quantised base is loaded onto the GPU that there is, unless this run trains on the CPU, or
    each GPU gets a shard of it."""
    if recipe.model.quantize == "none":
        return {}
    on_cpu = device_kind() == "cpu" or recipe.scale.strategy == "fsdp"
    return {"device_map": {"": "cpu"}} if on_cpu else {}


def _attention(settings: ModelSettings) -> dict[str, Any]:
    return {} if settings.attention == "auto" else {"attn_implementation": settings.attention}


def head_arguments(head: Head) -> dict[str, Any]:
    """Arguments of `from_pretrained` that a model with this head needs."""
    return {"num_labels": 1} if head == "score" else {}


def forward_arguments(model: Model) -> frozenset[str]:
    """Parameter names of the base model's `forward`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return frozenset(inspect.signature(base.forward).parameters)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode: without dropout and gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of all (`total`) and of trainable parameters, without an adapter's frozen copy."""
    total = trainable = 0
    for name, parameter in model.named_parameters():
        if not is_reference_copy(name):
            total += numel(parameter)
            trainable += numel(parameter) if parameter.requires_grad else 0
    return {"total": total, "trainable": trainable}


@locates
def build_meta_model(
    recipe: Recipe,
    head: Head = "causal",
    left_out: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> Model:
    """The model to train on the meta device: built from its configuration, without weights.

    Args:
        recipe, head, left_out: as in `load_model`.
        dtype: what its weights are loaded in; None as its configuration says.

    Raises:
        InputError: transformers has no such model with this head, or a name of a module or
            parameter matches nothing.
    """
    config = _config(recipe.model, head)
    trust = recipe.model.trust_remote_code
    added = AddedTokens.of(recipe)
    with torch.device("meta"):
        own = {} if dtype is None else {"dtype": dtype}
        base = model_from_config(config, head, "model.base", trust_remote_code=trust, **own)
        model: Model = base
        make_room(base, added.trained, added.fresh)
        _check_quantisation(base, recipe)
        if recipe.trains_adapter:
            model = _attach(base, recipe, head, added.trained, left_out, weights=False)
            method = recipe.method
            _check_rollouts(recipe, model)
            is_copied = method.uses_reference and method.reference_name is None
            if is_copied and recipe.model.adapter is not None:
                check_reference_copy(model)
        else:
            if recipe.freeze is not None:
                freeze(model, recipe.freeze)
            freeze_towers(model)
            check_trained(model, added.trained)
    freeze_left_out(model, left_out)
    return model


@locates
def check_quantisation(recipe: Recipe) -> None:
    """Refuse a `model.quantize` that the model does not allow, alone or with shards.

    Raises:
        InputError: as `build_meta_model`.
    """
    trust = recipe.model.trust_remote_code
    config = _config(recipe.model, recipe.method.head)
    with torch.device("meta"):
        model = model_from_config(config, recipe.method.head, "model.base", trust_remote_code=trust)
    _check_quantisation(model, recipe)


def _check_quantisation(model: PreTrainedModel, recipe: Recipe) -> None:
    if recipe.model.quantize == "none":
        return
    check_quantisable(model, recipe.model.quantize, sharded=recipe.scale.strategy == "fsdp")
    check_saved(model, _saved_whole(recipe))


def _saved_whole(recipe: Recipe) -> list[str]:
    """Names or ends of names of the modules that an adapter trains whole."""
    if recipe.model.adapter is None:
        return list(recipe.adapter.modules_to_save) if recipe.adapter is not None else []
    saved = LoraConfig.from_pretrained(recipe.model.adapter).modules_to_save
    return list(saved or ())


def _check_rollouts(recipe: Recipe, model: PeftModel) -> None:
    """Refuse vLLM for an adapter that is added to parameters, which it does not read."""
    method = recipe.method
    uses_vllm = method.samples_online and not method.completions_at_once
    if uses_vllm and model.peft_config[TRAINED].target_parameters:
        raise InputError(
            "method.rollout: vLLM does not read an adapter of experts; set adapter.experts: false "
            "with adapter.targets of the attention, or method.rollout: transformers"
        )


def count_meta_parameters(recipe: Recipe, head: Head = "causal") -> dict[str, int]:
    """`count_parameters` of the run's model, computed without weights.

    Raises:
        InputError: as `build_meta_model`.
    """
    return count_parameters(build_meta_model(recipe, head))
