"""Mixtures of experts: what an adapter reaches, in finray, in plain PEFT, and quantised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from support.mixtures import MIXTURES, TOKENS, mixture, saved_mixture
from support.steps import make_sequences, make_setup
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from finray.training.common.errors import InputError
from finray.training.config.models import LoraAdapter
from finray.training.config.recipe import Recipe
from finray.training.config.sections import Isolation
from finray.training.data.stream import Sequence
from finray.training.engine.expert_load import ExpertLoad
from finray.training.engine.methods import objective_of
from finray.training.export.export import _unquantised
from finray.training.models.adapter import new_adapter
from finray.training.models.base_cache import BaseCache
from finray.training.models.left_out import patterns_of, plain_names
from finray.training.models.loading import build_meta_model, load_model
from finray.training.models.matrices import matrices
from finray.training.models.memory_estimate import sizes_of
from finray.training.models.packed import Packed8, PackedWeight, Scheme
from finray.training.models.quantiser import check_quantisable
from finray.training.models.targets import adapted_layers, coverage
from finray.training.models.weights import load_weights, save_weights
from finray.training.rehearsal.packing import find_isolation
from finray.training.rehearsal.small_copy import VOCABULARY, make_copy

pytestmark = [
    # peft calls a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FAST = ("qwen2_moe", "gpt_oss", "glm4_moe", "llama4_text")
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXTURES]
WAYS: tuple[Isolation, ...] = ("documents", "positions")
QUANTISED = [
    kind if kind in ("glm4_moe", "gpt_oss") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in MIXTURES
]


def recipe(base: Path, quantize: str = "none", **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base), "quantize": quantize},
            "adapter": {"rank": 4, **adapter},
            "data": {"train": [{"path": "/x"}]},
        }
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    values: torch.Tensor = model.eval()(TOKENS).logits
    return values


@torch.no_grad()
def change(model: Any) -> None:
    """Give every trained weight a random value."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.copy_(torch.randn_like(weight) * 0.1)


@torch.no_grad()
def add_by_hand(plain: Any, adapted: PeftModel, alpha: float) -> None:
    """Add scale · B·A to each weight of a plain model, computed from the adapter's own tensors."""
    weights = dict(plain.named_parameters())
    for name, layer in adapted_layers(adapted).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = weights.get(name, weights.get(f"{name}.weight"))
        if weight.dim() == 2:
            weight += alpha / a.shape[0] * b @ a
            continue
        experts = weight.shape[0]
        rank = a.shape[0] // experts
        holder = plain.get_submodule(name.rpartition(".")[0])
        for expert in range(experts):
            own_a = a[expert * rank : (expert + 1) * rank]
            delta = alpha / rank * b[:, expert::experts] @ own_a
            weight[expert] += delta.T if vars(holder).get("is_transposed") else delta


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_and_expert_is_adapted(kind: str, tmp_path: Path) -> None:
    """The adapter equals its sums by hand, has all gradients, and means the same to plain PEFT."""
    plain = mixture(kind)
    adapted = new_adapter(mixture(kind), LoraAdapter(rank=4, alpha=8), "causal")
    assert torch.equal(logits(adapted), logits(plain))
    change(adapted)
    adapted.save_pretrained(tmp_path)
    expected = logits(adapted)
    assert (expected - logits(plain)).std() > 0.1 * expected.std()

    loaded = PeftModel.from_pretrained(mixture(kind), tmp_path)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    by_hand = mixture(kind)
    add_by_hand(by_hand, adapted, alpha=8)
    assert torch.allclose(logits(by_hand), expected, atol=1e-4)

    reached = coverage(adapted)
    for title in ("attention", "dense MLP", "shared experts", "experts"):
        row = reached.get(title)
        refused = 2 if kind == "deepseek_v4" and title == "attention" else 0  # grouped weights
        assert row is None or row["of"] - row["modules"] == refused
    for title in ("routers", "head"):
        assert reached.get(title, {"modules": 0})["modules"] == 0
    assert reached["experts"]["modules"] > 0


def test_coverage_counts_parameters() -> None:
    """Compared with sums over the layers' shapes."""
    model = new_adapter(mixture("qwen2_moe"), LoraAdapter(rank=4), "causal")
    reached = coverage(model)
    per_layer = 4 * ((64 + 2 * 32) + (32 + 64))  # gate and up are one matrix
    assert reached["experts"] == {
        "modules": 4,
        "of": 4,
        "parameters": 2 * 4 * per_layer,
        "share": 1.0,
    }
    assert reached["routers"]["of"] == 2 and reached["routers"]["modules"] == 0
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert reached["all"]["parameters"] == trained and reached["all"]["share"] == 1.0


