"""`eval.metrics`: measured at evaluations, watched, resumed exactly, and equal for all workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models import generation
from finray.training.models.generation import Generated, generate_completions
from finray.training.records.run_folder import existing_run, read_metrics, read_samples
from finray.training.run import prepare_data, run_folder, run_prepared
from finray.tuning.metrics import is_measured_during_training, reported_metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SCORE = """
import random
import torch

def letters(prompts, completions, completion_ids, reference, topic, **columns):
    assert prompts[0][-1]["role"] == "user" and topic[0] == "numbers"
    assert all(isinstance(token, int) for token in completion_ids[0])
    torch.manual_seed(0)
    return [float(len(turns[-1]["content"])) for turns in completions]

def broken(completions, **columns):
    raise KeyError("nope")
"""


def make(model: Path, folder: Path, name: str, rows: list[Any], **changes: Any) -> Recipe:
    (folder / "score.py").write_text(SCORE)
    lines = [json.dumps({**row, "topic": "numbers"}) for row in rows[:60]]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return load_recipe(
        {
            "name": name,
            "model": {"base": str(model)},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": str(folder / "rows.jsonl"), "holdout": 0.2, "max_length": 128},
            "optim": {"batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "schedule": "linear"},
            "eval": {
                "every_steps": 2,
                "samples": 5,
                "max_new_tokens": 6,
                "metrics": [
                    "token_f1",
                    {"file": f"{folder}/score.py:letters", "mode": "min"},
                    {"file": f"{folder}/score.py:broken"},
                ],
                "watch": "eval_letters",
            },
            "checkpoint": {"every_steps": 2, "keep": 5},
            "log": {"every_steps": 1, "to": []},
            "scale": {"workers": 0},
            "storage": str(folder / "runs"),
            **changes,
        }
    )


def go(recipe: Recipe, until: int | None = None) -> dict[str, Any]:
    run_prepared(recipe, prepare_data(recipe), InProcessLauncher(), until=until)
    return existing_run(run_folder(recipe))


def evaluations(recipe: Recipe) -> dict[int, dict[str, Any]]:
    lines = [line for line in read_metrics(run_folder(recipe)) if "eval_loss" in line]
    return {line["step"]: {k: v for k, v in line.items() if k[:5] == "eval_"} for line in lines}


@pytest.mark.long
def test_answers_are_measured_while_it_trains(
    tiny_model: Path, chat_rows: list[Any], tmp_path: Path
) -> None:
    whole = make(tiny_model, tmp_path, "whole", chat_rows)
    record = go(whole)
    measured = evaluations(whole)
    assert list(measured) == [0, 2, 4, 6]
    names = {"eval_token_f1", "eval_letters"}
    assert all(names < line.keys() and "eval_broken" not in line for line in measured.values())
    samples = read_samples(run_folder(whole))
    for step, key in ((0, "before"), (6, "after")):
        lengths = [len(sample[key]) for sample in samples]
        assert measured[step]["eval_letters"] == sum(lengths) / len(lengths) and len(lengths) == 5
    notices = [line for line in record["notices"] if "broken" in line]
    assert len(notices) == 4 and all("KeyError" in line for line in notices)
    best = min((line["eval_letters"], step) for step, line in measured.items() if step)
    assert record["best_checkpoint"] == f"step-{best[1]:08d}"
    # stopped and resumed: the same values, and the same training beside a function that seeds torch
    parts = make(tiny_model, tmp_path, "parts", chat_rows)
    go(parts, until=3)
    go(parts)
    assert evaluations(parts) == measured
    plain = make(tiny_model, tmp_path, "plain", chat_rows, eval={"every_steps": 2})
    go(plain)
    losses = [line["eval_loss"] for line in evaluations(plain).values()]
    assert losses == [line["eval_loss"] for line in measured.values()]


def test_they_are_objectives_of_a_sweep(
    tiny_model: Path, chat_rows: list[Any], tmp_path: Path
) -> None:
    recipe = make(tiny_model, tmp_path, "x", chat_rows)
    assert reported_metrics(recipe)[0] == "eval_letters"
    assert {"eval_token_f1", "eval_letters"} <= {*reported_metrics(recipe)}
    assert is_measured_during_training("eval_letters", recipe)
    assert (recipe.metric("eval_letters").mode, recipe.metric("eval_token_f1").mode) == (
        "min",
        "max",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "set eval.samples"),
        (
            {"metrics": ["rogue"]},
            "eval.metrics.0: a metric is one of exact_match, .*function\"}, found 'rogue'",
        ),
        ({"metrics": ["bleu", "bleu"]}, "names bleu twice"),
        ({"watch": "eval_bleu"}, "does not report eval_bleu; choose one of eval_loss"),
        ({"metrics": [{"file": "none.py:f"}]}, "cannot read"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    settings: dict[str, Any], message: str, tiny_model: Path, chat_rows: list[Any], tmp_path: Path
) -> None:
    changed = {"samples": 2, "metrics": ["exact_match"], **settings}
    with pytest.raises(InputError, match=message):
        make(tiny_model, tmp_path, "x", chat_rows, eval=changed)


def test_batches_are_the_same_for_any_number_of_workers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer(f"task {n} " * (1 + n % 4))["input_ids"] for n in range(11)]
    expected = generate_completions(model, tokenizer, prompts, 4, 0, 1, at_once=3)
    calls: list[list[list[int]]] = []
    real = generation.generate_ids

    def recording(model: Any, tokenizer: Any, batch: list[list[int]], most: int) -> list[Generated]:
        calls.append(batch)
        return real(model, tokenizer, batch, most)

    monkeypatch.setattr(generation, "generate_ids", recording)
    for world in (1, 2, 3):
        calls.clear()
        parts: list[dict[int, Generated]] = []
        for rank in range(world):

            def gather(own: dict[int, Generated], _: int) -> list[dict[int, Generated]]:
                parts.append(dict(own))  # noqa: B023
                return parts if len(parts) == world else [dict.fromkeys(range(11))]  # type: ignore[list-item] # noqa: B023

            monkeypatch.setattr(generation, "_gather", gather)
            result = generate_completions(model, tokenizer, prompts, 4, rank, world, at_once=3)
        assert result == expected
        assert len(calls) == world * -(-4 // world)  # a sharded model needs equally many
        assert sorted(map(len, calls))[-4:] == [2, 3, 3, 3]
