"""From an error to the end of an attempt, where another attempt may cure it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.errors import FinrayError
from ..config.recipe import Recipe
from ..data.origin import describe, rows_of_step
from ..data.prepared import Prepared
from .nonfinite import NotFiniteError
from .progress import Position
from .restart import AttemptOver, Restart, is_out_of_memory


@contextmanager
def ending_attempts(
    recipe: Recipe, prepared: Prepared, position: Position, on_skips: Callable[[], None]
) -> Iterator[None]:
    """What another attempt can cure leaves the block as `AttemptOver`.

    Args:
        recipe: the run's.
        prepared: its data, whose rows are named.
        position: how far the training is.
        on_skips: called before an attempt ends because of steps that are not finite.
    """
    try:
        yield
    except NotFiniteError as error:
        on_skips()
        listed = ", ".join(map(str, error.steps))
        raise AttemptOver(
            Restart(
                cause="not_finite",
                steps=list(error.steps),
                rows=describe(rows_of_step(recipe, prepared, error.steps[-1])),
                found=f"the loss or the gradient is not finite in steps {listed}, one after the "
                "other",
            )
        ) from None
    except RuntimeError as error:
        if isinstance(error, FinrayError) or not is_out_of_memory(error):
            raise
        found = f"out of memory ({str(error).splitlines()[0]})"
        raise AttemptOver(
            Restart(cause="memory", steps=[position.step + 1], rows="", found=found)
        ) from None
