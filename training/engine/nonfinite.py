"""Skips steps whose loss or gradient is not finite: they change no weights.

The device decides by the norm of the gradient, which is the same on all ranks: a loss that is not
finite makes its gradients NaN (`propagate_nan`), and the mean over the workers carries that to
every rank. The host reads a step's flag when the next step is over, so it never waits for the
device.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch

_SCALER_HALVINGS = 16
"""fp16's GradScaler finds its scale by skipping steps: from 2**16 down to 1."""


class NonFiniteError(Exception):
    """Too many steps in a row were skipped.

    Args:
        steps: the skipped steps, counted from 1.
    """

    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__(steps)
        self.steps = steps


@dataclass(frozen=True)
class _Flag:
    """A step's flag on its way from the device to the host."""

    step: int
    value: torch.Tensor
    arrived: torch.cuda.Event | None

    def is_set(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.value)


class NonFiniteSteps:
    """Counts skipped steps, and sums the loss of the others.

    Args:
        device: where the model is trained.
        patience: steps in a row that may be skipped.
        scaled: True if fp16's GradScaler is used.
    """

    def __init__(self, device: torch.device, patience: int, scaled: bool) -> None:
        self._patience = patience + (_SCALER_HALVINGS if scaled else 0)
        self._total = torch.zeros((), device=device)
        self._pending: deque[_Flag] = deque()
        self._in_a_row: list[int] = []
        self._unreported: list[int] = []

    def add(self, step: int, skipped: torch.Tensor, loss: torch.Tensor) -> None:
        """Record a step.

        Args:
            step: counted from 1.
            skipped: its `nonfinite_flag`, a scalar on the device.
            loss: this worker's share of its loss, a scalar on the device.
        """
        self._total = self._total + torch.where(skipped > 0, 0.0, loss)
        on_host = skipped.to("cpu", non_blocking=skipped.is_cuda)
        arrived = None
        if skipped.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending.append(_Flag(step, on_host, arrived))

    def read_flags(self, up_to: int) -> None:
        """Read the flags of all steps up to this one; waits for the device."""
        while self._pending and self._pending[0].step <= up_to:
            flag = self._pending.popleft()
            if flag.is_set():
                self._in_a_row.append(flag.step)
                self._unreported.append(flag.step)
            else:
                self._in_a_row = []

    def check(self) -> None:
        """Raise where the flags read so far show too many skipped steps in a row.

        Raises:
            NonFiniteError: naming these steps.
        """
        if len(self._in_a_row) >= self._patience:
            raise NonFiniteError(tuple(self._in_a_row))

    def take_loss(self) -> torch.Tensor:
        """This worker's sum of the losses since the last call, without skipped steps."""
        total, self._total = self._total, torch.zeros_like(self._total)
        return total

    def take_steps(self) -> list[int]:
        """The skipped steps whose flags were read since the last call."""
        steps, self._unreported = self._unreported, []
        return steps


def nonfinite_flag(norm: torch.Tensor) -> torch.Tensor:
    """1.0 where the gradient with this norm must not be used, else 0.0; on its device."""
    return (~norm.isfinite()).float()


def propagate_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss unchanged, but with NaN gradients where it is not finite."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
