"""The estimated memory of a loss, compared with what torch's allocator gives out for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from finray.training.models import output_head
from finray.training.models.logit_memory import (
    HeadFacts,
    LossSizes,
    head_facts,
    loss_bytes,
)
from finray.training.models.output_head import Finish, LogitSizes, OutputHead
from finray.training.objectives.logprobs import cross_entropies

TOKENS, VOCABULARY, HIDDEN = 2048, 2048, 16
CASES: dict[str, tuple[HeadFacts, Finish]] = {
    "plain": (HeadFacts(), Finish(VOCABULARY)),
    "trained": (HeadFacts(trained=VOCABULARY * HIDDEN), Finish(VOCABULARY)),
    "scaled": (HeadFacts(results=2, gradients=1), Finish(VOCABULARY, factor=0.5)),
    "capped": (HeadFacts(results=3, gradients=2), Finish(VOCABULARY, cap=30.0)),
    "own logits": (HeadFacts(in_parts=False), Finish(VOCABULARY)),
}


def most_held(compute: Callable[[], object]) -> int:
    """Bytes that are held at most, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compute()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_takes_the_estimated_bytes(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several parts and slices; the rest are vectors of tokens, and what a product takes."""
    monkeypatch.setitem(output_head._SIZES, "cpu", LogitSizes(VOCABULARY * 512, VOCABULARY * 128))
    # Where a CPU has no bfloat16, oneDNN multiplies in float32, of which it holds a copy.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    facts, finish = CASES[case]
    layer = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    layer.requires_grad_(facts.trained > 0)
    tokens = torch.randint(VOCABULARY, (TOKENS,))
    width = VOCABULARY if not facts.in_parts else HIDDEN
    states = torch.randn(TOKENS, width, dtype=dtype, requires_grad=True)
    head = OutputHead(layer, finish) if facts.in_parts else None

    def compute() -> None:
        losses, _ = cross_entropies(states * 1, tokens, head, summed=True)
        losses.backward()  # type: ignore[no-untyped-call]

    sizes = LossSizes(TOKENS, VOCABULARY, HIDDEN, dtype.itemsize, dtype.itemsize)
    assert loss_bytes(facts, sizes, "cpu") == pytest.approx(most_held(compute), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {}, HeadFacts(trained=64 * 32)),
        ("cohere", {}, HeadFacts(64 * 32, 2, 1)),
        ("granite", {"logits_scaling": 8.0}, HeadFacts(64 * 32, 2, 1)),
        ("granite", {"logits_scaling": 1.0}, HeadFacts(64 * 32)),
        ("gemma2", {}, HeadFacts(64 * 32, 3, 2)),
        ("gemma2", {"final_logit_softcapping": None}, HeadFacts(64 * 32)),
    ],
)
def test_settings_tell_what_follows_the_output_layer(
    kind: str, settings: dict[str, Any], expected: HeadFacts
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    config = AutoConfig.for_model(
        kind, **sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16, **settings
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = 64 * 32 if config.tie_word_embeddings else 0
    assert head_facts(model) == replace(expected, values=64 * 32, tied=tied)
