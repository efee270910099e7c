"""Losses computed from hidden states, against those of all logits at once."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.steps import Gradients, gradients, make_sequences, make_setup
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from finray.training.config.recipe import recipe_from_dict
from finray.training.data.batching import Batch, collate
from finray.training.engine.methods import objective_of
from finray.training.models import output_head
from finray.training.models.output_head import LogitSizes, OutputHead, find_head
from finray.training.objectives import logprobs
from finray.training.objectives.objective import Objective

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCABULARY = 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **settings}))


def adapted(model: Any, **settings: Any) -> Any:
    targets = settings.pop("targets", ["q_proj", "v_proj"])
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def only_head_trained() -> Any:
    model = llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def quantised_head() -> Any:
    model = llama()
    head = bitsandbytes.nn.Linear8bitLt(16, VOCABULARY, bias=False, has_fp16_weights=False)
    head.load_state_dict({"weight": model.lm_head.weight.detach()})
    model.lm_head = head.to("cpu")
    return adapted(model)


class _Masking(LlamaForCausalLM):  # type: ignore[misc]
    """Takes away some logits, as Chameleon does."""

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        logits_to_keep: Any = 0,
        use_cache: Any = None,
        **_: Any,
    ) -> Any:
        outputs = super().forward(
            input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, use_cache=use_cache
        )
        outputs.logits[..., 7:9] = -1e4
        return outputs


class _Scaling(LlamaForCausalLM):  # type: ignore[misc]
    """Multiplies logits by a number that is trained, and starts at 1."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_scale = torch.nn.Parameter(torch.ones(()))

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None, **_: Any
    ) -> Any:
        outputs = super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        outputs.logits = outputs.logits * self.logit_scale
        return outputs


class _Cutting(LlamaForCausalLM):  # type: ignore[misc]
    """Scales, caps and drops the last logits; computes those of all columns."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None, **_: Any
    ) -> Any:
        outputs = super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        scaled = outputs.logits * self.config.output_multiplier
        cap = self.config.softcap["of_head"]
        outputs.logits = (torch.tanh(scaled / cap) * cap)[..., :251]
        return outputs


KINDS: dict[str, Callable[[], Any]] = {
    "frozen": lambda: adapted(llama()),
    "trained": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "alone": only_head_trained,
    "adapted": lambda: adapted(llama(), targets=["q_proj", "lm_head"]),
    "dora": lambda: adapted(llama(), targets=["q_proj", "lm_head"], use_dora=True),
    "saved": lambda: adapted(llama(), modules_to_save=["lm_head"]),
    "tokens": lambda: adapted(
        llama(tie_word_embeddings=True), trainable_token_indices={"embed_tokens": [4, 5, 6]}
    ),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=3.0, tie_word_embeddings=True)
    ),
    "multiplied": lambda: adapted(CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3))),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.7)),
    "quantised": quantised_head,
    "masked": lambda: adapted(_Masking(LlamaConfig(**SIZES))),
    "scaled": lambda: _Scaling(LlamaConfig(**SIZES)),
    "cut": lambda: _Cutting(LlamaConfig(**SIZES, output_multiplier=1.9, softcap={"of_head": 2.5})),
}
OWN_FORWARD = {"masked", "scaled"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_batch(share: float, generator: random.Random) -> Batch:
    """Three packed rows, a share of whose tokens is trained."""
    rows = make_sequences(3, seed=generator.randrange(100))
    for row in rows:
        row.trainable[:] = [generator.random() < share for _ in row.trainable]
        row.trainable[0] = False
    return collate(rows)


def make_objective(model: Any, folder: Path, **method: Any) -> Objective:
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(folder)},
            "data": {"train": [{"path": "/x"}]},
            "method": {"kind": "sft", **method},
        }
    )
    return objective_of(make_setup(recipe, model, folder, 0, 1))


def plain(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the trained tokens, from all logits."""
    kept = batch.inputs["logits_to_keep"]
    inputs = {name: value for name, value in batch.inputs.items() if name != "logits_to_keep"}
    logits = model(**inputs, use_cache=False).logits[:, kept].flatten(0, 1) / temperature
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.to(wide).log_softmax(-1)[batch.trained]
    return rows.gather(1, batch.targets.flatten()[batch.trained, None]).squeeze(1)


