"""Decides how a model keeps packed documents apart: by equality with one document at a time.

Tokens see those before them alone, which is tried here, too.
"""

import inspect
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..common.errors import FinrayError
from ..config.recipe import Recipe
from ..config.sections import FLAT, Isolation
from ..data.batching import Batch, collate, collate_flat
from ..data.stream import Sequence
from ..models.attention import attend_by_documents
from ..models.isolation import kept_outputs
from ..models.loading import forward_arguments
from .kernels import missing_packages
from .rows import made_up
from .small_copy import SmallCopy
from .step import train_step

_TOLERANCE = 1e-5
"""Of losses, relative; of gradients, relative to the largest gradient of the model. float32 leaves
1e-6."""

_UNCHANGED = 1e-4
"""Of logits, relative to the largest one, before a token that is another."""
_REACH, _FARTHEST = 8, 256
"""Some architectures change how they attend where a row is several times as long as a block."""

Document = Tensor
"""Token ids, (tokens,)."""
Result = tuple[list[float], list[Tensor]]
"""The loss of each document, and the gradient of each parameter."""


@torch.no_grad()
def sees_later_tokens(copy: SmallCopy, vocabulary: int) -> bool:
    """True if a token's logits depend on the tokens after it.

    Args:
        copy: the copy.
        vocabulary: rows of its embedding.
    """
    random = np.random.default_rng(2)
    size = min(_REACH * copy.longest, _FARTHEST)
    tokens = torch.from_numpy(made_up(random, size, vocabulary))
    middle = size // 2
    other = torch.cat([tokens[:middle], torch.from_numpy(made_up(random, middle, vocabulary))])
    copy.model.eval()
    one, two = (
        copy.model(input_ids=row[None], use_cache=False).logits[0, :middle].float()
        for row in (tokens, other)
    )
    return bool((one - two).abs().max() > _UNCHANGED * one.abs().max())


def find_isolation(
    copy: SmallCopy, vocabulary: int, ways: tuple[Isolation, ...] = get_args(Isolation)
) -> tuple[Isolation | None, str | None]:
    """The first way that gives the losses and gradients of one document at a time.

    Args:
        copy: the copy.
        vocabulary: rows of its embedding.
        ways: those to try.

    Returns:
        The way, or None and the reason.
    """
    model = copy.model
    kind = model.config.get_text_config().model_type
    random = np.random.default_rng(1)
    lengths = (copy.longest, copy.longest - 5, copy.longest + 3)
    documents = [torch.from_numpy(made_up(random, size, vocabulary)) for size in lengths]
    model.train()
    alone = _alone(model, documents)
    for isolation in ways:
        try:
            packed = _packed(copy, documents, isolation)
        except Exception:  # noqa: BLE001 - a model without this way may raise anything
            continue
        if _equal(alone, packed):
            return isolation, None
    source = inspect.getsource(sys.modules[type(model).__module__])
    if missing := missing_packages(source):
        return None, (
            f"the architecture {kind} keeps documents apart only with {', '.join(missing)} "
            "(pip install 'finray[kernels]'), without which its linear layers are slow, too"
        )
    return None, f"the architecture {kind} would mix documents that share a row"


