"""The texts of rows before they are tokenised, and which characters of them are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .answers import ChatText, chat_texts, check_tools, marked_text
from .chat import ChatTemplate, Span, chat_template_of, training_template_of
from .encoding import Divider
from .frames import Frames
from .render_settings import RenderSettings
from .shapes import (
    Completion,
    Conversation,
    Example,
    LabelledExample,
    Part,
    PreferencePair,
    Question,
    Text,
    parts_of,
)

_ANY_ANSWER = "a"


@dataclass(frozen=True)
class Draft:
    """A row's text before it is tokenised."""

    text: str
    spans: Sequence[Span] | None
    """Character spans that are trained; None means all characters."""
    is_bare: bool
    """True if the special tokens at both ends are not part of the text yet."""
    can_split: bool
    is_open: bool = False
    """True for a prompt: it has no end token, and none of it is trained."""
    answer: str = ""
    """An answer to a prompt that ends in a space, to see which token the space belongs to."""
    borders: tuple[int, ...] = ()
    """Characters at which the model starts to write: no token may stand across one."""
    is_chat: bool = False


class Drafter:
    """Renders rows as text, with a tokenizer's chat template and the recipe's settings."""

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings

    @cached_property
    def divider(self) -> Divider:
        """Divides texts at the special tokens of the chat template."""
        return Divider(self._tokenizer, self.template.source)

    @cached_property
    def _frames(self) -> Frames:
        return Frames(self.divider.starts)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; it is loaded when a conversation needs it."""
        return self._load(with_tools=False)

    @cached_property
    def _template_with_tools(self) -> ChatTemplate:
        return self._load(with_tools=True)

    def _load(self, with_tools: bool) -> ChatTemplate:
        settings = self._settings
        template = chat_template_of(
            self._tokenizer, settings.chat_template, settings.day, with_tools
        )
        if settings.template == "training":
            return training_template_of(self._tokenizer, template)
        return template

    def documents(self, row: Example) -> list[list[Draft]]:
        """The texts of each document of a row: one text, or two of a pair. A conversation may have
        a document for each answer, and none if nothing of it is trained.

        Raises:
            RowError: the chat template refuses a conversation, or leaves out a part of it.
        """
        as_one = isinstance(row, PreferencePair | LabelledExample)
        parts = [self._texts(part, as_one) for part in parts_of(row)]
        if len(parts) == 1:
            return [[draft] for draft in parts[0]]
        drafts = [draft for texts in parts for draft in texts]
        return [drafts] if len(drafts) == len(parts) else []

    def _texts(self, part: Part, as_one: bool) -> list[Draft]:
        can_split = self._settings.split_overlong
        if isinstance(part, Question):
            return [self.question(part)]
        if isinstance(part, Text):
            return [Draft(part.text, None, is_bare=True, can_split=True)]
        if isinstance(part, Completion):
            text = part.prompt + part.completion
            spans = None if self._settings.train_on_all else [(len(part.prompt), len(text))]
            return [Draft(text, spans, is_bare=True, can_split=can_split)]
        return [
            Draft(text.text, text.spans, False, can_split, borders=text.borders, is_chat=True)
            for text in self._chat(part, as_one)
        ]

    def _chat(self, conversation: Conversation, as_one: bool) -> list[ChatText]:
        template = self._template_with_tools if conversation.context.tools else self.template
        rules = self._settings.turn_rules(as_one)
        if self._settings.template == "training" and not rules.train_on_all:
            return marked_text(template, conversation, rules)
        return chat_texts(template, conversation, rules, self._frames)

    def question(self, row: Question) -> Draft:
        """A prompt that the model answers.

        Raises:
            RowError: see `documents`.
        """
        if isinstance(row.prompt, str):
            answer = (row.reference or _ANY_ANSWER) if row.prompt.endswith(" ") else ""
            return Draft(row.prompt, [], True, can_split=False, is_open=True, answer=answer)
        template = self._template_with_tools if row.context.tools else self.template
        check_tools(template, row.context.tools, row.prompt)
        text = template.render(row.prompt, add_generation_prompt=True, context=row.context)
        return Draft(text, [], False, can_split=False, is_open=True, is_chat=True)
