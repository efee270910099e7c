"""The summary that `finray train` prints at the end."""

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from ...training.common import formatting
from ...training.common.storage import Folder
from ...training.records.labels import key_metrics, label_of
from ...training.records.run_folder import (
    METRICS_FILE,
    REPORT_FILE,
    Record,
    existing_run,
    is_match,
    read_samples,
)

WIDTH = 80
SAMPLES = 3
_BOLD, _DIM, _GREEN, _RED = "1", "2", "32", "31"


def render_summary(folder: Folder, *, colour: bool = False) -> str:
    """How a run ended, what it improved, and where its results are.

    Lines have at most 80 columns, except for paths and errors.

    Args:
        folder: the run's folder.
        colour: whether to use a terminal's colours.

    Raises:
        InputError: the folder holds no run, or one of its files is damaged.
    """
    run = existing_run(folder)
    paint = _Paint(colour)
    blocks = [
        _headline(run, paint),
        _error(run),
        _gains(run, paint),
        *_samples(read_samples(folder)[:SAMPLES], paint),
        _places(folder, run, paint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


class _Paint:
    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _headline(run: Record, paint: _Paint) -> list[str]:
    """support-lora finished: 400 steps, 1,234,567 tokens, 12m03s"""
    status = str(run.get("status") or "unknown")
    step, total = run.get("step"), run.get("total_steps")
    steps = f"{formatting.count(step)} steps"
    if status != "finished" and formatting.is_number(total):
        steps = f"step {formatting.count(step)} of {formatting.count(total)}"
    facts = [steps, f"{formatting.count(run.get('tokens'))} tokens"]
    facts.append(formatting.duration(run.get("wall_seconds")))
    present = [fact for fact in facts if formatting.MISSING not in fact]
    colour = {"finished": _GREEN, "failed": _RED}.get(status, _BOLD)
    name = paint(formatting.one_line(str(run.get("name") or "run")), _BOLD)
    head = f"{name} {paint(status, colour)}" + (f": {', '.join(present)}" if present else "")
    return [head, *_wrapped(run.get("over"))]


def _wrapped(over: object) -> list[str]:
    """Why a run ended before its last step."""
    text = formatting.one_line(f"ended early: {over}") if over else ""
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _error(run: Record) -> list[str]:
    lines = str(run.get("error") or "").strip().splitlines()
    return [f"  {formatting.one_line(line)}".rstrip() for line in lines]


def _gains(run: Record, paint: _Paint) -> list[str]:
    """Metrics of the base and the tuned model, if either was evaluated."""
    before, after = run.get("before") or {}, run.get("metrics") or {}
    rows = [
        (label_of(key), before.get(key), after.get(key))
        for key in key_metrics(before, after)
        if formatting.is_number(before.get(key)) or formatting.is_number(after.get(key))
    ]
    if not rows:
        return [f"  training loss {formatting.loss(after.get('loss'))}"] if "loss" in after else []
    width = max(len(measure.title) for measure, _, _ in rows)
    lines = [paint(f"  {'':{width}}  {'base':>8}  {'tuned':>8}  {'change':>8}", _DIM)]
    for measure, old, new in rows:
        cells = f"  {measure.title:{width}}  {measure.write(old):>8}  {measure.write(new):>8}"
        lines.append(f"{cells}  {measure.difference(old, new):>8}".rstrip())
    return lines


def _samples(samples: Sequence[Record], paint: _Paint) -> list[list[str]]:
    return [_sample(sample, paint) for sample in samples]


def _sample(sample: Record, paint: _Paint) -> list[str]:
    reference = sample.get("reference")
    rows = [("prompt", sample.get("prompt")), ("reference", reference)]
    lines = [
        f"  {paint(label.ljust(9), _DIM)}  {shorten(str(text))}"
        for label, text in rows
        if text is not None
    ]
    for label, text in (("base", sample.get("before")), ("tuned", sample.get("after"))):
        if text is None:
            continue
        mark = paint("  ✓", _GREEN) if is_match(text, reference) else ""
        lines.append(f"  {paint(label.ljust(9), _DIM)}  {shorten(text) or '(empty)'}{mark}")
    return lines


def shorten(text: str, columns: int = WIDTH - 16) -> str:
    """One line of at most `columns` columns, with … at its end if it was cut."""
    line = formatting.one_line(text)
    if cell_len(line) <= columns:
        return line
    return set_cell_size(line, columns - 1).rstrip() + "…"


def _places(folder: Folder, run: Record, paint: _Paint) -> list[str]:
    names = [("report", REPORT_FILE), ("metrics", METRICS_FILE)]
    result = run.get("result")
    if result:
        names.insert(0, (str(result), str(result)))
    return [
        f"  {paint(label.ljust(9), _DIM)}  {folder / name}"
        for label, name in names
        if folder.exists(name)
    ]
