"""Where the answers of a conversation stand in its text.

What is learnt is what the model will have to write. The text before a trained answer is the chat
template's rendering of the messages before it, with the generation prompt; the trained text is what
the template writes from there when the answer is the last message.

Where a single rendering has all trained answers in this form, it is one text. Other templates
render an answer differently once more turns follow it: then each trained answer is a text of its
own.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .chat import ChatTemplate, Span, UnstableTemplate
from .frames import Frames
from .shapes import Conversation, Message, RowError

_THINK = "<think>"
_THOUGHT = re.compile(r"(?:<think>|\A(?!.*<think>))(.*?)</think>", re.DOTALL)
"""A thought; models whose prompt opens it write only its end."""
_CLOSED = re.compile(r"</think>\s*\Z")
_WORDS = re.compile(r"\w[\w ]*\w|\w")
_FEWEST_IN_FRAME = 2
"""A conversation of one answer takes two renderings in any case."""
_SAMPLE = 40
"""Characters of a message that are looked for in its rendering."""


@dataclass(frozen=True)
class TurnRules:
    """Which turns of a conversation are trained, and how."""

    train_on_all: bool = False
    last_only: bool = False
    train_on_reasoning: bool = True
    as_one: bool = False
    """All trained answers of a row have to stand in one text."""


@dataclass(frozen=True)
class ChatText:
    """A text of a conversation."""

    text: str
    spans: tuple[Span, ...] | None
    """Characters that are trained; None: all."""
    borders: tuple[int, ...] = ()
    """Characters at which the model starts to write: no token may stand across one."""


@dataclass(frozen=True)
class _Answer:
    """A trained answer."""

    text: str
    """A text in which it stands; all answers of a conversation may share it."""
    start: int
    """Before it is the rendering of the messages before the answer, with the generation prompt."""
    stop: int
    """Up to it is what the model writes, with its end."""
    spans: tuple[Span, ...]
    """Characters of the text that are trained."""

    @property
    def alone(self) -> ChatText:
        """The answer as the end of a text."""
        return ChatText(self.text[: self.stop], self.spans, (self.start,))


def chat_texts(
    template: ChatTemplate, conversation: Conversation, rules: TurnRules, frames: Frames
) -> list[ChatText]:
    """The texts of a conversation: one, or one for each trained answer; none if none is trained.

    Args:
        template: the chat template.
        conversation: the conversation.
        rules: which turns are trained.
        frames: the forms of the conversations before it.

    Raises:
        UnstableTemplate: the answers cannot be separated from the prompts.
        RowError: the template refuses the conversation, or leaves out a part of it.
    """
    _check_support(template, conversation, rules)
    if rules.train_on_all:
        return [_everything(template, conversation)]
    turns = trained_turns(conversation, rules)
    if not turns:
        return []
    reader = _Reader(template, conversation, rules)
    answers = _in_frame(reader, turns, frames)
    texts = [] if answers is None else _as_one(answers)
    if answers is None:
        answers = [reader.answer(turn) for turn in turns]
        texts = _as_one(answers)
        if texts:
            reader.learn(turns, frames, answers)
    if not texts:
        if rules.as_one:
            raise UnstableTemplate(
                "the chat template rewrites earlier turns, so the answers after the prompt are "
                "not one text; set data.template: training, or data.chat_template to another"
            )
        texts = [answer.alone for answer in answers]
    _check_nothing_vanished(conversation.messages[: turns[-1]], texts[-1].text)
    return texts


def marked_text(
    template: ChatTemplate, conversation: Conversation, rules: TurnRules
) -> list[ChatText]:
    """The text of a conversation in a template whose {% generation %} blocks say what is trained,
    wherever it stands; an empty list if nothing is trained.

    Raises:
        UnstableTemplate: the answers that are not trained cannot be told from the others.
        RowError: the template refuses the conversation, or leaves out a part of it.
    """
    _check_support(template, conversation, rules)
    turns = trained_turns(conversation, rules)
    if not turns:
        return []
    written = template.write(conversation.messages[: turns[-1] + 1])
    text, marks = template.marked(written, conversation.context)
    spans: list[Span] = []
    for turn in turns:
        start, stop = _place(template, conversation, written, turn, text)
        if not rules.train_on_reasoning:
            start += _after_reasoning(conversation.messages[turn], text[start:stop])
        spans += [(max(start, a), min(stop, b)) for a, b in marks if a < stop and b > start]
    _check_nothing_vanished(conversation.messages[: turns[-1]], text)
    return [ChatText(text, tuple(spans))]


def _place(
    template: ChatTemplate,
    conversation: Conversation,
    written: Sequence[Message],
    at: int,
    text: str,
) -> Span:
    """The characters of a message in the text of its conversation."""
    before = template.render_written(written[:at], conversation.context) if at else ""
    upto = template.render_written(written[: at + 1], conversation.context)
    if not (text.startswith(before) and text.startswith(upto)):
        raise UnstableTemplate(
            f"the chat template rewrites earlier turns (here message {at + 1}), so the answers "
            "that are trained cannot be told from the others; take data.template: own"
        )
    return len(before), len(upto)


def trained_turns(conversation: Conversation, rules: TurnRules) -> list[int]:
    """Indices of the assistant turns that are trained."""
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and index >= conversation.first_trained
    ]
    turns = turns[-1:] if rules.last_only else turns
    return [index for index in turns if index not in conversation.silent]


def divided(text: ChatText) -> list[ChatText]:
    """A text with an example for each of its answers."""
    assert text.spans is not None
    stops = [*text.borders[1:], len(text.text)]
    pieces = []
    for border, stop in zip(text.borders, stops, strict=True):
        spans = tuple(span for span in text.spans if border <= span[0] < stop)
        if spans:
            pieces.append(ChatText(text.text[: spans[-1][1]], spans, (border,)))
    return pieces


def _in_frame(reader: "_Reader", turns: Sequence[int], frames: Frames) -> list[_Answer] | None:
    """The answers as they stand in a single rendering; None if its form is not known yet."""
    if not reader.has_form(turns):
        return None
    text = reader.whole(turns[-1])
    spans = frames.find(reader.template, reader.conversation, turns, text)
    if spans is None:
        return None
    return [reader.read(turn, text, *span) for turn, span in zip(turns, spans, strict=True)]


def _as_one(answers: Sequence[_Answer]) -> list[ChatText]:
    """The last answer's text, if it has all answers in the form in which each is written."""
    last = answers[-1]
    for answer in answers[:-1]:
        if answer.text is not last.text and not last.text.startswith(answer.text):
            return []
    spans = tuple(span for answer in answers for span in answer.spans)
    borders = tuple(answer.start for answer in answers)
    return [ChatText(last.text[: last.stop], spans, borders)]


