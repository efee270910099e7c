"""Texts on one row give the losses and gradients of texts that are padded."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.steps import Gradients, gradients, make_setup
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from finray.training.config.recipe import Recipe
from finray.training.config.sections import Isolation
from finray.training.data.batching import Batch
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.models.loading import load_model
from finray.training.objectives.objective import Objective
from finray.training.rl.rollouts.rollout import Rollout
from finray.training.rl.scoring import Scores

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH, LONGEST = 8, 40
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "losses": {"sigmoid": 1.0, "sft": 0.5}},
    "dpo by length": {"kind": "dpo", "losses": {"ipo": 1.0, "sigmoid_norm": 0.5, "apo_down": 0.3}},
    "kto": {"kind": "kto", "desirable_weight": 1.5},
    "kto without baseline": {"kind": "kto", "loss": "apo_zero"},
    "orpo": {"kind": "orpo"},
    "cpo": {"kind": "cpo", "sft_weight": 0.7},
    "cpo by length": {"kind": "cpo", "loss": "ipo"},
    "simpo": {"kind": "simpo", "sft_weight": 0.2},
    "reward": {"kind": "reward", "center_coefficient": 0.1},
    "grpo": {"kind": "grpo", "beta": 0.1, "passes": 2},
    "grpo by completion": {"kind": "grpo", "loss": "grpo"},
    "rloo": {"kind": "rloo", "beta": 0.1},
    "sft": {"kind": "sft"},
}
BY_LENGTH = ("dpo by length", "orpo", "cpo by length", "simpo")
"""Methods whose losses divide by the tokens of an answer, which every answer therefore has."""


def make_rows(name: str, kind: str) -> list[Sequence]:
    """Texts of very different lengths; some are cut off, and one has a single token."""
    random = np.random.default_rng(3)
    rows = []
    for number in range(BATCH // 2 if kind in ("grpo", "rloo") else BATCH):
        texts = 1 if kind in ("sft", "kto", "grpo", "rloo") else 2
        lengths = random.integers(2, LONGEST + 1, size=texts).astype(np.int32)
        lengths[0] = LONGEST if number == 2 else lengths[0]
        if number == 3 and name not in BY_LENGTH:
            lengths[-1] = 1
        prompts = np.minimum(random.integers(1, 9, size=texts), np.maximum(lengths - 1, 1))
        own = [np.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
        extra: dict[str, Any] = {
            "kto": {"label": number % 3 == 0},
            "reward": {"margin": number / 4},
            "grpo": {"prompt": "", "columns": {}},
        }.get({"rloo": "grpo"}.get(kind, kind), {})
        trainable = np.concatenate(own)
        rows.append(
            Sequence(
                random.integers(3, 250, lengths.sum()).astype(np.int32),
                lengths,
                trainable & (kind not in ("grpo", "rloo")),
                np.array([number]),
                json.dumps(extra) if extra else None,
            )
        )
    return rows


def with_prefixes(rows: list[Sequence]) -> list[Sequence]:
    """The same; two texts of a pair, or of neighbouring rows, begin alike."""
    texts = [text for row in rows for text in np.split(row.input_ids, row.lengths[:1])]
    texts = [text for text in texts if len(text)]
    for one, other in zip(texts[::2], texts[1::2], strict=True):
        size = min(len(one), len(other)) // 2 + 1
        other[:size] = one[:size]  # a view of the row's tokens
    return rows


def make_recipe(base: Path, method: dict[str, Any], **changes: Any) -> Recipe:
    online = {"rewards": [{"file": "/x.py:f", "source": "def f(**_): ..."}], "generations": 2}
    is_online = method["kind"] in ("grpo", "rloo")
    if is_online:
        method = {**method, **online, "max_completion": 20}
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base), "dtype": "float32"},
            "adapter": {"rank": 4},
            "method": method,
            "data": {"train": [{"path": "/x"}], "max_length": LONGEST + 20 * is_online},
            "optim": {"batch_size": BATCH, "micro_batch_size": 3},
            **changes,
        }
    )


def make_model(settings: Recipe) -> Any:
    """In float64; an adapter is not zero, so that it differs from its reference."""
    torch.manual_seed(4)
    model = load_model(settings, settings.method.head).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def sampled(objective: Any) -> Callable[..., Any]:
    """Completions and rewards in place of sampled ones; one completion has one token."""
    random = np.random.default_rng(5)
    sizes = [1, *random.integers(2, 20, BATCH - 1)]
    rollouts = [Rollout(random.integers(3, 250, n).tolist(), ended=n != 7) for n in sizes]
    total = torch.from_numpy(random.random(BATCH))
    scores = Scores(total, total[None], 0, [""] * BATCH)
    objective._tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids: "")
    return lambda *_: (rollouts, scores)


def objective_for(
    settings: Recipe, model: Any, folder: Path, isolation: Isolation | None, shares: bool = False
) -> Objective:
    setup = make_setup(settings, model, folder, 0, 1)
    setup = replace(setup, isolation=isolation, shares_prefixes=shares)
    made = objective_of(setup)
    if settings.method.samples_online:
        cast(Any, made)._rollouts = sampled(made)
    reference = vars(made).get("_reference")
    if reference is not None and reference._adapted is None:
        reference._model.double()
    return made


def step(
    settings: Recipe,
    model: Any,
    rows: list[Sequence],
    folder: Path,
    isolation: Isolation | None,
    shares: bool = False,
) -> tuple[float, torch.Tensor, Gradients, list[Batch]]:
    """Loss, measures and gradients of a step, and its batches."""
    model = copy.deepcopy(model)
    objective = objective_for(settings, model, folder, isolation, shares)
    with torch.no_grad():
        batches = objective.batches(0, rows)
    units = sum(batch.loss_units for batch in batches)
    total, measures = 0.0, []
    for batch in batches:
        loss = objective.loss(model, batch, measured=True)
        (loss.total / units).backward()
        total += float(loss.total.detach()) / units
        assert loss.measures is not None
        measures.append(loss.measures)
    return total, torch.stack(measures).sum(0), gradients(model), batches


def assert_equal(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-6)
    assert one[2].keys() == other[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in other[2].values())
    assert largest > 1e-4
    for name, gradient in one[2].items():
        difference = float((gradient - other[2][name]).abs().max())
        assert difference <= tolerance * max(largest, 1.0), name


def computed(batches: list[Batch]) -> int:
    return sum(batch.inputs["input_ids"].numel() for batch in batches)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_flat_is_padded(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """By a number of rows and by a budget of tokens, whose parts hold other rows."""
    settings = make_recipe(tiny_model, METHODS[name])
    rows, model = with_prefixes(make_rows(name, settings.method.kind)), make_model(settings)
    alone = make_recipe(
        tiny_model, METHODS[name], optim={"batch_size": BATCH, "micro_batch_size": 1}
    )
    expected = step(alone, model, rows, tmp_path, None)
    budget = make_recipe(
        tiny_model, METHODS[name], optim={"batch_size": BATCH, "micro_batch_tokens": 90}
    )
    budget = budget.with_isolation(False)
    for recipe in (settings.with_isolation(False), budget):
        padded = step(recipe, model, rows, tmp_path, None)
        flat = step(recipe, model, rows, tmp_path, "documents")
        assert_equal(padded, expected)
        assert_equal(flat, expected)
        own = sum(batch.tokens for batch in flat[3])
        nothing = sum(2 * recipe.method.sequences_per_row for b in flat[3] if not b.rows.size)
        assert computed(flat[3]) == own + nothing < computed(padded[3])
        shared = step(recipe, model, rows, tmp_path, "documents", shares=True)
        # Norms compute in float32, and here add up the gradients of both texts.
        assert_equal(shared, expected, 1e-6)
        assert computed(shared[3]) < computed(flat[3])
        if recipe is budget:
            assert all(batch.inputs["input_ids"].numel() <= 90 for batch in flat[3] + padded[3])


def test_online_rows_of_one_pass_keep_their_order(tiny_model: Path, tmp_path: Path) -> None:
    """bnpo averages over a forward pass, so the same completions share one in either form."""
    settings = make_recipe(tiny_model, {"kind": "grpo", "loss": "bnpo"})
    rows, model = make_rows("grpo", "grpo"), make_model(settings)
    padded, flat = (step(settings, model, rows, tmp_path, way) for way in (None, "documents"))
    assert_equal(flat, padded)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["adapter", "copy", "named", "other"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_references(tiny_model: Path, tmp_path: Path, kind: str, start: str) -> None:
    """The same batch goes to the policy and to its reference, whatever that is."""
    method: dict[str, Any] = {"kind": kind}
    if start in ("named", "other"):
        method["reference_model"] = str(reference(tiny_model, tmp_path, start))
    adapter = None if start == "copy" else {"rank": 4}
    settings = make_recipe(tiny_model, method, adapter=adapter).with_isolation(False)
    rows, model = with_prefixes(make_rows(kind, kind)), make_model(settings)
    results = []
    for way, shares in ((None, False), ("documents", False), ("documents", True)):
        held = copy.deepcopy(model)
        objective: Any = objective_for(settings, held, tmp_path, way, shares)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in held.parameters():  # what is trained moves away from its reference
                if parameter.requires_grad:
                    parameter.mul_(1.3)
        with torch.no_grad():
            batches = objective.batches(0, rows)
        loss = sum(objective.loss(held, batch, measured=True).total for batch in batches) / BATCH
        loss.backward()
        results.append((float(loss.detach()), torch.zeros(1), gradients(held)))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0], 1e-6)


def reference(tiny_model: Path, folder: Path, start: str) -> Path:
    """A model with other weights than the policy's; of another architecture, if `start` is so."""
    target = folder / "reference"
    torch.manual_seed(9)
    if start == "named":
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    else:
        size = AutoModelForCausalLM.from_pretrained(tiny_model).config.vocab_size
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
    model.save_pretrained(target)
    for file in tiny_model.glob("token*"):
        shutil.copy(file, target)
    return target