def test_the_dense_part_alone() -> None:
    model = new_adapter(mixture("glm4_moe"), LoraAdapter(rank=4, experts=False), "causal")
    reached = coverage(model)
    assert reached["experts"]["modules"] == 0
    assert reached["dense MLP"]["modules"] == reached["shared experts"]["modules"] == 3
    assert reached["attention"]["modules"] == 8


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "gate_up_proj"], {"attention": 2, "experts": 2}),
        (["experts"], {"experts": 4}),
        (["q_proj", "gate_proj", "up_proj", "down_proj"], {"attention": 2, "experts": 4}),
        (r".*layers\.1\.mlp\.experts.*", {"experts": 2}),
        (r".*layers\.1\..*(q_proj|experts\.\d+\.(gate|up)_proj)", {"attention": 1, "experts": 1}),
    ],
)
def test_explicit_targets_reach_experts(
    targets: list[str] | str, expected: dict[str, int], tmp_path: Path
) -> None:
    """By the model's names, or by those of files with a matrix for each expert."""
    model = new_adapter(mixture("qwen3_moe"), LoraAdapter(rank=2, targets=targets), "causal")
    reached = {title: row["modules"] for title, row in coverage(model).items() if row["modules"]}
    assert reached == {**expected, "all": sum(expected.values())}
    change(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture("qwen3_moe"), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_patterns_reach_experts_and_layers_beside_them() -> None:
    settings = LoraAdapter(
        rank=4, rank_pattern={"experts.down_proj": 2, "shared_experts.up_proj": 6}
    )
    layers = adapted_layers(new_adapter(mixture("glm4_moe"), settings, "causal"))
    ranks = {name.partition("mlp.")[2]: layer.r["default"] for name, layer in layers.items()}
    assert ranks["experts.down_proj"] == 2 and ranks["experts.gate_up_proj"] == 4
    assert ranks["shared_experts.up_proj.weight"] == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 0.1}, r"adapter\.dropout: .*experts\.gate_up_proj.*adapter\.experts: false"),
        ({"dora": True}, r"adapter\.dora: "),
        ({"init": "pissa"}, r"adapter\.init: .*set adapter\.init: default"),
        ({"targets": ["gate_proj"]}, r"gate_proj and up_proj of the experts are one matrix"),
        ({"targets": ["router"]}, r"'router' matches no module .*gate_up_proj"),
    ],
)
def test_what_experts_do_not_allow(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        new_adapter(mixture("qwen3_moe"), LoraAdapter(**settings), "causal")


def test_layers_that_return_more_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"layers\.\*\.feed_forward\.router cannot be adapted"):
        new_adapter(mixture("llama4_text"), LoraAdapter(targets=["router"]), "causal")


# quantised


def held(model: Any) -> float:
    """Bytes of the base's weights and their scales for each of its values."""
    values = stored = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            stored += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
            values += module.in_features * module.out_features
    for name, weight in model.named_parameters():
        if "lora_" not in name and weight.dtype != torch.uint8:
            stored += weight.nbytes
            values += weight.numel()
    return stored / values


@torch.no_grad()
def dequantise_into(plain: Any, quantised: Any) -> None:
    """Give a plain model the values that a quantised one computes with."""
    state = plain.state_dict()
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            own = f"{name.replace('.base_layer', '')}.weight"
            state[own].copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    for name, weight in quantised.named_parameters():
        if isinstance(weight, PackedWeight):
            state[name.replace(".base_layer", "")].copy_(weight.values())


WITHOUT_GRADIENT = {
    "deepseek_v4": tuple(
        f"model.layers.*.self_attn.compressor.{name}_proj" for name in ("kv", "gate")
    )
}
"""What a rehearsal leaves out of the adapter: rows as short as these compress nothing."""


