"""Converts normalised rows to tokens, and marks the tokens that are trained."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..common.errors import InputError
from ..config.recipe import Recipe
from .chat import ChatTemplate, Span, chat_template_of
from .shapes import (
    Completion,
    Conversation,
    Example,
    Part,
    Question,
    RowError,
    Text,
    parts_of,
    question_of,
)

OVERLONG = "overlong"
NO_TRAINABLE_TOKEN = "no_trainable_token"


@dataclass(frozen=True)
class RenderSettings:
    """The settings that determine how a row becomes tokens."""

    base: str
    revision: str | None
    trust_remote_code: bool
    chat_template: str | None
    train_on_all: bool
    split_overlong: bool
    """Split every text that is too long into pieces, as in continued pretraining."""
    max_length: int
    overlong: Literal["drop", "truncate"]

    @classmethod
    def of(cls, recipe: Recipe) -> "RenderSettings":
        return cls(
            base=recipe.model.base,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            chat_template=recipe.data.chat_template,
            train_on_all=recipe.method.trains_on_all,
            split_overlong=recipe.method.splits_overlong,
            max_length=recipe.row_length,
            overlong=recipe.data.overlong,
        )


@dataclass(frozen=True)
class Document:
    """A unit of training, isolated from its neighbours in a sequence."""

    input_ids: NDArray[np.int32]
    """Shape (tokens,)."""
    trainable: NDArray[np.bool_]
    """Shape (tokens,): True for tokens that the loss counts. The first token of a text is never
    trained, because no token before it can predict it."""
    lengths: tuple[int, ...]
    """Tokens of each of its texts: one text, or the two of a pair."""


@dataclass(frozen=True)
class Rendered:
    """The result of rendering a row: documents, or the reason why there are none."""

    documents: tuple[Document, ...] = ()
    dropped: str | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt with its reference answer."""

    text: str
    input_ids: NDArray[np.int32]
    reference: str


@dataclass(frozen=True)
class _Draft:
    """A row's text before it is tokenised."""

    text: str
    spans: list[Span] | None
    """Character spans that are trained; None means all characters."""
    is_bare: bool
    """True if the special tokens at both ends are not part of the text yet."""
    can_split: bool
    is_open: bool = False
    """True for a prompt: it has no end token, and none of it is trained."""