def shares_prefixes(copy: SmallCopy, vocabulary: int) -> bool:
    """True if attention by documents gives the losses and gradients of one document at a time where
    documents share what they begin with.

    Args:
        copy: the copy.
        vocabulary: rows of its embedding.
    """
    random = np.random.default_rng(3)
    prefix = made_up(random, copy.longest // 2, vocabulary)
    documents = [
        torch.from_numpy(np.concatenate([prefix[:common], made_up(random, own, vocabulary)]))
        for common, own in ((len(prefix), 5), (len(prefix) - 3, 7), (len(prefix), 3))
    ]
    copy.model.train()
    alone = _alone(copy.model, documents)
    try:
        shared = _shared(copy, documents)
    except Exception:  # noqa: BLE001 - a model that cannot may raise anything
        return False
    return _equal(alone, shared)


def scores_alike(
    recipe: Recipe, copy: SmallCopy, isolation: Isolation | None, shares: bool
) -> bool:
    """True if a model that scores texts takes them on one row as it takes each in its own.

    Args:
        recipe: of the copy.
        copy: the copy.
        isolation: how its language model keeps them apart.
        shares: whether it lets them share what they begin with.

    Raises:
        InputError: no step can be taken either way.
    """
    apart = train_step(recipe, copy, None)
    try:
        together = train_step(recipe, copy, isolation, shares=shares)
    except FinrayError:
        return False
    one, other = (([step.loss], _gradients(step.model)) for step in (apart, together))
    return _equal(one, other)


def _alone(model: torch.nn.Module, documents: list[Document]) -> Result:
    model.zero_grad()
    losses = []
    for document in documents:
        losses += _losses_and_backward(model, [[document]], None)
    return losses, _gradients(model)


def _packed(copy: SmallCopy, documents: list[Document], isolation: Isolation) -> Result:
    """Two documents in the first row, and the third with padding in the second."""
    model: torch.nn.Module = copy.model
    if isolation == "documents":
        model = _by_documents(copy)
    model.zero_grad()
    losses = _losses_and_backward(model, [documents[:2], documents[2:]], isolation)
    return losses, _gradients(model)


def _shared(copy: SmallCopy, documents: list[Document]) -> Result:
    """All on one row, on which tokens that several begin with are once."""
    model = _by_documents(copy)
    model.zero_grad()
    losses = _losses_and_backward(model, [[one] for one in documents], "documents", shares=True)
    return losses, _gradients(model)


def _by_documents(copy: SmallCopy) -> torch.nn.Module:
    """The model with this attention; the other ways are tried with the attention of its own."""
    model: torch.nn.Module = deepcopy(copy.model)
    attend_by_documents(model)
    return model


def _losses_and_backward(
    model: torch.nn.Module,
    rows: list[list[Document]],
    isolation: Isolation | None,
    shares: bool = False,
) -> list[float]:
    """The mean loss of each document; their sum is differentiated."""
    batch = _collated(rows, is_flat=isolation in FLAT, shares=shares)
    logits, _ = kept_outputs(model, batch, forward_arguments(model), isolation, model.config)
    losses = [
        cross_entropy(row[first : first + len(document) - 1].float(), document[1:])
        for row, first, document in _placed(logits, rows)
    ]
    torch.autograd.backward(torch.stack(losses).sum())
    return [float(loss.detach()) for loss in losses]


def _collated(rows: list[list[Document]], is_flat: bool, shares: bool) -> Batch:
    """All tokens, and the logits of the columns of all documents."""
    sequences = [
        Sequence(
            torch.cat(row).numpy().astype(np.int32),
            np.array([len(document) for document in row], np.int32),
            np.zeros(sum(map(len, row)), np.bool_),
            np.zeros(0, np.int64),
        )
        for row in rows
    ]
    batch = collate_flat(sequences, shares) if is_flat else collate(sequences)
    columns = torch.arange(batch.inputs["input_ids"].shape[1])
    if batch.documents is not None:
        columns = batch.documents.places(torch.arange(batch.documents.tokens))
    return replace(batch, inputs={**batch.inputs, "logits_to_keep": columns})


def _placed(logits: Tensor, rows: list[list[Document]]) -> Iterator[tuple[Tensor, int, Document]]:
    """Each document with the logits of its row, and the place of its first token there."""
    first = 0
    for number, row in enumerate(rows):
        first = first if len(logits) == 1 else 0
        for document in row:
            yield logits[min(number, len(logits) - 1)], first, document
            first += len(document)


def _gradients(model: torch.nn.Module) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for parameter in model.parameters()
    ]


def _equal(alone: Result, packed: Result) -> bool:
    losses = zip(alone[0], packed[0], strict=True)
    if any(abs(one - other) > _TOLERANCE * abs(one) for one, other in losses):
        return False
    largest = max(float(gradient.abs().max()) for gradient in alone[1] if gradient.numel())
    gradients = zip(alone[1], packed[1], strict=True)
    return all(
        float((one - other).abs().max()) <= _TOLERANCE * largest
        for one, other in gradients
        if one.numel()
    )
