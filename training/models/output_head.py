"""The layer that turns hidden states into logits, apart from the rest of a model's forward pass.

A loss that computes logits for a few tokens at a time needs the hidden states and a function of
them that equals what the model does. Some families scale or cap the logits after the layer, or cut
off unused ones. Which of that a model does is read from a forward pass whose logits are replaced by
a range of numbers: the settings of its configuration must explain every result exactly. A model
that does something else keeps its own forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .devices import random_state
from .loading import Model

_WIDEST = 60.0
"""The range of logits that a family's function is recognised by."""
_SAMPLE = 64


@dataclass(frozen=True)
class LogitSizes:
    """Numbers of logits that a loss holds at a time."""

    part: int
    """Logits in the type in which the head computes."""
    slice: int
    """Logits in float32."""


# A processor's slices stay in its cache.
_SIZES = {"cpu": LogitSizes(2**25, 2**20)}
_ACCELERATOR = LogitSizes(2**27, 2**25)


def logit_sizes(kind: str) -> LogitSizes:
    """Those of a kind of device: cpu, cuda, …"""
    return _SIZES.get(kind, _ACCELERATOR)


@dataclass(frozen=True)
class Finish:
    """What a model does with its logits after the layer."""

    size: int
    """Number of logits that it keeps."""
    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None
    """Bounds the logits: cap * tanh(logits / cap)."""
    is_wide: bool = False
    """True if it computes that in float32."""

    @property
    def is_identity(self) -> bool:
        """True if logits of the type in which they are computed stay as they are."""
        return self.factor == self.divisor == 1.0 and self.cap is None

    def __call__(self, logits: Tensor) -> Tensor:
        """The final logits of those of the layer; (…, vocabulary)."""
        if logits.shape[-1] != self.size:
            logits = logits[..., : self.size]
        if self.is_wide:
            logits = logits.float()
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True)
class OutputHead:
    """A model's output layer and what follows it."""

    module: torch.nn.Module
    finish: Finish

    @property
    def linear(self) -> torch.nn.Linear | None:
        """The layer, if all that it does is a product with its weight."""
        module = self.module
        return module if type(module) is torch.nn.Linear else None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits of hidden states: (tokens, hidden) to (tokens, vocabulary)."""
        logits: Tensor = self.finish(self.module(states))
        return logits

    @contextmanager
    def capturing(self, consume: Callable[[Tensor], object]) -> Iterator[None]:
        """Inside, the model's forward pass hands its hidden states to `consume`, in place of
        the layer, and returns no logits.

        These logits of no token have a graph, which leads to the states: a sharded model gathers
        its weights when a gradient arrives there.
        """

        def hand_over(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            handles.pop().remove()  # `consume` calls the layer
            (states,) = args
            consume(states)

            def link(_: torch.nn.Module, args: Any, logits: Tensor) -> Tensor:
                return states[:, :0, :1].expand(logits.shape).clone()

            handles.append(module.register_forward_hook(link))
            return (states[:, :0],)

        handles = [self.module.register_forward_pre_hook(hand_over)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_head(model: Model, run: Callable[[], Tensor]) -> OutputHead | None:
    """The model's output head; None if the model's own logits are needed.

    Args:
        model: the model, not wrapped for training.
        run: runs the model on a few tokens without gradients, and returns its logits.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    module = base.get_output_embeddings()
    if module is None:
        return None
    states: list[Tensor] = []
    made: list[Tensor] = []

    def take_states(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        states.append(args[0])
        return (args[0][:, :0],)

    def replace_logits(_: torch.nn.Module, args: Any, logits: Tensor) -> Tensor:
        width = logits.shape[-1]
        numbers = torch.linspace(-_WIDEST, _WIDEST, 2 * width, device=logits.device)
        made.append(numbers.to(logits.dtype).view(1, 2, width).expand(len(logits), -1, -1))
        # What follows has a graph if it is trained: it would not stay what it is now.
        torch.set_grad_enabled(True)
        return made[0].clone()

    hooks = (
        module.register_forward_pre_hook(take_states),
        module.register_forward_hook(replace_logits),
    )
    finish: Finish | None = None
    # A model with a head of another kind may raise anything on what it does not expect.
    with random_state(model.device), torch.no_grad(), suppress(Exception):
        logits = run()
        is_usual = len(states) == len(made) == 1 and logits.shape[:-1] == made[0].shape[:-1]
        if is_usual and states[0].dim() == 3 and not logits.requires_grad:
            finish = _explain(made[0][0], logits[0], base.config.to_dict())
    for hook in hooks:
        hook.remove()
    return None if finish is None else OutputHead(module, finish)


def _explain(before: Tensor, after: Tensor, settings: dict[str, Any]) -> Finish | None:
    """The function that turns logits into a model's final ones; None if no setting explains it."""
    size = after.shape[-1]
    if size > before.shape[-1]:
        return None
    # The same few numbers rule out almost all functions.
    at = torch.linspace(0, size - 1, _SAMPLE, device=before.device).long()
    few = replace(Finish(size), size=len(at))
    for finish in _candidates(sorted(_numbers(settings)), few):
        if not _gives(finish, before[:, at], after[:, at]):
            continue
        whole = replace(finish, size=size)
        if _gives(whole, before, after):
            return whole
    return None


def _candidates(numbers: list[float], plain: Finish) -> Iterator[Finish]:
    scaled = [replace(plain, factor=number) for number in numbers]
    scaled += [replace(plain, divisor=number) for number in numbers]
    capped = [replace(plain, cap=number) for number in numbers if number > 0]
    both = (replace(one, cap=other.cap) for one, other in product(scaled, capped))
    for finish in (plain, *scaled, *capped, *both):
        yield finish
        yield replace(finish, is_wide=True)


def _gives(finish: Finish, before: Tensor, after: Tensor) -> bool:
    return torch.equal(finish(before).to(after.dtype), after)


def _numbers(settings: Any) -> set[float]:
    """All numbers of a configuration that could scale logits."""
    if isinstance(settings, dict):
        return set[float]().union(*(_numbers(value) for value in settings.values()))
    is_number = isinstance(settings, int | float) and not isinstance(settings, bool)
    return {float(settings)} - {0.0, 1.0} if is_number else set()
