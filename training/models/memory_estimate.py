"""One worker's peak GPU memory, estimated from recipe and model configuration without weights.

Weights, gradients and optimizer states are counted. Activations are those that a Llama's layers
keep for the backward pass (with torch's fused attention), other decoders keep about as many.
What a GPU's allocator adds, and DoRA's and LLM.int8()'s own activations, are not counted. The
estimate for a sharded model (FSDP) is a formula without measurements behind it.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ..config.recipe import Recipe
from .dtypes import DtypeName
from .loading import Model, without_weights

CONTEXT_BYTES = 2**29
"""Approximate size of CUDA's own context."""
_NF4_BYTES = 0.516
"""Bytes per value, double quantised: 4 bits, 8 for each 64, 32 for each 256 of those."""


class _Kept(NamedTuple):
    """Bytes kept for a token of a layer, for each unit of the layer's sizes."""

    hidden: int
    queries: int
    keys: int
    inner: int
    ranks: int
    heads: int = 4
    one: int = 8


# Measured by saved_tensors_hooks over models of many sizes; tests/unit/test_memory.py repeats it.
_Compute = Literal["float32", "low", "autocast"]
_ADAPTER: dict[_Compute, _Kept] = {
    "float32": _Kept(16, 8, 8, 16, 4),
    "low": _Kept(12, 4, 4, 8, 2),
    "autocast": _Kept(18, 6, 4, 8, 2),
}
_ADAPTER_DROPOUT: dict[_Compute, _Kept] = {
    "float32": _Kept(48, 16, 8, 20, 4),
    "low": _Kept(28, 8, 4, 10, 2),
    "autocast": _Kept(38, 10, 4, 12, 2),
}
_WHOLE: dict[_Compute, _Kept] = {
    "float32": _Kept(24, 8, 8, 16, 0),
    "autocast": _Kept(26, 4, 4, 8, 0),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run's model that decide its memory."""

    linear: int
    """Values of frozen linear layers, which quantisation packs."""
    frozen: int
    """Values of all else that is frozen."""
    trained: int
    cast: int
    """Trained values in matrix products, of which autocast keeps copies."""
    layers: int
    """Decoder layers that keep activations."""
    hidden: int
    queries: int
    """Heads times their width."""
    keys: int
    inner: int
    ranks: int
    """Sum of the adapters' ranks in a layer."""
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's GPU."""

    weights: int
    """Of the model and of a reference beside it, as they are kept."""
    training: int
    """Gradients and the optimizer's states."""
    activations: int
    """Of a microbatch, with the logits."""

    @property
    def peak(self) -> int:
        """The sum, with CUDA's context."""
        return self.weights + self.training + self.activations + CONTEXT_BYTES


def sizes_of(recipe: Recipe, model: Model | None = None) -> Sizes:
    """The sizes of a recipe's model, whose configuration is on this machine.

    Args:
        recipe: the run's.
        model: what `without_weights` gives for it, where that is at hand.

    Raises:
        InputError: as `without_weights`.
    """
    model = model or without_weights(recipe, recipe.method.head)
    counts = dict.fromkeys(("linear", "frozen", "trained", "cast"), 0)
    linear = {
        id(module.weight): not name.endswith(("lm_head", "score"))  # these are not quantised
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
    kept = freeze.last_layers if freeze is not None and not freeze.train else None
    return Sizes(
        **counts,
        layers=kept or layers,
        hidden=config.hidden_size,
        queries=heads * width,
        keys=_setting(config, "num_key_value_heads", heads) * width,
        inner=_setting(config, "intermediate_size", 4 * config.hidden_size),
        ranks=ranks // layers,
        heads=heads,
        vocabulary=config.vocab_size,
    )


def _setting(config: Any, name: str, otherwise: int) -> int:
    """A setting that not every kind of model has."""
    value = config.to_dict().get(name)
    return int(otherwise if value is None else value)


def estimate(recipe: Recipe, sizes: Sizes) -> Memory:
    """The peak of a step on a GPU, where `auto` computes in bfloat16, and where the recipe says
    fsdp with as few workers as it trains with."""
    compute: DtypeName = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    is_sharded = recipe.scale.strategy == "fsdp"
    shards = max(recipe.scale.least_workers, 2) if is_sharded else 1
    gathered = _gathered(sizes, compute) if is_sharded else 0
    return Memory(
        weights=_weights(recipe, sizes, compute) // shards + gathered,
        training=_training(recipe, sizes, compute) // shards,
        activations=max(_of_a_step(recipe, sizes, compute), _of_a_rollout(recipe, sizes, compute)),
    )


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _trained_width(recipe: Recipe, compute: DtypeName) -> int:
    """Bytes per trained value."""
    if not recipe.trains_adapter:
        return 4
    dtype = "auto" if recipe.adapter is None else recipe.adapter.dtype
    if dtype == "auto":
        return 2 if compute == "bfloat16" else 4
    return _width(dtype)


def _weights(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    low = _width(compute)
    # Beside weights that are trained themselves, the frozen ones are float32 too.
    base = low if recipe.trains_adapter else 4
    linear = {"none": base, "nf4": _NF4_BYTES, "int8": 1}[recipe.model.quantize]
    held = sizes.linear * linear + sizes.frozen * base
    held += sizes.trained * _trained_width(recipe, compute)
    if recipe.method.holds_second_model(recipe.trains_adapter):
        held += (sizes.linear + sizes.frozen) * low
        held += 0 if recipe.trains_adapter else sizes.trained * low
    return round(held)


def _gathered(sizes: Sizes, compute: DtypeName) -> int:
    """Weights that are whole for a moment: those in no layer, a layer's, and the next one's."""
    outside = min(2 * sizes.vocabulary * sizes.hidden, sizes.frozen + sizes.trained)
    layer = (sizes.linear + sizes.frozen + sizes.trained - outside) // sizes.layers
    return _width(compute) * (outside + 2 * layer)


def _training(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Gradients, two moments, and masters (with gradients of their own) of a low type."""
    width = _trained_width(recipe, compute)
    of_a_value = width + 8 + (8 if width == 2 else 0)
    if recipe.scale.most_workers > 1 and recipe.scale.strategy != "fsdp":
        of_a_value += width  # DDP's buckets
    return sizes.trained * of_a_value


def _tokens(recipe: Recipe) -> int:
    return recipe.optim.micro_batch_size * recipe.method.sequences_per_row * recipe.data.max_length


def _of_a_step(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    tokens, low = _tokens(recipe), compute != "float32"
    casts = low and _trained_width(recipe, compute) == 4
    kind: _Compute = "autocast" if casts else "low" if low else "float32"
    dropout = recipe.adapter is not None and recipe.adapter.dropout > 0
    table = _WHOLE if not recipe.trains_adapter else _ADAPTER_DROPOUT if dropout else _ADAPTER
    layer = tokens * _of_a_layer(table[kind], sizes)
    kept = layer * sizes.layers
    if recipe.model.gradient_checkpointing:
        inputs = tokens * sizes.hidden * (_width(compute) if recipe.trains_adapter else 4)
        kept = inputs * sizes.layers + layer
    # Shards of weights that are trained themselves are gathered in the compute type.
    gathers_low = recipe.scale.strategy == "fsdp" and not recipe.trains_adapter
    copies = 2 * sizes.cast if casts and not gathers_low else 0
    return kept + copies + tokens * _of_logits(recipe, sizes, kind)


def _of_a_layer(kept: _Kept, sizes: Sizes) -> int:
    """Activation bytes that one decoder layer keeps per token for the backward pass."""
    amounts = (sizes.hidden, sizes.queries, sizes.keys, sizes.inner, sizes.ranks, sizes.heads, 1)
    return sum(bytes_ * amount for bytes_, amount in zip(kept, amounts, strict=True))


def _of_logits(recipe: Recipe, sizes: Sizes, kind: _Compute) -> int:
    """Bytes per token of logits and their gradients, as if all tokens had logits."""
    if recipe.method.head == "score":
        return 0
    if recipe.method.packs:  # log-softmax, its gradient and that of the logits
        return sizes.vocabulary * (12 if kind == "float32" else 14)
    # The logits and their gradient, which autocast casts.
    return sizes.vocabulary * {"float32": 8, "low": 4, "autocast": 10}[kind]


def _of_a_rollout(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Keys and values of the completions that a worker generates at a time, and their logits."""
    completions = recipe.method.completions_at_once
    tokens = completions * recipe.data.max_length
    cache = tokens * sizes.layers * 2 * sizes.keys * _width(compute)
    return cache + completions * sizes.vocabulary * 8
