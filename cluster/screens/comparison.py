"""Runs side by side on the terminal: what differs, their metrics, curves and answers."""

from collections.abc import Sequence

from ...training.common.formatting import one_line
from ...training.records.charts import BOX, Chart
from ...training.records.comparison import ComparedAnswers, Comparison
from ...training.records.comparison_page import matched, metric_rows, setting_text
from .runs import columns, shortened

_WIDTH, _HEIGHT = 60, 12
"""Characters of a plot."""
_SCALE, _NARROWEST = 18, 20
"""Characters beside a plot, and of the narrowest."""
_CELL = 40
_TEXT = 300
_COLOURS = ("34", "33", "32", "35", "36", "31")
_PLOTS = ("loss", "eval_loss", "eval_reward", "reward")
"""Metrics that are drawn; the page draws all."""


def render_comparison(
    comparison: Comparison, rows: int, colour: bool = False, width: int | None = None
) -> str:
    """All that differs, as text; a run is marked A, B, … in plots and answers.

    Args:
        comparison: the runs.
        rows: prompts of which the answers are shown.
        colour: mark the runs by colour, too.
        width: columns of the terminal; None where there is none.
    """
    marks = [_mark(number, colour) for number in range(len(comparison.names))]
    head = [f"{'ABCDEF'[n]} {one_line(name)}" for n, name in enumerate(comparison.names)]
    blocks = [_metrics(comparison, head, width)]
    for title, values in (("settings", comparison.settings), ("inputs", comparison.inputs)):
        cells = [
            [key, *(shortened(one_line(setting_text(v)), _CELL) for v in row)]
            for key, row in values.items()
        ]
        if cells:
            blocks.append(columns([(title, *head), *cells], len(head) + 1, width=width))
        elif title == "settings":
            blocks.append("no setting differs")
    drawn = [name for name in comparison.curves if name in _PLOTS]
    charts = zip(comparison.curves, comparison.charts(), strict=False)
    across = _WIDTH if width is None else max(_NARROWEST, min(_WIDTH, width - _SCALE))
    blocks += [
        _plot(chart, comparison.names, marks, across) for name, chart in charts if name in drawn
    ]
    blocks += [_answers(item, marks) for item in comparison.answers[:rows]]
    left = len(comparison.answers) - rows
    if left > 0:
        blocks.append(f"{left} more prompts; --rows N or --page FILE shows them")
    return "\n\n".join(blocks)


def _metrics(comparison: Comparison, head: Sequence[str], width: int | None) -> str:
    rows = [("metric", *head)]
    for title, values, differences in metric_rows(comparison):
        cells = [f"{v} ({d})" if d else v for v, d in zip(values, differences, strict=True)]
        rows.append((title, *cells))
    if right := matched(comparison):
        rows.append(("answers that match", *right))
    for name, facts in comparison.facts.items():
        if name != "Base model" or len(set(facts)) > 1:
            rows.append((name.lower(), *(shortened(one_line(f), _CELL) for f in facts)))
    return columns(rows, 1, width=width)


def _plot(chart: Chart, names: Sequence[str], marks: Sequence[str], across: int) -> str:
    """The curves over one another, as letters; where two meet, * stands."""
    grid = [[" "] * across for _ in range(_HEIGHT)]
    for line in chart.lines:
        mark = marks[list(names).index(line.label)]
        for x, y, _, _ in line.readout:
            row = min(_HEIGHT - 1, int(y / BOX * _HEIGHT))
            column = min(across - 1, int(x / BOX * across))
            before = grid[row][column]
            grid[row][column] = mark if before in (" ", mark) else "*"
    labels = [""] * _HEIGHT
    for tick in chart.y_ticks:
        labels[min(_HEIGHT - 1, int((100 - tick.at) / 100 * _HEIGHT))] = tick.label
    width = max(map(len, labels))
    lines = [f"{label:>{width}} |{''.join(row)}" for label, row in zip(labels, grid, strict=True)]
    scale = ", log scale" if chart.is_log else ""
    meet = " (* where they meet)" if any("*" in row for row in grid) else ""
    last = chart.x_ticks[-1].label if chart.x_ticks else ""
    axis = f"{'':>{width}} +{'-' * across} {chart.unit} {last}"
    return "\n".join([f"{chart.title}{scale}{meet}", *(line.rstrip() for line in lines), axis])


def _answers(item: ComparedAnswers, marks: Sequence[str]) -> str:
    lines = [f"prompt     {_cut(item.prompt)}"]
    if item.reference is not None:
        lines.append(f"reference  {_cut(item.reference)}")
    for mark, text, is_right in zip(marks, item.answers, item.matches, strict=True):
        if text is not None:
            sign = "✓" if is_right else " "
            lines.append(f"{mark} {sign}        {_cut(text)}")
    return "\n".join(lines)


def _mark(number: int, colour: bool) -> str:
    letter = "ABCDEF"[number]
    return f"\x1b[{_COLOURS[number]}m{letter}\x1b[0m" if colour else letter


def _cut(text: str) -> str:
    return shortened(one_line(text), _TEXT)
