"""The finray command: arguments in, exit codes out.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted.
Only the standard library is imported here; each command imports what it needs.
"""

import sys
from collections.abc import Sequence
from io import TextIOWrapper

from ...training.common.errors import FinrayError
from .commands import command_function
from .usage import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    _accept_any_text()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        _prepare_process(options.log_level)
        command_function(options)(options)
    except FinrayError as error:
        from ...training.common.secrets import redact

        print(f"finray: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("finray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it: no error of ours.
        sys.stderr.close()
        return 0
    return 0


def _accept_any_text() -> None:
    """Signs that the terminal lacks are shown as escapes, and input that is no text is replaced."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _prepare_process(log_level: str | None) -> None:
    """Set what libraries read when they are imported."""
    from ...training.common.logs import choose_level, start_logging

    if log_level is not None:
        choose_level(log_level)
    from ..environment import quiet_libraries, set_environment

    set_environment()
    quiet_libraries()
    start_logging()


if __name__ == "__main__":
    sys.exit(main())
