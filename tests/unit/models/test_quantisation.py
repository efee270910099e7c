"""A base in 4 or 8 bits: its size, that it does not change, and several workers."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import multiprocessing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from finray.training.config.models import LoraAdapter
from finray.training.config.recipe import Recipe
from finray.training.models import quantiser
from finray.training.models.loading import count_meta_parameters, count_parameters, load_model
from finray.training.models.matrices import matrices
from finray.training.models.quantisation import forget_input
from finray.training.models.quantiser import plan_quantisation
from finray.training.models.shrunk import shrink
from finray.training.models.targets import choose_targets

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = torch.arange(3, 131).reshape(4, 32)


def recipe(base: Path | str, quantize: str, **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base), "quantize": quantize},
            "adapter": {"rank": 4, **adapter},
            "data": {"train": [{"path": "/x"}]},
        }
    )


def layers(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def frozen(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: weight.clone() for name, weight in named if not weight.requires_grad}


def test_nf4_weighs_half_a_byte(tiny_model: Path) -> None:
    """Counts the packed weights and their scales, which are quantised too."""
    model = load_model(recipe(tiny_model, "nf4"))
    quantised = layers(model, Linear4bit)
    assert len(quantised) == 2 * 7
    held = values = 0
    for layer in quantised:
        weight, state = layer.weight, layer.weight.quant_state
        assert weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
        held += weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        values += layer.in_features * layer.out_features
    assert held / values < 0.6
    settings = recipe(tiny_model, "nf4")
    assert count_parameters(model) == count_meta_parameters(settings)


@pytest.mark.parametrize(("quantize", "kind"), [("nf4", Linear4bit), ("int8", Linear8bitLt)])
def test_the_base_stays_as_it_is(tiny_model: Path, quantize: str, kind: type) -> None:
    """Training, evaluation and training again do not change the weights; gradients flow."""
    torch.manual_seed(0)
    model = load_model(recipe(tiny_model, quantize))
    assert layers(model, kind)
    before = frozen(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        model.train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in trained)
        losses.append(float(loss.detach()))
        model.eval()
        with torch.no_grad():
            evaluated = float(model(input_ids=TOKENS, labels=TOKENS).loss)
        assert evaluated == pytest.approx(losses[-1], abs=2e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, weight in frozen(model).items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name]), name


def test_loftq_gives_back_what_quantisation_took(tiny_model: Path) -> None:
    """The product is the best approximation of its rank (Eckart-Young)."""
    model = load_model(recipe(tiny_model, "nf4", init="loftq", alpha=20))
    plain = load_model(recipe(tiny_model, "nf4"))
    full = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_base_model().get_submodule(name)
        base = layer.get_base_layer().weight
        untouched = plain.get_base_model().get_submodule(name).get_base_layer().weight
        assert torch.equal(base, untouched)
        weight = full.get_submodule(name).weight.detach()
        lost = weight - dequantize_4bit(base.data, base.quant_state)
        update = layer.get_delta_weight("default").detach()
        expected = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.norm(lost - update), expected, rtol=1e-4, atol=0)
    with torch.no_grad():
        expected = full(TOKENS).logits
        with_loftq = (model.eval()(TOKENS).logits - expected).norm()
        assert with_loftq < 0.9 * (plain.eval()(TOKENS).logits - expected).norm()


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    named = model.named_parameters()
    return {name: weight.grad for name, weight in named if weight.grad is not None}


def _rank(rank: int, base: str, quantize: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = load_model(recipe(base, quantize))
    before = frozen(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    own = gradients(wrapped, TOKENS[2 * rank : 2 * rank + 2])
    after = frozen(model)
    same = all(torch.equal(after[name], weight) for name, weight in before.items())
    torch.save({"gradients": own, "same": same}, f"{folder}/rank-{rank}.pt")
    del wrapped, model  # after the group their end can hang
    dist.destroy_process_group()


def kept_beside_autograd(node: Any) -> list[torch.Tensor]:
    """What the nodes of a graph hold as attributes, rather than as saved tensors."""
    held, pending, seen = [], [node], set()
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        pending += [after for after, _ in one.next_functions]
        if "8bit" in one.name():
            values = [*getattr(one, "tensors", ()), getattr(one, "A", None)]
            held += [value for value in values if value is not None]
    return held


@pytest.mark.parametrize("checkpoints", [False, True])
def test_int8_keeps_no_inputs(checkpoints: bool, tiny_model: Path) -> None:
    """Checkpointing would not free them; the gradients are the same."""
    gradients = []
    for forgets in (True, False):
        torch.manual_seed(0)
        model = load_model(recipe(tiny_model, "int8")).train()
        for layer in layers(model, Linear8bitLt):
            if not forgets:
                layer._forward_hooks.clear()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        assert bool(kept_beside_autograd(loss.grad_fn)) != forgets
        loss.backward()
        gradients.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert all(gradient.equal(gradients[1][name]) for name, gradient in gradients[0].items())


def test_int8_keeps_no_inputs_on_a_gpu_either() -> None:
    """Whose products take another way; the CPU computes it, too."""
    inputs = torch.randn(5, 16, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(8, 16, dtype=torch.float16)
    gradients = []
    for forgets in (True, False):
        state = MatmulLtState()
        state.threshold = 6.0
        state.CB, state.SCB, _ = int8_vectorwise_quant(weight)
        output = MatMul8bitLt.apply(inputs, weight, None, None, state)
        if forgets:
            forget_input(torch.nn.Identity(), (), output)
            assert kept_beside_autograd(output.grad_fn) == []
        gradients += torch.autograd.grad(output.sum(), inputs)
    assert gradients[0].equal(gradients[1]) and gradients[0].abs().sum() > 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_two_workers_share_a_quantised_base(
    tiny_model: Path, tmp_path: Path, quantize: str
) -> None:
    """Their mean gradient equals that of one worker; they start from rank 0's adapter."""
    torch.manual_seed(0)
    expected = gradients(load_model(recipe(tiny_model, quantize)), TOKENS)
    arguments = (str(tiny_model), quantize, str(tmp_path))
    # Forked: a fresh process would spend most of its time importing torch.
    multiprocessing.start_processes(_rank, arguments, nprocs=2, start_method="fork")
    for rank in range(2):
        saved = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert saved["same"]
        assert len(saved["gradients"]) == len(expected) == 2 * 7 * 2
        for name, gradient in saved["gradients"].items():
            expected_gradient = expected[name.removeprefix("module.")]
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "leaf", "place"),
    [
        ("mamba2", "out_proj", "packed"),  # a kernel gets its weight
        ("mamba2", "in_proj", "layers"),
        ("gemma3n_text", "correction_coefs", "packed"),
        ("gemma3n_text", "prediction_coefs", "nowhere"),  # its weight is clamped in every step
    ],
)
def test_weights_that_are_read_past_their_layer_are_packed(
    kind: str, leaf: str, place: str
) -> None:
    small = shrink(AutoConfig.for_model(kind), vocabulary=96)
    with torch.device("meta"):
        plan = plan_quantisation(AutoModelForCausalLM.from_config(small))
    places = {
        "layers": any(name.endswith(f".{leaf}") for name in plan.layers),
        "packed": any(name.endswith(f".{leaf}.weight") for name in plan.packed),
    }
    assert [name for name, holds in places.items() if holds] == [place] * (place != "nowhere")


