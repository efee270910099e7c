"""Converts normalised rows to tokens, and marks the tokens that are trained."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import InputError
from ..common.formatting import one_line
from .added_tokens import add_tokens, check_embedded
from .answers import ChatText, divided
from .chat import Span
from .drafts import Draft, Drafter
from .encoding import Piece, Tokens, encode, encode_divided, token_at
from .prepared import ANSWER_OVERLONG, CUT, NO_END_TRAINED, ONLY_END_TRAINED
from .render_settings import RenderSettings
from .shapes import (
    Example,
    Question,
    RowError,
    Text,
    parts_of,
    question_of,
)
from .template_traits import Traits
from .words import TextEncoder

OVERLONG = "overlong"
NO_TRAINABLE_TOKEN = "no_trainable_token"
_LAST_TOKENS = 8
"""Tokens up to the last trained one among which the end of an answer is looked for."""
_FEW = 100
"""An answer with more trained tokens is more than its end."""
_TEXTS_KEPT = 1000


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
    notes: tuple[str, ...] = ()
    """What is odd about its answers: ONLY_END_TRAINED, NO_END_TRAINED."""
    cut: str = ""
    """The end of a prompt that its tokens lack, as it begins the first token of an answer."""
    repeated: int = 0
    """Tokens that stand in several documents, because each answer of the row has one of its own."""


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt with its reference answer."""

    text: str
    """The prompt; a space at its end may be missing in the tokens, see `Rendered.cut`."""
    input_ids: NDArray[np.int32]
    reference: str
    """Empty if the data has none."""
    cut: str = ""
    """The end of the text that its tokens lack; see `Rendered.cut`."""
    asked: str = "{}"
    """See `Sample.asked` of a prepared data set."""