@pytest.mark.parametrize("kind", QUANTISED)
def test_nf4_reaches_experts(kind: str, tmp_path: Path) -> None:
    """Training steps equal those of plain PEFT on the dequantised model."""
    base = saved_mixture(kind, tmp_path / "base")
    adapted = load_model(recipe(base, "nf4"), left_out=WITHOUT_GRADIENT.get(kind, ()))
    exact = mixture(kind)._keep_in_fp32_modules or ()
    own = [
        m
        for m in matrices(adapted)
        if m.kind not in ("head", "router") and not any(part in m.module for part in exact)
    ]
    packed = {n for n, w in adapted.named_parameters() if w.dtype == torch.uint8}
    packed |= {n for n, w in adapted.named_parameters() if isinstance(w, PackedWeight)}
    assert len(packed) == len(own)
    train(adapted)
    save_weights(adapted, tmp_path / "adapter")
    plain = mixture(kind)
    dequantise_into(plain, adapted.get_base_model())
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)


def test_plain_peft_loads_what_was_trained_over_nf4(tmp_path: Path) -> None:
    """As the model card says, on a base whose layers that the adapter is added to stay whole."""
    base = saved_mixture("glm4_moe", tmp_path / "base")
    adapted = load_model(recipe(base, "nf4"))
    change(adapted)
    save_weights(adapted, tmp_path / "adapter")
    kept = _unquantised(tmp_path / "adapter")
    assert kept == ("down_proj", "gate_proj", "up_proj")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "score", *kept],
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    loaded, expected = (
        logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")),
        logits(adapted),
    )
    assert (loaded - expected).std() < 0.1 * expected.std()


def train(model: Any, steps: int = 2) -> None:
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert kind_of_gradients(model) == {True}
        optimizer.step()
        optimizer.zero_grad()


def kind_of_gradients(model: Any) -> set[bool]:
    return {w.grad is not None for w in model.parameters() if w.requires_grad}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_checkpoint_over_quantised_experts_is_exact(quantize: str, tmp_path: Path) -> None:
    base = saved_mixture("qwen3_moe", tmp_path / "base")
    first = load_model(recipe(base, quantize))
    train(first)
    (tmp_path / "checkpoint").mkdir()
    save_weights(first, tmp_path / "checkpoint")
    second = load_model(recipe(base, quantize))
    load_weights(second, tmp_path / "checkpoint")
    assert torch.equal(logits(second), logits(first))


def test_a_run_goes_on_from_experts(tmp_path: Path) -> None:
    """An adapter of experts is trained further, and a sweep keeps its base."""
    base = saved_mixture("qwen2_moe", tmp_path / "base")
    bases = BaseCache()
    settings = recipe(base, "nf4")
    first = load_model(settings, bases=bases)
    start = logits(first)
    change(first)
    save_weights(first, tmp_path / "adapter")
    expected = logits(first)
    again = load_model(settings, bases=bases)
    assert torch.equal(logits(again), start)
    values = {**settings.model_dump(), "adapter": None}
    values["model"] |= {"adapter": str(tmp_path / "adapter")}
    more = load_model(Recipe.model_validate(values))
    assert torch.equal(logits(more), expected)
    assert coverage(more) == coverage(first)


def test_quantised_experts_weigh_half_a_byte(tmp_path: Path) -> None:
    """Of a model with 1.2M values, 4% of them in embedding and head."""
    base = saved_mixture(
        "qwen3_moe",
        tmp_path,
        hidden_size=128,
        moe_intermediate_size=192,
        num_experts=8,
        vocab_size=160,
        dtype="bfloat16",
    )
    settings = Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base), "quantize": "nf4", "dtype": "bfloat16"},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": "/x"}]},
        }
    )
    assert held(load_model(settings)) < 0.6


def test_falcon_is_quantised(tmp_path: Path) -> None:
    """Its linear layers are of a subclass, which computes the same."""
    config = FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    FalconForCausalLM(config).save_pretrained(tmp_path)
    adapted = load_model(recipe(tmp_path, "nf4"))
    assert sum(isinstance(module, Linear4bit) for module in adapted.modules()) == 8
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    dequantise_into(plain, adapted.get_base_model())
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-5)


