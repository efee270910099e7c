"""Cross-entropies of tokens, with the logits of a few tokens at a time.

A vocabulary is some hundred times wider than a hidden state, so the logits of all tokens are the
largest tensors of a step. Here a few tokens at a time pass through the output head and the softmax;
what stays of them are their losses, and the gradient by the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.devices import random_state, sum_type
from ..models.output_head import OutputHead, logit_sizes
from .head_parts import Part, Product, part_of, trained_parameters, wide_type

_HALF_SCALE = 2.0**10
"""Keeps small probabilities within the range of float16."""


@dataclass(frozen=True)
class _Work:
    """A computation of cross-entropies."""

    head: OutputHead | None
    temperature: float
    is_summed: bool
    is_measured: bool
    leaves: tuple[Tensor, ...]
    """The head's parameters that are trained."""
    is_recorded: bool
    """True if there may be a backward pass."""


def cross_entropies(
    states: Tensor,
    tokens: Tensor,
    head: OutputHead | None,
    *,
    temperature: float = 1.0,
    summed: bool = False,
    measured: bool = False,
) -> tuple[Tensor, Tensor]:
    """-log p(token) in nats of each token, and statistics of the predictions.

    Args:
        states: hidden states (tokens, hidden); without a head logits (tokens, vocabulary).
        tokens: ids, (tokens,).
        head: the model's output head.
        temperature: divides the logits.
        summed: True for the losses' sum.
        measured: True for statistics.

    Returns:
        The losses (tokens,) in float32 or wider, or their sum, a scalar. The statistics, (2,) in
        float64, are sums over the tokens: of those that have the largest logit, and of the
        entropies in nats; 0 if they are not measured.
    """
    leaves = trained_parameters(head, states)
    work = _Work(head, temperature, summed, measured, leaves, torch.is_grad_enabled())
    losses, statistics = _CrossEntropy.apply(work, states, tokens, *leaves)  # type: ignore[no-untyped-call]
    return losses, statistics


