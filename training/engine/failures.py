"""Turns errors that another attempt may fix into retry requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import DistError

from ..common.errors import FinrayError, in_one_line
from ..data.origin import Origins, describe
from ..models.out_of_memory import first_line, is_out_of_memory
from ..records.checkpoint import step_of
from .heartbeat import Phase
from .nonfinite import NonFiniteError
from .progress import TrainingProgress
from .task import STEP_NOTE, RetryError, RetryRequest


@contextmanager
def retry_requests(
    origins: Callable[[int], Origins],
    progress: TrainingProgress,
    on_skips: Callable[[], None],
    phase: Callable[[], Phase],
) -> Iterator[None]:
    """Inside, an error that another attempt may fix leaves the block as `RetryError`.

    Args:
        origins: returns the source rows of a step, for messages.
        progress: the last step that is complete.
        on_skips: called before non-finite steps end the attempt.
        phase: returns what the worker does at the moment.
    """
    try:
        yield
    except NonFiniteError as error:
        on_skips()
        listed = ", ".join(map(str, error.steps))
        raise RetryError(
            RetryRequest(
                cause="not_finite",
                steps=list(error.steps),
                rows=describe(origins(error.steps[-1])),
                problem=f"the loss or the gradient is not finite in the consecutive steps {listed}",
            )
        ) from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, FinrayError) or not is_out_of_memory(error):
            raise
        raise RetryError(memory_request(error, phase(), progress.step + 1)) from None


def memory_request(error: BaseException, phase: Phase, step: int) -> RetryRequest:
    """The request that follows from a lack of memory in a phase.

    Args:
        error: the allocator's error.
        phase: what the worker did.
        step: the step that it belongs to, counted from 1.
    """
    problem = f"out of memory ({first_line(error)})"
    return RetryRequest(cause="memory", steps=[step], rows="", problem=problem, phase=phase)


@contextmanager
def reading(checkpoint: Path, what: str) -> Iterator[None]:
    """Inside, an error means that a file of the checkpoint cannot be used: an older one may be.

    Its hash is right, so it was saved like that.

    Args:
        checkpoint: the checkpoint's folder on this machine.
        what: the file, for the message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RetryError) or is_out_of_memory(error):
            raise
        reason = ": ".join(dict.fromkeys((type(error).__name__, in_one_line(error))))
        problem = f"unusable, {what} cannot be loaded ({reason})"
        raise RetryError(
            RetryRequest(
                cause="checkpoint", steps=[step_of(checkpoint.name)], rows="", problem=problem
            )
        ) from None


def note_step(error: Exception, step: int | None) -> None:
    """Add a note to an error: the step, counted from 1, that raised it; None for the loading.

    An error that a restart may cure gets none: of the storage, the network or another worker.
    """
    if not isinstance(error, OSError | MemoryError | DistError):
        error.add_note(f"{STEP_NOTE}{'while loading' if step is None else f'in step {step}'}")
