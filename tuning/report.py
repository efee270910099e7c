"""report.html of a sweep: one self-contained page with plots and a sortable table."""

from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..training.common import formatting
from ..training.common.storage import Folder
from ..training.records.report import asset
from ..training.records.run_folder import Record
from .plots import plots
from .sweep_folder import REPORT_FILE, note, saved_share


def write_report(folder: Folder, study: optuna.Study, record: Record) -> None:
    """Write report.html into a sweep's folder."""
    folder.write(REPORT_FILE, render_report(study, record).encode("utf-8", "replace"))


def render_report(study: optuna.Study, record: Record) -> str:
    """report.html as text.

    Args:
        study: the Optuna study, for its plots.
        record: the content of sweep.json.
    """
    figures = []
    for number, (title, figure) in enumerate(plots(study, record)):
        figure.update_layout(title=None, margin={"l": 70, "r": 30, "t": 30, "b": 60}, autosize=True)
        html = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{number}",
            config={"responsive": True, "displaylogo": False},
        )
        figures.append((title, Markup(html)))
    return (
        _environment()
        .get_template("report.html")
        .render(
            css=asset("report.css"),
            # "</script" inside a string of the library would end the script element.
            plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
            record=record,
            metrics=[objective["metric"] for objective in record["objectives"]],
            keys=list(dict.fromkeys(key for row in record["trials"] for key in row["settings"])),
            facts=_facts(record),
            figures=figures,
            cell=_cell,
            note=note,
            count=formatting.count,
        )
    )


def _environment() -> Environment:
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    rows = record["trials"]
    states = [
        f"{sum(row['state'] == state for row in rows)} {state}"
        for state in ("finished", "pruned", "failed", "running")
        if any(row["state"] == state for row in rows)
    ]
    facts = [("Trials", ", ".join(states) or "none")]
    if record["best"]:
        best = next(row for row in rows if row["number"] == record["best"][0])
        values = [
            f"{objective['metric']} {value:.6g}"
            for objective, value in zip(record["objectives"], best["values"], strict=True)
        ]
        facts.append(("Best", f"trial {best['number']}: {', '.join(values)}"))
    facts.append(("Tokens", formatting.count(sum(row["tokens"] for row in rows))))
    share = saved_share(record)
    if share is not None and record["prunes"]:
        saved = f"{formatting.percent(share)} of the tokens of whole trials"
        facts.append(("Saved by pruning", saved))
    facts.append(("Wall time", formatting.duration(record.get("wall_seconds"))))
    if record.get("over"):
        facts.append(("Ended early", str(record["over"])))
    for name, spread in (record.get("retrained") or {}).get("spread", {}).items():
        facts.append((f"Retrained {name}", f"{spread['mean']:.6g} ± {spread['deviation']:.2g}"))
    return facts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return formatting.MISSING if value is None else str(value)