class _Reader:
    """Reads the answers of one conversation."""

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, rules: TurnRules
    ) -> None:
        self.template = template
        self.conversation = conversation
        self._rules = rules
        self._messages = conversation.messages
        self._context = conversation.context
        self._written = template.write(conversation.messages)

    def answer(self, at: int) -> _Answer:
        """The answer at an index, as the model writes it."""
        message = self._messages[at]
        before = self._render(at, prompt=True)
        if not self._rules.train_on_reasoning and _CLOSED.search(before):
            message = _without_reasoning(message)
            self._written[at] = self.template.write([message])[0]
        marks: list[Span] | None = None
        if self.template.is_marked:
            whole, marks = self.template.marked(self._written[: at + 1], self._context)
        else:
            whole = self._render(at + 1)
        written = self._continuation(before, whole, at)
        ended = written + self._end(message, written)
        text = before + ended
        if marks is None:
            return self.read(at, text, len(before), len(text), message)
        _check_written(message, ended, self._rules)
        shift = len(before) + len(written) - len(whole)
        trained = [
            (max(len(before), first + shift), last + shift)
            for first, last in marks
            if last + shift > len(before)
        ]
        spans = self._without_thought(message, text, len(before), trained)
        return _Answer(text, len(before), len(text), spans)

    def read(
        self, at: int, text: str, start: int, stop: int, message: Message | None = None
    ) -> _Answer:
        """An answer whose place is known.

        Args:
            at: its index.
            text: a text in which it stands.
            start: its first character there.
            stop: the character after its last one.
            message: the message, if not that of the conversation.
        """
        message = message or self._messages[at]
        _check_written(message, text[start:stop], self._rules)
        spans = self._without_thought(message, text[:stop], start, [(start, stop)])
        return _Answer(text, start, stop, spans)

    def _without_thought(
        self, message: Message, text: str, start: int, trained: list[Span]
    ) -> tuple[Span, ...]:
        if self._rules.train_on_reasoning:
            return tuple(trained)
        first = start + _after_reasoning(message, text[start:])
        return tuple((max(first, a), b) for a, b in trained if b > first)

    def whole(self, last: int) -> str:
        """The rendering up to an answer, with its end."""
        text = self._render(last + 1)
        return text + self._end(self._messages[last], text)

    def has_form(self, turns: Sequence[int]) -> bool:
        """True if the form of the conversation decides where its answers stand."""
        is_plain = self._rules.train_on_reasoning and not self.template.is_marked
        return is_plain and len(turns) >= _FEWEST_IN_FRAME

    def learn(self, turns: Sequence[int], frames: Frames, answers: Sequence[_Answer]) -> None:
        """Keep the form of the conversation, if a single rendering has all its answers."""
        text = answers[-1].text
        if self.has_form(turns) and text == self.whole(turns[-1]):
            spans = [(answer.start, answer.stop) for answer in answers]
            frames.learn(self.template, self.conversation, turns, text, spans)

    def _render(self, stop: int, prompt: bool = False) -> str:
        if stop == 0:
            raise RowError("the conversation begins with an assistant turn, which answers nothing")
        return self.template.render_written(self._written[:stop], self._context, prompt)

    def _continuation(self, before: str, whole: str, at: int) -> str:
        """What the model writes after the text before an answer.

        Args:
            before: the rendering of the messages before it, with the generation prompt.
            whole: the rendering up to the answer.
            at: its index.
        """
        if whole.startswith(before):
            return whole[len(before) :]
        written = _after_opened_thought(before, whole, self._messages[at])
        if written is None:
            written = self._without_history(whole, at)
        if written is None and _CLOSED.search(before) and reasoning_of(self._messages[at]):
            raise RowError(
                "the chat template's generation prompt closes the thought, but the answer has "
                "reasoning; give the row chat_template_kwargs: {enable_thinking: true}, or set "
                "method.train_on_reasoning: false to leave it out"
            )
        if written is None:
            raise UnstableTemplate(
                f"the chat template's rendering of message {at + 1} does not continue its "
                "generation prompt, so the assistant's words cannot be separated from the prompt; "
                "set data.chat_template to another template, data.template: training, or "
                "method.train_on: all"
            )
        return written

    def _without_history(self, whole: str, at: int) -> str | None:
        """The answer as it follows a single message, if the conversation ends in the same text."""
        turns = [*self.template.write([{"role": "user", "content": "?"}]), self._written[at]]
        try:
            before = self.template.render_written(turns[:1], self._context, True)
            text = self.template.render_written(turns, self._context)
        except RowError:
            return None
        written = text[len(before) :] if text.startswith(before) else None
        if written is None:
            written = _after_opened_thought(before, text, self._messages[at])
        return written if written is not None and whole.endswith(written) else None

    def _end(self, message: Message, written: str) -> str:
        end = self.template.end_after(message)
        return "" if written.endswith(end) else end


