"""The estimated memory, compared with what a model really keeps for its backward pass."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.models import memory_estimate as memory
from finray.training.models.loading import load_model
from finray.training.models.memory_estimate import MemoryEstimate, Sizes, estimate, sizes_of

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = 48
LORA: dict[str, Any] = {"adapter": {"rank": 4}}
CASES: dict[str, dict[str, Any]] = {
    "lora-float32": {**LORA, "model": {"dtype": "float32"}},
    "lora-bfloat16": {**LORA, "model": {"dtype": "bfloat16"}},
    "lora-autocast": {
        "adapter": {"rank": 4, "dtype": "float32"},
        "model": {"dtype": "bfloat16"},
    },
    "dropout": {"adapter": {"rank": 4, "dropout": 0.1}, "model": {"dtype": "float32"}},
    "dropout-bfloat16": {"adapter": {"rank": 4, "dropout": 0.1}, "model": {"dtype": "bfloat16"}},
    "full-float32": {"model": {"dtype": "float32"}},
    "full-autocast": {"model": {"dtype": "bfloat16"}},
}


def make_base(folder: Path, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / f"layers-{layers}")
    return folder / f"layers-{layers}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with one layer and with three."""
    folder = tmp_path_factory.mktemp("bases")
    return {layers: make_base(folder, layers) for layers in (1, 3)}


def recipe(base: Path, **settings: Any) -> Recipe:
    model = {"base": str(base), **settings.pop("model", {})}
    optim = {"micro_batch_size": 1, **settings.pop("optim", {})}
    return recipe_from_dict(
        {
            "name": "run",
            "model": model,
            "data": {"train": [{"path": "/rows.jsonl"}], "max_length": TOKENS},
            "optim": optim,
            **settings,
        }
    )


def forward(settings: Recipe, model: Any) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None] % 64
    lower = settings.model.dtype == "bfloat16"
    casts = lower and next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        logits: torch.Tensor = model(
            input_ids=ids, position_ids=torch.arange(TOKENS)[None], use_cache=False
        ).logits
    return logits


def bytes_kept(settings: Recipe) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the model itself."""
    model = load_model(settings)
    model.train()
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    storages: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(settings, model)
    return sum(storages.values())


def estimated_bytes(settings: Recipe) -> int:
    """Bytes of a microbatch's activations and logits."""
    return estimate(settings, sizes_of(settings)).activations


@pytest.mark.parametrize("case", CASES)
def test_two_layers_keep_the_estimated_bytes(bases: dict[int, Path], case: str) -> None:
    """The values are equal; embedding, head and logits are the same in both models."""
    single, three = (recipe(bases[layers], **CASES[case]) for layers in (1, 3))
    assert estimated_bytes(three) - estimated_bytes(single) == bytes_kept(three) - bytes_kept(
        single
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_the_layers_inputs(bases: dict[int, Path], dtype: str) -> None:
    def live(settings: Recipe) -> int:
        model = load_model(settings)
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = forward(settings, model)
        gc.collect()
        shape = (1, TOKENS, 48)
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor) and tensor.shape == shape
        }
        assert logits.requires_grad
        return sum(sizes.values())

    settings = [
        recipe(bases[n], **LORA, model={"dtype": dtype, "gradient_checkpointing": True})
        for n in (1, 3)
    ]
    assert estimated_bytes(settings[1]) - estimated_bytes(settings[0]) == live(settings[1]) - live(
        settings[0]
    )


@pytest.mark.parametrize("case", ["lora-float32", "lora-bfloat16", "full-float32"])
def test_weights_and_states_have_the_estimated_size(bases: dict[int, Path], case: str) -> None:
    """The estimate equals the size of a real model's tensors after an optimizer step."""
    from finray.training.engine.optimizer import make_optimizer

    settings = recipe(bases[3], **CASES[case], scale={"workers": 0})
    model = load_model(settings)
    optimizer = make_optimizer(
        model.named_parameters(), (), learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.0, lora_plus_ratio=None,
    )  # fmt: skip
    forward(settings, model).float().sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    masters = sum(
        2 * p.nbytes  # and its gradient in the step
        for group in optimizer.param_groups
        for p in group["params"]
        if not any(p is weight for weight in model.parameters())
    )
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim > 0
    )
    memory = estimate(settings, sizes_of(settings))
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.training == gradients + masters + moments
    assert memory.peak > memory.weights + memory.training + memory.activations


def test_what_multiplies_it(bases: dict[int, Path]) -> None:
    plain = recipe(bases[3], **LORA)
    assert estimated_bytes(
        recipe(bases[3], **LORA, optim={"micro_batch_size": 3})
    ) == 3 * estimated_bytes(plain)
    pairs = recipe(bases[3], **LORA, method={"kind": "simpo"})
    logits = TOKENS * 64
    assert estimated_bytes(pairs) - 2 * logits * 4 == 2 * (estimated_bytes(plain) - logits * 14)
    scored = recipe(bases[3], **LORA, method={"kind": "reward"})
    assert estimated_bytes(scored) == 2 * (estimated_bytes(plain) - logits * 14)
    full = recipe(bases[3], method={"kind": "dpo"})
    without = recipe(bases[3], method={"kind": "dpo", "precompute_reference": True})
    sizes = sizes_of(full)
    difference = estimate(full, sizes).weights - estimate(without, sizes).weights
    assert difference == 2 * sizes.trained, "a second model in bfloat16"


LLAMA_8B = Sizes(
    linear=6_979_321_856,
    frozen=1_050_939_392,
    trained=41_943_040,
    cast=41_943_040,
    layers=32,
    hidden=4096,
    queries=4096,
    keys=1024,
    inner=14336,
    ranks=7 * 16,
    heads=32,
    vocabulary=128_256,
)


def test_a_known_model(tmp_path: Path) -> None:
    """8B at 8k tokens: 45 GiB of activations in bfloat16, 91 with float32 adapters and dropout."""

    def layers(**adapter: Any) -> float:
        settings = recipe_from_dict(
            {
                "name": "run",
                "model": {"base": "/m", "quantize": "nf4"},
                "adapter": adapter,
                "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 8192},
                "optim": {"micro_batch_size": 1},
            }
        )
        memory: MemoryEstimate = estimate(settings, LLAMA_8B)
        assert memory.weights / 2**30 == pytest.approx(5.4, abs=0.1)
        return (memory.activations - 8192 * 128_256 * 14) / 2**30

    assert layers() == pytest.approx(45, abs=1)
    assert layers(dropout=0.1, dtype="float32") == pytest.approx(91, abs=3)


def test_its_sizes_are_those_of_a_configuration(tmp_path: Path) -> None:
    """The sizes need no weights."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert sizes_of(recipe(tmp_path, adapter={"rank": 16})) == LLAMA_8B
    assert memory.CONTEXT_BYTES == 2**29
