"""Counts the bytes of a microbatch's loss: its logits, softmax and gradients.

The loss computes a few tokens at a time from their hidden states (`objectives/logprobs`), unless
the model hands over logits of its own: without an output layer, or with one whose logits no setting
explains (`output_head.find_head`). The latter shows when the run starts; until then the count is
too low.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel

from .loading import Model
from .output_head import logit_sizes


@dataclass(frozen=True)
class HeadFacts:
    """What decides the memory of a model's logits."""

    trained: int = 0
    """Trained values of the output layer."""
    results: int = 1
    """Tensors of the size of a part's logits that exist while its losses are computed."""
    gradients: int = 0
    """Those that are added for the gradient by the layer's own logits."""
    in_parts: bool = True
    """False if the model hands over the logits of all tokens."""
    values: int = 0
    """Values of the output layer."""
    tied: int = 0
    """Trained values that are the embedding's, too: their gradient waits for that of the
    embedding."""


@dataclass(frozen=True)
class LossSizes:
    """The sizes of a microbatch's loss."""

    tokens: int
    vocabulary: int
    hidden: int
    width: int
    """Bytes of a logit."""
    of_state: int
    """Bytes of a value of a hidden state."""
    of_copy: int = 0
    """Bytes of the output layer's copy in the type of the logits."""


def head_facts(model: Model) -> HeadFacts:
    """Those of a model that computes logits."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = base.get_output_embeddings()
    if layer is None:
        return HeadFacts(in_parts=False)
    values = sum(weight.numel() for weight in layer.parameters())
    leaves = [weight for weight in layer.parameters() if weight.requires_grad]
    trained = sum(weight.numel() for weight in leaves)
    shared = {id(weight) for weight in base.get_input_embeddings().parameters()}
    tied = sum(weight.numel() for weight in leaves if id(weight) in shared)
    if isinstance(layer, ModulesToSaveWrapper):  # the logits once, and the gradient by them
        return HeadFacts(trained, 2, 0, values=values, tied=tied)
    if type(layer) is not torch.nn.Linear:  # its adapter's logits too, and those of the part before
        return HeadFacts(trained, 2, 2, values=values)
    results, gradients = _finishing(base.config.get_text_config().to_dict())
    return HeadFacts(trained, results, gradients, values=values, tied=tied)


def _finishing(settings: dict[str, Any]) -> tuple[int, int]:
    """(results, gradients) where a setting scales or caps the logits."""
    names = [
        name
        for name, value in settings.items()
        if ("logit" in name or name == "lm_head_multiplier")
        and not any(part in name for part in ("att", "router"))
        and isinstance(value, int | float)
        and value not in (0, 1)
    ]
    if not names:
        return 1, 0
    return (3, 2) if any("cap" in name for name in names) else (2, 1)


def loss_bytes(head: HeadFacts, sizes: LossSizes, kind: str, trains: bool = True) -> int:
    """Bytes of the loss of a microbatch whose tokens are all trained.

    Args:
        head: facts of the model's output layer.
        sizes: those of the loss.
        kind: of the device: cpu, cuda, …
        trains: False for a loss without gradients.
    """
    rows = min(sizes.tokens, max(1, logit_sizes(kind).part // sizes.vocabulary))
    part = rows * sizes.vocabulary * sizes.width
    # Shares in float32; logits of another type are converted before.
    in_slice = min(rows, max(1, logit_sizes(kind).slice // sizes.vocabulary))
    softmax = in_slice * sizes.vocabulary * (4 if trains and sizes.width == 4 else 8)
    if not head.in_parts:
        whole = sizes.tokens * sizes.vocabulary * sizes.width
        return (2 * whole + part if trains else whole) + softmax
    states = sizes.tokens * sizes.hidden * sizes.of_state
    converted = rows * sizes.hidden * sizes.width if sizes.of_state != sizes.width else 0
    if not trains:
        return states + converted + sizes.of_copy + min(head.results, 2) * part + softmax
    # The gradient by the weight is added up in float32; its part has the type of the logits.
    of_weight = head.trained * sizes.width if sizes.width != 4 else 0
    if kind == "cpu" and of_weight:  # which converts it before the sum
        of_weight += 4 * head.trained
    product = max(of_weight, rows * sizes.hidden * sizes.width)
    if kind == "cpu" and sizes.width == 4 and head.results == 1:
        softmax, product = 0, 2 * product  # in place; a step that is logged has a slice more
    # What a cap adds to the logits is gone before the products.
    beside = 0 if head.results > 2 else head.gradients
    of_part = head.results * part
    of_part += max(softmax, head.gradients * part, beside * part + product)
    # The model's own, those of the trained tokens, and the gradient by these.
    return 3 * states + converted + sizes.of_copy + 4 * head.trained + of_part