def _after_opened_thought(before: str, whole: str, message: Message) -> str | None:
    """The answer after a generation prompt that opens a thought, which the template leaves out of
    an answer without one, or of every answer."""
    at = _common_prefix(before, whole)
    opened, rest = before[at:], whole[at:]
    if not opened.strip():
        return rest
    if opened.strip() != _THINK:
        return None
    return f"{reasoning_of(message)}\n</think>\n\n{rest.lstrip()}"


def reasoning_of(message: Message) -> str:
    """The reasoning of an answer, in its own field or inside <think> and </think>; else empty."""
    field = message.get("reasoning_content")
    if field is not None:
        return str(field).strip()
    thought = _THOUGHT.search(message["content"] or "")
    return "" if thought is None else thought.group(1).strip()


def _without_reasoning(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    if message["content"]:
        rest["content"] = _THOUGHT.sub("", message["content"]).strip() or None
    return rest


def _common_prefix(first: str, second: str) -> int:
    """Number of characters that two texts begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _after_reasoning(message: Message, written: str) -> int:
    """Index in what the model writes after its reasoning, and after what closes that."""
    reasoning = reasoning_of(message)
    at = written.find(reasoning) + len(reasoning) if reasoning and reasoning in written else 0
    content = _THOUGHT.sub("", message["content"] or "").strip()
    if content and content in written[at:]:
        return written.index(content, at)
    return max(at, written.rfind("</think>") + len("</think>") if "</think>" in written else 0)


def _everything(template: ChatTemplate, conversation: Conversation) -> ChatText:
    """The whole conversation, all of which is trained except its silent messages."""
    written = template.write(conversation.messages)
    text = template.render_written(written, conversation.context)
    _check_nothing_vanished(conversation.messages, text)
    if not conversation.silent:
        return ChatText(text, None)
    spans: list[Span] = []
    start = 0
    for index in sorted(conversation.silent):
        stop, after = _place(template, conversation, written, index, text)
        spans.append((start, stop))
        start = after
    spans.append((start, len(text)))
    return ChatText(text, tuple(span for span in spans if span[0] < span[1]))


def _check_support(template: ChatTemplate, conversation: Conversation, rules: TurnRules) -> None:
    """Refuse a conversation of which the template would leave out a part."""
    check_tools(template, conversation.context.tools, conversation.messages)
    has_reasoning = any(
        "reasoning_content" in message
        for message in conversation.messages[conversation.first_trained :]
    )
    if has_reasoning and rules.train_on_reasoning and not template.traits.reasoning:
        raise RowError(
            "the chat template renders no reasoning, but the row has some; set data.chat_template "
            "to one that does, or method.train_on_reasoning: false to leave it out"
        )


def check_tools(
    template: ChatTemplate, tools: Sequence[object], messages: Sequence[Message]
) -> None:
    """Refuse tools, calls and results that the template does not render.

    Raises:
        RowError: it says which.
    """
    traits = template.traits
    missing = None
    if tools and not traits.tools:
        missing = "tools"
    elif not traits.calls and any("tool_calls" in message for message in messages):
        missing = "tool_calls"
    elif not traits.results and any(message["role"] == "tool" for message in messages):
        missing = "tool results"
    if missing is not None:
        raise RowError(
            f"the chat template renders no {missing}, but the row has some; set data.chat_template "
            "to one that does, or take them out of the data"
        )


def _check_written(message: Message, written: str, rules: TurnRules) -> None:
    """Refuse a trained answer whose calls or reasoning the template leaves out."""
    names = Counter(call["function"]["name"] for call in message.get("tool_calls", ()))
    for name, count in names.items():
        if written.count(name) < count:
            raise RowError(
                f"the chat template leaves out a call of {name!r} in a turn that is to be learnt; "
                "set data.chat_template to one that renders all calls"
            )
    content = _THOUGHT.sub("", message["content"] or "").strip()
    if content and not _is_shown(content, written):
        raise RowError(
            "the chat template leaves out the content of a turn that is to be learnt"
            f"{', beside its calls' if names else ''}; set data.chat_template to one that renders "
            "it, or take the content out"
        )
    reasoning = reasoning_of(message) if rules.train_on_reasoning else ""
    if reasoning and not _is_shown(reasoning, written):
        raise RowError(
            "the chat template leaves out the reasoning of an answer that is to be learnt; set "
            "data.chat_template to one that renders it, or method.train_on_reasoning: false"
        )


def _check_nothing_vanished(messages: Sequence[Message], text: str) -> None:
    """Refuse a conversation if the template leaves out one of its messages."""
    for index, message in enumerate(messages):
        content = message["content"]
        if not content or message["role"] == "assistant" or _is_shown(content, text):
            continue
        raise RowError(
            f"the chat template leaves out message {index + 1} (role {message['role']}); take it "
            "out of the data, or set data.chat_template to one that renders it"
        )


def _is_shown(content: str, text: str) -> bool:
    """True if a text holds a content, perhaps escaped or with other spaces."""
    if content.strip() in text:
        return True
    longest = max(_WORDS.findall(content), key=len, default="")[:_SAMPLE].strip()
    return longest in text
