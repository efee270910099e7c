"""What stages dropped of the data, as text."""

from collections.abc import Sequence
from typing import Any

from ...training.common.formatting import count, one_line, percent, printable
from ...training.data.curation.funnel import (
    describe_funnel,
    describe_kinds,
    describe_samples,
    mean_lengths,
)


def render_curation(report: dict[str, Any]) -> str:
    """What `finray data report` prints.

    Args:
        report: name, funnel and sources, as `report_data` returns them.
    """
    lines = [printable(report["name"])]
    if (windows := report["windows"]) is not None:
        lines.append(f"  {'streams':10}  the first of {windows} windows of an epoch")
    for stage, line in zip(report["funnel"], describe_funnel(report["funnel"]), strict=True):
        lines.append(f"  {line}")
        lines.append(f"      {_lengths(stage)}")
        lines += [f"      {of}: {text}" for of, text in describe_kinds(stage)]
        lines += [f"      {printable(text)}" for text in describe_samples(stage)]
    lines += [f"  {'source':10}  {line}" for line in _sources(report["sources"])]
    if report["held_out"] is not None:
        lines.append(f"  {'held out':10}  {count(report['held_out'])} rows")
    return "\n".join(lines)


def _lengths(stage: dict[str, Any]) -> str:
    before, after = map(round, mean_lengths(stage))
    return f"characters a row: {count(before)} before, {count(after)} after"


def _sources(sources: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{one_line(source['path'])}: {count(source['rows'])} → {count(source['left'])} rows, "
        f"each used {source['weight']:g} times: {percent(source['share'])} of what is trained on"
        for source in sources
    ]
