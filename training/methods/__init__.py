"""The methods of fine-tuning.

To add one: a settings variant in `training.method_settings`, a module here, an entry in METHODS,
an objective in `training.objectives`.
"""

from ..config.recipe import Recipe
from ..data.examples import Method
from ..data.shapes import SHAPES, Normalised, RowError
from . import cpo, dpo, kto, online, orpo, pretrain, reward, sft

METHODS = {
    "sft": sft.METHOD,
    "pretrain": pretrain.METHOD,
    "dpo": dpo.METHOD,
    "kto": kto.METHOD,
    "orpo": orpo.METHOD,
    "cpo": cpo.METHOD,
    "simpo": cpo.METHOD,
    "reward": reward.METHOD,
    "grpo": online.GRPO,
    "rloo": online.RLOO,
}
"""By the recipe's `method.kind`."""


def examples_of(row: Normalised, kind: str) -> tuple[Normalised, ...]:
    """What a method learns from in a row of the data.

    Raises:
        RowError: for a row of a shape that it does not learn from.
    """
    examples = METHODS[kind].split(row)
    for example in examples:
        _check_shape(example, kind)
    return examples


def _check_shape(row: Normalised, kind: str) -> None:
    wanted = METHODS[kind].shapes
    if not isinstance(row, wanted):
        others = [name for name, method in METHODS.items() if isinstance(row, method.shapes)]
        raise RowError(
            f"method {kind} learns from {_told(wanted)}, and this is one of the "
            f"{SHAPES[type(row)]}, for method {' or '.join(others)}"
        )


def _told(shapes: tuple[type[Normalised], ...]) -> str:
    return " or ".join(SHAPES[shape] for shape in shapes)


def method_of(recipe: Recipe) -> Method:
    """The recipe's method."""
    return METHODS[recipe.method.kind]


__all__ = ["METHODS", "Method", "examples_of", "method_of"]
