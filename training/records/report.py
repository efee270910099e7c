"""report.html: a page about a run in a single file, without external resources.

The page is a pure function of the run's folder. Its template escapes all values, because prompts
and answers are untrusted text.
"""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ..common import formatting
from ..common.storage import Folder
from ..config.methods import title_of
from ..data.curation.funnel import funnel_facts
from ..data.prepared import remarks
from ..data.row_facts import describe_lengths
from .charts import Chart, Format, Histogram, Point, histogram, line_chart
from .labels import adapted_text, key_metrics, label_of
from .run_folder import (
    RECIPE_FILE,
    REPORT_FILE,
    Record,
    existing_run,
    is_match,
    read_metrics,
    read_recipe,
    read_rollouts,
    read_samples,
)

_COMMON = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "data_wait",
    "seconds",
    "exact_match",
}
"""Columns of metrics.jsonl that every method has."""
_SPECIAL = re.compile(
    r"((?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|\[/?INST\]|<</?SYS>>)+)"
)
"""What chat templates of the common families mark turns with."""
SAMPLES_OPEN = 4
"""Number of samples shown initially; a click shows the rest."""


@dataclass(frozen=True)
class Figure:
    """A key figure of the run; `before` is empty if there is no value to compare with."""

    label: str
    value: str
    before: str = ""


@dataclass(frozen=True)
class Answer:
    label: str
    text: str
    matches: bool


@dataclass(frozen=True)
class Sample:
    row: str
    prompt: str
    answers: list[Answer]

    @property
    def is_wrong(self) -> bool:
        """True if the tuned model's answer is not the reference."""
        labels = {answer.label: answer for answer in self.answers}
        return {"Reference", "Tuned"} <= labels.keys() and not labels["Tuned"].matches


Pairs = list[tuple[str, str]]


def write_report(folder: Folder) -> None:
    """Write report.html into a run's folder. Raises what `render_report` raises."""
    # UTF-8 cannot encode a lone surrogate in a model's answer
    folder.write(REPORT_FILE, render_report(folder).encode("utf-8", "replace"))


