"""Online methods: the model answers prompts itself, and learns from what its answers are worth.

GRPO: Shao et al., 2024, https://arxiv.org/abs/2402.03300
RLOO: Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740
"""

import json
from typing import TYPE_CHECKING

from ..config.metric import Metric
from ..data.examples import Method, Row
from ..data.shapes import (
    Completion,
    Conversation,
    Normalised,
    Question,
    RowError,
    question_of,
)

if TYPE_CHECKING:
    from ..objectives.objective import Objective, Setup

_ANSWERS = frozenset({"completion", "response", "prompts", "completions", "completion_ids"})
_FORMATS = (
    ("messages", frozenset({"messages"})),
    ("conversations", frozenset({"conversations", "system"})),
    ("instruction", frozenset({"instruction", "input", "output", "history", "system"})),
    ("prompt", frozenset({"prompt"})),
)
"""The columns that a format is made of, by the one that tells it."""


def _question(row: Normalised) -> Question:
    if isinstance(row, Question):
        return row
    assert isinstance(row, Conversation | Completion)
    question = question_of(row)
    if not question.prompt:
        raise RowError("there is no prompt before the last assistant turn")
    return question


def _extra(row: Row, normalised: Normalised) -> Row:
    """The prompt as reward functions get it, and the columns beside it."""
    question = _question(normalised)
    own = next((columns for name, columns in _FORMATS if name in row), frozenset())
    columns = {name: row[name] for name in row if name not in own | _ANSWERS}
    columns["reference"] = question.reference
    prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
    # What JSON does not have, such as a date of a Parquet file, becomes text.
    values: Row = json.loads(json.dumps({"prompt": prompt, "columns": columns}, default=str))
    return values


def _grpo(setup: "Setup") -> "Objective":
    from ..rl.grpo import GrpoObjective

    return GrpoObjective(setup)


def _rloo(setup: "Setup") -> "Objective":
    from ..rl.rloo import RlooObjective

    return RlooObjective(setup)


_MEASURES = ("reward", "reward_std", "completion_length", "truncated", "kl", "clipped")
_SHAPES = (Conversation, Completion, Question)
_WATCHED = Metric("eval_reward", "max")

GRPO = Method(
    shapes=_SHAPES,
    objective=_grpo,
    measures=_MEASURES,
    watched=_WATCHED,
    adapt=_question,
    extra=_extra,
)
RLOO = Method(
    shapes=_SHAPES,
    objective=_rloo,
    measures=_MEASURES,
    watched=_WATCHED,
    adapt=_question,
    extra=_extra,
)
