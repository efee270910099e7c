"""Estimates one worker's peak GPU memory from the recipe and the model's configuration.

Every phase of a run has a peak of its own: loading, a step, generation, vLLM beside it, evaluation.
A step counts weights, gradients, optimizer states, the activations that the model keeps for its
backward pass (`activations`), what a layer and its gradients hold for a while (`live`), and its
loss (`logit_memory`). Not counted: the overhead of the GPU's allocator, and what LLM.int8() keeps
beyond a plain linear layer. The formula for a sharded model (FSDP) is not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..common.errors import InputError
from ..config.recipe import Recipe
from ..config.sections import ANSWERS_AT_ONCE
from .activations import Attention, Kept, kept_by
from .dtypes import DtypeName
from .live import Beyond
from .loading import Model, build_meta_model
from .logit_memory import HeadFacts, LossSizes, head_facts, loss_bytes
from .matrices import Matrix, matrices, own_name
from .quantiser import plan_quantisation
from .reward_sizes import values_of_rewards
from .targets import adapted_layers

CONTEXT_BYTES = 2**29
"""Approximate size of CUDA's own context."""
_VLLM_WORKSPACE = 2**30
"""Approximate bytes of vLLM's own activations and captured graphs."""
_VLLM_SEQUENCES = 256
"""Sequences that vLLM computes at a time by default."""
_SAMPLED_LOGIT = 16
"""Bytes of a logit while a token is sampled, beside the model's own: it in float32 four times."""
_OF_TOP_P = 44
"""The same for top-p: in order with its place, in float64 and as a whole number."""
_BACKWARD = 4
"""Gradients of a layer's widest tensors that exist at a time."""
_COUNTED = 2**14
"""Tokens of the longest microbatch whose forward pass is followed."""
_OF_NORM = 3
"""Tensors of a weight's size that exist while DoRA's norm of it is computed."""
_NF4_BYTES = 0.5
_NF4_SCALES = 0.016
"""Bytes per value of a double quantised base's scales: 8 bits a block of 64, 32 per 256 blocks."""


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
    """Decoder layers."""
    hidden: int
    queries: int
    """Number of heads times their width."""
    keys: int
    inner: int
    ranks: int
    """Sum of the adapters' ranks in a layer."""
    heads: int
    vocabulary: int
    outside: int
    """Values of embedding and head, which count once where they are one matrix."""
    cached_values: int
    """Of a token in a layer that caches keys and values."""
    expanded: int = 0
    """Values of a token's keys and values that a layer makes of latent ones in its cache, while it
    computes."""
    cached: tuple[int | None, ...] = ()
    """For each layer that caches keys and values, the most tokens of a sequence that it keeps: its
    window, None for all."""
    packs_parameters: bool = False
    """Quantisation packs weights that bitsandbytes has no layer for, which cannot be sharded."""
    added: int = 0
    """Values of weights that an adapter is added to, such as experts; the sums are kept for the
    backward pass, in the base's type."""
    largest: int = 0
    """Values of the largest frozen matrix."""
    rewards: int = 0
    """Values of the reward models that score completions."""
    weighs: bool = False
    """Attention computes its scores itself, as it caps them or has sinks, and adds a mask."""
    drops: bool = False
    """Attention drops some of its scores in training, which no kernel of documents does."""
    head: HeadFacts = field(default_factory=HeadFacts)
    can_be_followed: bool = field(default=False, compare=False)
    """The model's configuration is at hand: its own forward pass decides on the activations.
    Otherwise a Llama's layers do."""

    @property
    def keeps_scores(self) -> bool:
        """True if what attention keeps of a document grows with the square of its length."""
        return self.weighs or self.drops


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one worker's GPU."""

    weights: int
    """The model, a second model as reference and reward models, if there are any, in their stored
    types."""
    training: int
    """Gradients and the optimizer's states."""
    activations: int
    """Activations of a microbatch's step, with the logits; or, if they are more, the gradients
    outside the layers that FSDP holds when there are no activations any more."""
    generation: int = 0
    """Caches and logits of the answers that the trained model generates at a time."""
    evaluation: int = 0
    """Logits of held-out rows, or caches of the answers to held-out prompts."""
    transient: int = 0
    """Of the largest matrix: its values while a quantised base computes, and the sums for DoRA's
    norm."""
    vllm: int = 0
    """The least that vLLM takes beside the training, if it samples."""

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase with CUDA's context, in bytes; only phases that the run has."""
        optional = {"generation": self.generation, "evaluation": self.evaluation}
        names = ["loading", "step", *(name for name, size in optional.items() if size)]
        return {name: sum(self.parts(name).values()) for name in names}

    def parts(self, phase: str) -> dict[str, int]:
        """What a phase holds at its peak, in bytes, by the fields' names and `context`."""
        own = {"step": "activations"}.get(phase, phase)
        trained = [] if phase == "loading" else ["training", own, "vllm"]
        named = {name: getattr(self, name) for name in ("weights", *trained, "transient")}
        return {**named, "context": CONTEXT_BYTES}

    @property
    def peak(self) -> int:
        """The largest peak of a phase, in bytes."""
        return max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase of the largest peak."""
        phases = self.phases
        return max(phases, key=lambda phase: phases[phase])


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
    own = matrices(model)
    # Heads and routers are not quantised.
    packs = {matrix.weight for matrix in own if matrix.kind not in ("head", "router")}
    products = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)
    }
    ranks = 0
    for name, parameter in model.named_parameters():
        ranks += parameter.shape[0] if "lora_A" in name else 0
        if parameter.requires_grad:
            counts["trained"] += parameter.numel()
            counts["cast"] += parameter.numel() if id(parameter) in products else 0
        else:
            is_packed = own_name(name.removeprefix("base_model.model.")) in packs
            counts["linear" if is_packed else "frozen"] += parameter.numel()
    config = model.config.get_text_config()
    # State-space models have heads under another name, or none.
    heads = _setting(config, "num_attention_heads", _setting(config, "num_heads", 1))
    width = _setting(config, "head_dim", config.hidden_size // heads)
    keys = _setting(config, "num_key_value_heads", heads) * width
    cached, expanded = _cached_values(config, heads, keys)
    return Sizes(
        **counts,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=heads * width,
        keys=keys,
        inner=_inner(config),
        ranks=ranks // config.num_hidden_layers,
        heads=heads,
        vocabulary=config.vocab_size,
        outside=_embeddings(model),
        cached_values=cached,
        expanded=expanded,
        cached=_cached(config),
        packs_parameters=recipe.trains_adapter and _packs_parameters(model),
        added=_added(model, own),
        largest=max((matrix.values for matrix in own if matrix.weight in packs), default=0),
        rewards=values_of_rewards(recipe) if recipe.method.samples_online else 0,
        weighs=_weighs(model),
        drops=_drops(config),
        head=head_facts(model),
        can_be_followed=True,
    )


def _embeddings(model: Model) -> int:
    """Values of embedding and head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = (base.get_input_embeddings(), base.get_output_embeddings())
    weights = {weight for part in parts if part is not None for weight in part.parameters()}
    return sum(weight.numel() for weight in weights)


