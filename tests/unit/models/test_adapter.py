"""Adapters: initial weights, refused names, and the reference model."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from finray.training.common.errors import InputError
from finray.training.config.adapter_folder import check_adapter, find_adapter
from finray.training.config.recipe import Recipe
from finray.training.models.adapter_reference import add_reference, reference_weights
from finray.training.models.devices import own_device
from finray.training.models.loading import (
    count_meta_parameters,
    count_parameters,
    load_model,
    load_tokenizer,
)
from finray.training.models.weights import load_weights, save_result, save_weights

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = torch.arange(3, 67).reshape(2, 32)


def recipe(base: Path, **changes: Any) -> Recipe:
    model = {"base": str(base), **changes.pop("model", {})}
    values = {"name": "x", "data": {"train": [{"path": "/x"}]}, "model": model, **changes}
    return Recipe.model_validate(values)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(TOKENS).logits
    return output


def train_a_little(model: Any) -> None:
    """Take a few large steps, so that every trained weight changes."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        output = model(TOKENS).logits
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_names(model: Any) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of an adapter of `tiny_model`, trained a little."""
    settings = recipe(tiny_model, adapter={"rank": 4, "alpha": 8})
    model = load_model(settings)
    train_a_little(model)
    save_result(settings, model, load_tokenizer(settings), tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": ["q_prj"]}, r"adapter\.targets: 'q_prj' matches no module.*q_proj"),
        ({"targets": r".*\.q_prj"}, r"adapter\.targets.*q_prj.*layers\.\*\.self_attn\.q_proj"),
        ({"modules_to_save": ["embed"]}, r"modules_to_save: 'embed'.*embed_tokens"),
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern: 'q_prj' matches no target.*q_proj"),
        ({"alpha_pattern": {"lm_head": 2}}, r"alpha_pattern: 'lm_head' matches no target"),
        ({"targets": ["self_attn"]}, r"'self_attn' is a LlamaAttention, .* no adapter; .* q_proj"),
    ],
)
def test_names_that_match_nothing(tiny_model: Path, adapter: dict[str, Any], message: str) -> None:
    settings = recipe(tiny_model, adapter=adapter)
    for load in (load_model, count_meta_parameters):
        with pytest.raises(InputError, match=message):
            load(settings)


def test_patterns_reach_the_modules_they_name(tiny_model: Path) -> None:
    settings = recipe(
        tiny_model,
        adapter={
            "rank": 4,
            "alpha": 8,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"k_proj": 32},
        },
    )
    model = load_model(settings)
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.q_proj.lora_A["default"].weight.shape == (2, 32)
    assert layers[1].self_attn.q_proj.lora_A["default"].weight.shape == (4, 32)
    assert layers[1].mlp.down_proj.lora_B["default"].weight.shape == (32, 6)
    assert layers[1].self_attn.k_proj.scaling["default"] == 32 / 4
    assert layers[1].self_attn.v_proj.scaling["default"] == 8 / 4
    assert count_parameters(model) == count_meta_parameters(settings)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_every_start_is_the_base(
    tiny_model: Path, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decomposes the base's matrices does so where the run computes."""
    base = logits(load_model(recipe(tiny_model)))
    settings = recipe(tiny_model, adapter={"rank": 4, "alpha": 8, "init": init})
    moved: list[torch.device] = []
    move = PreTrainedModel.to

    def to(model: Any, device: torch.device) -> Any:
        moved.append(device)
        return move(model, device)

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "to", to)
        model = load_model(settings)
    assert moved == ([own_device()] if init in ("pissa", "olora") else [])
    torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=1e-4)
    assert count_parameters(model) == count_meta_parameters(settings)


