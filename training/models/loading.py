"""Loads the model of a run: base weights, tokenizer, adapter."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..common.errors import InputError
from ..config.models import Head, ModelSettings
from ..config.recipe import Recipe
from ..data.chat import CHATML
from .adapter import cast_trainable_parameters, existing_adapter, new_adapter
from .adapter_reference import add_reference, is_reference_copy
from .base_cache import BaseCache
from .dtypes import choose_adapter_dtype, choose_dtype, torch_dtype
from .freezing import freeze
from .quantisation import (
    initialise_loftq,
    is_batch_invariant,
    numel,
    prepare_for_training,
    quantisation_config,
)

Model: TypeAlias = PreTrainedModel | PeftModel

AUTO_CLASSES = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template if it names one."""
    settings = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(
        settings.base,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    template = recipe.data.chat_template
    if template is not None:
        tokenizer.chat_template = CHATML if template == "chatml" else template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, head: Head = "causal", bases: BaseCache | None = None) -> Model:
    """The model to train, with its adapter if the recipe has one.

    The model is on the CPU; only a quantised base is on this process's GPU, if there is one.
    Trained weights of the base are float32 (autocast computes in lower types), those of an adapter
    have the type of `choose_adapter_dtype`, and a frozen base has the compute type.

    Args:
        recipe: the run's recipe.
        head: causal returns logits of the next token; score returns one number for the whole text
            through a new linear layer `score`, which is trained and saved.
        bases: keeps the frozen base for the next run of this process; None keeps nothing.

    Raises:
        InputError: the weights cannot be read, or a name of a module or parameter matches nothing.
    """
    if recipe.method.starts_at_random:
        model = _random_model(recipe, head)
    else:
        cached = bases.take(recipe) if bases is not None and head == "causal" else None
        model = cached or _load_base(recipe, head)
    model.config.use_cache = False
    if head == "score":
        model.config.pad_token_id = load_tokenizer(recipe).pad_token_id
    if recipe.trains_adapter:
        adapted = _with_adapter(model, recipe, head)
        if bases is not None and head == "causal":
            bases.put(recipe, adapted)
        return adapted
    if recipe.freeze is not None:
        freeze(model, recipe.freeze)
    return model


def _random_model(recipe: Recipe, head: Head) -> PreTrainedModel:
    trust = recipe.model.trust_remote_code
    return AUTO_CLASSES[head].from_config(
        _config(recipe.model, head),
        dtype=torch.float32,
        trust_remote_code=trust,
        **_attention(recipe.model),
    )


def _config(settings: ModelSettings, head: Head) -> Any:
    return AutoConfig.from_pretrained(
        settings.base,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        **head_arguments(head),
    )


def _load_base(recipe: Recipe, head: Head) -> PreTrainedModel:
    dtype = torch_dtype(choose_dtype(recipe.model)) if recipe.trains_adapter else torch.float32
    model = _load_weights(
        recipe.model, head, dtype=dtype, quantization_config=quantisation_config(recipe.model)
    )
    prepare_for_training(model)
    return model


def _load_weights(settings: ModelSettings, head: Head, **more: Any) -> PreTrainedModel:
    try:
        return AUTO_CLASSES[head].from_pretrained(
            settings.base,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            **_attention(settings),
            **head_arguments(head),
            **more,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.base: cannot load {settings.base}: {error}") from error


def _with_adapter(model: PreTrainedModel, recipe: Recipe, head: Head) -> PeftModel:
    """The frozen model with the recipe's adapter, in the state before the first step."""
    dtype = torch_dtype(choose_adapter_dtype(recipe))
    adapted = _attach(model, recipe, head)
    if recipe.adapter is not None and recipe.adapter.init == "loftq":
        full = _load_weights(recipe.model, head, dtype=torch.float32)
        initialise_loftq(adapted, full)
    cast_trainable_parameters(adapted, dtype)
    if recipe.adapter is not None and recipe.adapter.changes_base:
        add_reference(adapted, recipe)  # the saved adapter is the difference from this state
    return adapted


def _attach(
    model: PreTrainedModel, recipe: Recipe, head: Head, *, weights: bool = True
) -> PeftModel:
    if recipe.model.adapter is not None:
        return existing_adapter(model, Path(recipe.model.adapter), head, weights=weights)
    assert recipe.adapter is not None
    return new_adapter(model, recipe.adapter, head, weights=weights)


def _attention(settings: ModelSettings) -> dict[str, Any]:
    return {} if settings.attention == "auto" else {"attn_implementation": settings.attention}


def head_arguments(head: Head) -> dict[str, Any]:
    """Arguments of `from_pretrained` that a model with this head needs."""
    return {"num_labels": 1} if head == "score" else {}


def forward_arguments(model: Model) -> frozenset[str]:
    """Parameter names of the base model's `forward`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return frozenset(inspect.signature(base.forward).parameters)


@torch.no_grad()
def check_packing_isolation(model: Model) -> None:
    """Test that documents packed into one sequence do not influence each other.

    Attention separates them by their positions; convolutions and recurrences over tokens do not.

    Raises:
        InputError: a document's logits depend on the document before it.
    """
    if "position_ids" in forward_arguments(model):
        device = next(model.parameters()).device
        tokens = torch.arange(3, 19, device=device)[None] % model.config.vocab_size
        positions = torch.arange(8, device=device)[None]
        training = model.training
        model.eval()
        alone = model(input_ids=tokens[:, 8:], position_ids=positions, use_cache=False).logits
        both = model(
            input_ids=tokens, position_ids=torch.cat([positions] * 2, dim=1), use_cache=False
        ).logits[:, 8:]
        model.train(training)
        # Far above rounding errors, far below the influence of the other document.
        is_exact = alone.dtype == torch.float32 and is_batch_invariant(model)
        tolerance = 1e-4 if is_exact else 0.2
        if (alone - both).abs().max() <= tolerance * alone.std():
            return
    raise InputError(
        f"data.packing: a {model.config.model_type} model mixes the documents that are packed "
        "into one sequence; set data.packing: false"
    )


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


def build_meta_model(recipe: Recipe, head: Head = "causal") -> Model:
    """The model to train on the meta device: built from its configuration, without weights.

    Raises:
        InputError: a name of a module or parameter matches nothing.
    """
    config = _config(recipe.model, head)
    trust = recipe.model.trust_remote_code
    with torch.device("meta"):
        model: Model = AUTO_CLASSES[head].from_config(config, trust_remote_code=trust)
        if recipe.trains_adapter:
            model = _attach(model, recipe, head, weights=False)
        elif recipe.freeze is not None:
            freeze(model, recipe.freeze)
    return model


def count_meta_parameters(recipe: Recipe, head: Head = "causal") -> dict[str, int]:
    """`count_parameters` of the run's model, computed without weights.

    Raises:
        InputError: as `build_meta_model`.
    """
    return count_parameters(build_meta_model(recipe, head))
