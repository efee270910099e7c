"""The output head on a few tokens at a time, and the gradient through it."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.output_head import OutputHead


class Part(Protocol):
    """A layer whose passes follow each other: forward, then backward, of the same tokens."""

    owns_output: bool
    """True if `forward` returns a new tensor that nothing else reads."""
    sums: list[Tensor]
    """Gradients of the trained parameters, added up over all passes in float32 or wider."""

    def forward(self, states: Tensor) -> Tensor:
        """Logits of the layer: (tokens, vocabulary)."""

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient by the states, (tokens, hidden), of that by the logits."""


def part_of(head: OutputHead | None, leaves: tuple[Tensor, ...], differentiates: bool) -> Part:
    """The layer of a head; without one, states are logits.

    Args:
        head: the head.
        leaves: its `trained_parameters`.
        differentiates: False if `backward` is never called.
    """
    if head is None:
        return _Same()
    leaves = leaves if differentiates else ()
    linear = head.linear
    if linear is not None:
        return Product(linear, leaves)
    return _Module(head.module, leaves, differentiates)


def trained_parameters(head: OutputHead | None, states: Tensor) -> tuple[Tensor, ...]:
    """The parameters that logits have a gradient by, whoever holds them."""
    if head is None or not torch.is_grad_enabled():
        return ()
    linear = head.linear
    if linear is not None:
        return tuple(weight for weight in linear.parameters() if weight.requires_grad)
    return _leaves(head.module(states.detach()[:0]).grad_fn)


def wide_type(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's type if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Same:
    """Stands for a missing layer: returns what it gets."""

    owns_output = False

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def forward(self, states: Tensor) -> Tensor:
        return states

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient


class Product:
    """A linear layer, whose gradient is added up in place."""

    owns_output = True

    def __init__(self, linear: torch.nn.Linear, leaves: tuple[Tensor, ...]) -> None:
        kind, dtype = linear.weight.device.type, linear.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        # Once for all parts: autocast would do it for each.
        self._weight = linear.weight.detach().to(dtype)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self._is_trained = [
            any(weight is leaf for leaf in leaves) for weight in linear.parameters()
        ]
        self.sums = [torch.zeros_like(leaf, dtype=wide_type(leaf)) for leaf in leaves]
        self._states: Tensor

    def forward(self, states: Tensor) -> Tensor:
        self._states = states.to(self._weight.dtype)
        return F.linear(self._states, self._weight, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        sums = iter(self.sums)
        if self._is_trained[0]:
            total = next(sums)
            if total.dtype == gradient.dtype:
                total.addmm_(gradient.T, self._states)
            else:
                total += gradient.T @ self._states
        if self._is_trained[1:] == [True]:
            total = next(sums)
            total += gradient.sum(0, dtype=total.dtype)
        return gradient @ self._weight

    def backward_of_softmax(
        self, exponentials: Tensor, sums: Tensor, tokens: Tensor, factors: Tensor | None
    ) -> Tensor:
        """What `backward` does of the gradient of cross-entropies, which is not computed itself:
        scaling a hidden state costs less than scaling logits.

        Args:
            exponentials: of the logits, (tokens, vocabulary).
            sums: of these, (tokens,).
            tokens: the targets, (tokens,).
            factors: of the cross-entropies, (tokens,); None for 1.
        """
        factors = torch.ones_like(sums) if factors is None else factors.to(sums.dtype)
        shares = factors / sums
        totals = iter(self.sums)
        if self._is_trained[0]:
            total = next(totals)
            total.addmm_(exponentials.T, self._states * shares[:, None])
            total.index_add_(0, tokens, self._states * -factors[:, None])
        if self._is_trained[1:] == [True]:
            total = next(totals)
            total.addmv_(exponentials.T, shares).index_add_(0, tokens, -factors)
        by_states = (exponentials @ self._weight).mul_(shares[:, None])
        return by_states.addcmul_(self._weight[tokens], factors[:, None], value=-1)


class _Module:
    """Any layer, differentiated by autograd."""

    owns_output = False

    def __init__(
        self, module: torch.nn.Module, leaves: tuple[Tensor, ...], differentiates: bool
    ) -> None:
        self._module, self._leaves, self._differentiates = module, leaves, differentiates
        self.sums = [torch.zeros_like(leaf, dtype=wide_type(leaf)) for leaf in leaves]
        self._states: Tensor
        self._logits: Tensor

    def forward(self, states: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._differentiates):
            self._states = states.detach().requires_grad_(self._differentiates)
            self._logits = self._module(self._states)
        return self._logits.detach()

    def backward(self, gradient: Tensor) -> Tensor:
        inputs = [self._states, *self._leaves]
        own, *others = torch.autograd.grad(self._logits, inputs, gradient)
        for total, other in zip(self.sums, others, strict=True):
            total.add_(other)
        return own


def _leaves(node: Any) -> tuple[Tensor, ...]:
    """The parameters that a graph ends at."""
    pending, seen = [node], dict[Any, Tensor | None]()
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        is_end = one.name().endswith("AccumulateGrad")
        seen[one] = one.variable if is_end else None
        pending += [after for after, _ in one.next_functions]
    return tuple(leaf for leaf in seen.values() if leaf is not None)
