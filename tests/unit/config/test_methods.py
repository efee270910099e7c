"""Methods: the recipe's union and the registry name the same ones."""

from typing import get_args

from finray.training.config.recipe import Method as MethodSettings
from finray.training.config.recipe import Recipe
from finray.training.methods import METHODS, method_of


def test_the_union_and_the_registry_agree() -> None:
    union = get_args(get_args(MethodSettings)[0])
    kinds = {get_args(variant.model_fields["kind"].annotation)[0] for variant in union}
    assert kinds == METHODS.keys()


def recipe(**method: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "b"},
            "data": {"train": [{"path": "/a"}]},
            "method": method,
        }
    )


def test_what_bears_loss() -> None:
    for method, expected in (
        (recipe(kind="sft"), False),
        (recipe(kind="sft", train_on="all"), True),
        (recipe(kind="pretrain"), True),
    ):
        assert method_of(method).trains_on_all(method.method) is expected
