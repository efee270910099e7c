"""Measures how evenly tokens are sent to the experts of a mixture of experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..models.devices import sum_type
from ..models.matrices import expert_modules

MEASURES = ("expert_load", "idle_experts")
"""expert_load: tokens of a layer's busiest expert, as a multiple of an even share; the mean over
the layers. idle_experts: share of the experts that no token of the step was sent to."""


class ExpertLoad:
    """Counts the tokens of each expert, where the model hands their numbers to its experts.

    Args:
        model: the model to train, before it is wrapped.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._experts: list[int] = []
        self._counts: dict[int, torch.Tensor] = {}
        self._is_counting = False
        for layer, (module, experts) in enumerate(expert_modules(model)):
            self._experts.append(experts)
            module.register_forward_pre_hook(partial(self._count, layer), with_kwargs=True)

    @contextmanager
    def counting(self, active: bool) -> Iterator[None]:
        """Inside, count the tokens that each expert gets, if `active`."""
        self._is_counting = active
        try:
            yield
        finally:
            self._is_counting = False

    @torch.no_grad()
    def _count(self, layer: int, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._is_counting:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
                experts, chosen = self._experts[layer], value.flatten().long()
                wide = sum_type(value.device)
                added = torch.zeros(experts + 1, dtype=wide, device=value.device)
                # Numbers beyond the experts stand for tokens that are sent to none.
                added.scatter_add_(0, chosen.clamp(0, experts), torch.ones_like(chosen, dtype=wide))
                before = self._counts.get(layer)
                self._counts[layer] = added if before is None else before + added
                return

    def take(self, device: torch.device) -> torch.Tensor:
        """What this worker counted since the last call, of all layers, to be added up over workers.

        Args:
            device: of this worker.

        Returns:
            Equally many numbers on every worker; none if the model has no experts.
        """
        wide = sum_type(device)
        nothing = [torch.zeros(count + 1, dtype=wide) for count in self._experts]
        every = [self._counts.get(n, zeros).to(device) for n, zeros in enumerate(nothing)]
        self._counts = {}
        return torch.cat(every) if every else torch.zeros(0, dtype=wide, device=device)

    def measures(self, taken: Sequence[float]) -> dict[str, float]:
        """The measures of what was counted.

        Args:
            taken: sums over all workers of what each of them took.

        Returns:
            Empty if nothing was counted, as some models do not hand on whom they choose.
        """
        sizes = [count + 1 for count in self._experts]
        parts = torch.split(torch.tensor(taken, dtype=torch.float64), sizes) if sizes else ()
        counts = [part[:-1] for part in parts if part.sum() > 0]
        if not counts:
            return {}
        peaks = torch.stack([count.max() * len(count) / count.sum() for count in counts])
        idle = torch.cat(counts).eq(0).double().mean()
        return dict(zip(MEASURES, (float(peaks.mean()), float(idle)), strict=True))