def test_a_tied_embedding_is_saved_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    """The matrices of the head's adapter are those of the embedding's, transposed."""
    settings = recipe(tiny_model, adapter={"rank": 4, "targets": ["embed_tokens", "q_proj"]})
    model, other = load_model(settings), load_model(settings)
    train_a_little(model)
    save_weights(model, tmp_path)
    load_weights(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_dtypes_of_adapters(tiny_model: Path) -> None:
    def types(**changes: Any) -> set[torch.dtype]:
        model = load_model(recipe(tiny_model, **changes))
        return {weight.dtype for weight in model.parameters() if weight.requires_grad}

    low = {"dtype": "bfloat16"}
    assert types(adapter={}) == {torch.float32}
    assert types(adapter={"modules_to_save": ["embed_tokens"]}, model=low) == {torch.bfloat16}
    assert types(adapter={"dtype": "float32"}, model=low) == {torch.float32}
    assert types(adapter={"dtype": "bfloat16"}) == {torch.bfloat16}
    assert types(model=low) == {torch.float32}


# freeze


def test_freeze_trains_what_it_names(tiny_model: Path) -> None:
    settings = recipe(tiny_model, freeze={"last_layers": 1, "train": [r"layers\.0\.mlp\.up"]})
    model = load_model(settings)
    names = trained_names(model)
    assert all(name.startswith("model.layers.1.") or "0.mlp.up" in name for name in names)
    assert len(names) == 9 + 1
    assert count_parameters(model) == count_meta_parameters(settings)
    # The head is the embedding, under a name of its own.
    head = load_model(recipe(tiny_model, freeze={"train": ["lm_head"]}))
    assert trained_names(head) == ["model.embed_tokens.weight"]


def test_freeze_refuses_what_does_not_exist(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"last_layers: 3 is too large; the model has 2"):
        count_meta_parameters(recipe(tiny_model, freeze={"last_layers": 3}))
    with pytest.raises(InputError, match=r"'lm_hed' matches no parameter.*lm_head\.weight"):
        count_meta_parameters(recipe(tiny_model, freeze={"train": ["lm_hed"]}))


# an existing adapter


def test_an_existing_adapter_goes_on(tiny_model: Path, saved: Path) -> None:
    settings = recipe(tiny_model, model={"adapter": str(saved)})
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = load_model(settings)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base, saved)))
    assert all("lora_" in name for name in trained_names(model)) and trained_names(model)
    assert count_parameters(model) == count_meta_parameters(settings)


def test_where_an_adapter_is_looked_for(saved: Path, tmp_path: Path) -> None:
    missing, run = tmp_path / "missing", saved.parent
    assert find_adapter([str(missing), str(run)]) == str(saved)
    assert find_adapter([str(saved)]) == str(saved)
    with pytest.raises(InputError, match=f"no such folder.*{missing}"):
        find_adapter([str(missing)])
    with pytest.raises(InputError, match="holds no adapter"):
        find_adapter([str(tmp_path)])


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **values}), encoding="utf-8")


def test_adapters_that_cannot_be_trained_further(tiny_model: Path, saved: Path) -> None:
    def refusal(**values: Any) -> str:
        other = saved.parent / "other"
        shutil.copytree(saved, other)
        change(other, **values)
        with pytest.raises(InputError) as caught:
            check_adapter(recipe(tiny_model, model={"adapter": str(other)}).model, "causal")
        shutil.rmtree(other)
        return str(caught.value)

    check_adapter(recipe(tiny_model, model={"adapter": str(saved)}).model, "causal")
    assert "type IA3" in refusal(peft_type="IA3")
    assert "init_lora_weights 'pissa'" in refusal(init_lora_weights="pissa")
    assert "task SEQ_CLS; this method needs one for CAUSAL_LM" in refusal(task_type="SEQ_CLS")
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        check_adapter(recipe(tiny_model, model={"adapter": str(saved)}).model, "causal")