def _packs_parameters(model: Model) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(plan_quantisation(base).packed)


def _weighs(model: Model) -> bool:
    """True if a layer caps its scores, or has sinks."""
    caps = model.config.get_text_config().to_dict().get("attn_logit_softcapping")
    return bool(caps) or any(name.endswith(".sinks") for name, _ in model.named_parameters())


def _drops(config: Any) -> bool:
    """True if a setting names a probability with which attention drops scores."""
    return any(
        isinstance(value, float) and value > 0 and "drop" in name and "att" in name
        for name, value in config.to_dict().items()
    )


def _added(model: Model, own: list[Matrix]) -> int:
    """Number of values of the weights that an adapter is added to."""
    if not isinstance(model, PeftModel):
        return 0
    layers = adapted_layers(model)
    return sum(
        matrix.values for matrix in own if isinstance(layers.get(matrix.weight), ParamWrapper)
    )


def _cached(config: Any) -> tuple[int | None, ...]:
    """For each layer with a cache of keys and values, the window of what generation keeps there."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError):  # the code of some models has kinds of its own
        return (None,) * int(config.num_hidden_layers)
    return tuple(
        layer.sliding_window if layer.is_sliding else None
        for layer in layers
        if isinstance(layer, DynamicLayer)
    )


def _cached_values(config: Any, heads: int, keys: int) -> tuple[int, int]:
    """(`cached_values`, `expanded`); multi-head latent attention caches latent values."""
    latent, rotated = (_setting(config, name, 0) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    if not latent:
        return 2 * keys, 0
    width = _setting(config, "qk_nope_head_dim", 0) + _setting(config, "v_head_dim", 0)
    indices = _setting(config, "index_head_dim", 0)
    return latent + rotated + indices, heads * (width + rotated)


def _inner(config: Any) -> int:
    """Width of what a token passes inside the MLPs: of all experts that it is sent to."""
    dense = _setting(config, "intermediate_size", 4 * config.hidden_size)
    expert = _setting(config, "moe_intermediate_size", 0)
    sent_to = _setting(config, "num_experts_per_tok", 1)
    return max(dense, expert * sent_to + _setting(config, "shared_expert_intermediate_size", 0))


def _setting(config: Any, name: str, default: int) -> int:
    """A setting that not every kind of model has; the largest where each layer has its own."""
    value = config.to_dict().get(config.attribute_map.get(name, name))
    if isinstance(value, list | tuple):
        value = max(value, default=None)
    return int(default if value is None else value)


def estimate(
    recipe: Recipe, sizes: Sizes, compute: DtypeName | None = None, kind: str = "cuda"
) -> MemoryEstimate:
    """The peaks of a run's phases; fsdp counts the least workers.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        compute: the type that `model.dtype: auto` comes to; None for bfloat16.
        kind: of the device: cpu, cuda, …
    """
    if recipe.model.dtype != "auto":
        compute = recipe.model.dtype
    compute = compute or "bfloat16"
    is_sharded, is_packed = recipe.scale.strategy == "fsdp", recipe.model.quantize != "none"
    is_dora = recipe.adapter_kind == "dora"
    shards = max(recipe.scale.least_workers, 2) if is_sharded else 1
    whole = _weights(recipe, sizes, compute)
    weights, activations = whole, _step_activations(recipe, sizes, compute, kind)
    if is_sharded:
        weights = whole // shards + _gathered(recipe, sizes, compute)
        if recipe.model.quantize == "nf4":  # its scales are whole on each
            weights += round(sizes.linear * _NF4_SCALES * (shards - 1) / shards)
        activations = max(activations, _root_gradients(recipe, sizes, compute))
    return MemoryEstimate(
        weights=weights,
        training=_training(recipe, sizes, compute) // shards,
        activations=activations,
        generation=_generated(recipe, sizes, compute, completions_at_once(recipe)),
        evaluation=_evaluation(recipe, sizes, compute, kind),
        transient=sizes.largest * _width(compute) * (is_packed + _OF_NORM * is_dora),
        vllm=vllm_bytes(recipe, sizes, compute)[0],
    )


def attention_of(recipe: Recipe, compute: DtypeName = "bfloat16", kind: str = "cuda") -> Attention:
    """What attention keeps as the recipe runs.

    Packed rows get a dense mask with sdpa, and where the rehearsal shows that the model's attention
    cannot be computed by documents. Other rows are padded then. A kernel takes the borders of
    documents on a CPU and, in 16 bits, on GPUs that have bfloat16.

    Args:
        recipe: the run's recipe.
        compute: type that the model computes in.
        kind: of the device: cpu, cuda, …
    """
    if recipe.model.attention == "eager":
        return "eager"
    if recipe.is_flat and recipe.model.attention != "sdpa":
        by_kernel = kind == "cpu" or (kind == "cuda" and compute == "bfloat16")
        return "borders" if by_kernel else "groups"
    return "dense" if recipe.packs else "plain"


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
    """Bytes of all weights, with those of a second model as reference and of reward models."""
    low = _width(compute)
    # If the base itself is trained, its frozen weights are float32 too.
    base = low if recipe.trains_adapter else 4
    linear = {"none": base, "nf4": _NF4_BYTES + _NF4_SCALES, "int8": 1}[recipe.model.quantize]
    total = sizes.linear * linear + sizes.frozen * base
    total += sizes.trained * _trained_width(recipe, compute)
    if recipe.method.holds_second_model(recipe.trains_adapter):
        total += (sizes.linear + sizes.frozen) * low
        total += 0 if recipe.trains_adapter else sizes.trained * low
    return round(total + sizes.rewards * low)


def _gathered(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of what FSDP holds whole at a time.

    Those are the weights of two layers and all outside the layers. Without an adapter, also the
    gradients of a layer in their own type and in float32, in which they are reduced (see
    `_root_gradients` for those outside the layers); of an adapter, the sums of a step's gradients.
    """
    width = _width(compute)
    outside, rest = _outside(sizes)
    packed = _NF4_BYTES if recipe.model.quantize == "nf4" else width
    layer = (sizes.linear * packed + rest * width) / sizes.layers
    gradients: float = 4 * sizes.trained
    if not recipe.trains_adapter:
        gradients = _layer_gradients(sizes, compute)
    return round(outside * width + 2 * layer + gradients)


