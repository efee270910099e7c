"""The results of a sweep: the best recipe, its weights, and runs of it with several seeds."""

import statistics
from contextlib import nullcontext
from typing import Any

from ..training.common import formatting
from ..training.common.background import Stop
from ..training.common.progress import Progress
from ..training.common.scratch import scratch_folder
from ..training.common.storage import Folder
from ..training.common.yaml_text import dump_yaml
from ..training.config.recipe import Recipe
from ..training.launch.in_process import InProcessLauncher
from ..training.launch.ray_workers import RayLauncher
from ..training.models.devices import Room
from ..training.records.run_folder import Record, read_run
from ..training.run import run_folder, train
from .plan import Plan
from .sweep import Retrain
from .sweep_folder import BEST_FILE, PARETO_FOLDER, RETRAINED_FOLDER, lineage, trial_folder
from .trial_actor import final_measures


def best_recipe(plan: Plan, settings: dict[str, Any], name: str) -> Recipe:
    """The recipe of a trial's settings, as a run of its own in the sweep's storage."""
    return plan.space.recipe(settings, name=name[:63], storage=plan.sweep.storage)


def export_best(plan: Plan, record: Record) -> None:
    """Write best.yaml and copy the best trial's weights into the sweep's folder.

    With several objectives, the recipe of every trial of the Pareto front is written too, and
    best.yaml holds the best one in the first objective.
    """
    rows = {row["number"]: row for row in record["trials"]}
    front = [rows[number] for number in record["best"]]
    name = f"{plan.sweep.name}-best"
    _write_recipe(plan, record, plan.folder, BEST_FILE, front[0], name)
    for row in front if len(plan.metrics) > 1 else []:
        file = f"trial-{row['number']:04d}.yaml"
        pareto = plan.folder / PARETO_FOLDER
        _write_recipe(plan, record, pareto, file, row, f"{name}-{row['number']}")
    trial = trial_folder(plan.folder, front[0]["number"])
    result = (read_run(trial) or {}).get("result")
    record["result"] = result
    if result is not None:
        plan.folder.delete(result)
        copy(trial / result, plan.folder / result)


def _write_recipe(
    plan: Plan, record: Record, folder: Folder, file: str, row: Record, name: str
) -> None:
    recipe = best_recipe(plan, row["settings"], name)
    values = ", ".join(
        f"{metric.name} {value:.6g}"
        for metric, value in zip(plan.metrics, row["values"], strict=True)
    )
    written = recipe.model_dump(mode="json", exclude_unset=True)
    text = dump_yaml(written, allow_unicode=True)
    head = f"# Trial {row['number']} of the sweep {plan.sweep.name}: {values}\n"
    folder.create().write(file, (head + _history_comment(record, row) + text).encode())


def _history_comment(record: Record, row: Record) -> str:
    """YAML comment with the earlier settings of a population's member; empty for other trials."""
    line = lineage(record, row)
    if len(line) == 1:
        return ""
    ends = [f"{stage['parent']['tokens']:,.0f} tokens" for stage in line[1:]] + ["the end"]
    stages = [
        f"#   to {end}: {stage['settings']} (trial {stage['number']})\n"
        for end, stage in zip(ends, line, strict=True)
    ]
    return (
        "# Settings of this trial changed during training. This recipe holds the last ones, so a\n"
        "# run of it gives other weights than those beside it, which were trained with:\n"
        + "".join(stages)
    )


def copy(source: Folder, target: Folder) -> None:
    """Copy every file of a folder into another, on any storage."""
    with scratch_folder("best") as scratch:
        source.download(scratch)
        target.upload(scratch)


def retrain(
    plan: Plan,
    record: Record,
    progress: Progress,
    stop: Stop,
    worker_env: dict[str, str],
    room: Room | None,
) -> None:
    """Train the best recipe again with each seed; runs that are finished already are kept."""
    settings = plan.sweep.retrain
    assert settings is not None
    row = next(row for row in record["trials"] if row["number"] == record["best"][0])
    scale = plan.recipe.scale
    runs = []
    for seed in settings.seeds:
        recipe = _retrained(plan, row["settings"], settings, seed)
        progress.status(f"retraining the best settings with seed {seed}")
        ray = RayLauncher(scale, stop, worker_env, room=room) if scale.most_workers else None
        with ray or nullcontext(InProcessLauncher(stop, room=room)) as launcher:
            run = train(recipe, launcher, progress)
        metrics = _metrics(plan, recipe, run)
        runs.append({"seed": seed, "folder": run_folder(recipe).uri, "metrics": metrics})
    record["retrained"] = {"data": settings.data, "runs": runs, "spread": _spread(runs)}


def _metrics(plan: Plan, recipe: Recipe, run: Record) -> Record:
    """The metrics of a run, with its objectives as far as it reports them.

    A run on all rows has none held out; its training metric of the same name stands for those.
    """
    measures = final_measures(recipe, run)
    names = [metric.name for metric in plan.metrics]
    names += [name.removeprefix("eval_") for name in names]
    return {**{name: measures[name] for name in names if name in measures}, **run["metrics"]}


def _retrained(plan: Plan, settings: dict[str, Any], retrain: Retrain, seed: int) -> Recipe:
    recipe = best_recipe(plan, settings, f"seed-{seed}")
    updates: dict[str, Any] = {"seed": seed, "storage": (plan.folder / RETRAINED_FOLDER).uri}
    if retrain.data == "all":
        data = recipe.data
        everything = {"train": [*data.train, *data.eval], "eval": [], "holdout": 0.0}
        updates["data"] = data.model_copy(update=everything)
        updates["eval"] = recipe.eval.model_copy(update={"every_steps": None, "samples": 0})
    return recipe.model_copy(update=updates)


def _spread(runs: list[Record]) -> Record:
    """Mean and standard deviation over the seeds, of every metric that is finite for all."""
    finite = (
        {name for name, value in run["metrics"].items() if formatting.is_number(value)}
        for run in runs
    )
    names = set.intersection(*finite)
    spread = {}
    for name in sorted(names):
        values = [run["metrics"][name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return spread
