"""The examples that a method learns from: which rows it accepts, and how it converts them.

The table is keyed by `learns_from` of the method's settings, not by the method's kind.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.method_facts import LearnsFrom
from ..config.methods import METHODS
from .shapes import (
    SHAPES,
    Completion,
    Conversation,
    Example,
    LabelledExample,
    PreferencePair,
    Question,
    RowError,
    Text,
    question_of,
)

Row = dict[str, Any]


def _unchanged(example: Example) -> Example:
    return example


def _undivided(row: Example) -> tuple[Example, ...]:
    return (row,)


def _no_extra(_: Row, __: Example) -> None:
    return None


@dataclass(frozen=True)
class ExampleRules:
    """How the rows of a data set are converted to the examples of a method."""

    shapes: tuple[type[Example], ...]
    """Shapes that an example may have."""
    split: Callable[[Example], tuple[Example, ...]] = _undivided
    """Returns the examples in a row of the data."""
    adapt: Callable[[Example], Example] = _unchanged
    """Converts an example to the shape that is tokenised."""
    extra: Callable[[Row, Example], Row | None] = _no_extra
    """Returns the JSON object to store with an example, from the raw row and the example."""


def _labelled_answers(row: Example) -> tuple[Example, ...]:
    """Split a preference pair into a good answer and a bad one."""
    if isinstance(row, PreferencePair):
        return LabelledExample(row.chosen, True), LabelledExample(row.rejected, False)
    return (row,)


def _label(_: Row, example: Example) -> Row:
    assert isinstance(example, LabelledExample)
    return {"label": example.label}


def _margin(_: Row, example: Example) -> Row | None:
    assert isinstance(example, PreferencePair)
    return None if example.margin is None else {"margin": example.margin}


_ANSWERS = frozenset({"completion", "response", "prompts", "completions", "completion_ids"})
_FORMATS = (
    ("messages", frozenset({"messages"})),
    ("conversations", frozenset({"conversations", "system"})),
    ("instruction", frozenset({"instruction", "input", "output", "history", "system"})),
    ("prompt", frozenset({"prompt"})),
)
"""Each format's own columns, by the column that identifies the format."""


def _question(example: Example) -> Question:
    if isinstance(example, Question):
        return example
    assert isinstance(example, Conversation | Completion)
    question = question_of(example)
    if not question.prompt:
        raise RowError("there is no prompt before the last assistant turn")
    return question


def _reward_columns(row: Row, example: Example) -> Row:
    """The arguments of reward functions: the prompt, and the row's other columns."""
    question = _question(example)
    own = next((columns for name, columns in _FORMATS if name in row), frozenset())
    columns = {name: row[name] for name in row if name not in own | _ANSWERS}
    columns["reference"] = question.reference
    prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
    # Values that JSON lacks, such as a date from a Parquet file, become text.
    values: Row = json.loads(json.dumps({"prompt": prompt, "columns": columns}, default=str))
    return values


EXAMPLES: dict[LearnsFrom, ExampleRules] = {
    "documents": ExampleRules((Conversation, Completion, Text)),
    "pairs": ExampleRules((PreferencePair,)),
    "graded pairs": ExampleRules((PreferencePair,), extra=_margin),
    "labelled answers": ExampleRules((LabelledExample,), split=_labelled_answers, extra=_label),
    "prompts": ExampleRules(
        (Conversation, Completion, Question), adapt=_question, extra=_reward_columns
    ),
}


def rules_of(kind: str) -> ExampleRules:
    """The rules of a method, by its kind."""
    return EXAMPLES[METHODS[kind].learns_from]


def examples_of(row: Example, kind: str) -> tuple[Example, ...]:
    """The examples that a method learns from in a row of the data.

    Raises:
        RowError: the method does not learn from rows of this shape.
    """
    rules = rules_of(kind)
    examples = rules.split(row)
    for example in examples:
        if not isinstance(example, rules.shapes):
            suitable = [name for name in METHODS if isinstance(example, rules_of(name).shapes)]
            raise RowError(
                f"method {kind} learns from {_names(rules.shapes)}, but this row is one of the "
                f"{SHAPES[type(example)]}; use method {' or '.join(suitable)}, or other data"
            )
    return examples


def _names(shapes: tuple[type[Example], ...]) -> str:
    return " or ".join(SHAPES[shape] for shape in shapes)
