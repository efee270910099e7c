"""A base that is cached for the next run equals a newly loaded one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from finray.training.config.recipe import Recipe
from finray.training.models.base_cache import BaseCache
from finray.training.models.loading import load_model

# peft still calls a name that transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(base: Path, **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "adapter": {"rank": 4, **adapter},
            "data": {"train": [{"path": "/x"}]},
        }
    )


def load(recipe: Recipe, bases: BaseCache | None = None) -> Any:
    set_seed(7)
    return load_model(recipe, bases=bases)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_reused_base_is_as_if_loaded(tiny_model: Path) -> None:
    first, second = make(tiny_model), make(tiny_model, rank=8, targets=["q_proj"])
    bases = BaseCache()
    used = load(first, bases)
    for name, parameter in used.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
        assert ("lora" in name) == parameter.requires_grad
    base = used.get_base_model().model.embed_tokens
    reused = load(second, bases)
    assert reused.get_base_model().model.embed_tokens is base, "it was loaded again"
    fresh = load(second)
    actual, expected = state(reused), state(fresh)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
    trained = {name for name, each in reused.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in fresh.named_parameters() if each.requires_grad}


def test_a_base_that_its_adapter_changes_is_not_kept(tiny_model: Path) -> None:
    bases = BaseCache()
    load(make(tiny_model, init="olora"), bases)
    assert bases.take(make(tiny_model)) is None


def test_a_base_is_kept_once_and_for_its_own_recipe(tiny_model: Path) -> None:
    bases = BaseCache()
    load(make(tiny_model), bases)
    eager = make(tiny_model)
    eager = eager.model_copy(
        update={"model": eager.model.model_copy(update={"attention": "eager"})}
    )
    assert bases.take(eager) is None
    assert bases.take(make(tiny_model)) is None, "two bases may not fit"


def test_what_the_base_measures_goes_by_all_that_decides_it(tiny_model: Path) -> None:
    """They depend on model, method, data and seed (online methods sample), not on the LoRA rank."""
    base = make(tiny_model)
    reseeded = base.model_copy(update={"seed": base.seed + 1})
    bases = BaseCache()
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(len(calls))
        return {"eval_loss": float(len(calls))}

    assert bases.measured(base, "data", measure) == {"eval_loss": 1.0}
    assert bases.measured(make(tiny_model, rank=8), "data", measure)["eval_loss"] == 1.0
    assert bases.measured(reseeded, "data", measure)["eval_loss"] == 2.0
    assert bases.measured(base, "other data", measure)["eval_loss"] == 3.0
    olora = make(tiny_model, init="olora")
    for number in (4.0, 5.0):
        assert bases.measured(olora, "data", measure)["eval_loss"] == number