class _CrossEntropy(torch.autograd.Function):
    """Computes gradients together with losses where upstream only scales them.

    Gradients by a head's parameters mix those of all tokens: they need all upstream factors first,
    unless these are equal because the losses are summed. Then backward repeats the computation, as
    it does without a head: a gradient by logits takes as much memory as these. In float16, such a
    mix needs them too: they hold the scale that keeps it finite.
    """

    @staticmethod
    def forward(
        ctx: Any, work: _Work, states: Tensor, tokens: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.work = work
        has_equal_factors = work.is_summed and not _computes_in_half(states)
        ctx.is_joint = work.head is not None and (has_equal_factors or not work.leaves)
        if not ctx.is_joint:
            ctx.save_for_backward(states, tokens)
            ctx.surroundings = _Surroundings(states.device)
        done = _walk(work, states, tokens, work.is_recorded and ctx.is_joint)
        if ctx.is_joint:
            ctx.done, ctx.dtype = done, states.dtype
        ctx.mark_non_differentiable(done.statistics)
        return (done.losses.sum() if work.is_summed else done.losses), done.statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        if ctx.is_joint:
            done, ctx.done = ctx.done, None
            factor = upstream if work.is_summed else upstream[:, None]
            gradient = (done.gradient.to(upstream.dtype) * factor).to(ctx.dtype)
            sums = [total.mul_(upstream) for total in done.sums]
        else:
            states, tokens = ctx.saved_tensors
            with ctx.surroundings.restored():
                done = _walk(work, states, tokens, True, upstream.expand(tokens.shape))
            gradient, sums = done.gradient, done.sums
        del done
        others = (total.to(leaf.dtype) for total, leaf in zip(sums, work.leaves, strict=True))
        return None, gradient, None, *others


class _Surroundings:
    """Autocast and random state, to compute the same again."""

    def __init__(self, device: torch.device) -> None:
        kind = self._kind = device.type
        self._casts = torch.is_autocast_enabled(kind)
        self._dtype = torch.get_autocast_dtype(kind)
        self._device = device
        with random_state(device) as self._random:
            pass

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, both are as they were."""
        with (
            random_state(self._device, self._random),
            torch.autocast(self._kind, self._dtype, enabled=self._casts),
        ):
            yield


@dataclass
class _Done:
    """The losses of all tokens, and gradients of their (weighted) sum."""

    losses: Tensor
    statistics: Tensor
    gradient: Tensor | None
    """By the states, (tokens, hidden)."""
    sums: list[Tensor]
    """Gradients by the trained parameters, in their order."""


def _walk(
    work: _Work,
    states: Tensor,
    tokens: Tensor,
    differentiates: bool,
    factors: Tensor | None = None,
) -> _Done:
    """Compute part by part.

    Args:
        work: the computation.
        states, tokens: as for `cross_entropies`.
        differentiates: True for gradients too.
        factors: of the losses in the sum that is differentiated, (tokens,); None for 1.
    """
    layer = part_of(work.head, work.leaves, differentiates)
    width = states.shape[-1] if work.head is None else work.head.finish.size
    sizes = logit_sizes(states.device.type)
    rows = max(1, sizes.part // width)
    wide = wide_type(states)
    is_scaled = factors is None and _computes_in_half(states)
    if is_scaled:
        factors = torch.full(tokens.shape, _HALF_SCALE, dtype=wide, device=states.device)
    done = _Done(
        torch.empty(tokens.shape, dtype=wide, device=states.device),
        torch.zeros(2, dtype=sum_type(states.device), device=states.device),
        torch.empty_like(states, dtype=wide if is_scaled else None) if differentiates else None,
        layer.sums,
    )
    for first in range(0, len(tokens), rows):
        part = slice(first, first + rows)
        logits = _Logits(work, layer, states[part], differentiates)
        weights = None if factors is None else factors[part]
        at_a_time = max(1, sizes.slice // width)
        done.losses[part] = logits.losses(tokens[part], weights, at_a_time, done.statistics)
        if done.gradient is not None:
            done.gradient[part] = logits.gradient_by_states(tokens[part], weights)
        del logits  # before the next part has some
    if is_scaled and done.gradient is not None:
        for tensor in (done.gradient, *done.sums):
            tensor.div_(_HALF_SCALE)
    return done


class _Logits:
    """The logits of a few tokens; what a gradient by them takes is their own memory."""

    def __init__(self, work: _Work, layer: Part, states: Tensor, differentiates: bool) -> None:
        self._layer, self._is_measured = layer, work.is_measured
        self._raw = layer.forward(states).detach()
        with torch.set_grad_enabled(differentiates):
            final = self._raw.requires_grad_(differentiates)
            if work.head is not None:
                final = work.head.finish(final)
            if work.temperature != 1.0:
                final = final / work.temperature
        self._final = final
        self._product = layer if isinstance(layer, Product) else None
        is_logits = final is self._raw
        self._in_place = self._product is not None and is_logits and _is_wide_on_cpu(final)
        self._sums: list[Tensor] = []
        self._gradient: Tensor | None = None
        if differentiates:
            own = final.detach()
            self._gradient = own if layer.owns_output else torch.empty_like(own)

    def losses(
        self, tokens: Tensor, factors: Tensor | None, rows: int, statistics: Tensor
    ) -> Tensor:
        """The losses, (tokens,); adds to the statistics. `rows` at a time have a softmax."""
        final, losses = self._final.detach(), []
        for first in range(0, len(tokens), rows):
            part = slice(first, first + rows)
            values, targets = final[part], tokens[part, None]
            if self._in_place:
                losses.append(self._exponentials(values, targets, statistics))
                continue
            wide = wide_type(values)
            largest, own = values.amax(-1).to(wide), values.gather(1, targets)[:, 0].to(wide)
            shares = torch.softmax(values, -1, dtype=wide)
            # The largest share is 1 / sum(exp(values - largest)), and not small.
            norms = largest - shares.amax(-1).log()
            losses.append(norms - own)
            if self._is_measured:
                entropies = norms - torch.linalg.vecdot(shares, values.to(wide))
                statistics += torch.stack([(own >= largest).to(wide).sum(), entropies.sum()])
            if self._gradient is not None:
                shares.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=wide))
                if factors is not None:
                    shares *= factors[part, None]
                self._gradient[part] = shares
            del shares  # before the next tokens have some
        return torch.cat(losses)

    def _exponentials(self, values: Tensor, targets: Tensor, statistics: Tensor) -> Tensor:
        """The losses; leaves exp(value - largest) in place of the values, and their sums.

        A step that is measured computes the same, as a log must not change what is trained.
        """
        largest, own = values.amax(-1, keepdim=True), values.gather(1, targets)[:, 0]
        values.sub_(largest)
        exponentials = values.exp() if self._is_measured else values.exp_()
        sums = exponentials.sum(-1)
        if self._is_measured:
            entropies = sums.log() - torch.linalg.vecdot(exponentials, values) / sums
            hits = (own >= largest[:, 0]).to(values.dtype)
            statistics += torch.stack([hits.sum(), entropies.sum()])
            values.copy_(exponentials)
        self._sums.append(sums)
        return largest[:, 0] + sums.log() - own

    def gradient_by_states(self, tokens: Tensor, factors: Tensor | None) -> Tensor:
        """The gradient of the losses' sum by the states, (tokens, hidden); after `losses`, whose
        arguments these are."""
        gradient = self._gradient
        assert gradient is not None
        if self._in_place:
            assert self._product is not None
            sums = torch.cat(self._sums)
            return self._product.backward_of_softmax(gradient, sums, tokens, factors)
        if self._final is not self._raw:
            (gradient,) = torch.autograd.grad(self._final, self._raw, gradient)
        return self._layer.backward(gradient)


def _is_wide_on_cpu(logits: Tensor) -> bool:
    """True if nothing is converted for the softmax, and no kernel does all of it at once."""
    return logits.device.type == "cpu" and wide_type(logits) == logits.dtype


def _computes_in_half(states: Tensor) -> bool:
    """True if the head computes logits in float16."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == torch.float16
    return states.dtype == torch.float16