_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""(input_ids, trainable), both of shape (tokens,)."""


class Renderer:
    """Renders rows with a tokenizer, its chat template and the recipe's settings."""

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"model.base: the tokenizer of {settings.base} ({type(tokenizer).__name__}) has "
                "no character offsets; use a model with a fast tokenizer (tokenizer.json)"
            )
        self._tokenizer = tokenizer
        self._settings = settings
        self._encoder = tokenizer.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._lead: list[int] = [bos] if adds_bos else []

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; it is loaded when a conversation needs it."""
        return chat_template_of(self._tokenizer, self._settings.chat_template)

    def render(self, rows: Sequence[Example]) -> list[Rendered]:
        """Tokenise rows in one call of the tokenizer, which runs them in parallel.

        Raises:
            InputError: the tokenizer lacks a chat template or an end-of-sequence token that the
                rows need.
        """
        drafts = [self._drafts(row) for row in rows]
        texts = [part.text for parts in drafts if isinstance(parts, list) for part in parts]
        encodings = iter(self._encoder.encode_batch(texts, add_special_tokens=False))
        return [
            self._fit([(part, *self._tokens(part, next(encodings))) for part in parts])
            if isinstance(parts, list)
            else Rendered(error=parts)
            for parts in drafts
        ]

    def prompt(self, row: Example) -> Prompt | None:
        """The prompt of a row with its reference answer; None if the row has no such answer.

        Raises:
            RowError: the chat template does not accept the conversation.
        """
        part = parts_of(row)[0]
        if isinstance(part, Text):
            return None
        question = part if isinstance(part, Question) else question_of(part)
        if question.reference is None:
            return None
        draft = self._draft_question(question)
        ids, _ = self._tokens(draft, self._encoder.encode(draft.text, add_special_tokens=False))
        return Prompt(draft.text, ids, question.reference)

    def _drafts(self, row: Example) -> list[_Draft] | RowError:
        try:
            return [self._draft(part) for part in parts_of(row)]
        except RowError as error:
            return error

    def _draft(self, row: Part) -> _Draft:
        everything, can_split = self._settings.train_on_all, self._settings.split_overlong
        if isinstance(row, Question):
            return self._draft_question(row)
        if isinstance(row, Text):
            return _Draft(row.text, None, is_bare=True, can_split=True)
        if isinstance(row, Completion):
            text = row.prompt + row.completion
            spans = None if everything else [(len(row.prompt), len(text))]
            return _Draft(text, spans, is_bare=True, can_split=can_split)
        return self._draft_conversation(row)

    def _draft_conversation(self, row: Conversation) -> _Draft:
        can_split = self._settings.split_overlong
        if self._settings.train_on_all:
            text = self.template.render(row.messages)
            return _Draft(text, None, is_bare=False, can_split=can_split)
        text, spans = self.template.render_with_spans(row)
        return _Draft(text, spans, is_bare=False, can_split=can_split)

    def _draft_question(self, row: Question) -> _Draft:
        if isinstance(row.prompt, str):
            return _Draft(row.prompt, [], is_bare=True, can_split=False, is_open=True)
        text = self.template.render(row.prompt, add_generation_prompt=True)
        return _Draft(text, [], is_bare=False, can_split=False, is_open=True)

    @cached_property
    def _tail(self) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                f"model.base: the tokenizer of {self._settings.base} has no end-of-sequence token, "
                "which must follow a text or completion; set eos_token in tokenizer_config.json"
            )
        return [eos]

    def _tokens(self, draft: _Draft, encoding: Any) -> _Tokens:
        """The tokens of a text, and which of them are trained."""
        lead = self._lead if draft.is_bare else []
        tail = self._tail if draft.is_bare and not draft.is_open else []
        input_ids = np.array(lead + encoding.ids + tail, np.int32)
        if draft.spans is None:
            trainable = np.ones(len(input_ids), np.bool_)
        else:
            trainable = np.zeros(len(input_ids), np.bool_)
            for first, last in _token_ranges(encoding.offsets, draft.spans):
                trainable[len(lead) + first : len(lead) + last] = True
            trainable[len(input_ids) - len(tail) :] = True
        return input_ids, trainable

    def _fit(self, parts: list[tuple[_Draft, NDArray[np.int32], NDArray[np.bool_]]]) -> Rendered:
        """The document of a row's texts, or several documents if a single long text is split."""
        limit = self._settings.max_length
        if parts[0][0].can_split and len(parts) == 1:
            return _as_rendered([_joined([piece]) for piece in _pieces(*parts[0][1:], limit)])
        cuts_allowed = self._settings.overlong == "truncate"
        cut: list[_Tokens] = []
        for draft, input_ids, trainable in parts:
            # A prompt is never cut, because its end is the request itself.
            if len(input_ids) > limit and (draft.is_open or not cuts_allowed):
                return Rendered(dropped=OVERLONG)
            mask = trainable[:limit]
            mask[0] = False
            if not (mask.any() or draft.is_open):
                return Rendered(dropped=NO_TRAINABLE_TOKEN)
            cut.append((input_ids[:limit], mask))
        return Rendered((_joined(cut),))


def _pieces(
    input_ids: NDArray[np.int32], trainable: NDArray[np.bool_], limit: int
) -> Iterator[_Tokens]:
    """Consecutive pieces of at most `limit` tokens that contain a trained token."""
    for start in range(0, len(input_ids), limit):
        mask = trainable[start : start + limit]
        mask[0] = False
        if mask.any():
            yield input_ids[start : start + limit], mask


def _joined(parts: list[_Tokens]) -> Document:
    return Document(
        np.concatenate([input_ids for input_ids, _ in parts]),
        np.concatenate([trainable for _, trainable in parts]),
        tuple(len(input_ids) for input_ids, _ in parts),
    )


def _as_rendered(documents: list[Document]) -> Rendered:
    return Rendered(tuple(documents)) if documents else Rendered(dropped=NO_TRAINABLE_TOKEN)


@lru_cache(maxsize=2)
def load_renderer(settings: RenderSettings) -> Renderer:
    """The renderer for these settings; cached, because a tokenizer takes a second to load.

    Raises:
        InputError: the tokenizer cannot be loaded, or has no character offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.base,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.base: cannot load the tokenizer of {settings.base}: {error}"
        ) from None
    return Renderer(tokenizer, settings)


def _token_ranges(offsets: list[Span], spans: list[Span]) -> list[tuple[int, int]]:
    """The range of tokens that are completely inside each span of characters.

    A token whose only space the tokenizer trimmed has an empty offset (n, n). At the start of a
    span, such a token belongs to the text before the span.
    """
    return [
        (
            bisect_left(offsets, (start, start + 1)),
            bisect_right(offsets, stop, key=itemgetter(1)),
        )
        for start, stop in spans
    ]