def test_the_base_of_an_adapter(tiny_model: Path, saved: Path, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tiny_model, moved)
    shutil.copytree(tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(other)

    def check(base: Path) -> None:
        check_adapter(recipe(base, model={"adapter": str(saved)}).model, "causal")

    check(tiny_model)
    check(moved)
    with pytest.raises(InputError, match=f"adapter of {tiny_model}, and model.base is {other}"):
        check(other)
    # PEFT's own adapters say only where their base lies.
    (saved / "base.json").unlink()
    check(moved)
    with pytest.raises(InputError, match="which has other weights"):
        check(other)
    change(saved, base_model_name_or_path="/gone")
    with pytest.raises(InputError, match="adapter of /gone"):
        check(tiny_model)


def test_weights_that_do_not_fit(tiny_model: Path, saved: Path) -> None:
    change(saved, r=8)
    with pytest.raises(
        InputError, match=r"does not fit the model: .*lora_A.*\(28 tensors in all\)"
    ):
        load_model(recipe(tiny_model, model={"adapter": str(saved)}))


# the reference


@pytest.mark.parametrize(
    "start", ["default", "modules", "dora", "pissa", "olora", "loftq", "existing"]
)
def test_the_reference_stays_as_the_start(tiny_model: Path, saved: Path, start: str) -> None:
    changes: dict[str, Any] = {
        "modules": {"adapter": {"modules_to_save": ["embed_tokens"]}},
        "dora": {"adapter": {"dora": True}},
        "existing": {"model": {"adapter": str(saved)}},
        "loftq": {"adapter": {"init": "loftq"}, "model": {"quantize": "nf4"}},
    }.get(start, {"adapter": {"init": start}})
    settings = recipe(tiny_model, **changes)
    model = load_model(settings)
    add_reference(model, settings)
    add_reference(model, settings)
    before, names = logits(model), trained_names(model)
    assert names and not any("reference" in name for name in names)
    train_a_little(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.05
    with torch.no_grad(), reference_weights(model):
        reference = logits(model)
    torch.testing.assert_close(reference, before, atol=1e-4, rtol=1e-4)
    assert trained_names(model) == names
    assert torch.equal(logits(model), trained)


def test_the_reference_is_not_saved(tiny_model: Path, saved: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_model, model={"adapter": str(saved)})
    model = load_model(settings)
    counted = count_parameters(model)
    add_reference(model, settings)
    assert count_parameters(model) == counted
    save_weights(model, tmp_path / "checkpoint")
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}  # and no model card
    size = (tmp_path / "checkpoint" / "adapter_model.safetensors").stat().st_size
    assert size == (saved / "adapter_model.safetensors").stat().st_size


def test_a_step_after_the_reference_trains_the_adapter(tiny_model: Path, saved: Path) -> None:
    """A graph made before the reference computes has the same gradients as without it."""
    settings = recipe(tiny_model, model={"adapter": str(saved)})

    def gradients(with_reference: bool) -> dict[str, torch.Tensor]:
        model = load_model(settings)
        add_reference(model, settings)
        loss = model(TOKENS).logits.square().mean()
        if with_reference:
            with torch.no_grad(), reference_weights(model):
                model(TOKENS)
        loss.backward()
        return {name: w.grad for name, w in model.named_parameters() if w.grad is not None}

    plain, after_reference = gradients(False), gradients(True)
    assert plain.keys() == after_reference.keys() and plain
    assert all(torch.equal(plain[name], after_reference[name]) for name in plain)


# a score head


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_score_head_is_trained_and_saved(tiny_model: Path, tmp_path: Path, quantize: str) -> None:
    settings = recipe(tiny_model, adapter={"rank": 4}, model={"quantize": quantize})
    model = load_model(settings, head="score")
    assert logits(model).shape == (2, 1)
    assert {name.split(".")[-2] for name in trained_names(model) if "lora" not in name} == {
        "default"
    }
    assert any("score.modules_to_save" in name for name in trained_names(model))
    assert count_parameters(model) == count_meta_parameters(settings, head="score")
    train_a_little(model)
    save_result(settings, model, load_tokenizer(settings), tmp_path / "adapter")
    again = load_model(
        recipe(tiny_model, model={"adapter": str(tmp_path / "adapter"), "quantize": quantize}),
        head="score",
    )
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    if quantize == "none":
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", num_labels=1, dtype=torch.float32
        )
        loaded.config.pad_token_id = 0
        assert torch.equal(logits(loaded), logits(model))


def test_a_score_head_over_a_causal_adapter(tiny_model: Path, saved: Path) -> None:
    """The adapter's weights are loaded, and the head is new."""
    torch.manual_seed(0)
    model = load_model(recipe(tiny_model, model={"adapter": str(saved)}), head="score")
    causal = load_model(recipe(tiny_model, model={"adapter": str(saved)}))
    causal_weights = dict(causal.named_parameters())
    for name, weight in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, causal_weights[name]), name
    assert any("score" in name for name in trained_names(model))
    check_adapter(recipe(tiny_model, model={"adapter": str(saved)}).model, "score")


def test_full_fine_tuning_of_a_score_head(tiny_model: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_model)
    model = load_model(settings, head="score")
    save_result(settings, model, load_tokenizer(settings), tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    assert torch.equal(logits(loaded), logits(copy.deepcopy(model)))
