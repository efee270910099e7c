"""Keeps answers in a file while they are generated, so that a killed process loses one batch.

Beside the file, `<name>.part` holds a line with what decides the answers, then whole lines in the
order in which they were made. The end sorts them by their rows into the file itself, at once.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..common.errors import InputError, RunError, reason
from ..records.run_folder import Record, parse_record

_WRITTEN: Record = {"row": None, "written": True}
"""The last line of a part whose lines are in the finished file, too."""


def part_of(target: Path) -> Path:
    """What a file that is not finished is written to."""
    return target.with_name(f"{target.name}.part")


class AnswerFile:
    """Lines of a file by their row; what an earlier process wrote is there from the start.

    Args:
        target: the finished file.
        decides: all that decides the lines, as JSON values.
        place: where the part lies for whoever reads a message; by default where it does.

    Raises:
        InputError: the file cannot be written, or was started with other settings.
        RunError: a later write fails, as on a full disk.
    """

    def __init__(self, target: Path, decides: Record, place: str | None = None) -> None:
        self.target = target
        self._part = part_of(target)
        self._place = place or str(self._part)
        self._decides = decides
        self.lines: dict[int, Record] = {}
        """The lines so far, by row."""
        size = self._read_part()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("r+b" if size else "wb")
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written: {reason(error)}; choose another place"
            ) from None
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write([decides])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what a full disk did not take is made again
            self._file.close()

    def add(self, lines: list[Record]) -> None:
        """Add lines; those of rows that are there already gain their keys."""
        for line in lines:
            self.lines[line["row"]] = {**self.lines.get(line["row"], {}), **line}
        self._write(lines)

    def finish(
        self, change: Callable[[Record], Record] = lambda line: line, keeps_part: bool = False
    ) -> None:
        """Write the file, in the order of the rows, and remove the part unless it is kept: for the
        same settings alone, as others make a file of their own."""
        whole = self._part.with_name(f"{self.target.name}.tmp")
        with self._write_errors(), whole.open("wb") as file:
            for row in sorted(self.lines):
                file.write(_as_line(change(self.lines[row])))
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.target)
        if keeps_part:
            self._write([_WRITTEN])
        self._file.close()
        if not keeps_part:
            self._part.unlink()

    def _write(self, lines: list[Record]) -> None:
        with self._write_errors():
            self._file.write(b"".join(map(_as_line, lines)))
            self._file.flush()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """A disk that is full is the machine's fault, and nothing that it took is lost."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._place}: cannot be written: {reason(error)}; what is there is kept, and "
                "the same command continues it"
            ) from None

    def _read_part(self) -> int:
        """Read what an earlier process left; returns the bytes of its whole lines."""
        try:
            content = self._part.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise InputError(
                f"{self._part}: cannot be read: {reason(error)}; change its permissions, or delete "
                "it to start over"
            ) from None
        size = content.rfind(b"\n") + 1
        first, *lines = list(_records(content[:size])) or [None]
        if first is None and not lines:
            return 0
        if first is None:
            raise InputError(
                f"{self._place}: line 1 is damaged, which says how the {len(lines)} answers below "
                "it were made; restore it, or delete the file to start over"
            )
        if first != self._decides:
            if lines and lines[-1] == _WRITTEN:
                return 0
            changed = sorted(
                key for key in {*first, *self._decides} if first.get(key) != self._decides.get(key)
            )
            raise InputError(
                f"{self._place} was started with other settings ({', '.join(changed)}); give those "
                "to go on with it, or delete it"
            )
        for line in lines:
            if line is not None and line != _WRITTEN:
                self.lines[line["row"]] = {**self.lines.get(line["row"], {}), **line}
        return size


def _records(content: bytes) -> Iterator[Record | None]:
    for line in content.split(b"\n")[:-1]:
        yield parse_record(line)


def _as_line(record: Any) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=str)
    return f"{text}\n".encode("utf-8", "backslashreplace")
