"""One architecture, its base, and the runs from it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families.matrix import FAULTS, REFUSED, SAMPLE
from families.plain import documents, train_plainly

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe
from finray.training.data.prepared import Prepared, open_prepared
from finray.training.launch.in_process import InProcessLauncher
from finray.training.launch.retries import Launcher
from finray.training.run import train

STEPS = 2
LEARNING_RATE = {"lora": 1e-2, "full": 1e-3}
TOLERANCE = 1e-5
"""Of losses, relative: AdamW divides even the smallest gradients by their size."""


def cases(kinds: list[str], sample: frozenset[str] = SAMPLE, how: str = "") -> list[Any]:
    """Model types; those of the sample also run with the long tests of every change."""
    made = []
    for kind in kinds:
        if (kind, how) in REFUSED:
            continue
        marks: list[Any] = [pytest.mark.slow] if kind in sample else []
        if reason := FAULTS.get((kind, how)):
            marks.append(pytest.mark.xfail(reason=reason, strict=True))
        made.append(pytest.param(kind, marks=marks))
    return made


@dataclass
class Case:
    """One architecture's base, and runs from it."""

    kind: str
    base: Path
    data: Path
    storage: Path

    def recipe(self, name: str, **changes: Any) -> Recipe:
        kind = "lora" if "adapter" in changes else "full"
        optim = {
            "learning_rate": LEARNING_RATE[kind],
            "max_steps": STEPS,
            "batch_size": 2,
            "micro_batch_size": 2,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": 0.0,
        }
        return Recipe.model_validate(
            {
                "name": f"{self.kind}-{name}",
                "storage": str(self.storage),
                "scale": {"workers": 0},
                "optim": optim,
                "log": {"every_steps": 1},
                "checkpoint": {"every_steps": 1 if kind == "lora" else STEPS, "keep": STEPS},
                **changes,
                "model": {"base": str(self.base), **changes.get("model", {})},
                "data": {"train": [{"path": str(self.data)}], "max_length": 128},
            }
        )

    def run(self, recipe: Recipe, launcher: Launcher | None = None) -> "Run":
        """Train, packed or not, as finray decides."""
        record = train(recipe, launcher or InProcessLauncher())
        assert record["status"] == "finished"
        prepared = open_prepared(Folder(recipe.storage) / "prepared" / str(record["prepared"]))
        assert prepared is not None
        return Run(recipe, dict(record), prepared, self.storage / recipe.name)


@dataclass
class Run:
    """A finished run."""

    recipe: Recipe
    record: dict[str, Any]
    prepared: Prepared
    folder: Path

    @property
    def losses(self) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    @property
    def is_packed(self) -> bool:
        counts = self.record["data"]["train"]
        return int(counts["sequences"]) < int(counts["documents"])

    def plain_losses(self, model: Any) -> list[float]:
        rows = documents(self.recipe, self.prepared, STEPS)
        return train_plainly(model, rows, self.recipe.optim.learning_rate)
