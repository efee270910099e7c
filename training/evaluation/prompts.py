"""Reads the rows of a file as prompts, whatever their shape; a row that is none says why."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..common.errors import InputError
from ..config.source import KnownFormat, Source
from ..data.contents import describe_files
from ..data.examples import asked_of, rules_of
from ..data.expand import expand
from ..data.fields import alpaca_prompt
from ..data.formats import detect_format, normalise, own_format
from ..data.media import refuse_media
from ..data.messages import turns_of, with_lists
from ..data.resolve import all_rows
from ..data.row_changes import RowChanges
from ..data.rows import BadRow, Row
from ..data.shapes import (
    Example,
    LabelledExample,
    PreferencePair,
    Question,
    RowError,
    Text,
)

_METHOD = "grpo"
"""A method that learns from prompts: it reads rows as questions."""
_ROWS_CHECKED = 20
_RENAME = (
    "rename the keys of your rows in the file: prompt is what is asked, and response, where there "
    "is one, the right answer"
)
_MOST_BYTES = 16 * 2**20
"""Of a row, as `data.max_row_bytes` allows."""
_CONVERSATIONS = ("messages", "conversations")
_ALPACA = ("instruction", "input", "output", "history")


@dataclass(frozen=True)
class PromptRow:
    """A row of a file as a prompt."""

    number: int
    """Number of the row among those of all files, from 1."""
    place: str
    """file:line"""
    question: Question | None = None
    """The prompt, with the row's own answer as its reference; None if the row is none."""
    error: str = ""
    """Why the row is no prompt; empty if it is one."""
    example: Example | None = None
    """The row with its answer, of which a loss can be measured; None if it has none."""
    calls: list[Row] | None = None
    """The calls of the row's own answer, [{name, arguments}]; None if it offers no tools."""
    columns: Row = field(default_factory=dict)
    """The row's other columns, with `reference`, as functions of the user get them."""

    @property
    def turns(self) -> Any:
        """The prompt as text or as a list of messages."""
        assert self.question is not None
        prompt = self.question.prompt
        return prompt if isinstance(prompt, str) else list(prompt)


def read_prompts(sources: Sequence[Source], limit: int | None = None) -> Iterator[PromptRow]:
    """The rows of some sources, in their order.

    Args:
        sources: where they are, with absolute paths.
        limit: rows that are read at most.

    Raises:
        InputError: a source does not exist, is damaged, or none of its first rows can be read.
    """
    number = 0
    for source in sources:
        for place, row in _rows(source):
            if limit is not None and number >= limit:
                return
            number += 1
            yield row_of(number, place, *row)


def digest_of(sources: Sequence[Source]) -> str:
    """A hash of what decides the rows of some sources: 16 hex digits."""
    facts = [
        [describe_files(expand(source).files), RowChanges.of(source).facts, source.format]
        for source in sources
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def row_of(number: int, place: str, row: Row | BadRow, row_format: KnownFormat) -> PromptRow:
    """A row as a prompt."""
    try:
        if isinstance(row, BadRow):
            raise RowError(row.reason)
        return _read(number, place, row, row_format)
    except RowError as error:
        return PromptRow(number, place, error=f"{place}: {error}")
    except RecursionError:
        return PromptRow(number, place, error=f"{place}: nested too deeply")


def _rows(source: Source) -> Iterator[tuple[str, tuple[Row | BadRow, KnownFormat]]]:
    changes = RowChanges.of(source)
    files = expand(source).files

    def prompts() -> Iterator[tuple[str, Row | BadRow]]:
        for place, row in all_rows(files, changes, _MOST_BYTES):
            yield place, row if isinstance(row, BadRow) else _as_prompt(row)

    first = list(islice(prompts(), _ROWS_CHECKED))
    good = [(place, row) for place, row in first if not isinstance(row, BadRow)]
    if not good:
        faults = [f"{place}: {row.reason}" for place, row in first if isinstance(row, BadRow)]
        raise InputError(
            f"{faults[0]}; none of the first rows can be read"
            if faults
            else f"{source.label}: there are no rows; expected at least one"
        )
    row_format = source.format
    if row_format == "auto":
        row_format = detect_format(good, _METHOD, _RENAME)
    for place, row in prompts():
        yield place, (row, row_format)


def _as_prompt(row: Row) -> Row | BadRow:
    """A conversation or an instruction without an answer gets the column `prompt`."""
    try:
        row = with_lists(row)
        if row.get("instruction") is not None and row.get("output") in (None, ""):
            others = {name: value for name, value in row.items() if name not in _ALPACA}
            return {**others, "prompt": alpaca_prompt(row)}
        for name in _CONVERSATIONS:
            if isinstance(row.get(name), list) and row[name] and "chosen" not in row:
                turns = turns_of(row[name], name)
                if turns[-1]["role"] != "assistant":
                    others = {key: value for key, value in row.items() if key != name}
                    return {**others, "prompt": turns}
    except RowError as error:
        return BadRow(str(error), "")
    return row


def _read(number: int, place: str, row: Row, row_format: KnownFormat) -> PromptRow:
    refuse_media(row)
    normalised = normalise(row, _format_of(row, row_format))
    example = _answered(normalised)
    question = rules_of(_METHOD).adapt(example)
    assert isinstance(question, Question)
    asked = asked_of(row, example)
    columns = asked["columns"]
    reference = question.reference
    if reference is None and isinstance(columns.get("reference"), str):
        question = Question(question.prompt, columns["reference"], question.context)
    has_answer = not isinstance(example, Question)
    return PromptRow(
        number,
        place,
        question,
        example=example if has_answer else None,
        calls=asked["calls"],
        columns=columns,
    )


def _format_of(row: Row, row_format: KnownFormat) -> KnownFormat:
    """The format of a row, which may have an answer though others of its source have none."""
    own = own_format(row, row_format, _METHOD)
    if own != "prompt":
        return own
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return "preference"
    has_answer = any(row.get(name) is not None for name in ("completion", "response"))
    return "prompt_completion" if has_answer else own


def _answered(row: Example) -> Example:
    """The example whose prompt is asked: of a pair the chosen one."""
    if isinstance(row, PreferencePair):
        return row.chosen
    if isinstance(row, LabelledExample):
        return row.answer
    if isinstance(row, Text):
        raise RowError("a plain text has no prompt; rename its key to prompt in the file")
    return row
