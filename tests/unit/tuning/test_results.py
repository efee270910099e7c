"""What a sweep says about the runs of its best settings with other seeds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finray.training.common.storage import Folder
from finray.training.config.metric import Metric
from finray.training.config.recipe import Recipe
from finray.tuning.results import _metrics, _spread


def test_a_run_on_all_rows_is_judged_by_its_own_completions(tmp_path: Path) -> None:
    """It has no held-out reward."""
    values = {"name": "x", "model": {"base": "m"}, "data": {"train": [{"path": "/x"}]}}
    recipe = Recipe.model_validate({**values, "storage": str(tmp_path)})
    lines = b'{"step": 1, "loss": 0.1, "reward": 0.2}\n{"step": 2, "loss": 0.0, "reward": 0.6}\n'
    Folder(str(tmp_path / "x")).create().write("metrics.jsonl", lines)
    plan: Any = SimpleNamespace(metrics=[Metric("eval_reward", "max")])
    assert _metrics(plan, recipe, {"metrics": {"loss": 0.0}}) == {"loss": 0.0, "reward": 0.6}


def test_the_spread_leaves_out_what_is_not_finite_everywhere() -> None:
    runs: list[dict[str, Any]] = [
        {"metrics": {"loss": 1.0, "eval_loss": None, "reward": 2.0}},
        {"metrics": {"loss": 3.0, "eval_loss": 0.5}},
    ]
    assert _spread(runs) == {"loss": {"mean": 2.0, "deviation": pytest.approx(2**0.5)}}
