"""Turns rows of the stream into the tensors of one forward pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from .documents import Documents, Shared, moved
from .stream import Sequence

IGNORED = -100

Rows = list[Sequence]
"""The rows of one forward pass; at least one, which may be PADDING_ROW."""


@dataclass(frozen=True)
class Batch:
    """Tensors for one forward pass and its loss."""

    inputs: dict[str, torch.Tensor]
    """Arguments of the model's forward: input_ids and position_ids of shape (sequences, longest),
    and logits_to_keep, the columns that predict trained tokens. A flat batch is a single row; a
    column that several of its texts share may predict a token of each."""
    targets: torch.Tensor
    """Shape (sequences, columns): the token that follows each kept column, or IGNORED. Of a flat
    batch, the trained tokens of each sequence, the first in the first column."""
    trained: torch.Tensor
    """Places of the targets that are not IGNORED, in the flattened targets: (trained tokens,)."""
    tokens: int
    """Number of tokens, without padding."""
    loss_units: int
    """Number of units that the loss is averaged over: trained tokens, pairs, …"""
    rows: NDArray[np.int64]
    """Row numbers in the source data."""
    documents: Documents | None = None
    """The documents in the single row of a flat batch."""
    sizes: torch.Tensor | None = None
    """Tokens of each sequence of a padded batch, (sequences,)."""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors that the method's loss needs."""

    def having(self, **extra: torch.Tensor) -> "Batch":
        """The batch with further tensors for the loss."""
        return replace(self, extra={**self.extra, **extra})

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; the host does not wait for copies to a GPU."""

        def all_moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: moved(tensor, device) for name, tensor in tensors.items()}

        return replace(
            self,
            inputs=all_moved(self.inputs),
            targets=moved(self.targets, device),
            trained=moved(self.trained, device),
            documents=None if self.documents is None else self.documents.to(device),
            sizes=None if self.sizes is None else moved(self.sizes, device),
            extra=all_moved(self.extra),
        )


def in_batches(sequences: Iterator[Sequence], size: int) -> Iterator[Rows]:
    """Groups of `size` rows; the last may be smaller."""
    while part := list(islice(sequences, size)):
        yield part


PADDING_ROW = Sequence(
    np.zeros(2, np.int32), np.array([2], np.int32), np.zeros(2, np.bool_), np.zeros(0, np.int64)
)
"""Two tokens that are not trained and belong to no row of the data."""


def collate(sequences: Rows, pad: int = 0) -> Batch:
    """Tensors for one forward pass, padded at the end to the longest sequence.

    Positions restart at 0 in every document, which makes transformers isolate the documents; there
    is no attention mask. Padding continues the last document: attention is causal, so the
    document's own tokens do not attend to it. It counts no further than the longest document: the
    largest position may decide how a model computes all of them.

    Args:
        sequences: at least one row. The first token of no document is trained.
        pad: id of the padding token.
    """
    # The target of a column is in the next one.
    longest = max(2, *(len(sequence.input_ids) for sequence in sequences))
    document = max(2, *(int(sequence.lengths.max()) for sequence in sequences))
    shape = (len(sequences), longest)
    input_ids = np.full(shape, pad, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, sequence in enumerate(sequences):
        size = len(sequence.input_ids)
        input_ids[row, :size] = sequence.input_ids
        labels[row, :size] = np.where(sequence.trainable, sequence.input_ids, IGNORED)
        labels[row, np.cumsum(sequence.lengths) - sequence.lengths] = IGNORED
        positions[row] = _positions(sequence.lengths, longest) % document
    following = labels[:, 1:]
    columns = np.flatnonzero((following != IGNORED).any(axis=0))
    if not columns.size:
        columns = np.zeros(1, np.int64)
    targets = following[:, columns]
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(positions),
            "logits_to_keep": torch.from_numpy(columns),
        },
        targets=torch.from_numpy(targets),
        trained=torch.from_numpy(np.flatnonzero(targets != IGNORED)),
        tokens=sum(int(s.lengths.sum()) for s in sequences if s.rows.size),
        loss_units=int((targets != IGNORED).sum()),
        rows=np.concatenate([sequence.rows for sequence in sequences]),
        sizes=torch.tensor([len(sequence.input_ids) for sequence in sequences]),
    )


def collate_flat(sequences: Rows, shares: bool = False) -> Batch:
    """Tensors for one forward pass on a single row that holds all documents, without padding.

    Args:
        sequences: at least one row. The first token of no document is trained.
        shares: True to hold tokens that several rows begin with once; each row is a document.
    """
    lengths = np.concatenate([sequence.lengths for sequence in sequences])
    input_ids = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    is_trained = np.concatenate([sequence.trainable for sequence in sequences])
    is_trained[np.cumsum(lengths) - lengths] = False
    trained = np.flatnonzero(is_trained)
    ends = np.cumsum([len(sequence.input_ids) for sequence in sequences])
    owners = np.searchsorted(ends, trained, side="right")
    counts = np.bincount(owners, minlength=len(sequences))
    widest = max(1, int(counts.max()))
    places = owners * widest + np.arange(len(trained)) - (np.cumsum(counts) - counts)[owners]
    targets = np.full(len(sequences) * widest, IGNORED, np.int64)
    targets[places] = input_ids[trained]
    columns = torch.from_numpy(trained - 1 if trained.size else np.zeros(1, np.int64))
    ids = torch.from_numpy(input_ids)
    positions = torch.from_numpy(_positions(lengths, len(input_ids)))
    shared = Shared.of([sequence.input_ids for sequence in sequences]) if shares else None
    documents = Documents.of(lengths, shared)
    if shared is not None:
        ids, positions = ids[shared.back], positions[shared.back]
    return Batch(
        inputs={
            "input_ids": ids[None],
            "position_ids": positions[None],
            "logits_to_keep": documents.places(columns),
        },
        targets=torch.from_numpy(targets).view(len(sequences), widest),
        trained=torch.from_numpy(places),
        tokens=sum(int(s.lengths.sum()) for s in sequences if s.rows.size),
        loss_units=len(trained),
        rows=np.concatenate([sequence.rows for sequence in sequences]),
        documents=documents,
    )


def apart(batch: Batch) -> Batch:
    """The same batch with a document in each row, padded; it is made on the host.

    Args:
        batch: flat; each of its sequences is a document.
    """
    batch = batch.to(torch.device("cpu"))
    documents = batch.documents
    assert documents is not None
    ids = batch.inputs["input_ids"][0].numpy().astype(np.int32)
    if documents.shared is not None:
        ids = ids[documents.shared.index.numpy()]
    lengths = np.array(documents.lengths, np.int32)
    is_trained = np.zeros(len(ids), np.bool_)
    if len(batch.trained):
        owners = batch.trained.numpy() // batch.targets.shape[1]
        columns = batch.inputs["position_ids"][0, batch.inputs["logits_to_keep"]].numpy()
        is_trained[(np.cumsum(lengths) - lengths)[owners] + columns + 1] = True
    borders = np.cumsum(lengths)[:-1]
    parts = (np.split(ids, borders), np.split(lengths, len(lengths)), np.split(is_trained, borders))
    padded = collate([Sequence(*part, batch.rows[:0]) for part in zip(*parts, strict=True)])
    return replace(
        padded,
        tokens=batch.tokens,
        loss_units=batch.loss_units,
        rows=batch.rows,
        extra=batch.extra,
    )


def collate_pairs(pairs: Rows, assemble: Callable[[Rows], Batch]) -> Batch:
    """Both texts of every pair: all first texts, then all second texts. The loss unit is a pair.

    PADDING_ROW, which is then the only pair, does not count as a unit.

    Args:
        pairs: at least one.
        assemble: makes a batch of the texts.
    """
    rows = np.concatenate([pair.rows for pair in pairs])
    return replace(assemble(texts_of(pairs)), loss_units=len(rows), rows=rows)


def texts_of(pairs: Rows) -> Rows:
    """The first texts of all pairs, then the second ones."""
    halves = [_halves(pair) for pair in pairs]
    return [half[0] for half in halves] + [half[1] for half in halves]


def _halves(pair: Sequence) -> tuple[Sequence, Sequence]:
    if not pair.rows.size:
        return pair, pair
    cut = int(pair.lengths[0])
    return (
        Sequence(pair.input_ids[:cut], pair.lengths[:1], pair.trainable[:cut], pair.rows),
        Sequence(pair.input_ids[cut:], pair.lengths[1:], pair.trainable[cut:], pair.rows),
    )


def _positions(lengths: NDArray[np.int32], longest: int) -> NDArray[np.int64]:
    """The position of every token in its document; padding continues the last document."""
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    stretched = lengths.astype(np.int64)
    stretched[-1] += longest - int(lengths.sum())
    positions: NDArray[np.int64] = np.arange(longest) - np.repeat(starts, stretched)
    return positions