def taken(model: Any, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return gradients(model)


def assert_equal(actual: Gradients, expected: Gradients, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in actual.items():
        difference = float((gradient - expected[name]).abs().max())
        assert difference <= tolerance * max(largest, 1e-30), name


@pytest.mark.long
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_all_logits_at_once(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum that supervised fine-tuning uses, and each loss with a factor of its own."""
    generator = random.Random(f"{kind} {dtype}")
    if kind == "quantised" and dtype == torch.float64:
        pytest.skip("bitsandbytes has no float64")
    torch.manual_seed(generator.randrange(1000))
    model = KINDS[kind]().to(dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = make_objective(model, tmp_path)
    tolerance = TOLERANCE[dtype]
    for share in (1.0, 0.3, generator.random(), 0.0):
        sizes = LogitSizes(VOCABULARY * generator.randint(1, 9), generator.randint(1, 999))
        monkeypatch.setitem(output_head._SIZES, "cpu", sizes)
        batch = make_batch(share, generator)
        expected = -plain(model, batch).sum()
        actual = objective.loss(model, batch, measured=False).total
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        assert_equal(taken(model, actual), taken(model, expected), tolerance)

        objective.temperature = generator.choice([1.0, 0.7])
        each = plain(model, batch, objective.temperature)
        factors = torch.randn(each.shape, dtype=each.dtype)
        own = objective.log_probabilities(model, batch)
        assert own.shape == batch.targets.shape
        torch.testing.assert_close(
            own.flatten()[batch.trained], each, rtol=tolerance, atol=tolerance
        )
        spread = torch.zeros(own.numel(), dtype=own.dtype).index_copy(0, batch.trained, factors)
        assert_equal(
            taken(model, (own.flatten() * spread).sum()),
            taken(model, (each * factors).sum()),
            tolerance,
        )
        objective.temperature = 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_no_logits_of_all_tokens(kind: str, tmp_path: Path) -> None:
    """A head that computes as its model's logits is used, and no other."""
    model = KINDS[kind]().train()
    objective = make_objective(model, tmp_path)
    batch = make_batch(1.0, random.Random(0))
    shapes: list[tuple[int, ...]] = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.register_forward_hook(lambda _, __, outputs: shapes.append(outputs.logits.shape))
    with torch.no_grad():
        objective.loss(model, batch, measured=False)
    assert (shapes[-1][1] > 0) == (kind in OWN_FORWARD)


def test_measures_are_those_of_the_distribution(tmp_path: Path) -> None:
    model, batch = llama().eval(), make_batch(0.4, random.Random(1))
    objective = make_objective(model, tmp_path)
    with torch.no_grad():
        logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.trained]
        loss = objective.loss(model, batch, measured=True)
    targets = batch.targets.flatten()[batch.trained]
    correct = int((logits.argmax(-1) == targets).sum())
    entropy = float(torch.distributions.Categorical(logits=logits).entropy().sum())
    assert loss.measures is not None
    assert loss.measures[0].tolist() == [correct, len(targets)]
    assert loss.measures[1].tolist() == pytest.approx([entropy, len(targets)], rel=1e-5)


def test_float16_keeps_small_probabilities() -> None:
    """A gradient by states that many small probabilities add up to."""
    torch.manual_seed(0)
    size = 50_000
    head = torch.nn.Linear(8, size, bias=False).half().requires_grad_(False)
    output = OutputHead(head, _whole(head))
    states = (0.01 * torch.randn(4, 8)).half().requires_grad_()
    tokens = torch.randint(0, size, (4,))
    loss, _ = logprobs.cross_entropies(states, tokens, output, summed=True)
    loss.backward()
    wide = states.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(
        wide @ head.weight.double().T, tokens, reduction="sum"
    )
    exact.backward()
    assert states.grad is not None and wide.grad is not None
    torch.testing.assert_close(states.grad.double(), wide.grad, rtol=5e-3, atol=5e-3)


def test_float16_adds_up_a_trained_heads_gradient_at_the_scalers_scale() -> None:
    """A token that is frequent: its sum over tokens leaves float16's range at any fixed scale."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False)
    states, tokens = 3 * torch.randn(600, 32) + 0.5, torch.randint(0, 500, (600,))
    tokens[:100] = 7
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(head(states), tokens), head.weight
    )[0]
    for scale in (1.0, 64.0):
        with torch.autocast("cpu", torch.float16):
            loss, _ = logprobs.cross_entropies(
                states, tokens, OutputHead(head, _whole(head)), summed=True
            )
        (actual,) = torch.autograd.grad(scale * loss / 600, head.weight)
        torch.testing.assert_close(actual / scale, expected, rtol=1e-2, atol=1e-3)


def _whole(head: torch.nn.Linear) -> Any:
    model = llama(vocab_size=head.out_features)
    finish = find_head(
        model, lambda: model(torch.zeros(1, 2, dtype=torch.long), logits_to_keep=1).logits
    )
    assert finish is not None
    return finish.finish


def test_looking_at_the_head_draws_no_random_numbers(tmp_path: Path) -> None:
    """So that a resumed run draws what an undisturbed one does."""
    model = adapted(llama(attention_dropout=0.5), lora_dropout=0.5).train()
    objective = make_objective(model, tmp_path)
    before = torch.get_rng_state()
    objective.prepare()
    assert torch.get_rng_state().equal(before)


def test_dropout_in_the_head_is_the_same_in_both_passes(tmp_path: Path) -> None:
    """The gradient of each loss repeats the forward pass: numerically checked."""
    model = adapted(llama(), targets=["lm_head"], lora_dropout=0.5).double().train()
    objective, batch = make_objective(model, tmp_path), make_batch(0.5, random.Random(2))
    objective.prepare()
    factors = torch.randn(batch.targets.shape, dtype=torch.float64)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return (objective.log_probabilities(model, batch) * factors).sum()

    weight = model.get_base_model().lm_head.lora_B["default"].weight
    step = torch.randn_like(weight)
    slope = float((taken(model, loss())[_name_of(model, weight)] * step).sum())
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(weight.detach())
        weight.data.add_(sign * 1e-5 * step)
        values.append(float(loss().detach()))
        weight.data.copy_(moved)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def _name_of(model: torch.nn.Module, weight: torch.Tensor) -> str:
    return next(name for name, each in model.named_parameters() if each is weight)
