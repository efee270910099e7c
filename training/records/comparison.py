"""What differs between runs: their settings, what they started from, metrics, curves, answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import InputError
from ..common.formatting import is_number
from ..common.storage import Folder
from .charts import Chart, Point, overlay
from .labels import key_metrics, label_of
from .report import series_of
from .run_folder import (
    Record,
    existing_run,
    flat,
    is_match,
    read_metrics,
    read_recipe,
    read_samples,
)

MOST_RUNS = 6
"""As many as there are colours that can be told apart."""
_PLACES = ("name", "storage")
"""Settings that differ between any two runs."""
_NOT_COMPARED = ("step", "epoch", "tokens", "seconds", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class ComparedAnswers:
    """A held-out prompt, and how each run answers it."""

    prompt: str
    reference: str | None
    answers: list[str | None]
    """Of each run after its training; None where it did not answer this prompt."""

    @property
    def matches(self) -> list[bool]:
        """Whether each answer is the reference."""
        return [is_match(answer, self.reference) for answer in self.answers]

    @property
    def answers_differ(self) -> bool:
        """True if some answers are right and some wrong, or, without a reference, differ."""
        given = [answer for answer in self.answers if answer is not None]
        if self.reference is None:
            return len(set(given)) > 1
        return len(set(self.matches)) > 1


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; each list has a value of each run, in their order."""

    names: list[str]
    """Their names; their folders where two have the same name."""
    facts: dict[str, list[str]]
    """Status, method, base, steps and tokens."""
    settings: dict[str, list[Any]]
    """Settings that differ, by dotted key; None where a recipe does not have one."""
    inputs: dict[str, list[Any]]
    """What they started from, where that differs: prepared data, files, versions."""
    metrics: dict[str, list[float | None]]
    """Final values; the key metrics come first."""
    before: list[Record]
    """The base's values before training."""
    curves: dict[str, list[list[Point]]]
    """(step, value) of each metric that was logged."""
    answers: list[ComparedAnswers]
    """Those that tell the runs apart come first."""

    def charts(self) -> list[Chart]:
        """Each metric's curves over one another."""
        charts = (
            overlay(
                label_of(name).title[:1].upper() + label_of(name).title[1:],
                list(zip(self.names, series, strict=True)),
                format=label_of(name).format,
            )
            for name, series in self.curves.items()
        )
        return [chart for chart in charts if chart is not None]

    def as_json(self) -> Record:
        """The comparison as values of JSON."""
        return {
            "runs": self.names,
            "facts": self.facts,
            "settings": self.settings,
            "inputs": self.inputs,
            "metrics": self.metrics,
            "before": self.before,
            "curves": self.curves,
            "answers": [
                {"prompt": item.prompt, "reference": item.reference, "answers": item.answers}
                for item in self.answers
            ],
        }


def compare_runs(folders: Sequence[Folder]) -> Comparison:
    """Compare the runs in these folders.

    Raises:
        InputError: fewer than two runs or more than six, the same one twice, or a damaged file.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise InputError(f"runs compare: expected 2 to {MOST_RUNS} runs, found {len(folders)}")
    twice = {str(folder) for folder in folders if list(folders).count(folder) > 1}
    if twice:
        raise InputError(f"{min(twice)} is given twice; name another run")
    records = [existing_run(folder) for folder in folders]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    lines = [read_metrics(folder) for folder in folders]
    return Comparison(
        names=names,
        facts=_facts(records),
        settings=_settings([read_recipe(folder)[1] for folder in folders]),
        inputs=_differing([_inputs(record) for record in records]),
        metrics=_metrics(records),
        before=[record.get("before") or {} for record in records],
        curves=_curves(lines),
        answers=_answers([read_samples(folder) for folder in folders]),
    )


def _facts(records: Sequence[Record]) -> dict[str, list[str]]:
    def steps(record: Record) -> str:
        return f"{record.get('step')} of {record.get('total_steps')}"

    facts = {
        name: [str(record.get(key) or "") for record in records]
        for name, key in (("Status", "status"), ("Method", "method"), ("Base model", "base"))
    }
    return {**facts, "Steps": [steps(record) for record in records]}


def _settings(recipes: Sequence[Record]) -> dict[str, list[Any]]:
    settings = [
        flat({key: value for key, value in recipe.items() if key not in _PLACES})
        for recipe in recipes
    ]
    return _differing(
        [
            {key: _shown_setting(key, value) for key, value in each.items() if value != []}
            for each in settings
        ]
    )


def _shown_setting(key: str, value: Any) -> Any:
    """A setting; the text of a file of the user's functions as its hash."""
    if key.endswith(".source") and isinstance(value, str) and "\n" in value:
        return f"sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]}"
    return value


def _inputs(record: Record) -> Record:
    """What a run started from, by a name that a person reads."""
    files = record.get("identity") or {}
    return {
        "prepared data": record.get("prepared"),
        "workers": record.get("world_sizes"),
        "device": record.get("device"),
        **{name: json.dumps(content, sort_keys=True) for name, content in files.items()},
        **{f"{name} (version)": value for name, value in (record.get("versions") or {}).items()},
    }


def _differing(values: Sequence[Record]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for each in values for key in each)
    rows = {key: [each.get(key) for each in values] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _metrics(records: Sequence[Record]) -> dict[str, list[float | None]]:
    values = [record.get("metrics") or {} for record in records]
    names = [*key_metrics(*values), *(["loss"] if any("loss" in each for each in values) else [])]
    names += sorted({key for each in values for key in each} - set(names))
    return {
        name: [each[name] if is_number(each.get(name)) else None for each in values]
        for name in names
    }


def _curves(lines: Sequence[Sequence[Record]]) -> dict[str, list[list[Point]]]:
    keys = dict.fromkeys(key for each in lines for line in each for key in line)
    first = [key for key in ("loss", "eval_loss") if key in keys]
    others = [key for key in keys if key not in (*first, *_NOT_COMPARED)]
    return {key: [series_of(each, key) for each in lines] for key in (*first, *others)}


def _answers(samples: Sequence[Sequence[Record]]) -> list[ComparedAnswers]:
    """The prompts that at least two runs answered."""
    by_prompt = [{str(sample.get("prompt")): sample for sample in each} for each in samples]
    prompts = dict.fromkeys(prompt for each in by_prompt for prompt in each)
    compared = []
    for prompt in prompts:
        given = [each.get(prompt, {}) for each in by_prompt]
        answers = [None if (text := one.get("after")) is None else str(text) for one in given]
        references = [one["reference"] for one in given if one.get("reference") is not None]
        if sum(answer is not None for answer in answers) > 1:
            reference = str(references[0]) if references else None
            compared.append(ComparedAnswers(prompt, reference, answers))
    return sorted(compared, key=lambda item: not item.answers_differ)
