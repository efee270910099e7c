"""Evaluates models on the rows of some sources: a loss, answers, measures of them, preferences.

Answers, losses and verdicts are kept in a file while they are made, so that a measure that raises
or a judge that does not answer costs none of them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.errors import RunError
from ..common.progress import SILENT, Progress
from ..config.eval_metrics import ANSWER_METRICS, FunctionMetric, MetricChoice, metric_name
from ..config.metric import Mode
from ..config.source import Source
from ..data.tasks import RunTasks
from ..records.run_folder import Record
from .answer_file import AnswerFile
from .answer_settings import AnswerSettings
from .answering import Answer, Ask, batches
from .elsewhere import EvaluationTask, Measuring, Remote, measuring_by_tasks
from .generate import Batch, here
from .harness import Harness
from .judge import Judge, ask_all
from .losses import LossSum, TotalLoss, loss_of, loss_parts
from .opened import Opened
from .prompts import PromptRow, digest_of, read_prompts
from .scores import Answered, Scored, score, title_of

FORMAT = 1
OWN, BASE, AGAINST = "answer", "base", "against"
"""The columns of answers: the model's, those of the base under it, and those of another model."""
LOSS, PERPLEXITY = "loss", "perplexity"
_LOSSES_ROW = 0
_DEVIATIONS = 1.96
"""Standard errors of a mean in a 95 % interval."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how."""

    metrics: tuple[MetricChoice, ...]
    with_loss: bool = True
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    schema: Any = None
    """A JSON schema that valid JSON must fit."""
    judge: Judge | None = None
    rows: int | None = None
    """Rows that are read at most."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness."""


