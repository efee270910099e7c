"""The examples that a method learns from: which rows it takes, and what it makes of them.

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
    """How rows become the examples of a method."""

    shapes: tuple[type[Example], ...]
    """Shapes of an example."""
    split: Callable[[Example], tuple[Example, ...]] = _undivided
    """The examples in a row of the data."""
    adapt: Callable[[Example], Example] = _unchanged
    """An example as it is tokenised."""
    extra: Callable[[Row, Example], Row | None] = _no_extra
    """JSON object kept beside an example's tokens, from the row as read and the example."""


def _labelled_answers(row: Example) -> tuple[Example, ...]:
    """A pair is a good answer and a bad one."""
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
    """The prompt as reward functions get it, and the columns beside it."""
    question = _question(example)
    own = next((columns for name, columns in _FORMATS if name in row), frozenset())
    columns = {name: row[name] for name in row if name not in own | _ANSWERS}
    columns["reference"] = question.reference
    prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
    # What JSON does not have, such as a date of a Parquet file, becomes text.
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
    """What a method learns from in a row of the data.

    Raises:
        RowError: for a row of a shape that it does not learn from.
    """
    rules = rules_of(kind)
    examples = rules.split(row)
    for example in examples:
        if not isinstance(example, rules.shapes):
            others = [other for other in METHODS if isinstance(example, rules_of(other).shapes)]
            raise RowError(
                f"method {kind} learns from {_names(rules.shapes)}, and this is one of the "
                f"{SHAPES[type(example)]}, for method {' or '.join(others)}"
            )
    return examples


def _names(shapes: tuple[type[Example], ...]) -> str:
    return " or ".join(SHAPES[shape] for shape in shapes)
