"""From sequences to the tensors of one forward pass."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from .stream import Sequence, share

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    inputs: dict[str, torch.Tensor]
    """What the model's forward takes: input_ids and position_ids of shape (sequences, longest),
    and logits_to_keep, the columns whose logits bear loss."""
    targets: torch.Tensor
    """Shape (sequences, columns): the token that follows each kept column, or IGNORED."""
    tokens: int
    """Tokens without padding."""
    trainable: int
    """Tokens that bear loss."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.to(device), self.tokens, self.trainable)


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Microbatches of one optimizer step: the same number on every rank."""
    return math.ceil(share(batch_size, 0, world_size) / micro_batch_size)


def microbatches(
    sequences: Iterator[Sequence], own_share: int, micro_batch_size: int, accumulation: int
) -> Iterator[Batch]:
    """Group a worker's sequences into exactly `accumulation` microbatches a step.

    Where the batch does not divide evenly, a worker's last microbatch is smaller, or two tokens
    that bear no loss, so that all workers take the same number of passes.
    """
    while step := list(islice(sequences, own_share)):
        for index in range(accumulation):
            part = step[index * micro_batch_size : (index + 1) * micro_batch_size]
            yield collate(part or [_NOTHING])


def in_batches(sequences: Iterator[Sequence], size: int) -> Iterator[Batch]:
    """Batches of `size` sequences; the last may be smaller."""
    while part := list(islice(sequences, size)):
        yield collate(part)


_NOTHING = Sequence(
    np.zeros(2, np.int32), np.array([2], np.int32), np.zeros(2, np.bool_), np.zeros(0, np.int64)
)


def collate(sequences: list[Sequence]) -> Batch:
    """Tensors for one forward pass, padded at the end to the longest sequence.

    Positions restart with every document, and transformers isolates documents by that; there is
    no attention mask. Padding carries on its last document, whose tokens cannot look ahead at it.
    """
    longest = max(len(sequence.input_ids) for sequence in sequences)
    shape = (len(sequences), longest)
    input_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, sequence in enumerate(sequences):
        size = len(sequence.input_ids)
        input_ids[row, :size] = sequence.input_ids
        labels[row, :size] = np.where(sequence.trainable, sequence.input_ids, IGNORED)
        positions[row] = _positions(sequence.lengths, longest)
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
        tokens=sum(int(s.lengths.sum()) for s in sequences if s.rows.size),
        trainable=int((targets != IGNORED).sum()),
    )


def _positions(lengths: NDArray[np.int32], longest: int) -> NDArray[np.int64]:
    """Position of every token in its own document; padding carries on the last one."""
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    stretched = lengths.astype(np.int64)
    stretched[-1] += longest - int(lengths.sum())
    positions: NDArray[np.int64] = np.arange(longest) - np.repeat(starts, stretched)
    return positions
