"""Row formats of preference data: two answers to a prompt, or an answer with a label.

The prompt is a separate field, or the common beginning of two whole conversations.
"""

import math
import re
from typing import Any

from .fields import (
    alpaca_prompt,
    answered,
    conversation_of,
    required_text,
    sharegpt_turns,
    text_of,
    turn_of,
    turns_of,
)
from .reading import Row
from .shapes import Answer, Completion, LabelledExample, Message, PreferencePair, RowError

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def from_preference(row: Row) -> PreferencePair:
    """Read two answers to the same prompt.

    Raises:
        RowError: see `formats.normalise`.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"{name} is {'null' if name in row else 'missing'}; expected an answer")
    prompt = _prompt(row)
    if prompt is None or (isinstance(prompt, str) and _holds_prompt(row["chosen"])):
        chosen, rejected = _whole(row)
    else:
        chosen, rejected = (_after(prompt, row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal, so the row states no preference")
    return PreferencePair(chosen, rejected, _margin(row))


def _holds_prompt(answer: Any) -> bool:
    """True if an answer is a whole conversation, so the prompt field only repeats its prompt."""
    return isinstance(answer, list) and turns_of(answer, "chosen")[0]["role"] != "assistant"


def from_labelled(row: Row) -> LabelledExample:
    """Read an answer with its label: the last turn of a conversation, or the text after a prompt.

    Raises:
        RowError: see `formats.normalise`.
    """
    name = "label" if "label" in row else "kto_tag"
    label = row.get(name)
    if not (isinstance(label, bool) or (isinstance(label, int) and label in (0, 1))):
        raise RowError(f"{name} is {label!r}; expected true (a good answer) or false")
    return LabelledExample(_labelled_answer(row), bool(label))


def _labelled_answer(row: Row) -> Answer:
    if "messages" in row or "conversations" in row:
        messages = (
            turns_of(row["messages"], "messages") if "messages" in row else sharegpt_turns(row)
        )
        if messages[-1]["role"] != "assistant":
            raise RowError("the last message must be an assistant turn, because the label rates it")
        return conversation_of(messages, first_trained=len(messages) - 1)
    if "instruction" in row:
        return _after(alpaca_prompt(row), required_text(row, "output"), "output")
    name = "completion" if "completion" in row else "response"
    prompt = _prompt(row)
    if prompt is None or row.get(name) is None:
        raise RowError("prompt and completion (or response) are missing")
    return _after(prompt, row[name], name)


def _prompt(row: Row) -> list[Message] | str | None:
    """The prompt of the answers, as messages or as text; None if the answers contain it."""
    if "conversations" in row:
        return sharegpt_turns(row)
    if "instruction" in row:
        return alpaca_prompt(row)
    prompt = row.get("prompt")
    if prompt is None:
        return None
    return turns_of(prompt, "prompt") if isinstance(prompt, list) else text_of(prompt, "prompt")


def _after(prompt: list[Message] | str, value: Any, name: str) -> Answer:
    """The prompt followed by an answer, which is a text, a message or a list of messages."""
    if isinstance(value, str):
        answer = text_of(value, name)
        if isinstance(prompt, str):
            return Completion(prompt, answer)
        return conversation_of(answered(prompt, answer), first_trained=len(prompt))
    messages = [turn_of(value, name)] if isinstance(value, dict) else turns_of(value, name)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if messages[: len(prompt)] == prompt:  # the answer repeats it
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        raise RowError(f"{name} does not begin with an assistant turn")
    return conversation_of(prompt + messages, first_trained=len(prompt))


def _whole(row: Row) -> tuple[Answer, Answer]:
    """Read two conversations, or two texts, that both begin with the prompt."""
    texts = [row["chosen"], row["rejected"]]
    if any(isinstance(value, str) for value in texts):
        chosen, rejected = (required_text(row, name) for name in ("chosen", "rejected"))
        transcripts = _transcript(chosen), _transcript(rejected)
        if transcripts[0] is None or transcripts[1] is None:
            return _split_texts(chosen, rejected)
        return _split_turns(transcripts[0], transcripts[1])
    return _split_turns(turns_of(texts[0], "chosen"), turns_of(texts[1], "rejected"))


def _split_turns(chosen: list[Message], rejected: list[Message]) -> tuple[Answer, Answer]:
    cut = common_prefix(chosen, rejected)
    if cut == 0:
        raise RowError("chosen and rejected have no common prompt: their first messages differ")
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        if messages[cut]["role"] != "assistant":
            raise RowError(
                f"chosen and rejected first differ at message {cut + 1}, which in {name} has the "
                f"role {messages[cut]['role']}; expected an assistant turn after a common prompt"
            )
    return conversation_of(chosen, first_trained=cut), conversation_of(rejected, first_trained=cut)


def _split_texts(chosen: str, rejected: str) -> tuple[Answer, Answer]:
    cut = common_prefix(chosen, rejected)
    # The cut is between words; a space belongs to the word after it, as in most tokenizers.
    while (
        cut > 0 and chosen[cut - 1].isalnum() and (chosen[cut].isalnum() or rejected[cut].isalnum())
    ):
        cut -= 1
    while cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise RowError("chosen and rejected have no common prompt: they begin differently")
    answers = [Completion(chosen[:cut], text[cut:]) for text in (chosen, rejected)]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        text_of(answer.completion, f"{name} after the common prompt")
    return answers[0], answers[1]


def common_prefix(first: list[Message] | str, second: list[Message] | str) -> int:
    """Number of messages (or characters) that both begin with; at least one of each remains."""
    longest = min(len(first), len(second)) - 1
    pairs = zip(first[:longest], second[:longest], strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), longest)


def _transcript(text: str) -> list[Message] | None:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …"; None for other text."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip() or marks[0].group(1) != "Human":
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {
            "role": _SPEAKERS[mark.group(1)],
            "content": text_of(text[mark.end() : end].strip(), f"turn {number}"),
        }
        for number, (mark, end) in enumerate(zip(marks, ends, strict=True), start=1)
    ]


def _margin(row: Row) -> float | None:
    """By how much the chosen answer is better; None if the row has no margin or scores."""
    if row.get("margin") is not None:
        return _number(row["margin"], "margin")
    for names in _SCORES:
        if all(row.get(name) is not None for name in names):
            better, worse = (_number(row[name], name) for name in names)
            return better - worse
    return None


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{name} is {value!r}; expected a number")
    return float(value)