@pytest.mark.parametrize(
    ("kind", "config", "handed"),
    [
        ("mamba", {"num_hidden_layers": 1}, {"x_proj", "dt_proj", "out_proj"}),
        ("bamba", {"num_hidden_layers": 1}, {"out_proj"}),
        ("jamba", {"num_hidden_layers": 1}, {"dt_proj"}),
        ("bloom", {"n_layer": 1}, set()),
    ],
)
def test_weights_that_go_to_a_kernel_get_no_adapter(
    kind: str, config: dict[str, Any], handed: set[str]
) -> None:
    """It would be passed over."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    targets = choose_targets(model, LoraAdapter())
    left = [
        m for m in matrices(model) if m.kind != "head" and not {m.name, m.weight} & targets.names
    ]
    assert {m.module.rpartition(".")[2] for m in left if m.kind != "router"} == handed


def test_a_gpu_quantises_what_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values stand for both."""
    monkeypatch.setattr(quantiser, "own_device", lambda: torch.device("cuda", 0))
    seen: list[str] = []

    class Layers:
        def convert(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            seen.extend(str(weight.device) for weight in weights.values())
            return {name: weight.byte() for name, weight in weights.items()}

    of_all = SimpleNamespace(plan=quantiser.Plan(frozenset(), frozenset()), scheme="nf4")
    quantise = quantiser._Quantise(of_all, Layers())  # type: ignore[arg-type]
    with FakeTensorMode():  # type: ignore[no-untyped-call]
        weights = {"host": [torch.ones(4, 4)], "gpu": torch.ones(4, 4, device="cuda")}
        made = quantise.convert(weights)
    assert seen == ["cuda:0", "cuda:0"]
    devices = {name: str(weight.device) for name, weight in made.items()}
    assert devices == {"host": "cpu", "gpu": "cuda:0"}
