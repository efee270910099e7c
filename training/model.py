"""The model of a run: base weights, tokenizer, adapter."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.chat import CHATML
from .device import choose_dtype, torch_dtype
from .errors import InputError
from .methods import method_of
from .recipe import LoraAdapter, ModelSettings, Recipe

Model: TypeAlias = PreTrainedModel | PeftModel


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template where it names one."""
    settings = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(settings.base, revision=settings.revision)
    template = recipe.data.chat_template
    if template is not None:
        tokenizer.chat_template = CHATML if template == "chatml" else template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe) -> Model:
    """The model to train, on the CPU, with its adapter where the recipe has one.

    Weights that are trained are float32 (lower types are used by autocast); frozen ones are kept
    in the compute type.

    Raises:
        InputError: for weights that cannot be read, and for adapter targets that match nothing.
    """
    if method_of(recipe).starts_at_random(recipe.method):
        model: Model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(recipe.model.base, revision=recipe.model.revision),
            dtype=torch.float32,
            **_attention(recipe.model),
        )
    else:
        model = _load_base(recipe)
    model.config.use_cache = False
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter)
    return model


def _load_base(recipe: Recipe) -> PreTrainedModel:
    settings = recipe.model
    frozen = recipe.adapter is not None
    dtype = torch_dtype(choose_dtype(settings)) if frozen else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(
            settings.base,
            revision=settings.revision,
            dtype=dtype,
            use_safetensors=True,
            **_attention(settings),
        )
    except OSError as error:
        raise InputError(f"model.base: cannot load {settings.base}: {error}") from error


def _attention(settings: ModelSettings) -> dict[str, Any]:
    return {} if settings.attention == "auto" else {"attn_implementation": settings.attention}


def add_adapter(model: Model, settings: LoraAdapter) -> PeftModel:
    """Freeze the model and put a LoRA adapter beside its target modules.

    Raises:
        InputError: where a target matches no module; the names that exist are listed.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
    )
    if isinstance(settings.targets, list):
        _check_targets(model, settings.targets)
    return get_peft_model(model, config)


def _check_targets(model: Model, targets: list[str]) -> None:
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                f"adapter.targets: {target!r} matches no module of the model; its linear "
                f"layers are {', '.join(sorted(linear))}"
            )


def forward_arguments(model: Model) -> frozenset[str]:
    """Names that the base model's forward takes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return frozenset(inspect.signature(base.forward).parameters)


@torch.no_grad()
def check_isolation(model: Model) -> None:
    """Try whether documents packed into one sequence leave each other alone.

    Attention does, by its positions; convolutions and recurrences between tokens do not.

    Raises:
        InputError: where a document's logits depend on its neighbour.
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
        # Far above what rounding does, far below what a trained neighbour does.
        tolerance = 1e-4 if alone.dtype == torch.float32 else 0.2
        if (alone - both).abs().max() <= tolerance * alone.std():
            return
    raise InputError(
        f"data.packing: a {model.config.model_type} model mixes the documents that are packed "
        "into one sequence; set data.packing: false"
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, dropout is off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of all and of trainable parameters."""
    total = trainable = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return {"total": total, "trainable": trainable}


def count_without_weights(recipe: Recipe) -> dict[str, int]:
    """Parameters the run would have, from the configuration alone: no weights are read."""
    config = AutoConfig.from_pretrained(recipe.model.base, revision=recipe.model.revision)
    with torch.device("meta"):
        model: Model = AutoModelForCausalLM.from_config(config)
        if recipe.adapter is not None:
            model = add_adapter(model, recipe.adapter)
    return count_parameters(model)


def save_result(model: Model, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write what was trained as PEFT or transformers write it: it loads without finray."""
    model.config.use_cache = True
    model.save_pretrained(target, safe_serialization=True)
    model.config.use_cache = False
    tokenizer.save_pretrained(target)
