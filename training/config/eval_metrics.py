"""The metrics of answers that `finray eval` and `eval.metrics` know, and the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from ..common.errors import InputError
from .metric import Metric, Mode
from .rewards import FunctionReward

AnswerMetricName = Literal[
    "exact_match",
    "token_f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "chrf",
    "json_valid",
    "tool_calls",
]


@dataclass(frozen=True)
class AnswerMetric:
    """What is known of a metric without computing it."""

    title: str
    needs_reference: bool = True
    """True if a row without a reference answer has no value."""
    package: str = ""
    """The package that computes it; empty for none beside finray's own."""
    module: str = ""
    """The module that is imported from it."""
    largest: float = 1.0
    """The value of a perfect answer."""
    without: str = "without a reference answer"
    """Which rows have no value."""


ANSWER_METRICS: dict[str, AnswerMetric] = {
    "exact_match": AnswerMetric("exact match"),
    "token_f1": AnswerMetric("token F1"),
    "rouge1": AnswerMetric("ROUGE-1", package="rouge-score", module="rouge_score"),
    "rouge2": AnswerMetric("ROUGE-2", package="rouge-score", module="rouge_score"),
    "rougeL": AnswerMetric("ROUGE-L", package="rouge-score", module="rouge_score"),
    "bleu": AnswerMetric("BLEU", package="sacrebleu", module="sacrebleu", largest=100.0),
    "chrf": AnswerMetric("chrF", package="sacrebleu", module="sacrebleu", largest=100.0),
    "json_valid": AnswerMetric(
        "valid JSON", needs_reference=False, without="whose schema is none, or refers elsewhere"
    ),
    "tool_calls": AnswerMetric("tool calls", without="that offer no tools"),
}
"""Each metric by its name; of all of them a higher value is better."""


class FunctionMetric(FunctionReward):
    """A Python function as a metric, with the signature of reward functions."""

    file: str
    """A Python file and a function in it, "score.py:json_valid", relative to the recipe's folder.
    The function takes `prompts, completions, completion_ids, **columns`, as reward functions do,
    and returns a float (or None: not applicable) for each completion."""
    mode: Mode = "max"
    """max if a higher value is better, else min."""


def _kind(value: Any) -> str:
    """A function by its only required key, else a name."""
    is_function = isinstance(value, FunctionMetric | dict)
    is_name = isinstance(value, str) and value in ANSWER_METRICS
    return "file" if is_function else "name" if is_name else ""


MetricChoice = Annotated[
    Annotated[AnswerMetricName, Tag("name")] | Annotated[FunctionMetric, Tag("file")],
    Discriminator(
        _kind,
        custom_error_type="metric",
        custom_error_message=f"a metric is one of {', '.join(ANSWER_METRICS)} and "
        '{file: "score.py:function"}',
    ),
]


def metric_name(metric: MetricChoice) -> str:
    """The name of a metric in tables and files."""
    return metric if isinstance(metric, str) else metric.name


def answer_metrics(metrics: Sequence[MetricChoice]) -> dict[str, Metric]:
    """The metrics that a run reports, by name: eval_exact_match, …"""
    modes: dict[str, Mode] = {
        metric_name(metric): "max" if isinstance(metric, str) else metric.mode for metric in metrics
    }
    return {f"eval_{name}": Metric(f"eval_{name}", mode) for name, mode in modes.items()}


def check_installed(metrics: Sequence[MetricChoice], where: str) -> None:
    """Refuse a metric whose package is not installed.

    Args:
        metrics: those that are asked for.
        where: the option or key that names them.

    Raises:
        InputError: with the command that installs it.
    """
    from importlib.util import find_spec

    for metric in metrics:
        if isinstance(metric, str):
            fact = ANSWER_METRICS[metric]
            if fact.module and find_spec(fact.module) is None:
                raise InputError(
                    f"{where}: {metric} needs the package {fact.package}; install it: "
                    "pip install 'finray[eval]'"
                )


def metric_of(text: str, folder: Path, where: str) -> MetricChoice:
    """A metric as a command names it: a known name, or "score.py:function".

    Raises:
        InputError: there is no such metric, or the file cannot be used.
    """
    if text in ANSWER_METRICS:
        return text  # type: ignore[return-value]
    if ":" in text:
        return FunctionMetric(file=text).resolve(folder, where)
    raise InputError(
        f"{where}: there is no metric {text}; there are {', '.join(ANSWER_METRICS)}, and a "
        "function of your own as score.py:function"
    )
