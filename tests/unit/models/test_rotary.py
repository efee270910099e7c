"""Texts whose length changes the positions of a whole forward pass, beside others."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.steps import gradients, make_setup
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
)

from finray.training.config.recipe import recipe_from_dict
from finray.training.config.sections import Isolation
from finray.training.data.rendering import Document
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.evaluation.losses import _batches
from finray.training.models.loading import load_model
from finray.training.models.rotary import length_border
from finray.training.objectives.kto import KtoObjective
from finray.training.rl.rewards.classifiers import Classifier

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BORDER = 8
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}


def phi3() -> Any:
    config = Phi3Config(
        **SIZES,
        rope_parameters=dict(LONG),
        max_position_embeddings=64,
        original_max_position_embeddings=BORDER,
    )
    return Phi3ForCausalLM(config).double()


def rows_of(*lengths: list[int]) -> list[Sequence]:
    random = np.random.default_rng(0)
    rows = []
    for own in lengths:
        size = sum(own)
        trained = random.random(size) < 0.7
        trained[np.cumsum([0, *own[:-1]])] = False
        ids = random.integers(3, 64, size).astype(np.int32)
        numbers = np.arange(len(own), dtype=np.int64)
        rows.append(Sequence(ids, np.array(own, np.int32), trained, numbers))
    return rows


@pytest.mark.parametrize("micro", [{"micro_batch_size": 3}, {"micro_batch_tokens": 64}], ids=str)
@pytest.mark.parametrize("way", ["documents", "positions", "mask", None])
def test_a_long_document_leaves_short_ones_beside_it_as_they_are(
    way: Isolation | None, micro: dict[str, int], tmp_path: Path
) -> None:
    """Of LongRoPE, in which it changes the frequencies of all."""
    torch.manual_seed(0)
    model = phi3()
    packed = [[5, 20, BORDER, BORDER + 1], [3, 2], [30]]
    alone = [[size] for row in packed for size in row]
    rows = rows_of(*(packed if way else alone))
    ours, expected = deepcopy(model), torch.zeros((), dtype=torch.float64)
    for row in rows:
        borders = np.cumsum(row.lengths)[:-1]
        parts = (np.split(each, borders) for each in (row.input_ids, row.trainable))
        for own, trained in zip(*parts, strict=True):
            ids = torch.from_numpy(own.astype(np.int64))
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            losses = cross_entropy(logits, ids[1:], reduction="none")
            expected = expected + losses[torch.from_numpy(trained[1:].copy())].sum()
    torch.autograd.backward(expected)
    recipe = recipe_from_dict(
        {
            "name": "x",
            "model": {"base": str(tmp_path)},
            "data": {"train": [{"path": "/x"}], "max_length": 64, "packing": way is not None},
            "optim": {"batch_size": 8, **micro},
        }
    )
    objective = objective_of(replace(make_setup(recipe, ours, tmp_path, 0, 1), isolation=way))
    batches = objective.batches(0, rows)
    assert sum(batch.tokens for batch in batches) == sum(map(sum, packed))
    total = sum(objective.loss(ours, batch, measured=False).total for batch in batches)
    torch.autograd.backward(total)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(gradients(ours), gradients(model), rtol=0.0, atol=1e-10)
    with torch.no_grad():
        parts = objective.evaluated.in_order(iter(rows))
        measured = objective.evaluate_held_out(parts, torch.device("cpu"))
    assert float(measured[0, 0]) == pytest.approx(float(expected.detach()), rel=1e-10)


def test_held_out_answers_are_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KTO's, whose baseline is of answers to other prompts: the same for any microbatch."""
    # Without its lower bound, below which random weights are.
    monkeypatch.setattr(KtoObjective, "_mean", lambda _, divergences: divergences.double().mean())
    torch.manual_seed(0)
    phi3().float().save_pretrained(tmp_path)
    # (tokens, those of the prompt): a short text of two long ones, and the other way round.
    sizes = [(5, 2), (9, 7), (6, 3), (20, 2), (7, 4), (30, 3), (BORDER, 5)]
    rows = [
        replace(row, trainable=np.arange(size) >= prompt, extra=json.dumps({"label": prompt > 3}))
        for (size, prompt), row in zip(sizes, rows_of(*([size] for size, _ in sizes)), strict=True)
    ]

    def measured(micro: int) -> torch.Tensor:
        recipe = recipe_from_dict(
            {
                "name": "x",
                "model": {"base": str(tmp_path), "dtype": "float32"},
                "adapter": {"rank": 2},
                "method": {"kind": "kto", "beta": 2.0},
                "data": {"train": [{"path": "/x"}], "max_length": 64},
                "optim": {"batch_size": 8, "micro_batch_size": micro},
            }
        )
        torch.manual_seed(1)
        model = load_model(recipe).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        setup = make_setup(recipe, model, tmp_path, 0, 1)
        objective = objective_of(replace(setup, isolation="documents"))
        parts = objective.evaluated.in_order(iter(rows))
        with torch.no_grad():
            return objective.evaluate_held_out(parts, torch.device("cpu"))

    single, several = measured(1), measured(4)
    assert single[0, 1] == len(rows) and single[3, 0] < 0  # the baseline
    torch.testing.assert_close(several, single, rtol=5e-5, atol=1e-6)


def test_evaluated_answers_share_no_batch_across_the_border() -> None:
    trained = np.ones(30, np.bool_)
    documents = [
        Document(np.full(size, 3, np.int32), trained[:size], (size,))
        for size in (20, 5, BORDER + 1, BORDER, 3)
    ]
    sizes = [[len(one.input_ids) for one in batch] for batch in _batches(documents, 1000, BORDER)]
    assert sizes == [[3, 5, BORDER], [BORDER + 1, 20]]
    (whole,) = _batches(documents, 1000, None)
    assert len(whole) == len(documents)


def test_scores_of_a_reward_model_are_those_of_each_text_alone() -> None:
    torch.manual_seed(0)
    config = phi3().config
    config.num_labels = 1
    model = Phi3ForSequenceClassification(config).double().eval()
    texts = [row.input_ids.tolist() for row in rows_of([5], [20], [BORDER], [BORDER + 1], [3])]
    classifier = Classifier(model, None, 0, "reward", "")
    alone = [classifier.scores([text])[0] for text in texts]
    assert classifier.scores(texts) == pytest.approx(alone, rel=1e-6)
    assert classifier.scores([]) == []


def test_borders_of_configurations() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert length_border(phi3().config) == BORDER
    configs = [LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=dynamic)]
    assert [length_border(config) for config in (*configs, LlamaConfig(**SIZES))] == [32, None]