@dataclass(frozen=True)
class _Tokenised:
    """A tokenised text."""

    draft: Draft
    input_ids: NDArray[np.int32]
    """Shape (tokens,)."""
    trainable: NDArray[np.bool_]
    """Shape (tokens,)."""
    cut: str = ""
    note: str | None = None
    is_torn: bool = False
    """True if a token stands across one of the draft's borders."""


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
        core = tokenizer.backend_tokenizer
        core.no_truncation()
        core.no_padding()
        bos = tokenizer.bos_token_id
        template = settings.chat_template
        self._added = add_tokens(tokenizer, settings.add_tokens, template)
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._lead: list[int] = [bos] if adds_bos else []
        self._drafter = Drafter(tokenizer, settings)
        self._encoder = TextEncoder(core)
        self._alone: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def traits(self) -> Traits:
        """What the chat template reads and renders.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        return self._drafter.template.traits

    def reads(self, key: str) -> bool:
        """True if the chat template names a key of a message.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        return bool(re.search(rf"[.'\"]{re.escape(key)}\b", self._drafter.template.source))

    def render(self, rows: Sequence[Example]) -> list[Rendered]:
        """Tokenise rows in one call of the tokenizer, which runs them in parallel.

        Raises:
            InputError: the tokenizer lacks a chat template or an end-of-sequence token that the
                rows need.
        """
        drafts = [self._documents(row) for row in rows]
        flat = [
            draft
            for documents in drafts
            if isinstance(documents, list)
            for parts in documents
            for draft in parts
        ]
        tokenised = self._tokenise(flat)
        return [
            Rendered(error=documents)
            if isinstance(documents, RowError)
            else self._rendered([[next(tokenised) for _ in parts] for parts in documents])
            for documents in drafts
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
        return None if question.reference is None else self.question(question)

    def question(self, question: Question) -> Prompt:
        """A prompt, whether or not the data has an answer to it.

        Raises:
            RowError: the chat template does not accept the conversation.
        """
        draft = self._drafter.question(question)
        (tokens,) = self._tokenise([draft])
        return Prompt(draft.text, tokens.input_ids, question.reference or "", tokens.cut)

    def _documents(self, row: Example) -> list[list[Draft]] | RowError:
        try:
            return self._drafter.documents(row)
        except RowError as error:
            return error

    def _tokenise(self, drafts: Sequence[Draft]) -> Iterator[_Tokenised]:
        """The tokens of texts, in order; conversations are encoded piece by piece."""
        chats = [draft.text for draft in drafts if draft.is_chat]
        others = [draft.text + draft.answer for draft in drafts if not draft.is_chat]
        pieces = {
            True: iter(
                encode_divided(self._encoder, self._drafter.divider, chats) if chats else ()
            ),
            False: iter(encode(self._encoder, others)),
        }
        for draft in drafts:
            yield self._embedded(self._tokenised(draft, next(pieces[draft.is_chat])))

    def _rendered(self, documents: list[list[_Tokenised]]) -> Rendered:
        """The result of a row, from the tokens of each of its documents."""
        whole = [part for parts in documents for part in self._untorn(parts)]
        fitted = [self._fit(parts) for parts in whole]
        if len(fitted) <= 1:
            return fitted[0] if fitted else Rendered(dropped=NO_TRAINABLE_TOKEN)
        usable = tuple(document for part in fitted for document in part.documents)
        if not usable:
            return fitted[0]
        sizes = [len(document.input_ids) for document in usable]
        notes = tuple(note for part in fitted for note in part.notes)
        left_out = (ANSWER_OVERLONG,) * sum(part.dropped == OVERLONG for part in fitted)
        return Rendered(usable, notes=notes + left_out, repeated=sum(sizes) - max(sizes))

    def _untorn(self, parts: list[_Tokenised]) -> list[list[_Tokenised]]:
        """The document, or documents, in which no token stands across the start of an answer."""
        if not any(part.is_torn for part in parts):
            return [parts]
        if len(parts) > 1 or len(parts[0].draft.borders) == 1:
            return [[self._in_two(part.draft) if part.is_torn else part for part in parts]]
        draft = parts[0].draft
        texts = divided(ChatText(draft.text, tuple(draft.spans or ()), draft.borders))
        return [
            [self._in_two(replace(draft, text=text.text, spans=text.spans, borders=text.borders))]
            for text in texts
        ]

    def _in_two(self, draft: Draft) -> _Tokenised:
        """The tokens of a text whose answers are encoded apart from what is before them."""
        mark = self._drafter.divider.mark or ""
        starts = (0, *draft.borders)
        ids: list[NDArray[np.int32]] = []
        masks: list[NDArray[np.bool_]] = []
        for start, stop in zip(starts, (*draft.borders, len(draft.text)), strict=True):
            # After a special token, as a text's first word may be encoded in another way.
            lead = mark if start else ""
            (pieces,) = encode_divided(
                self._encoder, self._drafter.divider, [lead + draft.text[start:stop]]
            )
            shift = start - len(lead)
            spans = [(a - shift, b - shift) for a, b in draft.spans or ()]
            part = [(piece.ids, _trained(piece, spans)) for piece in pieces]
            skip = 1 if lead else 0
            ids.append(np.concatenate([tokens for tokens, _ in part])[skip:])
            masks.append(np.concatenate([mask for _, mask in part])[skip:])
        input_ids, trainable = np.concatenate(ids), np.concatenate(masks)
        return _Tokenised(draft, input_ids, trainable, note=self._note(draft, input_ids, trainable))

    @cached_property
    def _tail(self) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                f"model.base: the tokenizer of {self._settings.base} has no end-of-sequence token, "
                "which must follow a text or completion; set eos_token in tokenizer_config.json"
            )
        return [eos]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Ids of the tokens that can end an answer: all special ones."""
        added = self._tokenizer.added_tokens_decoder.items()
        ids = {token for token, content in added if content.special}
        return np.array(sorted({*ids, self._tokenizer.eos_token_id} - {None}), np.int64)

    def _tokenised(self, draft: Draft, pieces: Iterator[Piece]) -> _Tokenised:
        """The tokens of a text, and which of them are trained."""
        if draft.answer:
            return self._tokenised_before_answer(draft, pieces)
        tokens, is_torn = Tokens(), False
        for piece in pieces:
            is_torn = is_torn or self._tears_any(piece, draft)
            self._add(tokens, draft, piece.ids, _trained(piece, draft.spans))
            is_cut_at_end = not draft.can_split and self._settings.overlong != "truncate_left"
            if is_cut_at_end and len(tokens) > self._settings.max_length:
                break  # the rest would be cut off
        self._add_end(tokens, draft)
        input_ids, trainable = tokens.arrays()
        note = self._note(draft, input_ids, trainable)
        return _Tokenised(draft, input_ids, trainable, note=note, is_torn=is_torn)

    def _tears_any(self, piece: Piece, draft: Draft) -> bool:
        borders = draft.borders
        here = borders[bisect_right(borders, piece.start) :]
        if piece.stop is not None:
            here = here[: bisect_left(here, piece.stop)]
        return any(self._tears(piece, draft.text, border) for border in here)

    def _embedded(self, tokenised: _Tokenised) -> _Tokenised:
        """The same; refused if the model has no embedding for one of its tokens."""
        rows, ids = self._settings.rows, tokenised.input_ids
        if rows is not None and len(ids) and ids.max() >= rows:
            beyond = sorted({*ids[ids >= rows].tolist()} - {*self._added})
            names = self._tokenizer.convert_ids_to_tokens(beyond)
            check_embedded(dict(zip(beyond, names, strict=True)), rows)
        return tokenised

    def _tears(self, piece: Piece, text: str, border: int) -> bool:
        """True if the tokens before a border are not those that the text before it has alone."""
        if border <= piece.start or (piece.stop is not None and border >= piece.stop):
            return False
        index, first, before = token_at(piece, border)
        if index == len(piece.ids):
            return piece.stop is not None
        if index == 0 and piece.stop is None:
            return False
        if first != border or before != border:
            return True
        # A tokenizer may look ahead, but at the end of several spaces only.
        if piece.stop is None or not text[border - 2 : border].isspace():
            return False
        ids: list[int] = piece.ids[:index].tolist()
        return self._encoded(text[piece.start : border]) != ids

    def _encoded(self, text: str) -> list[int]:
        if text not in self._alone:
            if len(self._alone) > _TEXTS_KEPT:
                self._alone.clear()
            core = self._tokenizer.backend_tokenizer
            self._alone[text] = core.encode(text, add_special_tokens=False).ids
        return self._alone[text]

    def _tokenised_before_answer(self, draft: Draft, pieces: Iterator[Piece]) -> _Tokenised:
        """The tokens of a prompt, without the space that belongs to the answer's first token."""
        tokens = Tokens()
        stop = 0
        for piece in pieces:
            offsets = piece.offsets
            own = bisect_right(offsets, len(draft.text), key=itemgetter(1))
            self._add(tokens, draft, piece.ids[:own], np.zeros(own, np.bool_))
            stop = offsets[own - 1][1] if own else stop
        cut = draft.text[stop:]
        if cut.strip():  # a token that has words of the prompt, too
            alone = replace(draft, answer="")
            return self._tokenised(alone, encode(self._encoder, [draft.text])[0])
        self._add_end(tokens, draft)
        return _Tokenised(draft, *tokens.arrays(), cut)

    def _add(
        self,
        tokens: Tokens,
        draft: Draft,
        ids: NDArray[np.int32],
        trainable: NDArray[np.bool_],
    ) -> None:
        """Add a piece of a text, after the special token that a bare one lacks at its beginning."""
        if draft.is_bare and not len(tokens) and ids[:1].tolist() != self._lead:
            tokens.add_special(self._lead, trainable=False)
        tokens.add(ids, trainable)

    def _add_end(self, tokens: Tokens, draft: Draft) -> None:
        """Add the special token that a bare text lacks at its end."""
        if draft.is_bare and not draft.is_open and not tokens.ends_in(self._tail):
            tokens.add_special(self._tail, trainable=True)

    def _note(
        self, draft: Draft, input_ids: NDArray[np.int32], trainable: NDArray[np.bool_]
    ) -> str | None:
        """What is odd about the trained tokens of an answer: ONLY_END_TRAINED, NO_END_TRAINED."""
        if draft.is_open or (draft.is_bare and draft.spans is None):
            return None
        count = int(np.count_nonzero(trainable[1:]))
        if not count:
            return None
        stop = len(trainable) - int(trainable[::-1].argmax())
        part = slice(max(1, stop - _LAST_TOKENS), stop)
        last = input_ids[part][trainable[part]]
        if not np.isin(last, self._ends).any():
            return NO_END_TRAINED
        if count > _FEW:
            return None
        trained = input_ids[1:][trainable[1:]]
        if 2 * np.isin(trained, self._ends).sum() < count:
            return None
        text = self._tokenizer.decode(trained, skip_special_tokens=True)
        return None if text.strip() else ONLY_END_TRAINED

    def _fit(self, parts: list[_Tokenised]) -> Rendered:
        """The document of a row's texts, or several documents if a single long text is split."""
        limit = self._settings.max_length
        notes = tuple(part.note for part in parts if part.note is not None)
        if parts[0].draft.can_split and len(parts) == 1:
            pieces = _pieces(parts[0].input_ids, parts[0].trainable, limit)
            return _as_rendered([_joined([piece]) for piece in pieces], notes)
        beyond = max(len(part.input_ids) for part in parts) - limit
        if beyond > 0:
            # The end of a prompt is the request itself.
            can_cut = self._settings.overlong == "truncate" and not parts[0].draft.is_open
            if not (can_cut or self._settings.overlong == "truncate_left"):
                return Rendered(dropped=OVERLONG)
            notes = (*notes, CUT)
        cut = [self._cut(part, beyond) for part in parts]
        for part, (_, mask) in zip(parts, cut, strict=True):
            if not (mask.any() or part.draft.is_open):
                return Rendered(dropped=NO_TRAINABLE_TOKEN)
        return Rendered((_joined(cut),), notes=notes, cut=parts[0].cut)

    def _cut(self, part: _Tokenised, beyond: int) -> _Tokens:
        """The tokens of a text that are kept, and which of them are trained.

        Args:
            part: the text.
            beyond: tokens of the row's longest text above the limit. At the beginning all texts
                lose as many, so that the prompt before two answers stays the same.
        """
        ids, mask, limit = part.input_ids, part.trainable, self._settings.max_length
        if beyond > 0 and self._settings.overlong == "truncate_left":
            has_lead = bool(self._lead) and ids[:1].tolist() == self._lead
            start = beyond + has_lead
            ids = np.concatenate([ids[:has_lead], ids[start:]])
            mask = np.concatenate([mask[:has_lead], mask[start:]])
        mask = mask[:limit]
        mask[:1] = False
        return ids[:limit], mask


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
    if len(parts) == 1:  # without a copy, as a long text has many
        ((input_ids, trainable),) = parts
        return Document(input_ids, trainable, (len(input_ids),))
    return Document(
        np.concatenate([input_ids for input_ids, _ in parts]),
        np.concatenate([trainable for _, trainable in parts]),
        tuple(len(input_ids) for input_ids, _ in parts),
    )


