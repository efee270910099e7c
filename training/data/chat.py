"""Chat templates: render a conversation as text, and locate the assistant's turns in it."""

import re
from collections.abc import Container, Sequence
from typing import Any

from ..common.errors import InputError
from .shapes import Conversation, Message, RowError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template that `data.chat_template: chatml` names."""
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

NO_TEMPLATE = (
    "data.chat_template: the data contains conversations, but the tokenizer has no chat template; "
    "set it to chatml, a Jinja file or inline Jinja"
)

Span = tuple[int, int]
"""Characters [start, stop) of a rendered text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnstableTemplate(RowError):
    """The template renders a turn differently when more turns follow it, so the assistant's
    characters cannot be located by comparing prefixes."""


class ChatTemplate:
    """A Jinja chat template with the special tokens of a tokenizer."""

    def __init__(self, source: str, special_tokens: dict[str, Any]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._is_marked = bool(_GENERATION.search(source))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render messages as text.

        Raises:
            RowError: the template does not accept these messages.
            InputError: the template is not valid Jinja.
        """
        return self._render(messages, add_generation_prompt)[0]

    def render_with_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Render a conversation; returns the text and the spans of the trained assistant turns.

        {% generation %} blocks in the template mark the spans. Without them, the span of a turn
        is the text that rendering up to this turn adds to the prompt before it.

        Raises:
            UnstableTemplate: later turns change the rendering of earlier ones.
            RowError, InputError: see `render`.
        """
        if self._is_marked:
            text, spans = self._render(conversation.messages, False)
            trained = conversation.messages[conversation.first_trained :]
            turns = sum(message["role"] == "assistant" for message in trained)
            return text, spans[-turns:]
        text = self.render(conversation.messages)
        turns_at = [
            index
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and index >= conversation.first_trained
        ]
        return text, [self._turn_span(text, conversation.messages, at) for at in turns_at]

    def _turn_span(self, text: str, messages: tuple[Message, ...], at: int) -> Span:
        before = self.render(messages[:at], add_generation_prompt=True)
        upto = text if at + 1 == len(messages) else self.render(messages[: at + 1])
        if not (upto.startswith(before) and text.startswith(upto)):
            raise UnstableTemplate(
                f"the chat template rewrites earlier turns (here message {at + 1} of "
                f"{len(messages)}), so the assistant's words cannot be separated from the prompt; "
                "set data.chat_template to chatml, or to a template that marks them with "
                "{% generation %} … {% endgeneration %}, or method.train_on: all"
            )
        return len(before), len(upto)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self._is_marked,
                **self._special_tokens,
            )
        except TemplateSyntaxError as error:
            raise InputError(
                f"data.chat_template: not valid Jinja, line {error.lineno}: {error.message}"
            ) from None
        except (TemplateError, TypeError) as error:
            raise RowError(
                f"the chat template does not accept this conversation: {error}"
            ) from None
        return texts[0], spans[0] if self._is_marked else []


def chat_template_of(tokenizer: Any, requested: str | None) -> ChatTemplate:
    """The requested chat template, or the tokenizer's own.

    Args:
        tokenizer: the model's tokenizer.
        requested: the recipe's data.chat_template: chatml, Jinja source, or None.

    Raises:
        InputError: the tokenizer has no template, or lacks the tokens of chatml.
    """
    if requested == "chatml":
        check_chatml(tokenizer.get_vocab())
        return ChatTemplate(CHATML, tokenizer.special_tokens_map)
    if requested is not None:
        return ChatTemplate(requested, tokenizer.special_tokens_map)
    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    except ValueError:
        raise InputError(NO_TEMPLATE) from None


def check_chatml(vocabulary: Container[str]) -> None:
    """Refuse chatml for a tokenizer that would split its markers into several tokens.

    Raises:
        InputError: a marker is not a token of the vocabulary.
    """
    missing = [token for token in _CHATML_TOKENS if token not in vocabulary]
    if missing:
        raise InputError(
            f"data.chat_template: chatml needs the tokens {' and '.join(missing)}, which this "
            "tokenizer does not have; set a template that uses its own special tokens"
        )
