"""What `finray generate` and `finray eval` print."""

import json
from dataclasses import asdict
from typing import Any

from ...training.common.formatting import count
from ...training.evaluation.generate import GenerateSummary
from ...training.evaluation.page import column_title, columns_of, value_text

_SHOWN = 5


def render_generated(summary: GenerateSummary, as_json: bool) -> str:
    """The file, its rows, and what is odd about them."""
    if as_json:
        return json.dumps({**asdict(summary), "file": str(summary.file)}, indent=2)
    if summary.was_there:
        return (
            f"{summary.file}: has its {count(summary.rows)} rows already, and is not written "
            "again; delete it to start over"
        )
    answered = summary.rows - len(summary.bad)
    before = f", {count(summary.before)} of them before" if summary.before else ""
    lines = [
        f"{summary.file}: {_some(answered, 'answer')}, {_some(summary.tokens, 'token')}{before}"
    ]
    if summary.cut:
        cut = _some(summary.cut, "answer")
        lines.append(f"  {cut} reached --max-tokens or the end of the context")
    if summary.plain:
        lines.append(
            f"  {_some(summary.plain, 'prompt')} in plain text, continued without the chat "
            "template; messages would use it"
        )
    for mark, rows in summary.marks.items():
        lines.append(
            f"  {_some(rows, 'prompt')} with {mark}, a mark of another chat template, which this "
            "model reads as plain text"
        )
    if summary.bad:
        lines.append(f"  {_some(len(summary.bad), 'row')} without a prompt:")
        lines += [f"    {fault}" for fault in summary.bad[:_SHOWN]]
        if len(summary.bad) > _SHOWN:
            lines.append(f"    and {count(len(summary.bad) - _SHOWN)} more, in the file")
    return "\n".join(lines)


def render_evaluation(record: dict[str, Any], folder: str, as_json: bool) -> str:
    """A table: measures down, models across; then the preferences, and where the page is."""
    if as_json:
        return json.dumps({**record, "folder": folder}, indent=2)
    columns = columns_of(record)
    rows = [["", *(column_title(record, column) for column in columns), "rows"]]
    for one in record["measures"]:
        cells = [_cell(one, column) for column in columns]
        unit = " tokens" if one["name"] in ("loss", "perplexity") else ""
        rows.append([one["title"], *cells, f"{count(one['count'])}{unit}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"  {'  '.join([first.ljust(widths[0]), *cells])}")
    answered = f"{count(record['answered'])} of {_some(record['rows'], 'row')}"
    head = f"{record['models']['answer']}: {answered}"
    preferred = [
        f"  by {one['by']}: {count(one['wins'])} better, {count(one['ties'])} equal, "
        f"{count(one['losses'])} worse than {record['models']['against']}"
        for one in record["preferences"]
    ]
    lines += [f"  {text}" for text in record["remarks"]]
    bad = [f"  without a prompt: {fault}" for fault in record["bad"][:_SHOWN]]
    blocks = [[head], lines, preferred, bad, [f"  page  {folder}/eval.html"]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _cell(measure: dict[str, Any], column: str) -> str:
    text = value_text(measure["name"], measure["values"].get(column))
    interval = measure.get("intervals", {}).get(column)
    return text if not interval else f"{text} ± {value_text(measure['name'], interval)}"


def _some(number: int, what: str) -> str:
    return f"{count(number)} {what}{'' if number == 1 else 's'}"
