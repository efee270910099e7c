"""report.html of a sweep: one self-contained page with charts and a sortable table."""

from pathlib import Path
from typing import Any

import optuna

from ..training.common import formatting
from ..training.common.storage import Folder
from ..training.records.labels import label_of
from ..training.records.report import asset, page_environment
from ..training.records.run_folder import Record
from .plots import comparison_charts, importances, progress_charts, rule_of_thumb
from .sweep_folder import REPORT_FILE, note, saved_share


def write_report(folder: Folder, study: optuna.Study, record: Record) -> None:
    """Write report.html into a sweep's folder."""
    folder.write(REPORT_FILE, render_report(study, record).encode("utf-8", "replace"))


def render_report(study: optuna.Study, record: Record) -> str:
    """report.html as text.

    Args:
        study: the Optuna study, for the importance of settings.
        record: the content of sweep.json.
    """
    metrics = [objective["metric"] for objective in record["objectives"]]
    shares = [
        (f" of {metrics[int(place)]}" if len(metrics) > 1 else "", importance)
        for place, importance in importances(study)
    ]
    return (
        page_environment(Path(__file__).parent)
        .get_template("sweep.html")
        .render(
            css=asset("report.css"),
            script=asset("report.js"),
            record=record,
            metrics=metrics,
            keys=list(dict.fromkeys(key for row in record["trials"] for key in row["settings"])),
            subject=_subject(record),
            facts=_facts(record),
            progress=progress_charts(record),
            settings=list(comparison_charts(record)),
            importances=shares,
            cell=_cell,
            note=note,
            count=formatting.count,
            percent=formatting.percent,
        )
    )


def _subject(record: Record) -> list[tuple[str, str]]:
    """(label, text) under the title: what was searched, and what came of it."""
    aims = [f"{objective['metric']} ({objective['mode']})" for objective in record["objectives"]]
    rows = record["trials"]
    states = [
        f"{sum(row['state'] == state for row in rows)} {state}"
        for state in ("finished", "pruned", "failed", "running")
        if any(row["state"] == state for row in rows)
    ]
    pairs = [("Objective", ", ".join(aims)), ("Trials", ", ".join(states) or "none")]
    if len(aims) == 1 and record["best"]:
        pairs += [("Gain", gain(record)), ("Noise", noise(record))]
    if record.get("over"):
        pairs.append(("Ended early", str(record["over"])))
    return pairs


def gain(record: Record) -> str:
    """What the best trial gained over the rule of thumb: its settings are the first trial's."""
    metric, rule = record["objectives"][0]["metric"], rule_of_thumb(record)
    best = next(row for row in record["trials"] if row["number"] == record["best"][0])
    if rule is None or not rule["values"]:
        return "not known, as the rule of thumb's trial did not finish"
    if rule["number"] == best["number"]:
        return "none: the rule of thumb is the best"
    write = label_of(metric)
    difference = write.difference(rule["values"][0], best["values"][0])
    unit = " points" if write.format == "percent" else ""
    return (
        f"{difference}{unit} over the rule of thumb: {write.write(rule['values'][0])} "
        f"(trial 0) to {write.write(best['values'][0])} (trial {best['number']})"
    )


def noise(record: Record) -> str:
    """How much runs of the best settings differ by their seed alone."""
    metric = record["objectives"][0]["metric"]
    retrained = record.get("retrained") or {}
    spread = retrained.get("spread", {}).get(metric)
    runs = len(retrained.get("runs", ()))
    if spread is None or runs < 2:
        return "not measured; retrain: {seeds: [1, 2, 3]} measures it"
    mean = label_of(metric).write(spread["mean"])
    return f"the best settings with {runs} seeds: {mean} ± {spread['deviation']:.2g}"


def _facts(record: Record) -> list[tuple[str, str]]:
    rows = record["trials"]
    facts = [("Trials", formatting.count(len(rows)))]
    if record["best"]:
        best = next(row for row in rows if row["number"] == record["best"][0])
        title = f"Best, trial {best['number']}"
        several = len(record["objectives"]) > 1
        for objective, value in zip(record["objectives"], best["values"], strict=True):
            facts.append((f"{title}: {objective['metric']}" if several else title, f"{value:.6g}"))
    facts.append(("Tokens", formatting.short_count(sum(row["tokens"] for row in rows))))
    share = saved_share(record)
    if share is not None and record["prunes"]:
        facts.append(("Tokens saved by pruning", formatting.percent(share)))
    facts.append(("Wall time", formatting.duration(record.get("wall_seconds"))))
    for name, spread in (record.get("retrained") or {}).get("spread", {}).items():
        facts.append((f"Retrained {name}", f"{spread['mean']:.6g} ± {spread['deviation']:.2g}"))
    return facts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return formatting.MISSING if value is None else str(value)
