"""The rule for alpha: adapters with equivalent learning rates learn the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finray.training.config.recipe import Recipe
from finray.training.models.loading import load_model
from finray.tuning.default_search import rate_factor

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = torch.arange(3, 67).reshape(2, 32)
RATE, STEPS = 1e-3, 5


def losses(base: Path, rank: int, alpha: float, rslora: bool, smaller: float) -> list[float]:
    """Losses of a few Adam steps at the rule's learning rate, with the initial A / `smaller`."""
    adapter = {"rank": rank, "alpha": alpha, "rslora": rslora}
    values: dict[str, Any] = {"name": "x", "data": {"train": [{"path": "/x"}]}}
    values |= {"model": {"base": str(base), "dtype": "float32"}, "adapter": adapter}
    torch.manual_seed(0)
    model = load_model(Recipe.model_validate(values))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_A" in name:
                weight.div_(smaller)
    rate = RATE * rate_factor(32, rank, alpha, rslora)
    optimizer = torch.optim.Adam(weights.values(), lr=rate, eps=1e-30)
    reached = []
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(
            model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        )
        reached.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return reached


def test_four_times_alpha_with_half_of_a_needs_half_the_rate(tiny_model: Path) -> None:
    plain = losses(tiny_model, 4, 32, False, 1)
    assert plain[-1] < plain[0] - 0.01
    assert losses(tiny_model, 4, 128, False, 2) == pytest.approx(plain, rel=1e-5)
    assert losses(tiny_model, 4, 128, False, 1) != pytest.approx(plain, rel=1e-5)


def test_rslora_equals_an_alpha_times_the_root_of_the_rank(tiny_model: Path) -> None:
    assert losses(tiny_model, 4, 32, True, 1) == losses(tiny_model, 4, 64, False, 1)
