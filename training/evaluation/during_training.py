"""Measures of the answers that a run gives to held-out prompts while it trains."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..common.formatting import one_line
from ..config.eval_metrics import MetricChoice, metric_name
from ..data.prepared import Sample
from ..data.shapes import Question
from ..models import import_peft  # noqa: F401 - before what loads peft
from ..models.devices import random_state
from ..models.generation import Generated
from .prompts import PromptRow
from .scores import Answered, score

_SHOWN = 400
"""Characters of an error."""


@dataclass(frozen=True)
class AnswerMeasures:
    """Measures of some answers."""

    values: dict[str, float] = field(default_factory=dict)
    """By the name in metrics.jsonl, such as eval_exact_match; those without a value are absent."""
    problems: tuple[str, ...] = ()
    """A text for each measure that could not be computed for all answers."""


def measure_answers(
    metrics: Sequence[MetricChoice],
    samples: Sequence[Sample],
    texts: Sequence[str],
    completions: Sequence[Generated],
    device: torch.device,
) -> AnswerMeasures:
    """Measure answers; the user's functions change no random numbers of the training.

    Args:
        metrics: the recipe's.
        samples: the prompts.
        texts: the answers.
        completions: their tokens.
        device: the device of the training.
    """
    answers = [
        Answered(_row(sample), text, tuple(completion.ids))
        for sample, text, completion in zip(samples, texts, completions, strict=True)
    ]
    values, problems = {}, []
    with random_state(device):
        for metric in metrics:
            scored = score(metric, answers)
            if scored.overall is not None:
                values[f"eval_{metric_name(metric)}"] = scored.overall
            if scored.error:
                error = one_line(scored.error)[:_SHOWN]
                problems.append(f"eval.metrics: no value for {scored.failures} answers: {error}")
    return AnswerMeasures(values, tuple(problems))


def _row(sample: Sample) -> PromptRow:
    asked = json.loads(sample.asked)
    prompt = asked["prompt"] if isinstance(asked["prompt"], str) else tuple(asked["prompt"])
    return PromptRow(
        sample.row + 1,
        f"row {sample.row}",
        Question(prompt, sample.reference),
        calls=asked["calls"],
        columns=asked["columns"],
    )
