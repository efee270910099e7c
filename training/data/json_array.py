"""Reads the elements of a JSON array, which may be the value `data` of an object, from a sliding
window over its text."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from ..common.errors import InputError
from .rows import BadRow, Row, row_or_bad, shorten, size_in_bytes, too_large
from .sources import SourceFile

_BLOCK = 2**20
_IN_STRING = re.compile(r'\\.?|"', re.DOTALL)
_OUTSIDE = re.compile(r'["\[\]{},]')


def array_rows(file: SourceFile, max_bytes: int) -> Iterator[tuple[int, Row | BadRow]]:
    """(line, row) of every element.

    Args:
        file: the file.
        max_bytes: a larger element becomes a `BadRow`, and is not held in memory as a whole.

    Raises:
        InputError: the array is not valid JSON from some line on.
    """
    with file.open_text() as stream:
        yield from _elements(_Window(file, stream, max_bytes))


def fault_of_json(error: Exception) -> str:
    """Why a text of JSON is no row."""
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    return "not usable JSON: an integer has thousands of digits"


def _elements(window: "_Window") -> Iterator[tuple[int, Row | BadRow]]:
    window.skip_space()
    in_object = window.peek() == "{"
    if in_object:
        window.enter("data")
    window.expect("[")
    window.skip_space()
    while window.peek() != "]":
        window.skip_space()
        yield window.line, window.element()
        window.skip_space()
        if window.peek() != "]":
            window.expect(",")
            window.skip_space()
            window.refuse("]")
    window.expect("]")
    if in_object:
        window.leave("data")
    window.end()


class _Window:
    """A sliding window over a text file, with a position and its line number."""

    def __init__(self, file: SourceFile, stream: Any, max_bytes: int) -> None:
        self._file = file
        self._stream = stream
        self._max_bytes = max_bytes
        # Invalid UTF-8 becomes lone surrogates here, so that only the row with them is bad.
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._json = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self.line = 1
        self._ended = False

    def peek(self) -> str:
        """The next character; empty at the end of the file."""
        while self._position >= len(self._text) and not self._ended:
            self._read_more()
        return self._text[self._position : self._position + 1]

    def skip_space(self) -> None:
        while (character := self.peek()) and character in " \t\r\n":
            self.line += character == "\n"
            self._position += 1

    def expect(self, character: str) -> None:
        actual = self.peek()
        if actual != character:
            fault = f"expected '{character}', found {actual!r}" if actual else "the file ends"
            self._fail(fault, self.line)
        self._position += 1

    def enter(self, key: str) -> None:
        """Go to the value of a key of the object that begins here."""
        self.expect("{")
        while True:
            self.skip_space()
            is_key = self.peek() == '"' and self._starts(f'"{key}"')
            self.element()
            self.skip_space()
            self.expect(":")
            self.skip_space()
            if is_key:
                return
            self.element()
            self.skip_space()
            self.expect(",")

    def leave(self, key: str) -> None:
        """Go to the end of the object, past its other keys; fail if the key comes again."""
        self.skip_space()
        while self.peek() == ",":
            self.expect(",")
            self.skip_space()
            if self.peek() == '"' and self._starts(f'"{key}"'):
                self._fail(f"the key {key!r} comes twice, and one value would be lost", self.line)
            self.element()
            self.skip_space()
            self.expect(":")
            self.skip_space()
            self.element()
            self.skip_space()
        self.expect("}")

    def refuse(self, character: str) -> None:
        """Fail if this is the next character."""
        if self.peek() == character:
            self._fail(f"there is nothing between ',' and '{character}'", self.line)

    def end(self) -> None:
        """Fail unless nothing follows: a second array would be rows that nobody reads."""
        self.skip_space()
        if self.peek():
            self._fail("the array ends, and the file goes on", self.line)

    def _starts(self, text: str) -> bool:
        while len(self._text) - self._position < len(text) and not self._ended:
            self._read_more()
        return self._text.startswith(text, self._position)

    def element(self) -> Row | BadRow:
        """Read the next element."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except RecursionError as error:
                return self._skip(error)
            except ValueError as error:
                if not isinstance(error, json.JSONDecodeError):
                    return self._skip(error)
                if self._ended:
                    self._fail(str(error), self.line)
                if len(self._text) - self._position > self._max_bytes:
                    return self._skip(error)
                self._read_more()
            else:
                # A number may go on beyond the window.
                if end < len(self._text) or self._ended:
                    return self._take(value, end)
                self._read_more()

    def _take(self, value: Any, end: int) -> Row | BadRow:
        text = self._text[self._position : end]
        self.line += text.count("\n")
        self._position = end
        size = size_in_bytes(text)
        if size > _BLOCK:  # it need not stay in memory while the row is used
            self._text, self._position = self._text[end:], 0
        if size > self._max_bytes:
            return too_large(size, self._max_bytes, text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            return BadRow("not UTF-8 text", shorten(shown))
        return row_or_bad(value, text)

    def _skip(self, error: Exception) -> BadRow:
        """Pass over an element that could not be decoded; `error` says why."""
        line, start = self.line, self._text[self._position : self._position + 4096]
        size = self._pass_over()
        if size > self._max_bytes:
            return too_large(size, self._max_bytes, start)
        if size and not isinstance(error, json.JSONDecodeError):
            return BadRow(fault_of_json(error), shorten(start))
        return self._fail(str(error), line)

    def _pass_over(self) -> int:
        """Go on to the end of an element; returns its size in bytes, or 0 if it has no end."""
        size = depth = 0
        in_string = is_escaped = is_over = False
        while not is_over and self.peek():
            index = self._position + is_escaped
            is_escaped = False
            while not is_over:
                mark = (_IN_STRING if in_string else _OUTSIDE).search(self._text, index)
                if mark is None:
                    index = len(self._text)
                    break
                index, letter = mark.end(), mark[0]
                is_escaped = letter == "\\"  # the escaped character is in the next window
                in_string ^= letter == '"'
                depth += (letter in "[{") - (letter in "]}")
                is_over = (letter in "]}" and depth <= 0) or (letter == "," and depth == 0)
                if is_over and (letter == "," or depth < 0):
                    index = mark.start()
            part = self._text[self._position : index]
            size += size_in_bytes(part)
            self.line += part.count("\n")
            self._position = index
        return size if is_over else 0

    def _read_more(self) -> None:
        """Drop the text before the position, and double the rest (by at least a block)."""
        self._text = self._text[self._position :]
        self._position = 0
        block = self._stream.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        self._text += self._utf8.decode(block, final=self._ended)

    def _fail(self, reason: str, line: int) -> NoReturn:
        raise InputError(
            f"{self._file.place}:{line}: the JSON array is invalid from here on: {reason}; "
            "repair it, or write one object per line as .jsonl"
        )
