"""Losses of the first steps against TRL's own trainers: same rows, order, weights and settings."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trl_methods import first_model, in_order, make_trainer, texts_of

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepare import prepare
from finray.training.data.prepared import Prepared
from finray.training.data.tasks import run_in_process
from finray.training.engine.task import WorkerTask
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.loading import load_tokenizer

# What TRL itself does with its dependencies is not ours to cure.
pytestmark = pytest.mark.filterwarnings("default")

STEPS = 20
WORDS = "the quick brown fox jumps over lazy dog tiny model learns task quickly for ever".split()

METHODS: list[dict[str, Any]] = [
    {"kind": "dpo"},
    {"kind": "dpo", "losses": {"sigmoid": 0.8, "sft": 0.2, "bco_pair": 1.0}},
    {"kind": "dpo", "losses": {"ipo": 1.0}},
    {"kind": "dpo", "losses": {"robust": 1.0}, "label_smoothing": 0.1},
    {"kind": "dpo", "losses": {"exo_pair": 1.0}, "label_smoothing": 1e-3},
    {"kind": "dpo", "losses": {"aot": 1.0, "aot_unpaired": 1.0}, "label_smoothing": 0.1},
    {"kind": "dpo", "losses": {"hinge": 1.0}, "divergence": "js"},
    {"kind": "dpo", "losses": {"discopop": 1.0}, "divergence": "forward_kl"},
    {"kind": "dpo", "losses": {"sigmoid_norm": 1.0}, "divergence": "alpha", "beta": 2.0},
    {"kind": "dpo", "losses": {"nca_pair": 1.0, "sppo_hard": 0.01}, "precompute_reference": True},
    {"kind": "dpo", "losses": {"apo_zero": 1.0, "apo_down": 0.5}, "beta": 0.5},
    {"kind": "kto", "desirable_weight": 1.3},
    {"kind": "kto", "loss": "apo_zero", "undesirable_weight": 0.7},
    {"kind": "orpo"},
    {"kind": "cpo", "label_smoothing": 0.1},
    {"kind": "cpo", "loss": "hinge"},
    {"kind": "cpo", "loss": "ipo", "sft_weight": 0.5},
    {"kind": "simpo"},
    {"kind": "reward", "center_coefficient": 0.01, "margin": "margin"},
]


def name_of(method: dict[str, Any]) -> str:
    return "-".join([method["kind"], *method.get("losses", {}), str(method.get("loss", ""))])


def phrase(source: random.Random, longest: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(1, longest)))


def make_rows(kind: str) -> list[dict[str, Any]]:
    """Verbatim prompts and answers, which both sides tokenise alike."""
    source = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(100):
        prompt = phrase(source, 8)
        good, bad = f" {phrase(source, 9)}.", f" {phrase(source, 12)}!"
        if kind == "kto":
            label = source.random() < 0.6
            rows.append({"prompt": prompt, "completion": good if label else bad, "label": label})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
            if kind == "reward":
                rows[-1]["margin"] = round(source.random(), 2)
    return rows


def make_recipe(tiny_model: Path, data: Path, method: dict[str, Any]) -> Recipe:
    # Losses that are means over a whole batch in finray are over a microbatch in TRL.
    accumulates = method["kind"] in ("dpo", "reward") and not method.get("losses", {}).keys() & {
        "sft",
        "aot",
    }
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "adapter": {"rank": 4},
            "method": method,
            "data": {"train": [{"path": str(data)}], "max_length": 64},
            "optim": {
                "batch_size": 8,
                "micro_batch_size": 4 if accumulates else 8,
                "max_steps": STEPS,
                "learning_rate": 1e-3,
            },
            "scale": {"workers": 0},
            "log": {"every_steps": 1, "to": []},
        }
    )


def finray_losses(recipe: Recipe, prepared: Prepared, run: Path) -> list[float]:
    task = WorkerTask(
        recipe=recipe.model_dump(mode="json"),
        run=str(run),
        prepared=prepared.folder.uri,
        isolation="documents",
        shares_prefixes=True,
    )
    outcome = InProcessLauncher().attempt(task)
    assert outcome["status"] == "finished", outcome["error"]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def cases() -> Iterator[Any]:
    """The first of each method is enough for every change."""
    seen: set[str] = set()
    for method in METHODS:
        marks = [pytest.mark.slow] if method["kind"] in seen else []
        seen.add(method["kind"])
        yield pytest.param(method, id=name_of(method), marks=marks)


@pytest.mark.parametrize("method", [*cases()])
def test_losses_of_the_first_steps(
    tiny_model: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    rows = make_rows(method["kind"])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(tiny_model, data, method)
    folder = Folder(str(tmp_path / "prepared"))
    prepared = prepare(recipe, folder, run_in_process)
    order = in_order(recipe, prepared, STEPS)
    trainer = make_trainer(
        recipe,
        first_model(recipe),
        load_tokenizer(recipe),
        [rows[int(one.rows[0])] for one in order],
        tmp_path / "trl",
    )
    ours = [
        [one.input_ids[: one.lengths[0]].tolist(), one.input_ids[one.lengths[0] :].tolist()]
        for one in order
    ]
    assert [[text for text in pair if text] for pair in ours] == texts_of(recipe, trainer)
    trainer.train()
    expected = trainer.losses
    measured = finray_losses(recipe, prepared, tmp_path / "run")
    assert len(measured) == len(expected) == STEPS
    assert measured == pytest.approx(expected, abs=1e-4)
    # At this learning rate the weights do change, so that gradients are compared too.
    assert max(expected) - min(expected) > 0.01
