"""The errors that finray raises on purpose; the command line maps each to an exit code.

Each takes a single message, so that it can be pickled between Ray processes.
"""


class FinrayError(Exception):
    """Root of all errors that finray raises on purpose."""

    exit_code = 1


class InputError(FinrayError, ValueError):
    """The recipe, the data or the arguments are wrong. Exit code 2."""

    exit_code = 2


class RunError(FinrayError, RuntimeError):
    """The run itself failed. Exit code 1."""


class Interrupted(FinrayError):
    """The user stopped the run; its state is saved. Exit code 130."""

    exit_code = 130


def last_line(error: Exception) -> str:
    """The last line of an error that contains another process's traceback: the cause itself."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
