"""Objectives: what a run really reports, its direction, and what is refused before a start."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.training.common.errors import InputError
from finray.training.config.methods import METHODS
from finray.training.config.metric import MODES, Metric
from finray.training.config.recipe import Recipe, resolve_recipe
from finray.training.launch.in_process import InProcessLauncher
from finray.training.records.run_folder import read_metrics
from finray.training.run import run_folder, train
from finray.tuning.metrics import reported_metrics
from finray.tuning.plan import Plan, make_plan
from finray.tuning.sweep import load_sweep
from finray.tuning.trial_actor import final_measures

REWARDS = """
def worth(prompts, completions, completion_ids, **columns):
    return [len(ids) / 10 for ids in completion_ids]


def cost(prompts, completions, completion_ids, **columns):
    return [ids[0] % 3 for ids in completion_ids]
"""
FUNCTIONS = [{"file": "rewards.py:worth"}, {"file": "rewards.py:cost", "weight": -0.5}]
ONLINE = {"rewards": FUNCTIONS, "generations": 2, "max_completion": 4}
WHERE = {"step", "epoch", "learning_rate"}
"""Keys of a line that are no measurement."""


def rows(kind: str) -> list[dict[str, Any]]:
    asked = [{"prompt": f"What is {number}?", "completion": f"{number}."} for number in range(24)]
    if kind == "kto":
        return [{**row, "label": number % 2 == 0} for number, row in enumerate(asked)]
    if METHODS[kind].sequences_per_row == 2:
        return [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"}
            for row in asked
        ]
    return asked


def values_of(base: Path, folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows(kind))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    method = {"kind": kind, **changes.pop("method", {})}
    return {
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "method": {**ONLINE, **method} if METHODS[kind].samples_online else method,
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64, "holdout": 0.3},
        "optim": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4},
        "scale": {"workers": 0},
        "log": {"every_steps": 1, "to": []},
        **changes,
    }


CASES = [
    ("sft", {"eval": {"samples": 2, "metrics": ["exact_match"]}}),
    ("kto", {"method": {"loss": "apo_zero"}}),
    ("reward", {}),
    ("grpo", {}),
    ("grpo", {"adapter": None}),
    ("rloo", {"adapter": None}),
    *(
        pytest.param(kind, {}, marks=pytest.mark.slow)
        for kind in ("pretrain", "dpo", "kto", "orpo", "cpo", "simpo")
    ),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_run_reports_exactly_what_can_be_an_objective(
    kind: str, changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    values = values_of(tiny_model, tmp_path, kind, **changes)
    recipe = Recipe.model_validate({"name": "x", "storage": str(tmp_path / "runs"), **values})
    recipe = resolve_recipe(recipe, tmp_path)
    record = train(recipe, InProcessLauncher())
    written = {key for line in read_metrics(run_folder(recipe)) if line["step"] for key in line}
    names = reported_metrics(recipe)
    assert (written - WHERE) | {"adapter_bytes", "trainable_parameters", "wall_seconds"} == {*names}
    measures = final_measures(recipe, record)
    assert all(isinstance(measures[name], int | float) for name in names)


def plan_of(base: Path, folder: Path, kind: str, changes: dict[str, Any], **sweep: Any) -> Plan:
    values = {
        "name": "s",
        "search": {"optim.learning_rate": {"log_uniform": [1e-5, 1e-3]}},
        **sweep,
        "recipe": values_of(base, folder, kind, **changes),
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return make_plan(load_sweep(path))


@pytest.mark.parametrize(
    ("kind", "name", "mode"),
    [
        ("sft", "eval_loss", "min"),
        ("kto", "eval_loss", "min"),
        ("reward", "eval_reward_accuracy", "max"),
        ("grpo", "eval_reward", "max"),
        ("rloo", "eval_reward", "max"),
    ],
)
def test_the_default_objective_is_what_the_method_watches(
    kind: str, name: str, mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model, tmp_path, kind, {})
    assert [(metric.name, metric.mode) for metric in plan.metrics] == [(name, mode)]
    assert plan.prunes


DIRECTIONS = {
    "dpo": {"eval_chosen_reward": "max", "rejected_reward": "min", "eval_reward_margin": "max"},
    "sft": {"eval_token_accuracy": "max", "tokens_per_second": "max", "wall_seconds": "min"},
    "rloo": {
        "reward": "max",
        "eval_reward/worth": "max",
        "reward/cost": "min",  # its weight makes it a penalty
        "eval_reward/cost": "min",
        "kl": "min",
        "truncated": "min",
    },
}


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_every_reported_metric_can_be_an_objective(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model, tmp_path, kind, {}, objective=list(DIRECTIONS[kind]))
    assert {metric.name: metric.mode for metric in plan.metrics} == DIRECTIONS[kind]
    names = reported_metrics(plan.recipe)
    assert len(plan_of(tiny_model, tmp_path, kind, {}, objective=names).metrics) == len(names)
    opposite = [{"metric": name, "mode": "max"} for name in names]
    metrics = plan_of(tiny_model, tmp_path, kind, {}, objective=opposite).metrics
    assert {metric.mode for metric in metrics} == {"max"}


def test_every_measure_of_every_method_has_a_direction() -> None:
    names = {name for method in METHODS.values() for name in method.measures}
    assert names <= MODES.keys()
    assert METHODS["grpo"].watched == Metric("eval_reward", "max")


@pytest.mark.parametrize(
    ("kind", "changes", "objective", "message"),
    [
        ("grpo", {}, "eval_loss", r"yaml:7: objective: .*grpo never reports 'eval_loss'; it repor"),
        ("grpo", {}, "eval_reward_std", "it reports eval_reward, eval_reward/worth, eval_reward/c"),
        ("grpo", {}, "eval_clipped", "never reports 'eval_clipped'"),
        ("grpo", {}, "kl", "never reports 'kl'"),
        ("grpo", {"adapter": None}, "eval_kl", "never reports 'eval_kl'"),
        ("rloo", {}, "reward/other", r"loss, reward, .*reward/worth, reward/cost"),
        ("kto", {"method": {"loss": "apo_zero"}}, "kl", "never reports 'kl'"),
        ("sft", {}, ["eval_loss", "exact_match"], r"yaml:9: .*exact_match needs eval\.samples"),
        ("sft", {}, "learning_rate", "never reports 'learning_rate'"),
    ],
)
def test_what_a_run_never_reports_is_refused(
    kind: str,
    changes: dict[str, Any],
    objective: Any,
    message: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(tiny_model, tmp_path, kind, changes, objective=objective)


def test_a_default_objective_needs_held_out_data(tiny_model: Path, tmp_path: Path) -> None:
    data = {"train": [{"path": "rows.jsonl"}], "max_length": 64}
    message = r"sweep\.yaml:7: objective: it is eval_reward unless .*data\.eval or data\.holdout"
    with pytest.raises(InputError, match=message):
        plan_of(tiny_model, tmp_path, "grpo", {"data": data})
    assert plan_of(tiny_model, tmp_path, "grpo", {"data": data}, objective="reward").prunes


def test_settings_whose_runs_report_no_result_are_not_tried(
    tiny_model: Path, tmp_path: Path
) -> None:
    search = {
        "method.beta": {"choice": [0.05, 0.0]},
        "adapter": {"choice": [None, {"rank": 2}]},
    }
    plan = plan_of(tiny_model, tmp_path, "rloo", {}, search=search, objective="eval_kl")
    assert [item.settings for item in plan.excluded] == [{"method.beta": 0.0, "adapter": None}]
    message = r"sweep\.yaml:3: search\.method\.beta: 0\.0 never .*rloo never reports 'kl'"
    with pytest.raises(InputError, match=message):
        plan_of(tiny_model, tmp_path, "rloo", {}, search=search, objective="kl")


@pytest.mark.parametrize("metric", ["wall_seconds", "tokens", "trainable_parameters"])
def test_what_tells_unfinished_trials_not_apart_does_not_prune(
    metric: str, tiny_model: Path, tmp_path: Path
) -> None:
    assert not plan_of(tiny_model, tmp_path, "sft", {}, objective=metric).prunes
    with pytest.raises(InputError, match=r"yaml:8: pruning\.kind median: .*a trial's end"):
        pruning = {"kind": "median"}
        plan_of(tiny_model, tmp_path, "sft", {}, objective=metric, pruning=pruning)


@pytest.mark.parametrize("sampler", ["cmaes", "gp"])
def test_a_sampler_without_its_package_is_refused_at_the_start(
    sampler: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finray.tuning.plan.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"sweep\.yaml:7: sampler: {sampler} needs the package"):
        plan_of(tiny_model, tmp_path, "sft", {}, sampler=sampler)
