"""Estimates one worker's peak GPU memory from the recipe and the model's configuration.

The estimate counts weights, gradients, optimizer states and activations. The activations are those
that a Llama's layers keep for the backward pass (with torch's fused attention); other decoders keep
about as many. Not counted: the overhead of the GPU's allocator, and the additional activations of
DoRA and LLM.int8(). The formula for a sharded model (FSDP) is not measured.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ..config.recipe import Recipe
from .dtypes import DtypeName
from .loading import Model, build_meta_model

CONTEXT_BYTES = 2**29
"""Approximate size of CUDA's own context."""
_NF4_BYTES = 0.516
"""Bytes per value, double quantised: 4 bits, 8 per block of 64, 32 per 256 blocks."""


class _ActivationBytes(NamedTuple):
    """Bytes that a layer keeps per token, for each unit of the layer's sizes."""

    hidden: int
    queries: int
    keys: int
    inner: int
    ranks: int
    heads: int = 4
    constant: int = 8


# Measured with saved_tensors_hooks on models of many sizes; test_memory_estimate.py repeats it.
_Compute = Literal["float32", "low", "autocast"]
_ADAPTER: dict[_Compute, _ActivationBytes] = {
    "float32": _ActivationBytes(16, 8, 8, 16, 4),
    "low": _ActivationBytes(12, 4, 4, 8, 2),
    "autocast": _ActivationBytes(18, 6, 4, 8, 2),
}
_ADAPTER_DROPOUT: dict[_Compute, _ActivationBytes] = {
    "float32": _ActivationBytes(48, 16, 8, 20, 4),
    "low": _ActivationBytes(28, 8, 4, 10, 2),
    "autocast": _ActivationBytes(38, 10, 4, 12, 2),
}
_WHOLE: dict[_Compute, _ActivationBytes] = {
    "float32": _ActivationBytes(24, 8, 8, 16, 0),
    "autocast": _ActivationBytes(26, 4, 4, 8, 0),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run's model that decide its memory; numbers of values."""

    linear: int
    """Values of frozen linear layers, which quantisation packs."""
    frozen: int
    """All other frozen values."""
    trained: int
    cast: int
    """Trained values in matrix products; autocast keeps copies of them."""
    layers: int
    """Decoder layers that keep activations."""
    hidden: int
    queries: int
    """Number of heads times their width."""
    keys: int
    inner: int
    ranks: int
    """Sum of the adapters' ranks in a layer."""
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one worker's GPU."""

    weights: int
    """The model and a second model as reference, if there is one, in their stored types."""
    training: int
    """Gradients and the optimizer's states."""
    activations: int
    """Activations of a microbatch, with the logits."""

    @property
    def peak(self) -> int:
        """Sum of all parts and CUDA's context, in bytes."""
        return self.weights + self.training + self.activations + CONTEXT_BYTES


def sizes_of(recipe: Recipe, model: Model | None = None) -> Sizes:
    """The sizes of a recipe's model, whose configuration must be on this machine.

    Args:
        recipe: the run's recipe.
        model: the result of `build_meta_model` for the recipe; None builds it here.

    Raises:
        InputError: as `build_meta_model`.
    """
    model = model or build_meta_model(recipe, recipe.method.head)
    counts = dict.fromkeys(("linear", "frozen", "trained", "cast"), 0)
    linear = {
        id(module.weight): not name.endswith(("lm_head", "score"))  # heads are not quantised
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ranks = 0
    for name, parameter in model.named_parameters():
        ranks += parameter.shape[0] if "lora_A" in name else 0
        if parameter.requires_grad:
            counts["trained"] += parameter.numel()
            counts["cast"] += parameter.numel() if id(parameter) in linear else 0
        else:
            packs = linear.get(id(parameter), False)
            counts["linear" if packs else "frozen"] += parameter.numel()
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = _setting(config, "head_dim", config.hidden_size // heads)
    freeze = recipe.freeze
    trained_layers = freeze.last_layers if freeze is not None and not freeze.train else None
    return Sizes(
        **counts,
        layers=trained_layers or layers,
        hidden=config.hidden_size,
        queries=heads * width,
        keys=_setting(config, "num_key_value_heads", heads) * width,
        inner=_setting(config, "intermediate_size", 4 * config.hidden_size),
        ranks=ranks // layers,
        heads=heads,
        vocabulary=config.vocab_size,
    )


def _setting(config: Any, name: str, default: int) -> int:
    """A setting that not every kind of model has."""
    value = config.to_dict().get(name)
    return int(default if value is None else value)


def estimate(recipe: Recipe, sizes: Sizes) -> MemoryEstimate:
    """The peak of a step on a GPU that supports bfloat16; fsdp counts the least workers."""
    compute: DtypeName = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    is_sharded = recipe.scale.strategy == "fsdp"
    shards = max(recipe.scale.least_workers, 2) if is_sharded else 1
    gathered = _gathered(sizes, compute) if is_sharded else 0
    return MemoryEstimate(
        weights=_weights(recipe, sizes, compute) // shards + gathered,
        training=_training(recipe, sizes, compute) // shards,
        activations=max(
            _step_activations(recipe, sizes, compute), _rollout_bytes(recipe, sizes, compute)
        ),
    )


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _trained_width(recipe: Recipe, compute: DtypeName) -> int:
    """Bytes of one trained value."""
    if not recipe.trains_adapter:
        return 4
    dtype = "auto" if recipe.adapter is None else recipe.adapter.dtype
    if dtype == "auto":
        return 2 if compute == "bfloat16" else 4
    return _width(dtype)


def _weights(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of all weights, with those of a second model as reference."""
    low = _width(compute)
    # If the base itself is trained, its frozen weights are float32 too.
    base = low if recipe.trains_adapter else 4
    linear = {"none": base, "nf4": _NF4_BYTES, "int8": 1}[recipe.model.quantize]
    total = sizes.linear * linear + sizes.frozen * base
    total += sizes.trained * _trained_width(recipe, compute)
    if recipe.method.holds_second_model(recipe.trains_adapter):
        total += (sizes.linear + sizes.frozen) * low
        total += 0 if recipe.trains_adapter else sizes.trained * low
    return round(total)


def _gathered(sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of the weights that FSDP gathers at a time: two layers and all outside the layers."""
    outside = min(2 * sizes.vocabulary * sizes.hidden, sizes.frozen + sizes.trained)
    layer = (sizes.linear + sizes.frozen + sizes.trained - outside) // sizes.layers
    return _width(compute) * (outside + 2 * layer)


def _training(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of gradients, two moments, and float32 masters with gradients for 16-bit weights."""
    width = _trained_width(recipe, compute)
    per_value = width + 8 + (8 if width == 2 else 0)
    if recipe.scale.most_workers > 1 and recipe.scale.strategy != "fsdp":
        per_value += width  # DDP's buckets
    return sizes.trained * per_value


def _tokens(recipe: Recipe) -> int:
    """Number of tokens in a full microbatch."""
    return recipe.optim.micro_batch_size * recipe.method.sequences_per_row * recipe.data.max_length


def _step_activations(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes that the forward pass of a microbatch keeps."""
    tokens, low = _tokens(recipe), compute != "float32"
    casts = low and _trained_width(recipe, compute) == 4
    kind: _Compute = "autocast" if casts else "low" if low else "float32"
    dropout = recipe.adapter is not None and recipe.adapter.dropout > 0
    table = _WHOLE if not recipe.trains_adapter else _ADAPTER_DROPOUT if dropout else _ADAPTER
    layer = tokens * _layer_activations(table[kind], sizes)
    kept = layer * sizes.layers
    if recipe.model.gradient_checkpointing:
        inputs = tokens * sizes.hidden * (_width(compute) if recipe.trains_adapter else 4)
        kept = inputs * sizes.layers + layer
    # FSDP gathers the trained weights of a base in the compute type: autocast copies nothing.
    gathers_low = recipe.scale.strategy == "fsdp" and not recipe.trains_adapter
    copies = 2 * sizes.cast if casts and not gathers_low else 0
    return kept + copies + tokens * _logits_bytes(recipe, sizes, kind)


def _layer_activations(kept: _ActivationBytes, sizes: Sizes) -> int:
    """Activation bytes that one decoder layer keeps per token for the backward pass."""
    amounts = (sizes.hidden, sizes.queries, sizes.keys, sizes.inner, sizes.ranks, sizes.heads, 1)
    return sum(bytes_ * amount for bytes_, amount in zip(kept, amounts, strict=True))


def _logits_bytes(recipe: Recipe, sizes: Sizes, kind: _Compute) -> int:
    """Bytes per token of the logits and their gradients, if all tokens are trained."""
    if recipe.method.head == "score":
        return 0
    if recipe.method.packs:  # log-softmax, its gradient and that of the logits
        return sizes.vocabulary * (12 if kind == "float32" else 14)
    # The logits and their gradient, which autocast casts.
    return sizes.vocabulary * {"float32": 8, "low": 4, "autocast": 10}[kind]


def _rollout_bytes(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of the KV cache and the logits of the completions that a worker samples at a time."""
    completions = recipe.method.completions_at_once
    tokens = completions * recipe.data.max_length
    cache = tokens * sizes.layers * 2 * sizes.keys * _width(compute)
    return cache + completions * sizes.vocabulary * 8
