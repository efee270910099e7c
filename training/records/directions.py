"""Which direction of a recorded metric is better, for metrics of any run."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from ..config.metric import MODES, Mode
from .run_folder import Record


def direction_of(name: str, recipes: Iterable[Record]) -> Mode | None:
    """The direction of a metric; None if it is not known.

    Args:
        name: the metric's name in run.json.
        recipes: those of the runs that report it, as plain values; they are read only where the
            name alone does not decide, as for a user's function or a reward.
    """
    bare = name.removeprefix("eval_")
    if bare in MODES:
        return MODES[bare]
    from ..config.eval_metrics import ANSWER_METRICS  # pydantic takes a moment to import

    if bare in ANSWER_METRICS:
        return "max"
    stated = {mode for recipe in recipes for mode in _stated(name, recipe)}
    return stated.pop() if len(stated) == 1 else None


def _stated(name: str, recipe: Record) -> Iterator[Mode]:
    """What a recipe says: the mode of a function, or the sign of a reward's weight."""
    from pydantic import TypeAdapter, ValidationError

    from ..config.eval_metrics import answer_metrics
    from ..config.method_facts import MethodSettings
    from ..config.methods import Method
    from ..config.sections import EvalSettings

    with suppress(ValidationError):  # a recipe of another finray says nothing
        functions = answer_metrics(EvalSettings.model_validate(recipe.get("eval") or {}).metrics)
        if name in functions:
            yield functions[name].mode
    with suppress(ValidationError, KeyError):  # KeyError: not a metric of this method
        method: MethodSettings = TypeAdapter(Method).validate_python(recipe["method"])
        yield method.metric(name).mode
