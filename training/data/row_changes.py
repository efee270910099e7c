"""What a source does with each row before its shape is read: function, columns, roles, system."""

import copy
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..common.formatting import one_line
from ..config.source import RowFunction, Source
from ..config.user_code import traceback_of
from .messages import CONVERSATIONS, with_lists, with_messages, with_roles
from .rows import BadRow, Row, excerpt
from .scalars import with_text_answers
from .shapes import RowError

_OPTIONAL = ("system", "input", "history", "tools", "functions", "chat_template_kwargs")
"""Columns that rows of a shape may lack; of one that is misspelt, the real one is not used, which
is said."""
_SHOWN = 300


@dataclass(frozen=True)
class RowChanges:
    """The changes, in the order in which they are made: function, columns, message keys, roles,
    system prompt."""

    function: RowFunction | None = None
    columns: tuple[tuple[str, str], ...] = ()
    """(expected, own) names of columns."""
    message_keys: tuple[tuple[str, str], ...] = ()
    """(expected, own) keys of a message."""
    roles: tuple[tuple[str, str], ...] = ()
    """(own, standard) role names."""
    system: str | None = None

    @classmethod
    def of(cls, source: Source) -> "RowChanges":
        return cls(
            function=source.map,
            columns=tuple(source.columns.items()),
            message_keys=tuple(source.message_keys.items()),
            roles=tuple(source.roles.items()),
            system=source.system,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides the rows, for the fingerprint; empty where nothing is changed."""
        function = None if self.function is None else [self.function.name, self.function.digest]
        facts = {
            "map": function,
            "columns": self.columns,
            "message_keys": self.message_keys,
            "roles": self.roles,
            "system": self.system,
        }
        return {name: fact for name, fact in facts.items() if fact}

    def apply(self, row: Row) -> Row | None:
        """The changed row; None if the function leaves it out.

        Raises:
            RowError: the function fails, or a column is missing.
        """
        if self.function is not None:
            changed = _called(self.function, row)
            if changed is None:
                return None
            row = changed
        if self.columns:
            row = _with_columns(row, self.columns)
        if self.message_keys:
            row = _with_keys(row, dict(self.message_keys))
        if self.roles:
            row = with_roles(with_lists(row), dict(self.roles))
        return row if self.system is None else _with_system(row, self.system)


UNCHANGED = RowChanges()


def change_rows(
    rows: Iterable[tuple[int, Row | BadRow]], changes: RowChanges
) -> Iterator[tuple[int, Row | BadRow | None]]:
    """(line, row) of each row as its shape is read; None for a row that the function leaves out."""
    for line, row in rows:
        if isinstance(row, BadRow):
            yield line, row
            continue
        try:
            changed = changes.apply(row)
            if changed is not None:
                changed = with_text_answers(changed)
            yield line, changed
        except RowError as error:
            yield line, BadRow(str(error), excerpt(row))


@lru_cache(maxsize=16)
def _loaded(function: RowFunction) -> Any:
    return function.load()


def call(function: RowFunction, row: Row, purpose: str) -> Any:
    """What the user's function returns for a copy of a row.

    Args:
        function: the function.
        row: the row.
        purpose: the setting that names the function, for messages.

    Raises:
        RowError: the function raises.
    """
    try:
        return _loaded(function)(copy.deepcopy(row))
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        lines = traceback_of(error, function.path).strip().splitlines()
        where = next((line.strip() for line in reversed(lines) if function.path in line), "")
        raise RowError(
            f"{purpose} {function.name} raises {one_line(_said(error))[:_SHOWN]}"
            + (f" ({one_line(where)})" if where else "")
        ) from None


def _said(error: Exception) -> str:
    """The error's kind and message, of which a syntax error is the last line."""
    said = "".join(traceback.format_exception_only(error)).strip()
    return said.splitlines()[-1] if isinstance(error, SyntaxError) else said


def _called(function: RowFunction, row: Row) -> Row | None:
    changed = call(function, row, "map")
    if changed is None:
        return None
    if not isinstance(changed, Mapping):
        kind = type(changed).__name__
        raise RowError(f"map {function.name} returns {kind}; expected a dict, or None")
    return {name: _with_lists(value) for name, value in changed.items()}


def _with_lists(value: Any) -> Any:
    """A value with lists in place of tuples, and dicts in that of other mappings."""
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_lists(item) for item in value]
    return value


def _with_columns(row: Row, columns: tuple[tuple[str, str], ...]) -> Row:
    for expected, own in columns:
        if own not in row and expected not in _OPTIONAL:
            names = one_line(", ".join(map(str, row)))[:_SHOWN] or "none"
            raise RowError(
                f"there is no column {own}, which columns names as {expected}; the row has {names}"
            )
    taken = {expected: row[own] for expected, own in columns if own in row}
    moved = {own for _, own in columns}
    return {**{name: value for name, value in row.items() if name not in moved}, **taken}


def _with_keys(row: Row, keys: Mapping[str, str]) -> Row:
    def renamed(message: Row) -> Row:
        moved = {expected: message[own] for expected, own in keys.items() if own in message}
        rest = {key: value for key, value in message.items() if key not in keys.values()}
        return {**rest, **moved}

    return with_messages(with_lists(row, (*keys.values(), "role", "from")), renamed)


def _with_system(row: Row, system: str) -> Row:
    """The row with a system prompt, which its conversation has unless it begins with one."""
    if all(row.get(name) is None for name in (*CONVERSATIONS, "instruction")):
        raise RowError("system needs a conversation or a prompt, and this row has none")
    own = row.get("system")
    return {**row, "system": own if isinstance(own, str) and own.strip() else system}
