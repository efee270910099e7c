"""Row formats of preference data: two answers to a prompt, or an answer with a label.

The prompt is a separate field, or the common beginning of two whole conversations.
"""

import re
from collections.abc import Sequence
from typing import Any

from .fields import (
    alpaca_prompt,
    answered,
    conversation_of,
    is_for_chat,
    required_text,
    text_of,
)
from .messages import are_equal, turn_of, turns_of, with_lists
from .rows import Row, shown
from .scalars import label_of
from .shapes import Answer, Completion, LabelledExample, Message, PreferencePair, RowError

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]?")
_ANSWERS = ("chosen", "rejected")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def from_preference(row: Row) -> PreferencePair:
    """Read two answers to the same prompt.

    Raises:
        RowError: see `formats.normalise`.
    """
    row = with_lists(_with_plain_names(row))
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"{name} is {'null' if name in row else 'missing'}; expected an answer")
    prompt = None if _repeats_prompt(row) else _prompt(row)
    if prompt is None:
        chosen, rejected = _whole(row)
    else:
        chosen, rejected = (answer_to(row, prompt, row[name], name) for name in _ANSWERS)
    if chosen.contents == rejected.contents:
        raise RowError("chosen and rejected are equal, so the row states no preference")
    return PreferencePair(chosen, rejected)


def _with_plain_names(row: Row) -> Row:
    """The row with `chosen` for `chosen_messages`, where it has no other."""
    names = [name for name in _ANSWERS if row.get(name) is None]
    return {**row, **{n: row[f"{n}_messages"] for n in names if f"{n}_messages" in row}}


def _repeats_prompt(row: Row) -> bool:
    """True if the answers are whole conversations, beside which a prompt of text is not needed."""
    if "conversations" in row or "instruction" in row or isinstance(row.get("prompt"), list):
        return False
    chosen = row["chosen"]
    return isinstance(chosen, list) and turns_of(chosen, "chosen")[0]["role"] != "assistant"


def from_labelled(row: Row) -> LabelledExample:
    """Read an answer with its label: the last turn of a conversation, or the text after a prompt.

    Raises:
        RowError: see `formats.normalise`.
    """
    name, value = _label(row)
    label = label_of(value)
    if label is None:
        raise RowError(f"{name} is {shown(value)}; expected true (a good answer) or false")
    return LabelledExample(_labelled_answer(row), label)


def is_rated(row: Row) -> bool:
    """True if the row's label says that its answer is good, or that it is bad."""
    return label_of(_label(row)[1]) is not None


def _label(row: Row) -> tuple[str, Any]:
    name = "label" if "label" in row else "kto_tag"
    return name, row.get(name)


def _labelled_answer(row: Row) -> Answer:
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        messages = turns_of(row[name], name)
        if messages[-1]["role"] != "assistant":
            raise RowError("the last message must be an assistant turn, because the label rates it")
        return conversation_of(row, messages, first_trained=len(messages) - 1)
    if "instruction" in row:
        return answer_to(row, alpaca_prompt(row), required_text(row, "output"), "output")
    name = "completion" if "completion" in row else "response"
    prompt = _prompt(row)
    if prompt is None or row.get(name) is None:
        raise RowError("prompt and completion (or response) are missing")
    return answer_to(row, prompt, row[name], name)


def _prompt(row: Row) -> list[Message] | str | None:
    """The prompt of the answers, as messages or as text; None if the answers contain it."""
    if "conversations" in row:
        return turns_of(row["conversations"], "conversations")
    if "instruction" in row:
        return alpaca_prompt(row)
    if row.get("prompt") is not None or row.get("messages") is None:
        return prompt_of(row)
    messages = turns_of(row["messages"], "messages")
    return None if messages[-1]["role"] == "assistant" else messages


def prompt_of(row: Row) -> list[Message] | str | None:
    """The column `prompt`: messages, also where a system prompt or tools stand beside its text; or
    text that is used verbatim. None without one.

    Raises:
        RowError: it is neither messages nor text.
    """
    prompt = row.get("prompt")
    if prompt is None:
        return None
    if isinstance(prompt, list):
        return turns_of(prompt, "prompt")
    text = text_of(prompt, "prompt")
    return [{"role": "user", "content": text}] if is_for_chat(row) else text


def answer_to(row: Row, prompt: list[Message] | str, value: Any, name: str) -> Answer:
    """The prompt followed by an answer, which is a text, a message or a list of messages.

    Raises:
        RowError: it is none of these, or does not begin with an assistant turn.
    """
    if isinstance(value, str):
        answer = text_of(value, name)
        if isinstance(prompt, str):
            return Completion(prompt, answer)
        return conversation_of(row, answered(prompt, answer), first_trained=len(prompt))
    messages = [turn_of(value, name)] if isinstance(value, dict) else turns_of(value, name)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if all(map(are_equal, messages, prompt)) and len(messages) > len(prompt):  # it is repeated
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        raise RowError(f"{name} does not begin with an assistant turn")
    return conversation_of(row, prompt + messages, first_trained=len(prompt))


def _whole(row: Row) -> tuple[Answer, Answer]:
    """Read two conversations, or two texts, that both begin with the prompt."""
    texts = [row["chosen"], row["rejected"]]
    if any(isinstance(value, str) for value in texts):
        chosen, rejected = (required_text(row, name) for name in ("chosen", "rejected"))
        transcripts = _transcript(chosen), _transcript(rejected)
        if transcripts[0] is None or transcripts[1] is None:
            if row.get("messages") is not None or is_for_chat(row):
                raise RowError(
                    "chosen and rejected are texts without a prompt, so nothing can be done with "
                    "messages, system and tools beside them; give the prompt as a column of its own"
                )
            return _split_texts(chosen, rejected)
        return _split_turns(row, transcripts[0], transcripts[1])
    return _split_turns(row, turns_of(texts[0], "chosen"), turns_of(texts[1], "rejected"))


def _split_turns(row: Row, chosen: list[Message], rejected: list[Message]) -> tuple[Answer, Answer]:
    cut = common_prefix(chosen, rejected)
    if cut == 0:
        raise RowError("chosen and rejected have no common prompt: their first messages differ")
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        if messages[cut]["role"] != "assistant":
            raise RowError(
                f"chosen and rejected first differ at message {cut + 1}, which in {name} has the "
                f"role {messages[cut]['role']}; expected an assistant turn after a common prompt"
            )
    return conversation_of(row, chosen, cut), conversation_of(row, rejected, cut)


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


def common_prefix(first: Sequence[Message | str], second: Sequence[Message | str]) -> int:
    """Number of messages (or characters) that both begin with; at least one of each remains."""
    longest = min(len(first), len(second)) - 1
    pairs = zip(first[:longest], second[:longest], strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if not _same(a, b)), longest)


def _same(first: Message | str, second: Message | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    return are_equal(first, second)


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