@dataclass
class Evaluation:
    """Measures of one to three models."""

    record: Record
    """The content of eval.json."""
    lines: list[Record]
    """Those of eval.jsonl: rows with their answers and values."""
    problems: list[str] = field(default_factory=list)
    """Measures that could not be computed: one message each."""


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated."""

    name: str
    identity: str
    """Changes when a model of this name is another one."""
    open: Callable[[], Opened]
    """Loads it; without weights where other processes answer."""
    remote: Remote
    """Names the model to other processes, which load it themselves."""


def evaluate(
    candidates: Mapping[str, Candidate],
    sources: Sequence[Source],
    target: Path,
    settings: EvaluationSettings,
    progress: Progress = SILENT,
    place: str | None = None,
    run: RunTasks | None = None,
) -> Evaluation:
    """Evaluate models.

    Args:
        candidates: by column: `answer`, perhaps `base` and `against`.
        sources: the rows.
        target: the file of the rows with their answers; it is written when nothing failed.
        settings: what is measured.
        progress: receives what is done, and how far it is.
        place: what messages call the part of an unfinished file; by default its path.
        run: runs the answers and the losses in other processes; by default this one computes them.

    Raises:
        InputError: the rows or a model cannot be read.
    """
    rows = list(read_prompts(sources, settings.rows))
    harness = None
    if settings.tasks:
        progress.status("loading the tasks")
        harness = Harness(settings.tasks, settings.rows, settings.answers.at_once)
    decides = {
        "finray": FORMAT,
        "models": {column: one.identity for column, one in candidates.items()},
        "rows": digest_of(sources),
        "limit": settings.rows,
        "loss": settings.with_loss,
        "judge": None if settings.judge is None else settings.judge.model,
        **settings.answers.model_dump(),
    }
    with AnswerFile(target, decides, place) as file:
        for column, candidate in candidates.items():
            _answer_all(column, candidate, rows, file, settings, progress, run)
        problems = _run_tasks(candidates, file, harness, progress)
        problems += _judge_all(list(candidates), rows, file, settings.judge, progress)
        evaluation = _measured(candidates, sources, rows, file, settings)
        evaluation.problems[:0] = problems
        if not problems:
            file.lines.pop(_LOSSES_ROW, None)
            file.finish(_shown_line, keeps_part=bool(evaluation.problems))
    return evaluation


def _answer_all(
    column: str,
    candidate: Candidate,
    rows: list[PromptRow],
    file: AnswerFile,
    settings: EvaluationSettings,
    progress: Progress,
    run: RunTasks | None,
) -> None:
    """Answer with a model what it has not answered, and measure its loss."""
    losses = file.lines.get(_LOSSES_ROW, {})
    needs_loss = settings.with_loss and column not in losses
    done = {row for row, line in file.lines.items() if column in line or "error" in line}
    missing = sum(row.number not in done for row in rows)
    if not (missing or needs_loss):
        return
    progress.status(f"loading {candidate.name}")
    opened = candidate.open()
    if run is None:
        measuring = _measuring_here(opened, settings.answers)
    else:
        measuring = measuring_by_tasks(EvaluationTask(candidate.remote, settings.answers), run)

    def waiting() -> Iterator[list[Ask]]:
        for item in batches(opened, rows, settings.answers):
            if isinstance(item, PromptRow):
                if item.number not in done:
                    file.add([{"row": item.number, "error": item.error}])
            elif any(ask.row.number not in done for ask in item):
                yield item

    loss = TotalLoss(len(rows))
    answered = len(rows) - missing
    for part in measuring(loss_parts(rows if needs_loss else ()), waiting()):
        if isinstance(part, LossSum):
            total = loss.add(part)
            if total is not None:
                values = [total.mean, total.tokens, total.left_out]
                file.add([{"row": _LOSSES_ROW, **losses, column: values}])
        else:
            batch, (answers,) = part
            file.add(_lines(column, batch, answers))
            answered += len(batch)
        measured = loss.rows if needs_loss else len(rows)
        progress.advance(measured + min(answered, len(rows)), 2 * len(rows))


def _measuring_here(opened: Opened, settings: AnswerSettings) -> Measuring:
    """Measures losses in this process, then answers."""

    def measuring(
        losses: Iterator[list[PromptRow]], waiting: Iterator[list[Ask]]
    ) -> Iterator[LossSum | Batch]:
        yield from (loss_of(opened, rows) for rows in losses)
        yield from here([opened], settings)(waiting)

    return measuring


def _lines(column: str, batch: list[Ask], answers: list[Answer]) -> list[Record]:
    return [
        {"row": ask.row.number, column: one.text, f"{column}_ids": one.ids}
        for ask, one in zip(batch, answers, strict=True)
    ]


def _run_tasks(
    candidates: Mapping[str, Candidate],
    file: AnswerFile,
    harness: Harness | None,
    progress: Progress,
) -> list[str]:
    """Measure on the harness' tasks what is not measured; returns why a model could not."""
    if harness is None:
        return []
    problems = []
    for column, candidate in candidates.items():
        key = f"{column}_tasks"
        if harness.names != file.lines.get(_LOSSES_ROW, {}).get(key, {}).get("names"):
            progress.status(f"tasks of {candidate.name}")
            try:
                measured = harness.measure(candidate.open())
            except RunError as error:
                problems.append(str(error))
            else:
                done = {"names": harness.names, "measures": measured}
                file.add([{"row": _LOSSES_ROW, key: done}])
    return problems


def _judge_all(
    columns: list[str],
    rows: list[PromptRow],
    file: AnswerFile,
    judge: Judge | None,
    progress: Progress,
) -> list[str]:
    """Ask the judge for what it has not judged; returns why it could not."""
    if judge is None:
        return []
    progress.status("asking the judge")
    by_number = {row.number: row for row in rows}
    answered = _answered(rows, columns, file)
    for column in columns:
        key = f"judge_{column}"

        def ask(number: int, column: str = column) -> float:
            row = by_number[number]
            assert row.question is not None
            text = file.lines[number][column]
            return judge.score(row.turns, text, row.question.reference)

        waiting = [row.number for row in answered if key not in file.lines[row.number]]
        problem = ask_all(waiting, ask, _keeping(file, key))
        if problem:
            return [_left(problem)]
    if AGAINST in columns:

        def choose(number: int) -> str:
            row, line = by_number[number], file.lines[number]
            assert row.question is not None
            return judge.prefer(row.turns, line[OWN], line[AGAINST], row.question.reference)

        waiting = [row.number for row in answered if "preferred" not in file.lines[row.number]]
        problem = ask_all(waiting, choose, _keeping(file, "preferred"))
        return [_left(problem)] if problem else []
    return []


