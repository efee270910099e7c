"""Chat templates: render messages as text, in the form that the template reads."""

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import date
from functools import cached_property
from typing import Any

from ..common.errors import InputError
from ..common.formatting import one_line
from ..config.sections import TEMPLATE_DATE
from .rows import Row
from .shapes import NO_CONTEXT, ChatContext, Message, RowError
from .template_traits import ANSWER_SENTINEL, Traits, find_traits, probe_turns

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
    """The template's rendering of an answer does not continue its own prompt."""


class ChatTemplate:
    """A Jinja chat template with the special tokens of a tokenizer.

    Args:
        source: the template.
        special_tokens: the tokenizer's special tokens by name, which the template may use.
        markers: all added tokens of the tokenizer.
        day: today, for templates that read the clock.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, Any],
        markers: Iterable[str] = (),
        day: date = TEMPLATE_DATE,
    ) -> None:
        self.source = source
        self.special_tokens = special_tokens
        self.is_marked = bool(_GENERATION.search(source))
        self._markers = tuple(markers)
        self._day = day

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        context: ChatContext = NO_CONTEXT,
    ) -> str:
        """Render messages as text.

        Raises:
            RowError: the template does not accept these messages.
            InputError: the template is not valid Jinja.
        """
        return self.render_written(self.write(messages), context, add_generation_prompt)

    def write(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in the form that the template reads."""
        return [self.traits.writing.write(message) for message in messages]

    def render_written(
        self, messages: Sequence[Message], context: ChatContext, add_generation_prompt: bool = False
    ) -> str:
        """Render messages that `write` returned; see `render`."""
        compiled = self._compiled
        with _refusing():
            text: str = compiled.render(
                **self._values(context),
                messages=messages,
                tools=list(context.tools) or None,
                add_generation_prompt=add_generation_prompt,
            )
            return text

    def marked(self, messages: Sequence[Message], context: ChatContext) -> tuple[str, list[Span]]:
        """Render messages that `write` returned, with the spans in {% generation %} blocks."""
        # render_jinja_template would turn the function that gives the day into text.
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        compiled = self._compiled
        with _refusing():
            text, spans = _render_with_assistant_indices(
                compiled,
                messages=list(messages),
                tools=list(context.tools) or None,
                add_generation_prompt=False,
                **self._values(context),
            )
        return str(text), spans

    def with_source(self, source: str) -> "ChatTemplate":
        """Another template for the same tokenizer."""
        return ChatTemplate(source, self.special_tokens, self._markers, self._day)

    @cached_property
    def traits(self) -> Traits:
        """What the template reads and renders."""

        def render(messages: Sequence[Message], tools: Sequence[Row]) -> str:
            return self.render_written(messages, ChatContext(tuple(tools)))

        return find_traits(self.source, render)

    def end_after(self, message: Message) -> str:
        """The token that ends a turn, if it belongs to the message that follows; otherwise empty.

        Such templates write no end at the end of a conversation; the model has to write it.
        """
        return self._ends[bool(message.get("tool_calls"))]

    @cached_property
    def _ends(self) -> tuple[str, str]:
        turns, _ = probe_turns(with_call=False)
        try:
            text = self.render(turns)
        except RowError:
            return "", ""
        if not text.endswith(ANSWER_SENTINEL):
            return "", ""
        return self._next_marker(with_call=False), self._next_marker(with_call=True)

    def _next_marker(self, with_call: bool) -> str:
        turns, following = probe_turns(with_call)
        try:
            before, after = self.render(turns), self.render([*turns, following])
        except RowError:
            return ""
        rest = after.removeprefix(before) if after.startswith(before) else ""
        return max((mark for mark in self._markers if rest.startswith(mark)), key=len, default="")

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """The texts with other characters than those of words that the template compares or
        writes."""
        from jinja2 import nodes

        tree = self._compiled.environment.parse(self.source)
        texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return tuple(sorted(text for text in texts if text.strip() and not text.isidentifier()))

    @cached_property
    def _compiled(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        with _refusing():
            return _compile_jinja_template(self.source)

    def _values(self, context: ChatContext) -> Row:
        """The variables of the template beside messages, tools and the generation prompt."""
        return {
            **self.special_tokens,
            "documents": None,
            "strftime_now": self._day.strftime,
            **context.options,
        }


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors of a template into those of its row, and faults of Jinja into an InputError."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise _not_jinja(error.lineno, error.message) from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise RowError(
            f"the chat template does not accept this conversation: {one_line(str(error))}; change "
            "the messages, or the template"
        ) from None


def chat_template_of(
    tokenizer: Any, requested: str | None, day: date = TEMPLATE_DATE, with_tools: bool = False
) -> ChatTemplate:
    """The requested chat template, or the tokenizer's own.

    Args:
        tokenizer: the model's tokenizer.
        requested: the recipe's data.chat_template: chatml, Jinja source, or None.
        day: today, for templates that read the clock.
        with_tools: some tokenizers have a template of their own for conversations with tools.

    Raises:
        InputError: the tokenizer has no template, or lacks the tokens of chatml.
    """
    source = requested
    if requested == "chatml":
        check_chatml(tokenizer.get_vocab())
        source = CHATML
    if source is None:
        try:
            source = tokenizer.get_chat_template(**({"tools": [{}]} if with_tools else {}))
        except ValueError:
            raise InputError(NO_TEMPLATE) from None
    markers = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return ChatTemplate(source, tokenizer.special_tokens_map, markers, day)


def training_template_of(tokenizer: Any, template: ChatTemplate) -> ChatTemplate:
    """TRL's training template for a chat template, which renders every turn in the same way and
    marks the answers; the template itself if it does so.

    Raises:
        InputError: TRL has none for it.
    """
    from trl.chat_template_utils import get_training_chat_template

    plain = copy(tokenizer)
    plain.chat_template = template.source
    try:
        source = get_training_chat_template(plain)
    except ValueError:
        raise InputError(
            "data.template: TRL has no training template for this chat template; take own, or set "
            "data.chat_template to one with {% generation %} … {% endgeneration %}"
        ) from None
    return template if source is None else template.with_source(source)


def _not_jinja(line: int, problem: str | None) -> InputError:
    return InputError(f"data.chat_template: not valid Jinja, line {line}: {problem}; correct it")


def check_syntax(template: str) -> None:
    """Refuse a chat template that is not valid Jinja.

    Raises:
        InputError: with the line in the template.
    """
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """Accepts the blocks that mark the assistant's words."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
    except TemplateSyntaxError as error:
        raise _not_jinja(error.lineno, error.message) from None
    except RecursionError:
        raise InputError("data.chat_template: nested too deeply; simplify it") from None


def check_chatml(vocabulary: Container[str]) -> None:
    """Refuse chatml for a tokenizer that would split its markers into several tokens.

    Raises:
        InputError: a marker is not a token of the vocabulary.
    """
    missing = [token for token in _CHATML_TOKENS if token not in vocabulary]
    if missing:
        raise InputError(
            f"data.chat_template: chatml needs the tokens {' and '.join(missing)}, which this "
            "tokenizer does not have; set model.add_tokens: auto, or a template that uses its own "
            "special tokens"
        )
