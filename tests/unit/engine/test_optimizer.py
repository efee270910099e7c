"""AdamW for weights of any type: masters, groups and resumed states."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForCausalLM

from finray.training.engine.optimizer import MasterAdamW, make_optimizer

SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.99), "eps": 1e-8}


def make(model: nn.Module, decayed: set[str] | None = None, **changes: Any) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    settings: dict[str, Any] = {
        "learning_rate": 1e-5,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "lora_plus_ratio": None,
        **changes,
    }
    return make_optimizer(named, decayed or {name for name, _ in named}, **settings)


def linear(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)).to(dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Take one step on random gradients for each seed."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.grad = drawn.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_float32_is_torchs_own() -> None:
    model, expected = linear(torch.float32), linear(torch.float32)
    decayed = {"0.weight", "2.weight"}
    optimizer = make(model, decayed)
    named = dict(expected.named_parameters())
    groups = [
        {"params": [named[name] for name in named if name in decayed], "weight_decay": 0.1},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
    steps(model, optimizer, range(5))
    steps(expected, torch.optim.AdamW(groups, **SETTINGS, fused=True), range(5))
    assert all(map(torch.equal, values(model), values(expected)))


def test_masters_collect_updates_that_bfloat16_loses() -> None:
    """Weights of 1 move by 1e-5 a step; bfloat16 represents only steps of 2**-8 there."""

    def ones() -> nn.Module:
        model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        return model

    def go_down(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(1000):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    plain, model = ones(), ones()
    go_down(plain, torch.optim.AdamW(plain.parameters(), **SETTINGS, weight_decay=0.0))
    go_down(model, make(model, weight_decay=0.0))
    assert all(float(value) == 1.0 for value in values(plain)[0].flatten())
    expected = torch.tensor(1 - 1000 * 1e-5).bfloat16()
    assert all(value == expected for value in values(model)[0].flatten())


def test_masters_take_the_steps_of_float32() -> None:
    """The rounded weights are those of float32 weights with the same (rounded) gradients."""
    model, expected = linear(torch.bfloat16), linear(torch.bfloat16).float()
    steps(model, make(model, learning_rate=1e-2), range(20))
    rounded = copy.deepcopy(expected).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        expected.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
    )
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for parameter in expected.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = drawn.to(torch.bfloat16).float()
        optimizer.step()
    together = zip(values(model), values(expected), values(rounded), strict=True)
    for weight, exact, start in together:
        assert torch.equal(weight, exact.bfloat16())
        assert not torch.equal(weight, start)


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path, ratio: float | None) -> None:
    model = linear(torch.bfloat16)
    optimizer = make(model, lora_plus_ratio=ratio)
    assert isinstance(optimizer, MasterAdamW)
    steps(model, optimizer, range(7))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    steps(model, optimizer, range(7, 14))
    again = linear(torch.bfloat16)
    resumed = make(again, lora_plus_ratio=ratio)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    steps(again, resumed, range(7, 14))
    assert all(map(torch.equal, values(model), values(again)))
    masters = zip(optimizer.state_dict()["masters"], resumed.state_dict()["masters"], strict=True)
    assert all(torch.equal(value, another) for value, another in masters)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_plus_is_pefts(tiny_model: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
        return get_peft_model(base, config)

    model, expected, plain = adapted(), adapted(), adapted()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    decayed = {name for name in trained if "magnitude" not in name}
    make_untyped: Callable[..., Any] = make
    steps(model, make_untyped(model, decayed, learning_rate=1e-3, lora_plus_ratio=8.0), range(5))
    reference = create_loraplus_optimizer(
        expected,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.1,
        fused=True,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    steps(expected, reference, range(5))
    steps(plain, make_untyped(plain, decayed, learning_rate=1e-3), range(5))
    of_peft = dict(expected.named_parameters())
    of_plain = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        if "magnitude" not in name:  # PEFT decays DoRA's magnitudes too
            assert torch.equal(weight, of_peft[name]), name
        if "lora_B" in name:
            assert not torch.equal(weight, of_plain[name]), name