def _as_rendered(documents: list[Document], notes: tuple[str, ...]) -> Rendered:
    if not documents:
        return Rendered(dropped=NO_TRAINABLE_TOKEN)
    return Rendered(tuple(documents), notes=notes)


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
            f"model.base: cannot load the tokenizer of {settings.base}: {one_line(str(error))}; "
            "save it again"
        ) from None
    return Renderer(tokenizer, settings)


def _trained(piece: Piece, spans: Sequence[Span] | None) -> NDArray[np.bool_]:
    """Which tokens of a piece are trained: those with a character inside a span.

    So a token across the border of prompt and answer belongs to the answer, which begins with it.
    """
    size = len(piece.ids)
    if spans is None:
        return np.ones(size, np.bool_)
    trained = np.zeros(size, np.bool_)
    if piece.stop is not None:
        for start, stop in _overlapping(spans, piece.start, piece.stop):
            first = 0 if start <= piece.start else token_at(piece, start)[0]
            last = size if stop >= piece.stop else _tokens_before(piece, stop)
            trained[first:last] = True
        return trained
    offsets = piece.offsets
    for start, stop in spans:
        # A token whose only space the tokenizer trimmed has an empty offset (n, n), and belongs
        # to the text before n.
        first = bisect_right(offsets, start, key=itemgetter(1))
        trained[first : bisect_right(offsets, (stop, stop))] = True
    return trained


def _overlapping(spans: Sequence[Span], start: int, stop: int) -> Sequence[Span]:
    """Those of ordered spans that have a character of [start, stop)."""
    first = bisect_right(spans, start, key=itemgetter(1))
    return spans[first : bisect_left(spans, stop, key=itemgetter(0))]


def _tokens_before(piece: Piece, stop: int) -> int:
    """Number of a piece's tokens that begin before a position."""
    index, first, _ = token_at(piece, stop)
    return index + 1 if index < len(piece.ids) and first < stop else index