def _root_gradients(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes by which the gradients outside the layers exceed a layer's, without an adapter.

    Those of the embedding, the norm and the head are one unit of FSDP's, which is reduced when the
    backward pass is over.
    """
    if recipe.trains_adapter:
        return 0
    outside, rest = _outside(sizes)
    inside = (sizes.linear + rest) / sizes.layers * trained_layers(recipe, sizes)
    trained = min(outside, max(0, sizes.trained - inside))
    return round(max(0, trained * (_width(compute) + 4) - _layer_gradients(sizes, compute)))


def _layer_gradients(sizes: Sizes, compute: DtypeName) -> float:
    """Bytes of a layer's gradients in their own type and in float32."""
    layer = (sizes.linear + _outside(sizes)[1]) / sizes.layers
    return min(sizes.trained, layer) * (_width(compute) + 4)


def _outside(sizes: Sizes) -> tuple[int, int]:
    """Values of embedding and head, and all others that are not packed."""
    outside = min(sizes.outside, sizes.frozen + sizes.trained)
    return outside, sizes.frozen + sizes.trained - outside


def _training(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> int:
    """Bytes of gradients, two moments, and float32 masters with gradients for 16-bit weights."""
    width = _trained_width(recipe, compute)
    per_value = width + 8 + (8 if width == 2 else 0)
    if recipe.scale.most_workers > 1 and recipe.scale.strategy != "fsdp":
        per_value += width  # DDP's buckets
    return sizes.trained * per_value


class _Held(NamedTuple):
    """Bytes that are held from the forward to the backward pass of a microbatch."""

    always: int
    """Bytes that are held until the backward pass ends."""
    with_loss: int
    """Of what else is kept while the loss is computed."""
    most: int
    """Most beside `always` while the layers, what follows them, or their gradients are computed."""


def _step_activations(recipe: Recipe, sizes: Sizes, compute: DtypeName, device: str) -> int:
    """Bytes that a microbatch's forward pass keeps, and those of its loss."""
    tokens = recipe.microbatch_tokens
    trained: DtypeName = "float32" if _trained_width(recipe, compute) == 4 else "bfloat16"
    gathers_low = _gathers_low(recipe)
    kind: _Compute = "float32" if compute == "float32" else "low"
    if kind == "low" and trained == "float32":
        kind = "autocast"
    held = None
    if sizes.can_be_followed:
        own_type = compute if gathers_low else trained
        held = _followed(recipe, sizes, tokens, compute, own_type, device)
    if held is None:
        held = _of_a_llama(recipe, sizes, tokens, compute, kind, device)
        held = held._replace(always=held.always + _copies(recipe, compute, sizes.cast))
    logits = _logits_bytes(recipe, sizes, compute, device, tokens)
    # The gradient of a tied head waits for that of the embedding.
    return held.always + max(held.with_loss + logits, held.most + 4 * sizes.head.tied)


def _copies(recipe: Recipe, compute: DtypeName, values: int) -> int:
    """Bytes of autocast's copies of so many trained values."""
    casts = compute != "float32" and _trained_width(recipe, compute) == 4
    return 2 * values if casts and not _gathers_low(recipe) else 0


def _gathers_low(recipe: Recipe) -> bool:
    """True if FSDP gathers trained weights in the compute type, so that autocast copies nothing."""
    return recipe.scale.strategy == "fsdp" and not recipe.trains_adapter


def _followed(
    recipe: Recipe, sizes: Sizes, tokens: int, compute: DtypeName, trained: DtypeName, device: str
) -> _Held | None:
    """Bytes by the model's own forward pass; None where it cannot be followed.

    A row whose documents are computed one at a time counts as so many documents of the longest's
    length as fill it, if attention keeps scores. All else computes whole rows.
    """
    attention, size = attention_of(recipe, compute, device), recipe.data.max_length
    by_documents = attention in ("borders", "groups")
    longest = recipe.longest_document if by_documents else size
    if by_documents and sizes.keeps_scores:
        size = longest

    def held(rows: int) -> _Held | None:
        kept = kept_by(recipe, rows, size, compute, trained, attention)
        return None if kept is None else _held(recipe, sizes, kept, rows * size, compute)

    few, many = _counted_rows(tokens, size)
    of_few, of_many = held(few), held(many)
    if of_few is None or of_many is None:
        return None
    part = (tokens / size - few) / max(1, many - few)
    pairs = zip(of_few, of_many, strict=True)
    of_all = _Held(*(round(less + part * (more - less)) for less, more in pairs))
    masks = _masks(sizes, attention, longest, device) * longest**2 * _width(compute)
    return of_all._replace(always=of_all.always + masks)


def _counted_rows(tokens: int, size: int) -> tuple[int, int]:
    """Two numbers of rows of a size, from which those of so many tokens follow.

    They are the same where so many rows are counted themselves. Longer microbatches go on as those
    of _COUNTED do: a weight's gradient is seldom the most there, and a plan tries many of them.
    """
    rows, most = tokens // size, max(2, _COUNTED // size)
    if rows >= most:
        return most // 2, most
    return rows, rows + bool(tokens % size)


def _held(recipe: Recipe, sizes: Sizes, kept: Kept, tokens: int, compute: DtypeName) -> _Held:
    """What is held of what the layers keep, with or without checkpointing."""
    default = Beyond(0, 0, _of_gradients(sizes, tokens, compute))
    beyond = kept.beyond or (default,) * len(kept.layers)
    if recipe.model.checkpoints:
        copies = _copies(recipe, compute, sizes.cast - sizes.head.trained)
        return _recomputed(kept, beyond, copies)
    layers = sum(kept.layers)
    most = max(map(add, accumulate(kept.layers), map(max, beyond)), default=0)
    return _Held(kept.before, layers + kept.after, max(layers + kept.tail, most))


def _recomputed(kept: Kept, beyond: Sequence[Beyond], copies: int) -> _Held:
    """What is held where each layer is computed again when its gradient has come.

    Args:
        kept, beyond: what the layers keep, and hold for a while.
        copies: bytes of autocast's copies of the layers' weights, which it drops after the loss.
    """
    of_layers = (max(one.again, one.backward) for one in beyond)
    most = max(map(add, kept.layers, of_layers), default=0)
    always = kept.before + kept.inputs + kept.given
    return _Held(always, kept.after + copies, max(most, kept.tail))


def _of_gradients(sizes: Sizes, tokens: int, compute: DtypeName) -> int:
    """Bytes of the gradients inside a layer, which exist when those of the logits are gone."""
    return _BACKWARD * tokens * sizes.inner * _width(compute)


def _masks(sizes: Sizes, attention: Attention, size: int, device: str) -> int:
    """Number of masks, made once for all layers, that attention by documents of this size adds."""
    windows = {None if window is None or window >= size else window for window in sizes.cached}
    if attention not in ("borders", "groups"):
        return 0
    if sizes.weighs:
        return len(windows)
    takes_windows = attention == "borders" and device != "cpu"
    return 0 if takes_windows else len(windows - {None})


def _of_a_llama(
    recipe: Recipe,
    sizes: Sizes,
    tokens: int,
    compute: DtypeName,
    kind: _Compute,
    device: str,
) -> _Held:
    """Bytes that the layers of a Llama of these sizes keep."""
    dropout = recipe.adapter is not None and recipe.adapter.dropout > 0
    table = _WHOLE if not recipe.trains_adapter else _ADAPTER_DROPOUT if dropout else _ADAPTER
    layer = tokens * _layer_activations(table[kind], sizes)
    attention, width = attention_of(recipe, compute, device), _width(compute)
    expanded = 2 * (sizes.queries - sizes.keys)
    if attention == "dense":  # the mask, and keys and values of all heads
        layer += tokens * (recipe.data.max_length + expanded) * width
    elif attention == "groups":
        layer += tokens * (expanded + sizes.queries) * width
    elif attention == "eager":  # scores, and their softmax in float32
        layer += tokens * recipe.data.max_length * sizes.heads * (width + 4)
    sums = sizes.added * width
    count = trained_layers(recipe, sizes)
    inputs = tokens * sizes.hidden * (width if recipe.trains_adapter else 4) * count
    gradients = _of_gradients(sizes, tokens, compute)
    if recipe.model.checkpoints:
        return _Held(inputs, 0, layer + sums // count + gradients)
    return _Held(0, layer * count + sums, layer * count + sums + gradients)


def trained_layers(recipe: Recipe, sizes: Sizes) -> int:
    """Number of decoder layers through which gradients pass."""
    freeze = recipe.freeze
    last = None if freeze is None or freeze.train else freeze.last_layers
    return sizes.layers if last is None else min(last, sizes.layers)


def _layer_activations(kept: _ActivationBytes, sizes: Sizes) -> int:
    """Activation bytes that one decoder layer keeps per token for the backward pass."""
    amounts = (sizes.hidden, sizes.queries, sizes.keys, sizes.inner, sizes.ranks, sizes.heads, 1)
    return sum(bytes_ * amount for bytes_, amount in zip(kept, amounts, strict=True))


def _logits_bytes(
    recipe: Recipe, sizes: Sizes, compute: DtypeName, kind: str, tokens: int, trains: bool = True
) -> int:
    """Bytes of the loss of so many tokens, if all are trained."""
    if recipe.method.head == "score":
        return 0
    return loss_bytes(sizes.head, _loss_sizes(recipe, sizes, compute, tokens), kind, trains)


def _loss_sizes(recipe: Recipe, sizes: Sizes, compute: DtypeName, tokens: int) -> LossSizes:
    width = _width(compute)
    is_wide = not recipe.trains_adapter and not _gathers_low(recipe)
    casts = _trained_width(recipe, compute) == 4 and not _gathers_low(recipe)
    copies = is_wide or (sizes.head.trained > 0 and casts)
    return LossSizes(
        tokens,
        sizes.vocabulary,
        sizes.hidden,
        width,
        of_state=4 if is_wide else width,
        of_copy=width * sizes.head.values if copies and width != 4 else 0,
    )


def cache_bytes(sizes: Sizes, compute: DtypeName, tokens: int) -> int:
    """Bytes of the keys and values of a sequence of so many tokens."""
    kept = sum(tokens if window is None else min(window, tokens) for window in sizes.cached)
    return kept * sizes.cached_values * _width(compute)


def _generating(sizes: Sizes, compute: DtypeName, tokens: int) -> int:
    """Bytes of a sequence's cache, and of what a layer makes of it while it computes."""
    return cache_bytes(sizes, compute, tokens) + tokens * sizes.expanded * _width(compute)


def completions_at_once(recipe: Recipe) -> int:
    """Completions of a step that a worker generates in one batch on the trained model's weights."""
    rows = recipe.rows_of_worker(recipe.scale.least_workers)
    return min(recipe.method.completions_at_once, rows)


def _generated(recipe: Recipe, sizes: Sizes, compute: DtypeName, answers: int) -> int:
    """Bytes of the cache, and of the last tokens' logits and what is sampled from."""
    if not answers:
        return 0
    of_one = _generating(sizes, compute, recipe.data.max_length)
    sampled = _OF_TOP_P if recipe.method.samples_top_p else _SAMPLED_LOGIT
    logits = sizes.vocabulary * (sampled + _width(compute))
    return _copies(recipe, compute, sizes.cast) + answers * (of_one + logits)


def _evaluation(recipe: Recipe, sizes: Sizes, compute: DtypeName, kind: str) -> int:
    """Bytes of the larger of both evaluations: the held-out loss, and the answers to prompts."""
    held_out = bool(recipe.data.eval) or recipe.data.holds_out
    if not held_out or recipe.method.samples_online:
        return _generated(recipe, sizes, compute, recipe.method.completions_at_once * held_out)
    answers = min(recipe.eval.samples, ANSWERS_AT_ONCE)
    tokens = recipe.row_length + recipe.eval.max_new_tokens
    generated = answers * (_generating(sizes, compute, tokens) + sizes.vocabulary * 4)
    rows = recipe.microbatch * recipe.tokens_per_row  # held-out data fills them in any case
    measured = max(rows, recipe.optim.micro_batch_tokens or 0)
    loss = _logits_bytes(recipe, sizes, compute, kind, measured, trains=False)
    return max(generated, loss) + _copies(recipe, compute, sizes.cast)


def vllm_bytes(recipe: Recipe, sizes: Sizes, compute: DtypeName) -> tuple[int, int]:
    """The least that vLLM needs, and the most that it can use, in bytes; zeros if it is not used.

    It holds the base once more, and a cache of at least one sequence, at most of all that a worker
    samples at a time.
    """
    method = recipe.method
    if not method.samples_online or method.completions_at_once:
        return 0, 0
    base = (sizes.linear + sizes.frozen) * _width(compute) + CONTEXT_BYTES + _VLLM_WORKSPACE
    of_one = cache_bytes(sizes, compute, recipe.data.max_length)
    sequences = min(recipe.rows_of_worker(recipe.scale.least_workers), _VLLM_SEQUENCES)
    return base + of_one, base + sequences * of_one


def vllm_share(recipe: Recipe, sizes: Sizes, compute: DtypeName, total: int) -> float:
    """The share of a GPU's memory that vLLM gets: what the training leaves, as far as it is used.

    Args:
        recipe: the run's recipe.
        sizes: sizes of its model.
        compute: the type that the model computes in.
        total: bytes of the GPU's memory.

    Raises:
        InputError: the training leaves too little for the weights and one sequence.
    """
    least, most = vllm_bytes(recipe, sizes, compute)
    memory = estimate(recipe, sizes, compute)
    room = total - (memory.peak - memory.vllm)
    if room < least:
        raise InputError(
            f"method.rollout: vllm needs {least / 2**30:.1f} GiB of the GPU, and the training "
            f"leaves {max(room, 0) / 2**30:.1f} of {total / 2**30:.1f}; a smaller "
            "optim.micro_batch_size, model.gradient_checkpointing true or rollout: transformers "
            "takes less"
        )
    return min(room, most) / total