def test_a_model_that_would_stay_large_is_refused() -> None:
    """A share of its weights is neither a linear layer nor an expert."""

    class Odd(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.memory = torch.nn.Parameter(torch.zeros(1024, 1024))

    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(
        InputError, match=r"quantize nf4: 0.0021 GB of .* would stay in 16 bits, because model.mem"
    ):
        check_quantisable(Odd(config), "nf4", sharded=False)


def test_packed_weights_are_not_sharded(tmp_path: Path) -> None:
    values = recipe(saved_mixture("qwen3_moe", tmp_path), "nf4").model_dump()
    values["scale"] |= {"workers": 2, "strategy": "fsdp"}
    with pytest.raises(InputError, match=r"scale\.strategy fsdp: .*experts\.down_proj.*use ddp"):
        build_meta_model(Recipe.model_validate(values))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_recomputed_experts_have_the_same_gradients(quantize: str, tmp_path: Path) -> None:
    settings = recipe(saved_mixture("qwen3_moe", tmp_path), quantize)
    of_both = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        model = load_model(settings)
        change(model)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        of_both.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
    for name, gradient in of_both[0].items():
        assert torch.allclose(gradient, of_both[1][name], atol=1e-6), name


# what the parts do by themselves


def test_a_packed_weight_reads_as_its_values() -> None:
    weight = PackedWeight.of(torch.randn(4, 64, 32), "nf4")
    values = weight.values()
    assert weight.nbytes < 0.52 * weight.numel()
    assert torch.equal(weight[2], values[2])
    assert torch.equal(weight.transpose(1, 2) @ torch.eye(64), values.transpose(1, 2))
    assert torch.equal(weight.to(torch.bfloat16) + 0, values.bfloat16())
    with pytest.raises(RuntimeError, match="cannot be changed"):
        weight += 1


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_kernel_gets_no_more_values_than_it_counts(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 experts two at a time; each part has the values that it would have by itself."""
    monkeypatch.setattr("finray.training.models.packed._MOST", 2 * 64 * 32)
    source = torch.randn(5, 64, 32, dtype=torch.bfloat16)
    weight = PackedWeight.of(source, scheme)
    parts = [PackedWeight.of(part, scheme) for part in source.split(2)]
    assert weight.shape == source.shape and weight.nbytes == sum(part.nbytes for part in parts)
    assert weight.values().equal(torch.cat([part.values() for part in parts]))
    moved = weight.to(torch.device("cpu"), torch.float32)
    assert moved.dtype == torch.float32 and moved.values().shape == source.shape


def test_the_backward_pass_keeps_packed_values() -> None:
    """Not a copy in full precision of every weight."""
    weight = PackedWeight.of(torch.randn(4, 64, 32), "nf4")
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    tokens = torch.randn(4, 5, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = tokens @ weight.transpose(1, 2)
    assert not any(type(t) is torch.Tensor and t.numel() == weight.numel() for t in kept)
    result.square().sum().backward()
    expected = 2 * result.detach() @ weight.values()
    assert tokens.grad is not None and torch.allclose(tokens.grad, expected, atol=1e-3)


def test_the_load_of_experts() -> None:
    """Compared with the routers' own choices."""
    model = mixture("qwen3_moe")
    load = ExpertLoad(model)
    with load.counting(True):
        scores = model(TOKENS, output_router_logits=True).router_logits
    counts = [torch.bincount(s.topk(2).indices.flatten(), minlength=4) for s in scores]
    peaks = [float(count.max() * 4 / count.sum()) for count in counts]
    idle = float(torch.cat(counts).eq(0).double().mean())
    cpu = torch.device("cpu")
    assert load.measures(load.take(cpu).tolist()) == pytest.approx(
        {"expert_load": sum(peaks) / len(peaks), "idle_experts": idle}
    )
    logits(model)  # nothing is counted outside
    assert load.measures(load.take(cpu).tolist()) == {}


def test_the_estimate_counts_the_sums(tmp_path: Path) -> None:
    """Of weights and adapter, which the backward pass keeps: measured in a forward pass."""
    settings = recipe(saved_mixture("qwen3_moe", tmp_path))
    model = load_model(settings)
    shapes = {m.values for m in matrices(model) if m.experts}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.numel() in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(TOKENS)
    assert sizes_of(settings).added == sum(kept.values()) > 0
    assert output.logits.requires_grad
    assert sizes_of(recipe(tmp_path, experts=False)).added == 0


@pytest.mark.parametrize("isolation", WAYS)
def test_auxiliary_losses_are_trained(tmp_path: Path, isolation: Isolation) -> None:
    """The loss is the one that transformers computes from labels."""
    base = saved_mixture(
        "qwen3_moe",
        tmp_path / "base",
        vocab_size=256,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    settings = recipe(base)
    model = load_model(settings)
    tokens = np.arange(3, 35, dtype=np.int32)
    trainable = np.arange(32) > 9
    sequence = Sequence(tokens, np.array([32], dtype=np.int32), trainable, np.array([0]))
    setup = replace(make_setup(settings, model, tmp_path, 0, 1), isolation=isolation)
    objective = objective_of(setup)
    batch = objective.collate([sequence])
    loss = objective.loss(model, batch, measured=False).total / batch.loss_units
    ids = torch.from_numpy(tokens).long()[None]
    labels = ids.masked_fill(~torch.from_numpy(trainable), -100)
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = plain(input_ids=ids, labels=labels)
    assert expected.aux_loss > 0
    assert torch.allclose(loss, expected.loss, atol=1e-5)
    with torch.no_grad():  # what is measured is the cross-entropy alone
        held_out = objective.loss(model, batch, measured=False).total / batch.loss_units
    assert torch.allclose(held_out, expected.loss - 0.1 * expected.aux_loss, atol=1e-5)


def test_auxiliary_losses_do_not_count_padding(tmp_path: Path) -> None:
    """Of documents of a row each, with that of transformers and its mask of padding."""
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    base = saved_mixture("qwen3_moe", tmp_path / "base", vocab_size=256, **more)
    settings = recipe(base)
    model = load_model(settings)
    rows = [
        replace(row, lengths=row.lengths.sum(keepdims=True)) for row in make_sequences(4, seed=1)
    ]
    sizes = [len(row.input_ids) for row in rows]
    assert max(sizes) > 2 * min(sizes)
    setup = replace(make_setup(settings, model, tmp_path, 0, 1), isolation=None)
    objective = objective_of(setup)
    batch = objective.collate(rows)
    loss = objective.loss(model, batch, measured=False).total / batch.loss_units
    ids = torch.zeros(4, max(sizes), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own = torch.from_numpy(row.input_ids).long()
        ids[place, : len(own)], mask[place, : len(own)] = own, 1
        labels[place, : len(own)] = own.where(torch.from_numpy(row.trainable), -100)
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = plain(input_ids=ids, attention_mask=mask, labels=labels).loss
    without = plain(input_ids=ids, labels=labels).loss
    assert abs(float((without - expected).detach())) > 1e-4
    assert torch.allclose(loss, expected, atol=1e-6)


def test_auxiliary_losses_do_not_keep_documents_from_being_packed_by_their_borders(
    tmp_path: Path,
) -> None:
    """Losses and gradients are those of transformers' own mask."""
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    base = saved_mixture("qwen3_moe", tmp_path / "base", vocab_size=256, **more)
    settings = recipe(base)
    (row,) = make_sequences(1)
    assert len(row.lengths) > 2
    losses, gradients = [], []
    for isolation in WAYS:
        torch.manual_seed(0)
        model = load_model(settings)
        setup = replace(make_setup(settings, model, tmp_path, 0, 1), isolation=isolation)
        objective = objective_of(setup)
        loss = objective.loss(model, objective.collate([row]), measured=False).total
        loss.backward()
        losses.append(loss.detach())
        gradients.append([w.grad for w in model.parameters() if w.grad is not None])
    assert torch.allclose(*losses, rtol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()))
    copy = make_copy(settings, tmp_path)
    assert find_isolation(copy, VOCABULARY) == ("documents", None)


def test_what_is_left_out_of_experts_is_one_of_their_matrices(tmp_path: Path) -> None:
    """Of two adapters on the same module, the one without a gradient is named, and goes."""
    base = saved_mixture("qwen3_moe", tmp_path)
    model = build_meta_model(recipe(base))
    names = plain_names(model)
    missing = {plain for plain in names.values() if plain.endswith("experts.gate_up_proj")}
    assert len(missing) > 1
    patterns, is_general = patterns_of(missing, names.values())
    assert (patterns, is_general) == (["model.layers.*.mlp.experts.gate_up_proj"], True)
    assert isinstance(model, PeftModel)
    without = build_meta_model(recipe(base), left_out=patterns)
    assert isinstance(without, PeftModel)
    assert adapted_layers(model).keys() - adapted_layers(without).keys() == missing
    assert set(plain_names(without).values()) == set(names.values()) - missing


def test_a_gpu_packs_values_in_the_order_in_which_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its kernel reads the memory, whatever the strides say."""
    given: list[torch.Tensor] = []
    pack = functional.int8_vectorwise_quant

    def noted(rows: torch.Tensor) -> Any:
        given.append(rows)
        return pack(rows)

    monkeypatch.setattr(functional, "int8_vectorwise_quant", noted)
    weight = torch.arange(128.0).view(16, 8).T
    values = Packed8.of(weight).values(torch.float32)
    assert given[0].is_contiguous() and not weight.is_contiguous()
    torch.testing.assert_close(values, weight, atol=0.6, rtol=0)
