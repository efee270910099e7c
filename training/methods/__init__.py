"""The methods of fine-tuning.

To add one: a settings variant in `training.recipe`, a module here, an entry in METHODS.
"""

from ..recipe import Recipe
from . import pretrain, sft
from .method import Method

METHODS = {"sft": sft.METHOD, "pretrain": pretrain.METHOD}
"""By the recipe's `method.kind`."""


def method_of(recipe: Recipe) -> Method:
    """The recipe's method."""
    return METHODS[recipe.method.kind]


__all__ = ["METHODS", "Method", "method_of"]
