"""Turns errors that another attempt may fix into retry requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.errors import FinrayError
from ..config.recipe import Recipe
from ..data.origin import describe, rows_of_step
from ..data.prepared import Prepared
from .nonfinite import NonFiniteError
from .progress import TrainingProgress
from .task import RetryError, RetryRequest

_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)


@contextmanager
def retry_requests(
    recipe: Recipe, prepared: Prepared, progress: TrainingProgress, on_skips: Callable[[], None]
) -> Iterator[None]:
    """Inside, an error that another attempt may fix leaves the block as `RetryError`.

    Args:
        recipe: the run's recipe.
        prepared: the run's data; messages name the rows of a step.
        progress: the last step that is complete.
        on_skips: called before non-finite steps end the attempt.
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
                rows=describe(rows_of_step(recipe, prepared, error.steps[-1])),
                problem=f"the loss or the gradient is not finite in the consecutive steps {listed}",
            )
        ) from None
    except RuntimeError as error:
        if isinstance(error, FinrayError) or not is_out_of_memory(error):
            raise
        problem = f"out of memory ({str(error).splitlines()[0]})"
        raise RetryError(
            RetryRequest(cause="memory", steps=[progress.step + 1], rows="", problem=problem)
        ) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a device or the host could not allocate what torch requested."""
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)