def _left(problem: str) -> str:
    return f"judge: {problem}; the same command goes on with the rows that are left"


def _keeping(file: AnswerFile, key: str) -> Callable[[int, Any], None]:
    return lambda number, verdict: file.add([{"row": number, key: verdict}])


def _measured(
    candidates: Mapping[str, Candidate],
    sources: Sequence[Source],
    rows: list[PromptRow],
    file: AnswerFile,
    settings: EvaluationSettings,
) -> Evaluation:
    """Every measure of every model, with the values in the lines of the file."""
    answered = _answered(rows, list(candidates), file)
    measures, problems = [], []
    if settings.with_loss:
        measures += _losses(list(candidates), file.lines.get(_LOSSES_ROW, {}))
    for metric in settings.metrics:
        name = metric_name(metric)
        scored = {
            column: score(metric, _answers(column, answered, file), settings.schema)
            for column in candidates
        }
        is_min = isinstance(metric, FunctionMetric) and metric.mode == "min"
        measures.append(_measure(name, title_of(name), scored, "min" if is_min else "max"))
        for column, one in scored.items():
            _note(file, answered, column, name, one.values)
        errors = [one.error for one in scored.values() if one.error]
        problems += [f"{name}: {errors[0]}"] if errors else []
    measures += _of_tasks(list(candidates), file.lines.get(_LOSSES_ROW, {}))
    if settings.judge is not None:
        scored = {}
        for column in candidates:
            lines = [file.lines[row.number] for row in answered]
            values = [line.get(f"judge_{column}") for line in lines]
            present = [value for value in values if value is not None]
            overall = sum(present) / len(present) if present else None
            scored[column] = Scored(values, overall)
            _note(file, answered, column, "judge", values)
        measures.append(_measure("judge", f"judge {settings.judge.model}, 1 to 10", scored))
    for row in rows:
        line = file.lines.get(row.number)
        if line is not None and row.question is not None:
            line.update(prompt=row.turns, reference=row.question.reference)
    lines = [line for number, line in sorted(file.lines.items()) if number != _LOSSES_ROW]
    record = {
        "format": FORMAT,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {column: one.name for column, one in candidates.items()},
        "data": [source.label for source in sources],
        "rows": len(rows),
        "answered": len(answered),
        "bad": [line["error"] for line in lines if "error" in line][:20],
        "max_tokens": settings.answers.max_tokens,
        "measures": measures,
        "remarks": _remarks(measures, len(rows), len(answered), file.lines.get(_LOSSES_ROW, {})),
        "preferences": _preferences(lines, candidates, settings),
    }
    return Evaluation(record, lines, problems)


def _remarks(measures: list[Record], rows: int, answered: int, losses: Record) -> list[str]:
    """Which rows measures leave out."""
    without: dict[str, list[str]] = {}
    for one in measures:
        fact = ANSWER_METRICS.get(one["name"])
        left_out = answered - one["count"]
        if fact is not None and left_out:
            without.setdefault(f"{left_out:,} of {answered:,} rows {fact.without}", []).append(
                one["title"]
            )
    left_out = losses.get(OWN, [None, 0, 0])[2]
    if left_out:
        text = f"{left_out:,} of {rows:,} rows without an answer, or too long"
        without[text] = [LOSS, PERPLEXITY]
    return [f"not measured: {', '.join(titles)} of {text}" for text, titles in without.items()]


def _answered(rows: list[PromptRow], columns: list[str], file: AnswerFile) -> list[PromptRow]:
    """The rows that every model has answered: one may take prompts that another refuses."""
    return [row for row in rows if set(columns) <= file.lines.get(row.number, {}).keys()]


