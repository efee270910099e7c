"""A base that is kept for the next run is the one that would be loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from finray.training.config.recipe import Recipe
from finray.training.models import base_cache as kept_base
from finray.training.models.loading import load_model

# peft still calls a name that transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def keeping() -> Iterator[None]:
    kept_base.keep_bases()
    yield
    kept_base.forget_bases()


def make(base: Path, **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "adapter": {"rank": 4, **adapter},
            "data": {"train": [{"path": "/x"}]},
        }
    )


def load(recipe: Recipe) -> Any:
    set_seed(7)
    return load_model(recipe)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.usefixtures("keeping")
def test_a_reused_base_is_as_if_loaded(tiny_model: Path) -> None:
    first, second = make(tiny_model), make(tiny_model, rank=8, targets=["q_proj"])
    used = load(first)
    for name, parameter in used.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
        assert ("lora" in name) == parameter.requires_grad
    base = used.get_base_model().model.embed_tokens
    reused = load(second)
    assert reused.get_base_model().model.embed_tokens is base, "it was loaded anew"
    kept_base.forget_bases()
    fresh = load(second)
    one, other = state(reused), state(fresh)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    trained = {name for name, each in reused.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in fresh.named_parameters() if each.requires_grad}


@pytest.mark.usefixtures("keeping")
def test_a_base_that_its_adapter_changes_is_not_kept(tiny_model: Path) -> None:
    load(make(tiny_model, init="olora"))
    assert kept_base.take_base(make(tiny_model)) is None


def test_nothing_is_kept_unasked(tiny_model: Path) -> None:
    load(make(tiny_model))
    assert kept_base.take_base(make(tiny_model)) is None


@pytest.mark.usefixtures("keeping")
def test_what_the_base_measures_goes_by_all_that_decides_it(tiny_model: Path) -> None:
    """By model, method, data and, as online methods sample, by the seed; not by the rank."""
    base = make(tiny_model)
    reseeded = base.model_copy(update={"seed": base.seed + 1})
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(len(calls))
        return {"eval_loss": float(len(calls))}

    assert kept_base.measured_before(base, "data", measure) == {"eval_loss": 1.0}
    assert kept_base.measured_before(make(tiny_model, rank=8), "data", measure)["eval_loss"] == 1.0
    assert kept_base.measured_before(reseeded, "data", measure)["eval_loss"] == 2.0
    assert kept_base.measured_before(base, "other data", measure)["eval_loss"] == 3.0
    olora = make(tiny_model, init="olora")
    for number in (4.0, 5.0):
        assert kept_base.measured_before(olora, "data", measure)["eval_loss"] == number
