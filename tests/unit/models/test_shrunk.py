"""The shrunk copy has the whole model's parts: its modules' classes and its parameters' names."""

import re

import pytest
import torch
from families.published import PUBLISHED
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForImageTextToText as ImageText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finray.training.models.shrunk import random_copy, shrink

VOCABULARY = 256
SHOWN = (
    "Qwen3-30B-A3B",
    "gpt-oss-20b",
    "Gemma-3-4b",
    "DeepSeek-V3",
    "Llama-4-Scout",
    "Qwen3-VL-8B",
    "Granite-4-H-Small",
    "Nemotron-H-8B",
    "Jamba-1.5-Mini",
    "Phi-3.5-MoE",
    "Gemma-3n-E2B",
    "Zamba2-7B",
)


def published(name: str) -> PretrainedConfig:
    kind, fields = PUBLISHED[name]
    return CONFIG_MAPPING[kind](**fields)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    config.__dict__.pop("quantization_config", None)
    auto = Causal if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ImageText
    with torch.device("meta"):
        return auto.from_config(config)


def anatomy(model: PreTrainedModel) -> set[tuple[str, int]]:
    """Classes of modules, and names of parameters without layer numbers with their dimensions."""
    classes = {(type(module).__name__, 0) for module in model.modules()}
    names = {
        (re.sub(r"\.\d+(?=\.|$)", ".*", name), parameter.dim())
        for name, parameter in model.named_parameters()
    }
    return classes | names


@pytest.mark.parametrize("name", SHOWN)
def test_the_copy_has_every_part_of_the_whole_model_and_no_other(name: str) -> None:
    whole = published(name)
    small = shrink(whole, vocabulary=VOCABULARY)

    assert anatomy(without_weights(small)) == anatomy(without_weights(whole))


@pytest.mark.parametrize("name", SHOWN)
def test_the_copy_is_small_and_computes(name: str) -> None:
    model = random_copy(shrink(published(name), vocabulary=VOCABULARY), seed=1)

    ids = torch.arange(60).reshape(2, 30) % VOCABULARY
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss

    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.isfinite(loss)


def test_the_copy_keeps_the_order_of_kinds_and_the_shares_between_layers() -> None:
    nemotron = shrink(published("Nemotron-H-8B"), vocabulary=VOCABULARY)
    gemma = shrink(published("Gemma-3n-E2B"), vocabulary=VOCABULARY)
    deepseek = shrink(published("DeepSeek-V3"), vocabulary=VOCABULARY)

    assert nemotron.layers_block_type == ["linear_attention", "mlp", "full_attention"]
    # Sparse and dense activations, then the layers that use the keys of others; of each two kinds.
    assert gemma.layer_types == ["sliding_attention", "full_attention"] * 3
    assert gemma.num_kv_shared_layers == 2
    assert (deepseek.num_hidden_layers, deepseek.first_k_dense_replace) == (2, 1)


def test_sizes_keep_their_relations() -> None:
    qwen = shrink(published("Qwen3-30B-A3B"), vocabulary=VOCABULARY)
    deepseek = shrink(published("DeepSeek-V3"), vocabulary=VOCABULARY)
    vision = shrink(published("Qwen3-VL-8B"), vocabulary=VOCABULARY)
    granite = shrink(published("Granite-4-H-Small"), vocabulary=VOCABULARY)

    # Heads together are wider than the stream, and share keys.
    assert qwen.num_attention_heads * qwen.head_dim > qwen.hidden_size
    assert 1 < qwen.num_key_value_heads < qwen.num_attention_heads
    assert deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim == deepseek.qk_head_dim
    assert deepseek.qk_head_dim != deepseek.v_head_dim
    text = vision.text_config
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert vision.vision_config.out_hidden_size == text.hidden_size
    inner = granite.mamba_n_heads * granite.mamba_d_head
    assert inner == granite.mamba_expand * granite.hidden_size


@pytest.mark.parametrize("heads", [2, 8])
def test_a_model_smaller_than_copies_keeps_a_factor_for_each_of_its_rotary_positions(
    heads: int,
) -> None:
    width = 32 // heads // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * width,
        "long_factor": [2.0] * width,
    }
    whole = CONFIG_MAPPING["phi3"](
        vocab_size=96,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    small = shrink(whole, vocabulary=96)
    turned = small.hidden_size // small.num_attention_heads // 2
    assert [len(small.rope_parameters[key]) for key in ("short_factor", "long_factor")] == [
        turned,
        turned,
    ]
    model = random_copy(small, seed=0)
    assert model(torch.arange(3, 25)[None]).logits.isfinite().all()


def test_special_tokens_lie_in_the_vocabulary_each_at_its_own_place() -> None:
    whole = published("GLM-4.5-Air")
    small = shrink(whole, vocabulary=VOCABULARY)

    assert small.vocab_size == VOCABULARY
    assert len(set(small.eos_token_id)) == 3
    assert all(0 <= token < VOCABULARY for token in small.eos_token_id)
    assert small.pad_token_id == small.eos_token_id[0]  # as in the whole model


@pytest.mark.parametrize("name", SHOWN)
def test_a_copy_of_a_copy_is_the_copy(name: str) -> None:
    small = shrink(published(name), vocabulary=VOCABULARY)

    assert shrink(small, vocabulary=VOCABULARY).to_dict() == small.to_dict()


def test_the_whole_configuration_stays_as_it_is() -> None:
    whole = published("Gemma-3-4b")
    before = whole.to_dict()

    shrink(whole, vocabulary=VOCABULARY)

    assert whole.to_dict() == before


def test_copies_of_one_seed_are_equal_and_the_random_state_stays() -> None:
    small = shrink(published("Qwen3-30B-A3B"), vocabulary=VOCABULARY)
    state = torch.get_rng_state()

    first, second = random_copy(small, seed=3), random_copy(small, seed=3)

    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
