"""Adds up gradients of low precision over the microbatches of a step, in float32.

A bfloat16 sum of many gradients loses those that are small beside it. torch's own accumulation has
the type of the weight, and DDP reduces gradients of that type; so here each microbatch's gradient
is moved to a float32 sum, which becomes the weight's gradient after the last one. FSDP does the
same where `reduce_dtype` is float32.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class GradientSums:
    """The sums of a step.

    Args:
        weights: the model's parameters, before it is wrapped; those of float32 or wider, and those
            that are sharded, keep torch's own accumulation.
        world_size: number of workers; DDP averages only the last microbatch's gradients.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter], world_size: int) -> None:
        self._weights = [
            weight
            for weight in weights
            if weight.requires_grad and weight.itemsize < 4 and not isinstance(weight, DTensor)
        ]
        for weight in self._weights:
            weight.grad_dtype = None  # the gradient may have any type
        self._world_size = world_size
        self._sums: dict[int, torch.Tensor] = {}
        self._added = 0
        """Microbatches of this step so far, the same on all workers."""

    def add(self, is_last: bool) -> None:
        """Take the gradients of a microbatch; after the last one the weights have their sums."""
        if is_last:
            self._give_back()
            return
        self._added += 1
        for index, weight in enumerate(self._weights):
            if weight.grad is None:
                continue
            if index in self._sums:
                self._sums[index] += weight.grad
            else:
                self._sums[index] = weight.grad.float()
            weight.grad = None

    def _give_back(self) -> None:
        sums, self._sums = self._sums, {}
        added, self._added = self._added, 0
        if self._world_size > 1 and added and self._weights:
            # All of them, in their order: a worker's rows may leave some without a gradient.
            for index, weight in enumerate(self._weights):
                if index not in sums:
                    sums[index] = torch.zeros_like(weight, dtype=torch.float32)
            joined = torch.cat([sums[index].flatten() for index in range(len(self._weights))])
            dist.all_reduce(joined)
            sizes = [weight.numel() for weight in self._weights]
            parts = torch.split(joined / self._world_size, sizes)
            pairs = zip(self._weights, parts, strict=True)
            sums = {index: part.view(weight.shape) for index, (weight, part) in enumerate(pairs)}
        for index, total in sums.items():
            weight = self._weights[index]
            weight.grad = total if weight.grad is None else total.add_(weight.grad)
