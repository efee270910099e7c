"""The first rows of a recipe as the model sees them: text, special tokens, and what is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import numpy as np

from ..common.formatting import count
from ..common.storage import Folder
from ..config.recipe import Recipe
from .curation.following import Followed, Stages
from .formats import read_examples
from .render_settings import RenderSettings
from .rendering import Document, Renderer, load_renderer
from .resolve import ResolvedSource, all_rows, resolve_data
from .rows import BadRow, Row
from .shapes import Example, PreferencePair, RowError, is_chat, parts_of


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class ShownText:
    """A text that the model reads on its own: a document, or one answer of a pair."""

    title: str
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ShownRow:
    """A row of the data: its texts, or why it has none."""

    place: str
    """file:line"""
    facts: tuple[str, ...]
    """Split, format, template."""
    texts: tuple[ShownText, ...]
    problem: str = ""


@dataclass(frozen=True)
class ShownRows:
    """The first rows of each source."""

    name: str
    """The recipe's name."""
    facts: tuple[tuple[str, str], ...]
    """(label, text) pairs about all rows."""
    rows: tuple[ShownRow, ...]


def show_rows(recipe: Recipe, most: int, prepared: Folder) -> ShownRows:
    """Read and tokenise the first rows of each source as a preparation does.

    Args:
        recipe: the recipe.
        most: number of rows of each source.
        prepared: <storage>/prepared, where finished stages of data.curate are.

    Raises:
        InputError: a source, the tokenizer or the chat template is wrong.
    """
    data = resolve_data(recipe)
    renderer = load_renderer(RenderSettings.of(recipe))
    stages = None
    if recipe.data.is_curated:
        stages = Stages(recipe, data, prepared)
    rows = []
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources):
            if stages is not None and split == "train":
                followed = stages.first_rows(number, most)
                rows += [_followed(recipe, row, source, renderer) for row in followed]
            else:
                rows += _of_source(recipe, source, split, renderer, most)
    return ShownRows(recipe.name, tuple(_facts(recipe)), tuple(rows))


def _facts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model", recipe.model.base
    yield "method", recipe.method.kind
    length = count(recipe.row_length)
    if recipe.packs:
        yield "packing", f"texts share sequences of {length} tokens, isolated from each other"
    else:
        yield "packing", f"none: each text is a sequence of up to {length} tokens"


def template_of(recipe: Recipe) -> str:
    """Which template renders a conversation, in words."""
    named = recipe.data.chat_template
    if named is None:
        return "the model's own chat template"
    return "the template chatml" if named == "chatml" else "the recipe's own template"


def _of_source(
    recipe: Recipe, source: ResolvedSource, split: str, renderer: Renderer, most: int
) -> Iterator[ShownRow]:
    rows = all_rows(source.files, source.changes, recipe.data.max_row_bytes)
    for place, row in islice(rows, most):
        if isinstance(row, BadRow):
            yield ShownRow(place, (split, source.format), (), f"not usable: {row.reason}")
            continue
        yield _shown(recipe, place, row, source, split, renderer)


def _followed(
    recipe: Recipe, followed: Followed, source: ResolvedSource, renderer: Renderer
) -> ShownRow:
    """A row that goes through stages."""
    row = followed.row
    facts = ("train", source.format, *followed.facts)
    if isinstance(row, BadRow):
        return ShownRow(followed.place, facts, (), f"not usable: {row.reason}")
    if followed.dropped:
        return ShownRow(followed.place, facts, (), followed.dropped)
    shown = _shown(recipe, followed.place, row, source, "train", renderer)
    return replace(shown, facts=(*shown.facts, *followed.facts))


def _shown(
    recipe: Recipe, place: str, row: Row, source: ResolvedSource, split: str, renderer: Renderer
) -> ShownRow:
    facts: tuple[str, ...] = (split, source.format)
    method = recipe.method
    try:
        _, read = read_examples(row, source.format, method.kind, method.columns)
    except RowError as error:
        return ShownRow(place, facts, (), f"not usable: {error}")
    examples = [example for example, _ in read]
    has_chat = any(is_chat(part) for example in examples for part in parts_of(example))
    facts = (*facts, template_of(recipe) if has_chat else "no template: the text as it is")
    texts: list[ShownText] = []
    problems = []
    for example, rendered in zip(examples, renderer.render(examples), strict=True):
        if rendered.error is not None:
            problems.append(f"not usable: {rendered.error}")
        elif rendered.dropped is not None:
            problems.append(f"dropped: {rendered.dropped}")
        for number, document in enumerate(rendered.documents, start=1):
            title = f"part {number} of {len(rendered.documents)}"
            names = _titles(example, title if len(rendered.documents) > 1 else "text")
            texts += _texts(renderer.tokenizer, document, names)
    return ShownRow(place, facts, tuple(texts), "; ".join(problems))


def _titles(example: Example, single: str) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(example, PreferencePair) else (single,)


def _texts(tokenizer: Any, document: Document, titles: Sequence[str]) -> Iterator[ShownText]:
    special = np.array(sorted(set(tokenizer.all_special_ids) | _added(tokenizer)), np.int64)
    start = 0
    for title, length in zip(titles, document.lengths, strict=True):
        part = slice(start, start + length)
        start += length
        ids, trained = document.input_ids[part], document.trainable[part]
        pieces = _pieces(tokenizer, ids.tolist(), trained.tolist(), np.isin(ids, special).tolist())
        yield ShownText(title, length, int(trained.sum()), tuple(pieces))


def _added(tokenizer: Any) -> set[int]:
    """Tokens that a template writes, such as those of calls and reasoning."""
    return set(tokenizer.added_tokens_decoder)


def _pieces(
    tokenizer: Any, ids: list[int], trained: list[bool], special: list[bool]
) -> Iterator[Piece]:
    kinds = list(zip(trained, special, strict=True))
    stop = 0
    before = ""
    for (is_trained, is_special), tokens in groupby(kinds):
        stop += sum(1 for _ in tokens)
        # Decoded from the start, because what a token adds depends on those before it.
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        yield Piece(text[len(before) :], is_trained, is_special)
        before = text
