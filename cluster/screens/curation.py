"""What stages dropped of the data, as text."""

import textwrap
from collections.abc import Sequence
from typing import Any

from ...training.common.formatting import count, one_line, percent, printable
from ...training.data.curation.funnel import (
    describe_funnel,
    describe_kinds,
    describe_samples,
    mean_lengths,
)

_INDENT = 2
"""Of what goes on from a line, beside the line's own."""
_NARROWEST = 40


def render_curation(report: dict[str, Any], width: int | None = None) -> str:
    """What `finray data report` prints.

    Args:
        report: as `report_data` returns it.
        width: columns of the terminal, at which lines are broken; None: nowhere.
    """
    lines = [printable(report["name"])]
    if (windows := report["windows"]) is not None:
        lines.append(f"  {'streams':10}  the first of {windows} windows of an epoch")
    for stage, line in zip(report["funnel"], describe_funnel(report["funnel"]), strict=True):
        lines.append(f"  {line}")
        lines.append(f"      {_lengths(stage)}")
        lines += [f"      {of}: {text}" for of, text in describe_kinds(stage)]
        lines += [f"      {printable(text)}" for text in describe_samples(stage)]
    lines += [
        f"  {'unusable':10}  {bad['place']}: {one_line(bad['reason'])}"
        for bad in report["bad_rows"]
    ]
    lines += [f"  {'source':10}  {line}" for line in _sources(report["sources"])]
    if report["held_out"] is not None:
        lines.append(f"  {'held out':10}  {count(report['held_out'])} rows")
    return "\n".join(lines if width is None else [_broken(line, width) for line in lines])


def _broken(line: str, width: int) -> str:
    """The line in lines of a width, indented under its first word."""
    indent = " " * (len(line) - len(line.lstrip()) + _INDENT)
    width = max(width, _NARROWEST)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)


def _lengths(stage: dict[str, Any]) -> str:
    before, after = map(round, mean_lengths(stage))
    return f"characters a row: {count(before)} before, {count(after)} after"


def _sources(sources: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{one_line(source['path'])}: {count(source['rows'])} → {count(source['left'])} rows, "
        f"each used {source['weight']:g} times: {percent(source['share'])} of what is trained on"
        for source in sources
    ]
