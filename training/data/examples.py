"""The examples that a method learns from: which rows it accepts, and how it converts them.

The table is keyed by `learns_from` of the method's settings, not by the method's kind.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config.method_facts import LearnsFrom
from ..config.methods import METHODS
from .fields import number_of
from .rows import Row
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


def _unchanged(example: Example) -> Example:
    return example


def _undivided(row: Example) -> tuple[Example, ...]:
    return (row,)


def _no_extra(_: Row, __: Example, ___: Sequence[str]) -> None:
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
    extra: Callable[[Row, Example, Sequence[str]], Row | None] = _no_extra
    """Returns the JSON object to store with an example, from the raw row, the example and the
    `columns` of the method's settings; raises a RowError if they are not usable."""


def _labelled_answers(row: Example) -> tuple[Example, ...]:
    """Split a preference pair into a good answer and a bad one."""
    if isinstance(row, PreferencePair):
        return LabelledExample(row.chosen, True), LabelledExample(row.rejected, False)
    return (row,)


def _label(_: Row, example: Example, __: Sequence[str]) -> Row:
    assert isinstance(example, LabelledExample)
    return {"label": example.label}


def _margin(row: Row, _: Example, columns: Sequence[str]) -> Row | None:
    """The column's number, or the first column's minus the second's."""
    if not columns:
        return None
    better, *worse = (number_of(row, name) for name in columns)
    return {"margin": better - sum(worse)}


_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""The other arguments of reward functions."""
_FORMATS = (
    ("messages", frozenset({"messages"})),
    ("conversations", frozenset({"conversations", "system"})),
    ("instruction", frozenset({"instruction", "input", "output", "history", "system"})),
    ("prompt", frozenset({"prompt", "completion", "response"})),
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


def _reward_columns(row: Row, example: Example, _: Sequence[str]) -> Row:
    """The arguments of reward functions: the prompt, and the row's other columns.

    `reference` is the row's own column, else the answer that the row has.
    """
    question = _question(example)
    own = _format_columns(row, example) | _ARGUMENTS
    columns = {name: value for name, value in row.items() if name not in own}
    if columns.get("reference") is None:
        columns["reference"] = question.reference
    prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
    # Values that JSON lacks, such as a date from a Parquet file, become text.
    values: Row = json.loads(json.dumps({"prompt": prompt, "columns": columns}, default=str))
    return values


def _format_columns(row: Row, example: Example) -> frozenset[str]:
    """The columns from which the example was read."""
    if isinstance(example, Question):  # it has no answer, so no column is one
        return frozenset({"prompt"})
    return next((columns for name, columns in _FORMATS if name in row), frozenset())


def asked_of(row: Row, example: Example) -> Row:
    """What measures of answers read of a row: `prompt` and `columns`, as reward functions get them,
    and `calls`: those of its own answer, [{name, arguments}], None if it offers no tools.

    Args:
        row: the row.
        example: its example, or one of them; of a pair the chosen answer counts.
    """
    if isinstance(example, PreferencePair):
        example = example.chosen
    elif isinstance(example, LabelledExample):
        example = example.answer
    tools = isinstance(example, Conversation | Question) and bool(example.context.tools)
    return {
        **(_reward_columns(row, example, ()) or {}),
        "calls": _calls(example) if tools else None,
    }


def _calls(example: Example) -> list[Row]:
    """The calls in the answer of a conversation."""
    if not isinstance(example, Conversation):
        return []
    answers = [message for message in example.messages if message["role"] == "assistant"]
    return [call["function"] for call in answers[-1].get("tool_calls", ())]


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


def suits(shape: type[Example], kind: str) -> bool:
    """True if a method learns from rows of a shape."""
    rules = rules_of(kind)
    is_divided = rules.split is not _undivided and shape is PreferencePair
    return shape in rules.shapes or is_divided


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