def _answers(column: str, rows: list[PromptRow], file: AnswerFile) -> list[Answered]:
    lines = [file.lines[row.number] for row in rows]
    return [
        Answered(row, line[column], tuple(line[f"{column}_ids"]))
        for row, line in zip(rows, lines, strict=True)
    ]


def _note(
    file: AnswerFile, rows: list[PromptRow], column: str, name: str, values: Sequence[float | None]
) -> None:
    """Note an answer's values in the row's line."""
    for row, value in zip(rows, values, strict=True):
        file.lines[row.number].setdefault(f"{column}_values", {})[name] = value


def _losses(columns: list[str], losses: Record) -> list[Record]:
    """The measures loss and perplexity."""
    means = {column: losses.get(column, [None])[0] for column in columns}
    perplexities = {
        column: None if mean is None else math.exp(min(mean, 700.0))
        for column, mean in means.items()
    }
    tokens = losses.get(OWN, [None, 0])[1]
    return [
        {"name": LOSS, "title": "loss", "values": means, "count": tokens, "mode": "min"},
        {
            "name": PERPLEXITY,
            "title": "perplexity",
            "values": perplexities,
            "count": tokens,
            "mode": "min",
        },
    ]


def _of_tasks(columns: list[str], kept: Record) -> list[Record]:
    """The measures of the harness' tasks."""
    by_name: dict[str, Record] = {}
    for column in columns:
        for one in kept.get(f"{column}_tasks", {}).get("measures", []):
            facts = {key: one[key] for key in ("name", "count", "mode")}
            empty = {**facts, "title": one["name"], "values": {}, "intervals": {}}
            measure = by_name.setdefault(one["name"], empty)
            measure["values"][column] = one["value"]
            measure["intervals"][column] = one["interval"]
    return list(by_name.values())


def _measure(name: str, title: str, scored: Mapping[str, Scored], mode: Mode = "max") -> Record:
    counts = [sum(value is not None for value in one.values) for one in scored.values()]
    failures = max(one.failures for one in scored.values())
    return {
        "name": name,
        "title": title,
        "values": {column: one.overall for column, one in scored.items()},
        "intervals": {column: interval(one.values) for column, one in scored.items()},
        "count": max(counts, default=0),
        "mode": mode,
        **({"failures": failures} if failures else {}),
    }


def interval(values: Sequence[float | None]) -> float | None:
    """Half of a mean's 95 % interval, by its standard error; None for fewer than two values."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return None
    mean = sum(present) / len(present)
    variance = sum((value - mean) ** 2 for value in present) / (len(present) - 1)
    return _DEVIATIONS * math.sqrt(variance / len(present))


def _preferences(
    lines: list[Record], candidates: Mapping[str, Candidate], settings: EvaluationSettings
) -> list[Record]:
    """Against another model: how many rows each wins, by the judge and by each measure."""
    if AGAINST not in candidates:
        return []
    counted = []
    if settings.judge is not None:
        verdicts = [line["preferred"] for line in lines if "preferred" in line]
        numbers = [verdicts.count(one) for one in ("first", "tie", "second")]
        counted.append(("judge", *numbers))
    for metric in settings.metrics:
        name = metric_name(metric)
        sign = 1 if isinstance(metric, str) or metric.mode == "max" else -1
        gains = [
            sign * (own - other)
            for line in lines
            if (own := line.get(f"{OWN}_values", {}).get(name)) is not None
            and (other := line.get(f"{AGAINST}_values", {}).get(name)) is not None
        ]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        counted.append((name, wins, len(gains) - wins - losses, losses))
    return [
        {"by": name, "wins": wins, "ties": ties, "losses": losses}
        for name, wins, ties, losses in counted
    ]


def _shown_line(line: Record) -> Record:
    """A row's line without what only the evaluation itself needs."""
    left_out = {f"{column}_ids" for column in (OWN, BASE, AGAINST)}
    return {key: value for key, value in line.items() if key not in left_out}


def write_record(record: Record) -> bytes:
    """The content of eval.json."""
    return f"{json.dumps(record, indent=2, ensure_ascii=False)}\n".encode(
        "utf-8", "backslashreplace"
    )
