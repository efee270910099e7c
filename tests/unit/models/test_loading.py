"""Loading of models: trained weights, and initial weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe
from finray.training.models.loading import count_meta_parameters, count_parameters, load_model

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def recipe(base: Path, **changes: Any) -> Recipe:
    values = {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}}
    return Recipe.model_validate({**values, **changes})


def test_full_fine_tuning_trains_everything_in_float32(tiny_model: Path) -> None:
    model = load_model(recipe(tiny_model))
    counts = count_parameters(model)
    assert (
        counts["total"] == counts["trainable"] == count_meta_parameters(recipe(tiny_model))["total"]
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_lora_trains_the_adapter_alone(tiny_model: Path) -> None:
    settings = recipe(tiny_model, adapter={"rank": 4, "alpha": 8})
    model = load_model(settings)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    # rank * (in + out) of q, k, v, o, gate, up and down, in two layers
    expected = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert count_parameters(model)["trainable"] == expected
    assert count_parameters(model) == count_meta_parameters(settings)


def test_targets_by_name(tiny_model: Path) -> None:
    model = load_model(recipe(tiny_model, adapter={"rank": 2, "targets": ["q_proj"]}))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("q_proj" in name for name in names)
    with pytest.raises(InputError, match=r"'q_prj' matches no module.*q_proj"):
        load_model(recipe(tiny_model, adapter={"targets": ["q_prj"]}))


def test_a_random_start_ignores_the_weights(tiny_model: Path) -> None:
    weights = load_model(recipe(tiny_model)).state_dict()
    torch.manual_seed(1)
    fresh = load_model(recipe(tiny_model, method={"kind": "pretrain", "init": "random"}))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], fresh.state_dict()[name])


def test_weights_that_are_not_safetensors_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.base: cannot load"):
        load_model(recipe(tmp_path))
