"""Merging, compared with PEFT's unmerged model and its `merge_and_unload`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.mixtures import MIXTURES, saved_mixture
from support.recorded import RecordedProgress
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from finray.training.common.errors import InputError, RunError
from finray.training.common.progress import SILENT
from finray.training.config.recipe import Recipe
from finray.training.export.lora import Adapter
from finray.training.export.merge import merge, recast
from finray.training.export.tensor_files import TensorFiles
from finray.training.models.loading import load_model

# peft calls a name that transformers has renamed, and warns of what these tests do on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning",
    # It compares the patterns with modules alone, not with parameters.
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
)

IDS = torch.arange(3, 19)[None]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=tied, pad_token_id=0)
    return LlamaForCausalLM(config)


def qwen2() -> PreTrainedModel:
    """A model whose q, k and v layers have biases."""
    return Qwen2ForCausalLM(
        Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    )


def gpt2() -> PreTrainedModel:
    """A model of Conv1D layers, whose weights are stored as (in, out)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


def mixtral() -> PreTrainedModel:
    """A model with fused experts, which its files hold as separate tensors."""
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    )


def save(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **how)
    return folder


def adapt(base: Path, folder: Path, make: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """Write an adapter with random weights for a base."""
    task = "SEQ_CLS" if make is AutoModelForSequenceClassification else "CAUSAL_LM"
    more = {"num_labels": 1} if task == "SEQ_CLS" else {}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    model = get_peft_model(
        make.from_pretrained(base, dtype=torch.float32, **more),
        LoraConfig(task_type=task, **settings),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    output: torch.Tensor = model.eval()(input_ids=IDS.to(next(model.parameters()).device)).logits
    return output.float()


def unmerged(base: Path, adapter: Path, make: Any = AutoModelForCausalLM, **how: Any) -> PeftModel:
    more = {"num_labels": 1} if make is AutoModelForSequenceClassification else {}
    model = make.from_pretrained(base, **more, **how)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # else evaluation on some CPUs repacks it, lossily
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, adapter)


def load(folder: Path, make: Any = AutoModelForCausalLM, **how: Any) -> PreTrainedModel:
    """Load a merged model; no tensor may be missing or unexpected."""
    model, info = make.from_pretrained(folder, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    loaded: PreTrainedModel = model
    return loaded


def assert_close(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    """Assert equality within a share of the logits' standard deviation."""
    assert (actual - expected).abs().max() <= share * expected.std(), (
        (actual - expected).abs().max()
    )


Q_AND_UP = ["q_proj", "up_proj"]
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "plain": (llama, {}),
    "rslora": (llama, {"use_rslora": True}),
    "dora": (llama, {"use_dora": True}),
    "patterns": (
        llama,
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 32, "down_proj": 1},
        },
    ),
    "rslora patterns": (
        llama,
        {"use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    ),
    "saved norm": (llama, {"target_modules": Q_AND_UP, "modules_to_save": ["norm"]}),
    "bias of the adapter": (qwen2, {"target_modules": ["q_proj"], "lora_bias": True}),
    "biases": (qwen2, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "conv1d": (gpt2, {}),
    "conv1d dora": (gpt2, {"use_dora": True}),
    "experts beside": (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "one of the experts' parameters": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "alpha_pattern": {"experts.down_proj": 3},
        },
    ),
    "targets of older files": (mixtral, {"target_modules": ["w1", "w2", "w3", "v_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_peft(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, settings = CASES[case]
    base = save(make(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", **settings)
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    model = unmerged(base, adapter)
    actual, expected = logits(load(target)), logits(model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert_close(actual, expected)
    assert_close(actual, logits(model.merge_and_unload()))
    assert TensorFiles(target).info == TensorFiles(base).info


TIED: dict[str, dict[str, Any]] = {
    "head saved": {"target_modules": Q_AND_UP, "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": Q_AND_UP, "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_part_where_one_is_trained(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(llama(tied=True), tmp_path / "base")
    assert "lm_head.weight" not in TensorFiles(base).info
    adapter = adapt(base, tmp_path / "adapter", **TIED[case])
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    assert_close(logits(load(target)), logits(unmerged(base, adapter)))
    assert not json.loads((target / "config.json").read_bytes())["tie_word_embeddings"]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    base = save(llama(tied=True), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    assert TensorFiles(target).info == TensorFiles(base).info
    model = load(target)
    assert model.config.tie_word_embeddings
    assert_close(logits(model), logits(unmerged(base, adapter)))


TIED_AS_ONE: dict[str, dict[str, Any]] = {
    "saved": {"target_modules": Q_AND_UP, "modules_to_save": ["embed_tokens"]},
    "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("case", TIED_AS_ONE)
def test_tied_weights_that_are_trained_as_one(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(llama(tied=True), tmp_path / "base")
    settings = {**TIED_AS_ONE[case], "ensure_weight_tying": True}
    adapter = adapt(base, tmp_path / "adapter", **settings)
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    assert TensorFiles(target).info == TensorFiles(base).info
    assert_close(logits(load(target)), logits(unmerged(base, adapter)))


def test_names_of_an_older_file(tmp_path: Path) -> None:
    """GPT-2's original files were written from the model without its head."""
    torch.manual_seed(0)
    whole = gpt2()
    base = save(whole.transformer, tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "lm_head"])
    assert "h.0.attn.c_attn.weight" in TensorFiles(base).info
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    assert_close(logits(load(target)), logits(unmerged(base, adapter)))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_a_bfloat16_base_keeps_its_type(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = save(llama().to(torch.bfloat16), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", **settings)
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT)
    assert {info.dtype for info in TensorFiles(target).info.values()} == {torch.bfloat16}
    # In float32 over the same bfloat16 base: what is left is one rounding of each weight.
    expected = logits(unmerged(base, adapter, dtype=torch.float32))
    assert_close(logits(load(target, dtype=torch.float32)), expected, share=0.03)
    wide = tmp_path / "wide"
    wide.mkdir()
    merge(base, adapter, wide, SILENT, dtype="float32")
    assert_close(logits(load(wide, dtype="auto")), expected)
    assert json.loads((wide / "config.json").read_bytes())["dtype"] == "float32"


def test_shards_in_and_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base", max_shard_size="20KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = adapt(base, tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    progress = RecordedProgress()
    merge(base, adapter, target, progress, shard_bytes=30_000)
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 34_000 for shard in shards)
    index = json.loads((target / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == {
        name: shard.name for shard in shards for name in load_file(shard)
    }
    assert_close(logits(load(target)), logits(unmerged(base, adapter)))
    assert progress.advances[-1] == (index["metadata"]["total_size"],) * 2
    assert progress.advances == sorted(progress.advances)
    assert len(progress.advances) == len(index["weight_map"])


def test_a_score_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", AutoModelForSequenceClassification)
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT, pad_token_id=0)
    assert "lm_head.weight" not in TensorFiles(target).info
    model = load(target, AutoModelForSequenceClassification)
    expected = logits(unmerged(base, adapter, AutoModelForSequenceClassification))
    actual = logits(model)
    assert actual.shape == (1, 1) and abs(actual - expected).max() < 1e-5
    assert model.config.num_labels == 1 and model.config.pad_token_id == 0


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_adapter_trained_over_nf4(
    make: Callable[[], PreTrainedModel], settings: dict[str, Any], tmp_path: Path
) -> None:
    if make is gpt2 and "target_modules" in settings:
        settings = {"target_modules": ["c_attn"]}
    torch.manual_seed(0)
    base = save(make(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", **settings)
    expected = logits(unmerged(base, adapter, quantization_config=NF4, dtype=torch.float32))
    for folder, quantize in (("merged", "nf4"), ("other", "none")):
        (tmp_path / folder).mkdir()
        merge(base, adapter, tmp_path / folder, SILENT, quantize=quantize)
    assert_close(logits(load(tmp_path / "merged")), expected, share=1e-4)
    # The original weights are another model: what merging into them would lose.
    lost = (logits(load(tmp_path / "other")) - expected).abs().max()
    assert lost > 0.05 * expected.std()


def test_nf4_leaves_the_weights_that_were_trained_over(tmp_path: Path) -> None:
    """Every weight equals bitsandbytes' dequantised weight, in the compute type of the run."""
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT, quantize="nf4", compute_dtype="bfloat16")
    held = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=NF4, dtype=torch.bfloat16
    ).dequantize()
    actual, expected = load_file(target / "model.safetensors"), held.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(actual[name], expected[name].float())
    original = load_file(base / "model.safetensors")
    assert torch.equal(actual["lm_head.weight"], original["lm_head.weight"])
    assert not torch.equal(actual[name], original[name])


def test_an_adapter_trained_over_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    expected = logits(unmerged(base, adapter, quantization_config=INT8, dtype=torch.float32))
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, adapter, target, SILENT, quantize="int8")
    # LLM.int8() rounds activations too, which a merged model does not.
    assert_close(logits(load(target)), expected, share=0.1)


def test_a_whole_model_in_another_type(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    target = tmp_path / "half"
    target.mkdir()
    recast(base, target, "bfloat16", SILENT)
    actual, expected = (
        load_file(target / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name].bfloat16()) for name in expected)
    assert load(target, dtype="auto").dtype == torch.bfloat16


MERGED = [
    kind if kind in ("mixtral", "gpt_oss") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in MIXTURES
    if kind != "jamba"  # its kernel reads a weight past the adapter
]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", MERGED)
def test_adapters_of_experts(kind: str, quantize: Literal["none", "nf4"], tmp_path: Path) -> None:
    """In files that hold all experts as one tensor, and in files with tensors for each of them."""
    torch.manual_seed(0)
    base = saved_mixture(kind, tmp_path / "base")
    values = {"name": "x", "data": {"train": [{"path": "/x"}]}, "adapter": {"rank": 4}}
    settings = {**values, "model": {"base": str(base), "quantize": quantize}}
    model = load_model(Recipe.model_validate(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    target = tmp_path / "merged"
    target.mkdir()
    merge(base, tmp_path / "adapter", target, SILENT, quantize=quantize)
    assert_close(logits(load(target)), logits(model), share=1e-4)
    assert TensorFiles(target).info == TensorFiles(base).info


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    config = LlamaConfig(**{**SMALL, "hidden_size": 64}, intermediate_size=48)
    other = save(LlamaForCausalLM(config), tmp_path / "other")
    with pytest.raises(InputError, match=r"another base model.*of shape \(32, 48\), .*\(64, 48\)"):
        merge(other, adapter, tmp_path, SILENT)
    with pytest.raises(
        InputError, match=r"changes .*down_proj.weight, which is not a tensor of its own"
    ):
        merge(save(gpt2(), tmp_path / "gpt2"), adapter, tmp_path, SILENT)


def test_an_unconverted_pissa_adapter_is_refused(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"init_lora_weights: pissa .*cannot be merged"):
        Adapter(adapter)


def test_weights_beyond_their_type(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", lora_alpha=1e8)
    target = tmp_path / "merged"
    target.mkdir()
    with pytest.raises(RunError, match=r"proj.weight: .*not finite in float16"):
        merge(base, adapter, target, SILENT, dtype="float16")


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base", max_shard_size="20KB")
    shard = sorted(base.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{shard.name}: cannot read the weights"):
        TensorFiles(base)
    shard.unlink()
    with pytest.raises(InputError, match=rf"there is no {shard.name}"):
        TensorFiles(base)
    shutil.rmtree(base)
    base.mkdir()
    with pytest.raises(InputError, match=r"there is no model.safetensors; expected"):
        TensorFiles(base)


def test_a_base_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[name]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=rf"{base}: the base's weights lack {name} \(1 in all\)"):
        merge(base, adapter, tmp_path / "merged", SILENT)