def render_report(folder: Folder) -> str:
    """Render the page from the current content of the run's folder.

    Raises:
        InputError: the folder contains no run, or one of its files is damaged.
    """
    run = existing_run(folder)
    metrics = read_metrics(folder)
    recipe_text, recipe = read_recipe(folder)
    samples = sorted(map(_sample, read_samples(folder)), key=lambda sample: not sample.is_wrong)
    loss, *small = _charts(metrics)
    return _template().render(
        css=asset("report.css"),
        script=asset("report.js"),
        status=str(run.get("status") or "unknown"),
        error=str(run.get("error") or "").strip(),
        name=str(run.get("name") or folder.name),
        subject=_subject(run, recipe),
        result=f"{folder / str(run['result'])}" if run.get("result") else "",
        progress=_progress(run),
        key_figures=_key_figures(run, metrics),
        loss=loss,
        charts=[chart for chart in small if chart is not None],
        matched=_matched(samples),
        folds=any(_SPECIAL.search(sample.prompt) for sample in samples),
        next_steps=_next_steps(folder, run, recipe),
        shown=samples[:SAMPLES_OPEN],
        more=samples[SAMPLES_OPEN:],
        rollouts=_rollouts(read_rollouts(folder)),
        data=data_statistics(run),
        lengths=_lengths(run),
        settings=_settings(recipe),
        recipe_text=recipe_text,
        facts=_facts(run),
        restarts=_restarts(run),
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    return page_environment().get_template("report.html")


def page_environment(*folders: Path) -> Environment:
    """The environment of all pages: it escapes all values.

    Args:
        folders: where templates lie, beside those of this folder.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["pieces"] = pieces
    return environment


@dataclass(frozen=True)
class Piece:
    """A part of a prompt or an answer."""

    text: str
    is_special: bool
    """True for special tokens, which the page folds."""


def pieces(text: str) -> list[Piece]:
    """A text, split at what looks like a chat template's special tokens."""
    parts = _SPECIAL.split(text)
    return [Piece(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def asset(name: str) -> Markup:
    """The report's style sheet or script, which the page includes without escaping."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _subject(run: Record, recipe: Record) -> Pairs:
    """(label, text) pairs under the title: the method and the base model."""
    method = str(run.get("method") or "")
    model = recipe.get("model") or {}
    adapter = recipe.get("adapter")
    done = [title_of(method)]
    if adapter:
        kind = "dora" if adapter.get("dora") else adapter.get("kind")
        done.append(f"{kind}, rank {adapter.get('rank')}")
    elif model.get("adapter"):
        done.append(f"from the adapter {model['adapter']}")
    elif recipe.get("freeze"):
        done.append("some layers of the base")
    elif recipe:
        done.append("every parameter")
    if model.get("quantize", "none") != "none":
        done.append(f"{model['quantize']} base")
    pairs = [("Method", " · ".join(part for part in done if part))]
    pairs.append(("Base model", str(model.get("base") or run.get("base") or "")))
    return [(label, text) for label, text in pairs if text]


def _progress(run: Record) -> tuple[str, float] | None:
    """('step 120 of 400', per cent) of a run that is not finished; None for a finished run."""
    step, total = run.get("step"), run.get("total_steps")
    if run.get("status") == "finished" or not formatting.is_number(step):
        return None
    if not formatting.is_number(total) or total <= 0:
        return f"step {formatting.count(step)}", 0.0
    text = f"step {formatting.count(step)} of {formatting.count(total)}"
    return text, min(100.0, 100 * step / total)


def _key_figures(run: Record, metrics: Sequence[Record]) -> list[Figure]:
    before, after = run.get("before") or {}, run.get("metrics") or {}
    shown: list[Figure] = []
    available = [key for key in key_metrics(after) if formatting.is_number(after[key])]
    shown += [_change(before, after, key) for key in available]
    if not available:
        # in the file, null means a loss that is not a finite number
        lines = [line["loss"] for line in metrics if "loss" in line]
        losses = [math.nan if loss is None else loss for loss in lines]
        first = {"loss": losses[0]} if len(losses) > 1 else {}
        last = {"loss": losses[-1] if losses else after.get("loss")}
        shown.append(_change(first, last, "loss"))
    shown.append(Figure("Tokens trained on", formatting.short_count(run.get("tokens"))))
    speeds = sorted(value for _, value in series_of(metrics, "tokens_per_second") if value)
    median = speeds[len(speeds) // 2] if speeds else None
    shown.append(Figure("Tokens per second", formatting.short_count(median)))
    shown.append(Figure("Wall time", formatting.duration(run.get("wall_seconds"))))
    return shown


def _change(before: Record, after: Record, key: str) -> Figure:
    metric, old = label_of(key), before.get(key)
    label = _capital("training loss" if key == "loss" else metric.title)
    previous = metric.write(old) if formatting.is_number(old) else ""
    return Figure(label, metric.write(after.get(key)), previous)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _charts(metrics: Sequence[Record]) -> list[Chart | None]:
    """The chart of the loss, then the small charts."""

    def chart(title: str, key: str, format: Format, **how: bool) -> Chart | None:
        held_out = series_of(metrics, f"eval_{key}")
        return line_chart(title, series_of(metrics, key), held_out=held_out, format=format, **how)

    return [
        chart("Loss", "loss", "loss", log=True),
        chart("Learning rate", "learning_rate", "exponent", from_zero=True, noisy=False),
        chart("Tokens per second", "tokens_per_second", "count", from_zero=True),
        chart("Gradient norm", "grad_norm", "loss", from_zero=True),
        *(
            chart(_capital(label_of(name).title), name, label_of(name).format)
            for name in _own_metrics(metrics)
        ),
    ]


def _own_metrics(metrics: Sequence[Record]) -> list[str]:
    """Names of the method's own metrics, in the order in which they are logged."""
    names = (name.removeprefix("eval_") for line in metrics for name in line)
    return [name for name in dict.fromkeys(names) if name not in _COMMON]


def series_of(metrics: Sequence[Record], key: str) -> list[Point]:
    """(step, value) pairs in order of steps; for a step that a restart repeated, the later line."""
    values = {
        line["step"]: line[key]
        for line in metrics
        if key in line and formatting.is_number(line.get("step"))
    }
    return [
        (float(step), float(value) if formatting.is_number(value) else None)
        for step, value in sorted(values.items())
    ]


def _sample(sample: Record) -> Sample:
    reference = sample.get("reference")
    answers = [Answer("Reference", str(reference), False)] if reference is not None else []
    for label, key in (("Base model", "before"), ("Tuned", "after")):
        text = sample.get(key)
        if text is not None:
            answers.append(Answer(label, str(text), is_match(str(text), reference)))
    return Sample(str(sample.get("row", "")), str(sample.get("prompt", "")), answers)


def _rollouts(lines: Sequence[Record]) -> list[Sample]:
    """The prompts of the first and of the last step kept, with their sampled completions."""
    steps = [line.get("step") for line in lines]
    grouped: dict[tuple[Any, str], list[Answer]] = {}
    for line in lines:
        if line.get("step") in (steps[0], steps[-1]):
            label = f"Reward {formatting.loss(line.get('reward'))}"
            if formatting.is_number(line.get("advantage")):
                label += f" · advantage {line['advantage']:+.2f}"
            answers = grouped.setdefault((line.get("step"), str(line.get("prompt", ""))), [])
            answers.append(Answer(label, str(line.get("completion", "")), False))
    return [
        Sample(formatting.count(step), prompt, answers)
        for (step, prompt), answers in grouped.items()
    ]


def _matched(samples: Sequence[Sample]) -> str:
    tuned = [answer for sample in samples for answer in sample.answers if answer.label == "Tuned"]
    if not tuned:
        return ""
    matching = sum(answer.matches for answer in tuned)
    order = " The others come first." if 0 < matching < len(tuned) else ""
    return f"{matching} of {len(tuned)} tuned answers match the reference exactly.{order}"


def _next_steps(folder: Folder, run: Record, recipe: Record) -> Pairs:
    """(what, command) for a run that is not being trained."""
    file = _quoted(folder / RECIPE_FILE)
    place = _quoted(folder)
    if run.get("status") in ("stopped", "failed"):
        return [("Go on", f"finray train {file}")]
    if run.get("status") != "finished":
        return []
    steps = [] if run.get("method") == "reward" else [("Talk to it", f"finray chat {place}")]
    merge = " --merge" if run.get("result") == "adapter" else ""
    counts = "max_steps" if (recipe.get("optim") or {}).get("max_steps") else "epochs"
    sort = " --sort eval_loss" if "eval_loss" in (run.get("metrics") or {}) else ""
    return [
        *steps,
        ("Export it", f"finray export {place} --to {_quoted(folder.name)}{merge}"),
        ("Train longer", f"finray train {file} --longer --set optim.{counts}=N"),
        ("All runs", f"finray runs --storage {_quoted(folder.parent)}{sort}"),
    ]


def _quoted(place: object) -> str:
    return shlex.quote(str(place))


def data_statistics(run: Record) -> list[tuple[str, Pairs]]:
    """Data statistics, as titled groups of (label, text) pairs."""
    data = run.get("data") or {}
    groups: list[tuple[str, Pairs]] = []
    for title, key in (("Training", "train"), ("Held-out", "eval")):
        if data.get(key):
            groups.append((title, _split(data[key])))
    dropped = data.get("dropped") or {}
    if formatting.is_number(data.get("rows_read")):
        rows = [("Read", formatting.count(data["rows_read"]))]
        rows += [(f"Dropped: {reason}", formatting.count(n)) for reason, n in dropped.items()]
        lengths = describe_lengths(data.get("length_quantiles") or {}, data.get("max_length", 0))
        rows += [("Lengths", lengths)] if lengths else []
        rows += [("Note", remark) for remark in remarks(data)]
        groups.insert(0, ("Rows", rows if dropped else [*rows, ("Dropped", "0")]))
    if run.get("streamed"):
        groups.append(("Streamed", _streamed(run["streamed"])))
    if data.get("funnel"):
        groups.append(("Curation", funnel_facts(data["funnel"])))
    sources = [
        (str(source.get("path", "")), _source(source, data.get("train") or {}))
        for source in data.get("sources") or []
    ]
    return [*groups, ("Sources", sources)] if sources else groups


def _streamed(streamed: Record) -> Pairs:
    """What the windows that were prepared add up to, and what the training data gave to them."""
    names = ("windows", "rows", "sequences", "documents", "tokens")
    pairs = [(_capital(name), formatting.count(streamed.get(name))) for name in names]
    dropped = streamed.get("dropped") or {}
    pairs += [(f"Dropped: {reason}", formatting.count(n)) for reason, n in dropped.items()]
    sources, total = streamed.get("sources") or {}, streamed.get("documents") or 0
    pairs += [
        (f"Documents of {path}", f"{formatting.count(n)} ({formatting.percent(n / total)})")
        for path, n in sources.items()
        if total
    ]
    return pairs


def _source(source: Record, train: Record) -> str:
    """A source's rows and format, and its share of the documents that are trained on."""
    text = f"{formatting.count(source.get('rows'))} rows"
    documents, total = source.get("documents"), train.get("documents")
    if documents and formatting.is_number(total) and documents != total:
        text += f", {formatting.percent(documents / total)} of the training documents"
    return f"{text}, {source.get('format', 'unknown format')}"


def _split(split: Record) -> Pairs:
    pairs = [
        ("Sequences", formatting.count(split.get("sequences"))),
        ("Documents", formatting.count(split.get("documents"))),
        ("Tokens", formatting.count(split.get("tokens"))),
        ("Trainable tokens", _trained(split)),
        ("Fill", formatting.percent(split.get("fill"))),
    ]
    return [(label, text) for label, text in pairs if text != formatting.MISSING]


def _trained(split: Record) -> str:
    trained, tokens = split.get("trainable_tokens"), split.get("tokens")
    text = formatting.count(trained)
    if not (formatting.is_number(trained) and formatting.is_number(tokens) and tokens):
        return text
    return f"{text} ({formatting.percent(trained / tokens)})"


def _lengths(run: Record) -> Histogram | None:
    lengths = (run.get("data") or {}).get("length_histogram") or {}
    return histogram(lengths.get("edges") or [], lengths.get("counts") or [])


def _settings(recipe: Record) -> list[tuple[str, Pairs]]:
    """The recipe's sections as titled (setting, value) pairs; settings outside a section first."""
    bare = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in recipe.items() if isinstance(value, dict)}
    groups = {"recipe": bare, **sections} if bare else sections
    return [
        (title, [(str(key), _setting(value)) for key, value in values.items()])
        for title, values in groups.items()
    ]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_setting(item) for item in value) if value else "none"
    if isinstance(value, dict):
        return ", ".join(
            _setting(item) if key == "path" else f"{key} {_setting(item)}"
            for key, item in value.items()
        )
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _facts(run: Record) -> Pairs:
    """Facts about the run: times, workers, device, parameters and versions."""
    parameters = run.get("parameters") or {}
    worlds = run.get("world_sizes") or []
    pairs: list[tuple[str, Any]] = [
        ("Started", _time(run.get("started_at"))),
        ("Finished", _time(run.get("finished_at"))),
        ("Last update", "" if run.get("finished_at") else _time(run.get("updated_at"))),
        ("Last saved step", formatting.count(run.get("last_saved_step"))),
        ("Save failed", run.get("save_error")),
        ("Ended early", run.get("over")),
        ("Workers", ", then ".join(str(size) for size in worlds)),
        ("Schedules", ", then ".join(f"to step {end:,}" for end in _schedules(run))),
        ("Skipped steps", ", ".join(map(_skipped, run.get("skipped") or []))),
        ("Device", run.get("device")),
        ("Compute type", run.get("dtype")),
        *_rehearsal(run),
        ("Parameters", formatting.count(parameters.get("total"))),
        ("Trainable", _trainable(parameters)),
        ("Adapted", _adapted(run.get("adapted"))),
        ("Prepared data", run.get("prepared")),
        *((run.get("versions") or {}).items()),
    ]
    return [(label, str(text)) for label, text in pairs if text and text != formatting.MISSING]


def _adapted(adapted: Any) -> str:
    rows = adapted if isinstance(adapted, dict) else {}
    is_complete = rows and all(isinstance(row, dict) and "of" in row for row in rows.values())
    return adapted_text(rows) if is_complete else ""


def _rehearsal(run: Record) -> list[tuple[str, Any]]:
    """What the rehearsal found, and what the run does about it."""
    rehearsal = run.get("rehearsal") or {}
    lines = rehearsal.get("lines")
    notes = lines if isinstance(lines, list) else []
    return [("Rehearsal", rehearsal.get("text")), *(("Rehearsal: note", note) for note in notes)]


def _skipped(step: Record) -> str:
    """A step that changed no weights, with the reason unless it was not finite."""
    reason = step.get("reason", "not finite")
    return str(step.get("step")) + ("" if reason == "not finite" else f" ({reason})")


def _time(iso: Any) -> str:
    """An ISO time as 2026-05-02 09:12:44 UTC; any other text unchanged."""
    try:
        time = datetime.fromisoformat(str(iso or ""))
    except ValueError:
        return str(iso or "")
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _schedules(run: Record) -> list[int]:
    """The last step of each learning-rate schedule of a run that was made longer."""
    ends = run.get("schedule") or []
    return ends if len(ends) > 1 else []


def _restarts(run: Record) -> Pairs:
    return [
        (formatting.count(restart.get("step")), str(restart.get("reason") or "unknown reason"))
        for restart in run.get("restarts") or []
    ]


def _trainable(parameters: Record) -> str:
    total, trainable = parameters.get("total"), parameters.get("trainable")
    if not (formatting.is_number(total) and formatting.is_number(trainable)) or not total:
        return ""
    return f"{formatting.count(trainable)} ({100 * trainable / total:.3g}%)"
