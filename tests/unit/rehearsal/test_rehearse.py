"""What a rehearsal finds: routers, parameters without gradient, packing that leaks, no copy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.published import FIELDS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from finray.training.common.errors import InputError, RunError
from finray.training.config.recipe import Recipe
from finray.training.models import adapter as adapter_module
from finray.training.models.loading import build_meta_model, count_parameters
from finray.training.rehearsal import rehearse as module
from finray.training.rehearsal.outcome import Outcome
from finray.training.rehearsal.rehearse import rehearse_recipe
from finray.training.rehearsal.small_copy import _tokenizer

# peft calls a name that transformers has renamed; kernels that are not installed are slow.
pytestmark = pytest.mark.filterwarnings("ignore")

Rehearsed = Callable[..., Outcome]
MakeRecipe = Callable[..., Recipe]

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "dpo"},
        {"kind": "kto"},
        {"kind": "orpo"},
        {"kind": "reward"},
        {"kind": "grpo", "rewards": [{"file": "/r.py:f", "source": "def f(**columns): ..."}]},
        {"kind": "pretrain"},
    ],
    ids=lambda method: method["kind"],
)
def test_every_kind_of_method_takes_a_step(rehearsed: Rehearsed, method: dict[str, Any]) -> None:
    outcome = rehearsed("qwen3", method=method)
    assert outcome.status == "ok" and outcome.notes == () and outcome.left_out == (), outcome
    assert outcome.adapted == dict.fromkeys(LINEAR, 2)
    assert outcome.isolation == "documents"
    assert outcome.shares_prefixes == (method["kind"] != "pretrain")


def test_tokens_that_are_mixed_with_their_neighbours_are_not_shared(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shift that stops where positions restart keeps documents apart, but on a row that holds a
    prefix once the token before is another document's."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    honest = Qwen3DecoderLayer.forward

    def forward(self: Any, states: Any, *, position_ids: Any, **others: Any) -> Any:
        before = states.roll(1, 1).masked_fill((position_ids == 0)[..., None], 0.0)
        return honest(self, states + before, position_ids=position_ids, **others)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", forward)
    outcome = rehearsed("qwen3", method={"kind": "dpo"})
    assert outcome.status == "ok" and outcome.isolation == "documents", outcome
    assert not outcome.shares_prefixes


@pytest.mark.parametrize("fails", [False, True], ids=["mixes texts", "fails"])
def test_a_classifier_that_takes_one_text_a_row(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Its language model would keep texts of one row apart."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForSequenceClassification

    honest = Qwen3ForSequenceClassification.forward

    def forward(self: Any, input_ids: Any = None, use_cache: Any = None, **others: Any) -> Any:
        if fails and "documents" in others:
            raise TypeError("unexpected keyword argument")
        return honest(self, input_ids, use_cache=use_cache)

    monkeypatch.setattr(Qwen3ForSequenceClassification, "forward", forward)
    outcome = rehearsed("qwen3", method={"kind": "reward"})
    assert outcome.status == "ok" and outcome.isolation is None, outcome


def test_texts_share_a_row_without_packing_only_to_save_padding() -> None:
    ways = {
        way: Outcome("ok", isolation=way).way(packs=False)
        for way in ("documents", "borders", "positions", "mask", None)
    }
    assert ways == {**dict.fromkeys(ways), "documents": "documents", "borders": "borders"}
    assert Outcome("ok", isolation="mask").way(packs=True) == "mask"


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": None},
        {"adapter": None, "freeze": {"last_layers": 20}},
        {"adapter": {"rank": 8, "dora": True}},
        {"adapter": {"rank": 8, "init": "pissa"}},
        {"adapter": {"rank": 8, "targets": "model\\.layers\\.21\\.self_attn\\.q_proj"}},
        {"adapter": {"rank": 8, "modules_to_save": ["lm_head"]}},
    ],
    ids=["full", "last layers", "dora", "pissa", "one layer", "head"],
)
def test_every_way_to_train(rehearsed: Rehearsed, sections: dict[str, Any]) -> None:
    outcome = rehearsed("qwen3", {"num_hidden_layers": 24}, **sections)
    assert outcome.status == "ok" and outcome.notes == () and outcome.left_out == (), outcome


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_bases(rehearsed: Rehearsed, tmp_path: Path, quantize: str) -> None:
    model = {"base": str(tmp_path / "base"), "quantize": quantize}
    outcome = rehearsed("llama", model=model)
    assert outcome.status == "ok" and outcome.notes == () and outcome.isolation == "documents"


def test_a_layer_that_returns_a_tuple(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    def forward(self: Any, x: Any) -> Any:
        gate = self.gate_proj(x, 1) if hasattr(self.gate_proj, "lora_A") else self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    outcome = rehearsed("qwen3", adapter={"rank": 8, "targets": ["gate_proj", "up_proj", "q_proj"]})
    assert outcome.status == "refused"
    assert outcome.message == (
        "adapter.targets: the architecture qwen3 cannot compute with LoRA on gate_proj; leave "
        "them out: adapter.targets: [q_proj, up_proj]"
    )


def test_checkpointing_that_memory_may_decide_on(
    rehearsed: Rehearsed, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """JetMoe's code recomputes nothing: `auto` leaves it, and `true` is refused."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4}
    outcome = rehearsed("jetmoe", sizes)
    line = "model.gradient_checkpointing: false: the model cannot be trained with it"
    assert outcome.status == "ok" and not outcome.checkpointing
    settled = outcome.settle(make_recipe("jetmoe", sizes))
    assert settled.model.gradient_checkpointing is False and line in outcome.lines(settled)
    model = {"base": str(tmp_path / "base"), "gradient_checkpointing": True}
    refused = rehearsed("jetmoe", sizes, scratch="again", model=model)
    assert refused.status == "refused" and refused.message == (
        "model.gradient_checkpointing: the code of the architecture jetmoe does not recompute "
        "activations; set it to false"
    )


