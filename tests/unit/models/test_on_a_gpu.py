"""What only a GPU shows; skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.models.devices import has_bfloat16
from finray.training.models.loading import load_model
from finray.training.models.memory_estimate import estimate, sizes_of
from finray.training.models.out_of_memory import is_out_of_memory
from finray.training.models.output_head import find_head
from finray.training.objectives.logprobs import cross_entropies

# peft calls a name that transformers has renamed.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOKENS, VOCABULARY = 1024, 8192


def recipe(base: Path, **model: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "run",
            "model": {"base": str(base), "dtype": "bfloat16", **model},
            "adapter": {"rank": 16},
            "data": {"train": [{"path": "/x"}], "max_length": TOKENS, "packing": False},
            "optim": {"micro_batch_size": 2},
            "scale": {"workers": 0},
        }
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_estimate_is_near_the_allocator(base: Path) -> None:
    """A step's activations and its loss, within 5 percent."""
    settings = recipe(base)
    model = load_model(settings).to("cuda").train()
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), device="cuda")
    head = find_head(model, lambda: model(input_ids=ids[:, :4], use_cache=False).logits)
    assert head is not None
    losses: list[torch.Tensor] = []

    def compute(states: torch.Tensor) -> None:
        loss, _ = cross_entropies(states.flatten(0, 1), ids.flatten(), head, summed=True)
        losses.append(loss)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with head.capturing(compute):
        logits = model(input_ids=ids, use_cache=False).logits
    (losses[0] + logits.sum()).backward()
    seen = torch.cuda.max_memory_allocated() - before
    assert estimate(settings, sizes_of(settings)).activations == pytest.approx(seen, rel=0.05)


def test_real_errors_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, device="cuda")
    assert is_out_of_memory(caught.value)


def test_bfloat16_is_what_the_card_has() -> None:
    assert has_bfloat16("cuda") == (torch.cuda.get_device_capability() >= (8, 0))
