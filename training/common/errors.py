"""The errors that finray raises on purpose; the command line maps each to an exit code.

Each takes a single message, so that it can be pickled between Ray processes.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .formatting import one_line, printable
from .secrets import redact

_LONG = re.compile(r"\S{500,}")
"""A path or a word that would fill the screen."""


def _shortened(match: re.Match[str]) -> str:
    return f"{match[0][:200]}…{match[0][-60:]}"


_ERROR_NAME = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b")


class FinrayError(Exception):
    """Root of all errors that finray raises on purpose.

    Args:
        message: may quote the user's input; secrets and the terminal's control characters in it
            are replaced, and very long words cut.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(_LONG.sub(_shortened, redact(printable(message))))


class InputError(FinrayError, ValueError):
    """The recipe, the data or the arguments are wrong. Exit code 2."""

    exit_code = 2


class RunError(FinrayError, RuntimeError):
    """The run itself failed. Exit code 1."""


class Interrupted(FinrayError):
    """The user stopped the run; its state is saved. Exit code 130."""

    exit_code = 130


def reason(error: Exception) -> str:
    """Why a file cannot be read, on one line, without its path."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(str(error)) or type(error).__name__


@contextmanager
def writing(place: object, remedy: str = "choose another place") -> Iterator[None]:
    """Inside, a file of the user's is written.

    Args:
        place: the file, or the option with it, for messages.
        remedy: what to do about a place that takes no file.

    Raises:
        InputError: the place takes no file.
        RunError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        text = f"{place}: cannot be written: {reason(error)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise RunError(f"{text}; free space there, and run the same command") from None
        raise InputError(f"{text}; {remedy}") from None


def in_one_line(error: BaseException) -> str:
    """What an error says: its first line, and its last where that says more.

    If it contains the traceback of another process, these are lines of the cause, which follows it.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    cause = [line for line in after if not (frames and line.startswith("  "))]
    if not cause:
        return lines[-1].strip() if lines else type(error).__name__
    first, last = cause[0].strip(), cause[-1].strip()
    says_more = last != first and (first.endswith(":") or _ERROR_NAME.match(last))
    return f"{first} {last}" if says_more else first
