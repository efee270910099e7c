"""The loss of a model on rows with answers, as training measures it on held-out rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from ..data.rendering import Document
from ..models.out_of_memory import in_fitting_parts
from ..models.rotary import length_border, on_either_side
from ..objectives.logprobs import cross_entropies
from .answering import windows
from .opened import Opened
from .prompts import PromptRow

_TOKENS_AT_ONCE = {"cpu": 2048}
"""By kind of device; a processor's caches hold the states of fewer."""
_ACCELERATOR_TOKENS = 8192
_WINDOW = 512


@dataclass
class LossSum:
    """The loss of some rows."""

    total: float = 0.0
    """Sum over the trained tokens, in nats."""
    tokens: int = 0
    """Number of trained tokens."""
    left_out: int = 0
    """Rows that have no text to measure: none with an answer, or too long."""
    rows: int = 0

    @property
    def mean(self) -> float | None:
        """Per trained token; None without any."""
        return self.total / self.tokens if self.tokens else None


class TotalLoss:
    """Adds up the losses of parts, which come in any order.

    Args:
        rows: the number of all rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: list[LossSum] = []

    @property
    def rows(self) -> int:
        """The number of rows so far."""
        return sum(part.rows for part in self._parts)

    def add(self, part: LossSum) -> LossSum | None:
        """Add a part. Returns the loss of all rows with the last one."""
        self._parts.append(part)
        if self.rows < self._rows:
            return None
        return LossSum(
            # Exactly rounded, so that the order in which they came does not matter.
            total=math.fsum(part.total for part in self._parts),
            tokens=sum(part.tokens for part in self._parts),
            left_out=sum(part.left_out for part in self._parts),
            rows=self._rows,
        )


def loss_parts(rows: Iterable[PromptRow]) -> Iterator[list[PromptRow]]:
    """Rows in parts whose losses are measured by themselves."""
    return windows(rows, _WINDOW)


def loss_of(opened: Opened, rows: Sequence[PromptRow]) -> LossSum:
    """The loss of the answers in a list of rows."""
    result = LossSum(rows=len(rows))
    rendered = opened.renderer.render([row.example for row in rows if row.example is not None])
    documents = [document for one in rendered for document in one.documents]
    result.left_out = len(rows) - sum(bool(one.documents) for one in rendered)
    at_once = _TOKENS_AT_ONCE.get(opened.device.type, _ACCELERATOR_TOKENS)
    border = length_border(opened.model.config)
    for batch in _batches(documents, at_once, border):
        sums, _ = in_fitting_parts(
            *(batch, len(batch), lambda part: _sums(opened, part)),
            what="rows",
            remedy="--no-loss leaves out the loss",
        )
        result.total += sum(total for total, _ in sums)
        result.tokens += sum(tokens for _, tokens in sums)
    return result


def _batches(
    documents: Sequence[Document], tokens: int, border: int | None
) -> Iterator[list[Document]]:
    """Documents of similar length, of at most so many tokens with their padding, on one side of the
    border."""

    def size(document: Document) -> int:
        return len(document.input_ids)

    for side in on_either_side(sorted(documents, key=size), border, size):
        batch: list[Document] = []
        for document in side:
            if batch and (len(batch) + 1) * size(document) > tokens:
                yield batch
                batch = []
            batch.append(document)
        yield batch


@torch.no_grad()
def _sums(opened: Opened, documents: Sequence[Document]) -> list[tuple[float, int]]:
    """(sum of the losses, number) of each document's trained tokens."""
    sizes = [len(document.input_ids) for document in documents]
    ids = np.zeros((len(documents), max(sizes)), np.int64)
    mask, trained = np.zeros_like(ids), np.zeros(ids.shape, np.bool_)
    for row, (document, size) in enumerate(zip(documents, sizes, strict=True)):
        ids[row, :size], mask[row, :size] = document.input_ids, 1
        trained[row, :size] = document.trainable
    tokens, attended = (torch.from_numpy(part).to(opened.device) for part in (ids, mask))
    chosen = torch.from_numpy(trained[:, 1:]).to(opened.device)
    computed: list[torch.Tensor] = []

    def compute(values: torch.Tensor) -> None:
        of_tokens, _ = cross_entropies(values[:, :-1][chosen], tokens[:, 1:][chosen], head)
        computed.append(of_tokens.double())

    head = opened.head
    with opened.active(), nullcontext() if head is None else head.capturing(compute):
        outputs = opened.model(input_ids=tokens, attention_mask=attended, use_cache=False)
    if head is None:
        compute(outputs.logits)
    (losses,) = computed
    counts = trained[:, 1:].sum(1).tolist()
    parts = torch.split(losses, counts)
    return [(float(part.sum()), count) for part, count in zip(parts, counts, strict=True)]
