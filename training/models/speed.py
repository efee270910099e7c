"""Estimates how long a step takes on a GPU: arithmetic at a stated utilisation, and transfers."""

from dataclasses import dataclass

from ..config.recipe import Recipe
from .memory_estimate import Sizes, cache_bytes, trained_layers

_QLORA = 0.85
"""Speed with a base in 4 or 8 bits, whose weights are unpacked for every product."""


@dataclass(frozen=True)
class Device:
    """What decides the speed of a GPU."""

    flops: float
    """Dense 16-bit operations a second."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to the other workers."""


def training_flops(recipe: Recipe, sizes: Sizes) -> float:
    """Operations that training on one token takes, without those of checkpointing.

    A product with N weights takes 2N forward, 2N for the gradient of its input, and 2N for that of
    its weights if they are trained. Of experts, those count that a token is sent to. Attention is
    that to half of a full row. Below the first layer that is trained there are no gradients.
    """
    products, head, attention = _of_a_pass(recipe, sizes)
    back = trained_layers(recipe, sizes) / sizes.layers
    of_trained = 6 * sizes.trained
    if not recipe.trains_adapter:
        of_trained = 2 * min(sizes.trained, products + head)
    return 2 * (1 + back) * products + 4 * head + of_trained + (1 + 2 * back) * attention


def forward_flops(recipe: Recipe, sizes: Sizes) -> float:
    """Operations of one token's forward pass, without those of an adapter."""
    products, head, attention = _of_a_pass(recipe, sizes)
    return 2 * (products + head) + attention


def _of_a_pass(recipe: Recipe, sizes: Sizes) -> tuple[int, int, int]:
    """Weights of the layers' products and of the head's, and the operations of attention."""
    head = sizes.vocabulary * sizes.hidden
    layer = 2 * sizes.hidden * (sizes.queries + sizes.keys) + 3 * sizes.hidden * sizes.inner
    whole = sizes.linear
    if not recipe.trains_adapter:
        whole += sizes.frozen + sizes.trained - head
    products = min(layer * sizes.layers, max(whole, 0))
    return products, head, 2 * sizes.layers * sizes.queries * recipe.data.max_length


def seconds_per_step(
    recipe: Recipe, sizes: Sizes, device: Device, utilisation: float, tokens: float, workers: int
) -> float:
    """Seconds of an optimizer step.

    Args:
        recipe: the run's recipe, with its strategy and checkpointing decided.
        sizes: sizes of its model.
        device: the GPU.
        utilisation: share of its operations that training reaches.
        tokens: tokens of the step that are trained on, over all workers.
        workers: number of workers.
    """
    per_token = training_flops(recipe, sizes)
    forward = forward_flops(recipe, sizes)
    if recipe.model.checkpoints:
        per_token += forward * trained_layers(recipe, sizes) / sizes.layers
    if recipe.method.uses_reference:
        per_token += forward
    speed = device.flops * utilisation * (1.0 if recipe.model.quantize == "none" else _QLORA)
    most = recipe.rows_of_worker(workers) / recipe.rows_of_worker(1)
    computing = most * tokens * per_token / speed
    return (
        computing
        + _exchange(recipe, sizes, device, workers)
        + _sampling(recipe, sizes, device, workers)
    )


def _exchange(recipe: Recipe, sizes: Sizes, device: Device, workers: int) -> float:
    """Seconds in which gradients, or with fsdp all weights, travel; half of it is hidden."""
    if workers == 1:
        return 0.0
    share = (workers - 1) / workers
    gradients = 2 * share * sizes.trained * (2 if recipe.trains_adapter else 4)
    if recipe.scale.strategy != "fsdp":
        return gradients / device.link / 2
    passes = -(-recipe.rows_of_worker(workers) // recipe.microbatch)
    packed = 0.5 if recipe.model.quantize == "nf4" else 2
    weights = sizes.linear * packed + (sizes.frozen + sizes.trained) * 2
    return (2 * passes * share * weights + gradients) / device.link / 2


def _sampling(recipe: Recipe, sizes: Sizes, device: Device, workers: int) -> float:
    """Seconds in which the completions of a step are sampled: each token reads all weights."""
    method = recipe.method
    if not method.samples_online:
        return 0.0
    completions = recipe.rows_of_worker(workers)
    at_once = min(method.completions_at_once or completions, completions)
    tokens = recipe.data.max_length - recipe.row_length
    weights = 2 * (sizes.linear + sizes.frozen)
    cache = at_once * cache_bytes(sizes, "bfloat16", recipe.data.max_length)
    each = (weights + cache / 2) / (0.5 * device.bandwidth)
    return -(-completions // at_once) * tokens * each / method.repeats
