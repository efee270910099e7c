"""Steps that change nothing, because their loss or their gradient is not finite.

The device decides by the norm of the gradient, which all ranks share: a loss that is not finite
makes the gradient so (`carried`), and the mean over the workers carries that to every rank. The
host hears of a step when the next one is over, so that it never waits for the device.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch

_SCALER_HALVINGS = 16
"""fp16's GradScaler looks for its scale by skipping steps: from 2**16 down to 1."""


class NotFiniteError(Exception):
    """Too many steps in a row were skipped.

    Args:
        steps: the steps, counted from 1.
    """

    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__(steps)
        self.steps = steps


@dataclass(frozen=True)
class _Told:
    """What a step's flag says, on its way to the host."""

    step: int
    flag: torch.Tensor
    arrived: torch.cuda.Event | None

    def is_skipped(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.flag)


class SkippedSteps:
    """What is known of the steps so far.

    Args:
        device: where the model is trained.
        patience: steps in a row that may be skipped.
        scaled: whether fp16's GradScaler is at work.
    """

    def __init__(self, device: torch.device, patience: int, scaled: bool) -> None:
        self._patience = patience + (_SCALER_HALVINGS if scaled else 0)
        self._total = torch.zeros((), device=device)
        self._on_the_way: deque[_Told] = deque()
        self._in_a_row: list[int] = []
        self._untold: list[int] = []

    def add(self, step: int, skipped: torch.Tensor, loss: torch.Tensor) -> None:
        """Take a step: its `flag`, and this worker's share of its loss."""
        self._total = self._total + torch.where(skipped > 0, 0.0, loss)
        on_host = skipped.to("cpu", non_blocking=True)
        arrived = None
        if skipped.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._on_the_way.append(_Told(step, on_host, arrived))

    def hear(self, up_to: int) -> None:
        """Learn what became of the steps up to this one; waits for the device."""
        while self._on_the_way and self._on_the_way[0].step <= up_to:
            told = self._on_the_way.popleft()
            if told.is_skipped():
                self._in_a_row.append(told.step)
                self._untold.append(told.step)
            else:
                self._in_a_row = []

    def check(self) -> None:
        """See whether it may go on, by the steps that were heard of.

        Raises:
            NotFiniteError: too many in a row were skipped.
        """
        if len(self._in_a_row) >= self._patience:
            raise NotFiniteError(tuple(self._in_a_row))

    def take_loss(self) -> torch.Tensor:
        """This worker's sum of the losses of the steps since the last call that were taken."""
        total, self._total = self._total, torch.zeros_like(self._total)
        return total

    def take_steps(self) -> list[int]:
        """The skipped steps that were heard of since the last call."""
        steps, self._untold = self._untold, []
        return steps


def flag(norm: torch.Tensor) -> torch.Tensor:
    """1.0 where the gradient with this norm must not be used, else 0.0; on its device."""
    return (~norm.isfinite()).float()


def carried(loss: torch.Tensor) -> torch.Tensor:
    """The loss; where it is not finite, every gradient of it is NaN."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
