"""A tenth of the architectures: quantised, on preferences, by two workers, and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families.case import STEPS, TOLERANCE, Case, cases
from families.matrix import LEFT_WHOLE, TENTH
from families.plain import (
    Document,
    documents,
    load,
    logits,
    rounded,
    with_adapter,
    with_new_adapter,
)
from families.results import note
from support.steps import by_workers

from finray.training.common.background import Stop
from finray.training.common.storage import Folder
from finray.training.engine.heartbeat import Heartbeat
from finray.training.engine.task import WorkerResult, WorkerTask
from finray.training.engine.worker import run_worker
from finray.training.export.export import export
from finray.training.launch.in_process import InProcessContext
from finray.training.launch.retries import Launcher
from finray.training.models.quantiser import plan_quantisation

pytestmark = [pytest.mark.families, pytest.mark.filterwarnings("ignore")]

KINDS = sorted(TENTH)
SLOW = frozenset({"qwen3"})
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
BETA = 0.1


@pytest.mark.parametrize("case", cases(KINDS, SLOW), indirect=True)
def test_nf4(case: Case) -> None:
    run = case.run(case.recipe("nf4", adapter={"rank": 4}, model={"quantize": "nf4"}))
    if case.kind in LEFT_WHOLE:
        whole = load(case.base)
        plain = rounded(whole, plan_quantisation(whole).weights)
    else:
        settings = transformers.BitsAndBytesConfig(**NF4)
        plain = load(case.base, quantization_config=settings)
    plain = with_new_adapter(plain, run.folder)
    assert run.losses == pytest.approx(run.plain_losses(plain), rel=TOLERANCE)
    note(case.kind, "nf4")


@pytest.fixture(scope="session")
def pairs(storage: Path) -> Path:
    """Rows of a chosen and a rejected answer."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What comes after {number}?"}],
            "chosen": [{"role": "assistant", "content": f"After {number} comes {number + 1}."}],
            "rejected": [{"role": "assistant", "content": "The lazy dog."}],
        }
        for number in range(6)
    ]
    path = storage / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", cases(KINDS, SLOW), indirect=True)
def test_dpo(case: Case, pairs: Path) -> None:
    preferences = Case(case.kind, case.base, pairs, case.storage)
    method = {"kind": "dpo", "beta": BETA}
    run = preferences.run(preferences.recipe("dpo", adapter={"rank": 4}, method=method))

    plain = with_new_adapter(load(case.base), run.folder)
    rows = documents(run.recipe, run.prepared, STEPS)
    assert run.losses == pytest.approx(_direct_preference(plain, rows), rel=TOLERANCE)
    note(case.kind, "dpo")


def _direct_preference(model: Any, steps: list[list[Document]]) -> list[float]:
    """DPO's loss of each step; the model without its adapter is the reference."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in steps:
        total = torch.zeros(())
        for chosen, rejected in zip(step[::2], step[1::2], strict=True):
            with torch.no_grad(), model.disable_adapter():
                reference = _log_probability(model, *chosen) - _log_probability(model, *rejected)
            margin = _log_probability(model, *chosen) - _log_probability(model, *rejected)
            total = total - F.logsigmoid(BETA * (margin - reference)) / (len(step) // 2)
        total.backward()
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _log_probability(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    scores = model(input_ids=ids, use_cache=False).logits.float()[:, :-1]
    return -F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("case", cases(KINDS, SLOW), indirect=True)
def test_two_workers(case: Case, tmp_path: Path) -> None:
    alone = case.run(case.recipe("alone", adapter={"rank": 4}))
    scale = {"workers": 2}
    together = case.recipe("two", adapter={"rank": 4}, scale=scale)
    optim = together.optim.model_copy(update={"micro_batch_size": 1})
    run = case.run(together.model_copy(update={"optim": optim}), Forked(tmp_path))

    assert run.losses == pytest.approx(alone.losses, rel=TOLERANCE)
    note(case.kind, "workers")


class _Member(InProcessContext):
    """One of several workers, in a forked process."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(Stop(), Heartbeat())
        self.rank, self.world_size = rank, world_size


class Forked(Launcher):
    """Two workers, forked from this process and joined by gloo."""

    max_failures = 0

    def __init__(self, scratch: Path) -> None:
        self.stop = Stop()
        self._scratch = scratch

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train by both."""

        def work(rank: int, world_size: int) -> dict[str, Any]:
            return dict(run_worker(task, _Member(rank, world_size)))

        first = by_workers(2, self._scratch, work)[0]
        return WorkerResult(**first)  # type: ignore[typeddict-item]

    def wait_until_ready(self, progress: Any) -> None:
        """It always is."""


@pytest.mark.parametrize("case", cases(KINDS, SLOW), indirect=True)
def test_merge(case: Case, tmp_path: Path) -> None:
    run = case.run(case.recipe("merged", adapter={"rank": 4}))
    export(Folder(str(run.folder)), tmp_path / "whole", merge=True)

    loaded = with_adapter(load(case.base), run.folder / "adapter")
    torch.testing.assert_close(
        logits(load(tmp_path / "whole")), logits(loaded), rtol=1e-4, atol=1e-4
    )
    note(case.kind, "merge")
