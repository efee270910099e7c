"""The loss of a model on rows with answers, as training measures it on held-out rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from ..data.rendering import Document
from ..models.out_of_memory import in_fitting_parts
from .opened import Opened
from .prompts import PromptRow

_TOKENS_AT_ONCE = 8192
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

    @property
    def mean(self) -> float | None:
        """Per trained token; None without any."""
        return self.total / self.tokens if self.tokens else None


def measure_loss(
    opened: Opened, rows: Iterable[PromptRow], on_row: Callable[[int], None] = lambda _: None
) -> LossSum:
    """The loss of the answers in some rows, over the tokens that training learns.

    Args:
        opened: the model.
        rows: the rows; those without an answer are left out.
        on_row: receives the number of rows so far.
    """
    result = LossSum()
    waiting = iter(rows)
    count = 0
    while window := list(islice(waiting, _WINDOW)):
        examples = [row.example for row in window if row.example is not None]
        rendered = opened.renderer.render(examples)
        documents = [document for one in rendered for document in one.documents]
        result.left_out += len(window) - sum(bool(one.documents) for one in rendered)
        for batch in _batches(documents):
            sums, _ = in_fitting_parts(
                *(batch, len(batch), lambda part: _sums(opened, part)),
                what="rows",
                remedy="leave out the measure loss",
            )
            result.total += sum(total for total, _ in sums)
            result.tokens += sum(tokens for _, tokens in sums)
        count += len(window)
        on_row(count)
    return result


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents of similar length, of at most `_TOKENS_AT_ONCE` tokens with their padding."""
    batch: list[Document] = []
    for document in sorted(documents, key=lambda one: len(one.input_ids)):
        if batch and (len(batch) + 1) * len(document.input_ids) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(document)
    if batch:
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
    with opened.active():
        logits = opened.model(input_ids=tokens, attention_mask=attended).logits[:, :-1]
    chosen = torch.from_numpy(trained[:, 1:]).to(opened.device)
    losses = torch.nn.functional.cross_entropy(
        logits[chosen].float(), tokens[:, 1:][chosen], reduction="none"
    ).double()
    counts = trained[:, 1:].sum(1).tolist()
    parts = torch.split(losses, counts)
    return [(float(part.sum()), count) for part, count in zip(parts, counts, strict=True)]