@pytest.mark.parametrize(("kind", "target"), [("mamba", "out_proj"), ("llama4_text", "router")])
def test_modules_that_take_no_adapter(rehearsed: Rehearsed, kind: str, target: str) -> None:
    outcome = rehearsed(kind, adapter={"rank": 8, "targets": [target]})
    message = str(outcome.message)
    assert outcome.status == "refused" and "PEFT" not in message
    assert message.startswith("adapter.targets: ") and target in message
    assert rehearsed(kind, scratch="all").status == "ok"


@pytest.mark.parametrize(
    ("kind", "config", "cause"),
    [
        ("bert", {}, " (its config.json has is_decoder: False)"),
        ("xlnet", {}, " (its config.json has attn_type: bi)"),
        # Short rows are computed otherwise.
        ("big_bird", {"is_decoder": True}, " (its config.json has attention_type: block_sparse)"),
    ],
)
def test_tokens_that_see_later_ones(
    rehearsed: Rehearsed, kind: str, config: dict[str, Any], cause: str
) -> None:
    outcome = rehearsed(kind, config, adapter=None)
    assert outcome.status == "refused" and outcome.message == (
        f"model.base: in the architecture {kind} a token sees those after it{cause}, so it cannot "
        "learn to predict the next one; choose a decoder"
    )


def test_adapters_that_peft_would_put_elsewhere(rehearsed: Rehearsed) -> None:
    outcome = rehearsed("laguna")
    assert outcome.status == "ok" and outcome.adapted is not None, outcome
    assert outcome.adapted["gate_proj"] == 1  # that of the dense layer, not of shared experts
    targets = ["q_proj", "shared_experts.gate_proj"]
    outcome = rehearsed("laguna", adapter={"rank": 8, "targets": targets}, scratch="named")
    assert "its adapter is loaded under another name than it is saved; leave it out" in str(
        outcome.message
    )
    outcome = rehearsed("deepseek_ocr2", FIELDS["deepseek_ocr2"], scratch="none")
    assert outcome.message == (
        "adapter: the adapter of a deepseek_ocr2 model is loaded under other names than it is "
        "saved, and would be lost; take the section adapter out to train all weights"
    )


@pytest.mark.long
def test_what_gets_no_gradient_is_left_out(rehearsed: Rehearsed, make_recipe: MakeRecipe) -> None:
    small = {"num_hidden_layers": 10, "num_kv_shared_layers": 2, "vocab_size": 512}
    outcome = rehearsed("gemma3n_text", small)
    assert outcome.status == "ok" and outcome.notes == ()
    assert outcome.left_out == ("model.layers.*.altup.correction_coefs",)
    assert outcome.adapted is not None and "correction_coefs" not in outcome.adapted
    recipe = make_recipe("gemma3n_text", small)
    assert any("correction_coefs" in line for line in outcome.lines(recipe))
    # The whole model, with other layers than the copy.
    whole, without = (build_meta_model(recipe, "causal", out) for out in ((), outcome.left_out))
    modules = whole.targeted_module_names, without.targeted_module_names
    assert len(modules[0]) - len(modules[1]) == 10
    assert not any("correction_coefs" in name for name in modules[1])
    assert count_parameters(without)["trainable"] < count_parameters(whole)["trainable"]


