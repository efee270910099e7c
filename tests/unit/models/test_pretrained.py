"""Every tensor of a model comes from its files, and every tensor of the files has its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe
from finray.training.models.loading import load_model
from finray.training.models.open_result import open_model
from finray.training.models.pretrained import load_pretrained

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"

Tensors = dict[str, torch.Tensor]


def changed(base: Path, to: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """A copy of a base with other tensors and another configuration."""
    folder = shutil.copytree(base, to)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **config}), encoding="utf-8")
    return folder


def recipe(base: Path, **changes: Any) -> Recipe:
    values = {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}}
    return Recipe.model_validate({**values, **changes})


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def add(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def nothing(tensors: Tensors) -> None:
    """Leave all as it is."""


FAULTS: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "a weight is missing": (drop(DOWN), {}, f"lack {DOWN}, which would get random values"),
    "a layer is missing": (nothing, {"num_hidden_layers": 3}, r"lack model\.layers\.2\..* and 4"),
    "a layer too many": (nothing, {"num_hidden_layers": 1}, r"hold model\.layers\.1\..* and 4"),
    "a bias too many": (
        add("model.layers.0.self_attn.q_proj.bias", 32),
        {},
        r"hold model\.layers\.0\.self_attn\.q_proj\.bias, which the model has no place for",
    ),
    "a norm too many": (
        add("model.layers.0.self_attn.q_norm.weight", 8),
        {},
        r"hold model\.layers\.0\.self_attn\.q_norm\.weight",
    ),
    "a score head": (add("score.weight", 1, 32), {}, r"hold score\.weight"),
    "an untied head": (nothing, {"tie_word_embeddings": False}, r"lack lm_head\.weight"),
    "another shape": (
        nothing,
        {"intermediate_size": 48},
        r"other shapes: model\.layers\.0\.mlp\.down_proj\.weight \[32, 64\] instead of \[32, 48\]",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_weights_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path, what: str) -> None:
    change, config, message = FAULTS[what]
    base = changed(tiny_model, tmp_path / "base", change, **config)
    for settings in (recipe(base), recipe(base, adapter={"rank": 2})):
        with pytest.raises(InputError, match=f"^model.base: {base}: the weights do not.*{message}"):
            load_model(settings)
    with pytest.raises(InputError, match=f"^where: .*{message}"):
        open_model(str(base), "causal", torch.float32, "where")


def test_a_quantised_base_is_compared_too(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"adapter": {"rank": 2}}
    base = changed(tiny_model, tmp_path / "base", drop(DOWN))
    for kind in ("nf4", "int8"):
        load_model(
            recipe(tiny_model, model={"base": str(tiny_model), "quantize": kind}, **settings)
        )
        with pytest.raises(InputError, match=f"lack {DOWN}"):
            load_model(recipe(base, model={"base": str(base), "quantize": kind}, **settings))


def test_parts_that_a_language_model_lacks_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    def add_parts(tensors: Tensors) -> None:
        for number in range(3):
            tensors[f"visual.blocks.{number}.weight"] = torch.ones(2)
        tensors["model.mtp.norm.weight"] = torch.ones(2)

    base = changed(tiny_model, tmp_path / "base", add_parts)
    lines: list[str] = []
    load_model(recipe(base), notify=lines.append)
    assert lines == [f"model.base: 4 tensors of {base} are not used: model.mtp, visual"]


def test_only_a_head_may_be_new(tiny_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    load_model(recipe(tiny_model, method={"kind": "reward"}), "score", notify=lines.append)
    assert not lines
    base = changed(tiny_model, tmp_path / "base", drop(DOWN))
    with pytest.raises(InputError, match=f"lack {DOWN}"):
        load_model(recipe(base, method={"kind": "reward"}), "score")
    with pytest.raises(InputError, match=r"lack score\.weight"):
        open_model(str(tiny_model), "score", torch.float32, "where")


@pytest.fixture
def classifier(tiny_model: Path, tmp_path: Path) -> Path:
    """A reward model in the folder that a run without an adapter writes."""
    model = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    folder = shutil.copytree(tiny_model, tmp_path / "classifier")
    model.save_pretrained(folder)
    return folder


def test_a_reward_model_is_no_language_model(classifier: Path) -> None:
    with pytest.raises(InputError, match=r"hold score\.weight"):
        load_model(recipe(classifier))
    with pytest.raises(InputError, match=r"hold score\.weight"):
        open_model(str(classifier), "causal", torch.float32, "where")
    trained = load_model(recipe(classifier, method={"kind": "reward"}), "score")
    head = load_file(classifier / WEIGHTS)["score.weight"]
    assert torch.equal(trained.score.weight, head)


def small(kind: str) -> PreTrainedModel:
    """Models whose files have other names than their parameters, or fewer."""
    common: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    common |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=2))
    more = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    values = {"v_head_dim": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
    common["num_key_value_heads"] = 4
    return DeepseekV3ForCausalLM(DeepseekV3Config(**common, **more, **heads, **values))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "deepseek"])
def test_other_names_are_no_fault(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    lines: list[str] = []
    loaded = load_pretrained(tmp_path / "base", "causal", "where", notify=lines.append)
    assert not lines and (tmp_path / "base" / "model.safetensors.index.json").exists()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kind", "obsolete"),
    [
        ("gpt2", {"h.0.attn.masked_bias": (1,), "h.0.attn.bias": (1, 1, 8, 8)}),
        ("deepseek", {"model.layers.2.embed_tokens.weight": (64, 32)}),
    ],
)
def test_obsolete_and_extra_tensors_are_no_fault(
    kind: str, obsolete: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    small(kind).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    extra = {name: torch.ones(shape) for name, shape in obsolete.items()}
    save_file({**tensors, **extra}, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    load_pretrained(tmp_path / "base", "causal", "where")


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter on the tiny model, with a score head's task or a language model's."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_compared_with_its_model(adapter: Path) -> None:
    assert open_model(str(adapter), "causal", torch.float32, "where")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with (
        pytest.raises(InputError, match=f"where: .* does not fit the model: {name}"),
        pytest.warns(UserWarning, match="missing adapter keys"),
    ):
        open_model(str(adapter), "causal", torch.float32, "where")
    save_file({**tensors, name: torch.ones(3, 3)}, file)
    with pytest.raises(InputError, match=r"where: .* does not fit .*size mismatch"):
        open_model(str(adapter), "causal", torch.float32, "where")


def test_an_adapter_for_another_task_is_refused(adapter: Path) -> None:
    with pytest.raises(InputError, match=r"where: .*task CAUSAL_LM; expected one for SEQ_CLS"):
        open_model(str(adapter), "score", torch.float32, "where")


def test_the_model_that_a_checkpoint_was_made_of_still_loads(tiny_model: Path) -> None:
    model = load_pretrained(tiny_model, "causal", "where", dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