def test_without_a_copy_nothing_is_packed(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a width of 7 has no small form")

    monkeypatch.setattr("finray.training.rehearsal.small_copy.shrink", fail)
    recipe = make_recipe("llama")
    outcome = rehearse_recipe(recipe, tmp_path)
    assert outcome.status == "not rehearsed" and "a width of 7" in str(outcome.message)
    assert recipe.packs and not outcome.settle(recipe).packs
    lines = outcome.lines(recipe)
    assert any(line.startswith("not rehearsed: no small copy") for line in lines)
    assert any(line.startswith("data.packing: one document a row") for line in lines)
    fixed = make_recipe("llama", data={"train": [{"path": "/x"}], "packing": True})
    with pytest.raises(InputError, match=r"data\.packing: .* set data\.packing: auto"):
        outcome.settle(fixed)


def test_a_resumed_run_packs_as_before(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("llama")
    apart, mixed = Outcome("ok", isolation="positions"), Outcome("ok", unpacked_because="they mix")
    assert apart.settle(recipe).packs and not mixed.settle(recipe).packs
    assert not apart.settle(recipe, packed_before=False).packs
    with pytest.raises(InputError, match=r"data\.packing: .* they mix; continue it where"):
        mixed.settle(recipe, packed_before=True)


def test_a_loss_that_is_not_finite(rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from finray.training.rehearsal import step

    monkeypatch.setattr(step, "_loss", lambda *_: torch.tensor(torch.nan))
    outcome = rehearsed("llama")
    assert outcome.status == "refused" and "loss of nan" in str(outcome.message)


def test_a_step_that_fails_is_told_with_its_place(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    def forward(self: Any, x: Any) -> Any:
        raise TypeError("a tuple is no tensor")

    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    monkeypatch.setattr(module, "find_isolation", lambda *_: ("positions", None))
    outcome = rehearsed("qwen3")
    assert outcome.status == "refused"
    assert str(outcome.message).startswith("model.base: the architecture qwen3 cannot take a step")
    assert "model.layers.*.mlp fails (TypeError at test_rehearse.py:" in str(outcome.message)


FOREIGN = """
from transformers import LlamaConfig, LlamaForCausalLM


class ForeignConfig(LlamaConfig):
    model_type = "foreign"


class ForeignForCausalLM(LlamaForCausalLM):
    config_class = ForeignConfig
"""


def test_models_with_code_of_their_own(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    base = tmp_path / "base"
    recipe = make_recipe("llama", model={"base": str(base), "trust_remote_code": True})
    (base / "foreign.py").write_text(FOREIGN, encoding="utf-8")
    classes = {"AutoConfig": "ForeignConfig", "AutoModelForCausalLM": "ForeignForCausalLM"}
    values = json.loads((base / "config.json").read_text(encoding="utf-8"))
    values |= {"auto_map": {k: f"foreign.{v}" for k, v in classes.items()}}
    values |= {"model_type": "foreign"}
    (base / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "scratch").mkdir()
    outcome = rehearse_recipe(recipe, tmp_path / "scratch")
    assert outcome.status == "ok" and outcome.isolation == "documents", outcome
    assert len(outcome.notes) == 1
    assert outcome.notes[0].startswith(f"the result cannot be merged: {base}: cannot merge into")


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 800}


def test_an_adapter_whose_rows_the_copy_lacks(rehearsed: Rehearsed, tmp_path: Path) -> None:
    """And on a base of another width, which it does not fit: refused before weights are read."""
    folder = tmp_path / "adapter"
    rows = {"model.embed_tokens": [700, 701], "lm_head": [700, 701]}
    config = LoraConfig(
        r=8, target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
    model = {"base": str(tmp_path / "base"), "adapter": str(folder)}
    outcome = rehearsed("llama", SMALL, adapter=None, model=model)
    assert outcome.status == "ok" and outcome.notes == (), outcome
    assert outcome.adapted == {"q_proj": 2}
    outcome = rehearsed(
        *("llama", SMALL | {"hidden_size": 96}), adapter=None, model=model, scratch="other"
    )
    assert outcome.status == "refused"
    assert "adapter does not fit the model: base_model.model" in (outcome.message or "")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            "mlp",
            r"^adapter.modules_to_save: mlp holds model.layers.\*.mlp.down_proj.weight, .*packs",
        ),
        ("norm", None),
        ("lm_head", None),
    ],
)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_what_is_quantised_is_not_trained_whole(
    rehearsed: Rehearsed, tmp_path: Path, quantize: str, saved: str, message: str | None
) -> None:
    model = {"base": str(tmp_path / "base"), "quantize": quantize}
    adapter = {"rank": 8, "modules_to_save": [saved]}
    outcome = rehearsed("llama", SMALL, model=model, adapter=adapter)
    assert outcome.status == ("refused" if message else "ok"), outcome
    assert message is None or re.match(message, outcome.message or "")


def test_a_model_that_cannot_be_evaluated(rehearsed: Rehearsed, tmp_path: Path) -> None:
    """RWKV divides weights in place, which quantised ones do not bear."""
    model = {"base": str(tmp_path / "base"), "quantize": "nf4"}
    outcome = rehearsed("rwkv", {"num_hidden_layers": 2, "vocab_size": 96}, model=model)
    assert outcome.status == "refused", outcome
    assert "takes a step with these settings, but cannot be evaluated" in (outcome.message or "")


def test_attention_that_an_architecture_lacks(rehearsed: Rehearsed, tmp_path: Path) -> None:
    model = {"base": str(tmp_path / "base"), "attention": "sdpa"}
    outcome = rehearsed("xlm", {"causal": True}, model=model)
    assert outcome.status == "refused"
    assert str(outcome.message).startswith(f"model.base: cannot load {tmp_path / 'base'}: ")


def test_a_model_that_does_not_take_text_alone(rehearsed: Rehearsed) -> None:
    outcome = rehearsed("blip")
    assert outcome.status == "refused" and "does not take text alone" in str(outcome.message)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("llama", {"rank": 8}, None),
        ("llama", {"rank": 8, "dora": True}, None),
        ("llama", {"rank": 8, "targets": ["lm_head"]}, r"targets: lm_head has rows of model\.add_"),
        ("bloom", {"rank": 8, "modules_to_save": ["lm_head"]}, None),
        ("phi", {"rank": 8, "modules_to_save": ["lm_head"]}, None),
        (
            "phi",
            {"rank": 8},
            r"add_tokens: lm_head has a bias, which is lost .* add lm_head to ada",
        ),
    ],
)
@pytest.mark.parametrize("rows", [300, 304], ids=["grown", "spare"])
def test_added_tokens(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    kind: str,
    adapter: dict[str, Any],
    message: str | None,
    rows: int,
) -> None:
    """Their rows are saved, loaded with plain PEFT, and merged, or cannot be."""
    model = {"base": str(tmp_path / "base"), "add_tokens": ["<|a|>", "<|b|>"]}
    config = {"vocab_size": rows, "tie_word_embeddings": kind != "phi"}
    recipe = make_recipe(kind, config, model=model, adapter=adapter)
    _tokenizer(300).save_pretrained(tmp_path / "base")
    (tmp_path / "scratch").mkdir()
    outcome = rehearse_recipe(recipe, tmp_path / "scratch")
    assert (outcome.status, outcome.notes) == ("refused" if message else "ok", ())
    assert message is None or re.search(message, outcome.message or "")
    trained = tmp_path / "scratch" / "result" / "adapter_model.safetensors"
    if message is None:
        tensors = load_file(trained)
        merged = load_file(tmp_path / "scratch" / "merged" / "model.safetensors")
        embedding = next(name for name in merged if "embed" in name and name.endswith("s.weight"))
        assert len(merged[embedding]) == (98 if rows == 300 else 96)
        assert any(
            len(value) in (2, 96, 98) for name, value in tensors.items() if "lora" not in name
        )


def test_an_error_of_the_run_is_the_outcome(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("adapter.targets: PEFT adapted other layers")

    monkeypatch.setattr(adapter_module, "check_adapted", fail)
    outcome = rehearsed("llama")
    assert outcome.status == "refused"
    assert outcome.message == "adapter.targets: PEFT adapted other layers"
