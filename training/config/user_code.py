"""The user's code: a function in a Python file that a recipe names.

The file is read once, where the recipe is loaded. From then on its text is part of the recipe: it
travels with a job or a RayJob, it is the same on every node, and a changed file is another run.

    python -m finray.training.config.user_code

imports such a file, whose `UserFunction` comes as JSON through stdin (see `try_import`).
"""

import ast
import functools
import hashlib
import linecache
import operator
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel

from ..common.errors import InputError, RunError, reason
from ..common.formatting import shown
from ..common.secrets import redact, secret_kind
from .paths import resolve_path
from .places import PlacedSection, about, locates
from .section import Section

AnySettings = TypeVar("AnySettings", bound=BaseModel)

_TRY_SECONDS = 300
_TRIED = "tried"
"""What the process that imports a file prints last."""
_FAILED = "\0failed: "
"""What it prints before the error; what the file itself prints comes earlier."""


class UserFunction(Section):
    """A function at the top level of a Python file, "file.py:function"."""

    file: str
    source: str | None = None
    """The file's text; read from the file where the recipe leaves it out."""

    @property
    def path(self) -> str:
        """The file, without the function's name."""
        return self.file.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.file.rpartition(":")[2]

    @property
    def text(self) -> str:
        """The file's text; only functions that `resolve` returned have it."""
        assert self.source is not None
        return self.source

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def resolve(self, folder: Path, where: str) -> Self:
        """The function with its file's absolute path and text; nothing of it is executed.

        Args:
            folder: where a relative path starts.
            where: the key in the recipe, for messages.

        Raises:
            InputError: the file cannot be read, is not Python, holds a secret, or lacks the
                function.
        """
        if not self.path:
            raise InputError(
                f"{where}.file: {shown(self.file)} names a file without a function; write both, as "
                "in rewards.py:score"
            )
        with about(f"{where}.file"):
            file = f"{resolve_path(self.path, folder)}:{self.name}"
        function = self.model_copy(update={"file": file})
        if function.source is None:
            try:
                source = Path(function.path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{where}.file: cannot read {function.path!r}: {reason(error)}; "
                    "give a Python file and a function in it, as in rewards.py:score"
                ) from None
            function = function.model_copy(update={"source": source})
        function._check(f"{where}.file: {function.path}")
        return function

    def _check(self, place: str) -> None:
        if (kind := secret_kind(self.text)) is not None:
            raise InputError(
                f"{place} holds {kind}, and its text is stored with the run; read it from the "
                "environment instead"
            )
        try:
            tree = ast.parse(self.text, self.path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            raise InputError(f"{place}{line}: not valid Python: {error}; correct it") from None
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        functions = [node for node in tree.body if isinstance(node, kinds)]
        named = [node for node in functions if node.name == self.name]
        if not named:
            names = ", ".join(node.name for node in functions) or "none"
            raise InputError(
                f"{place} has no function {self.name!r} at its top level; its functions: {names}; "
                "name one of them"
            )
        if isinstance(named[-1], ast.AsyncFunctionDef):
            raise InputError(
                f"{place}:{named[-1].lineno}: {self.name} is an async function; define it with "
                "def, without async"
            )
        self.check_parameters(named[-1], f"{place}:{named[-1].lineno}: {self.name}")

    def check_parameters(self, function: ast.FunctionDef, place: str) -> None:
        """Check the function's parameters; subclasses override this.

        Args:
            function: its definition.
            place: file, line and name, for messages.

        Raises:
            InputError: it does not take the arguments that it is called with.
        """

    def load(self) -> Callable[..., Any]:
        """Execute the file as a module and return the function; tracebacks show the file's lines.

        Raises:
            RunError: the file raises.
        """
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self.text), None, lines, self.path)
        module = types.ModuleType(f"finray_user_{self.digest[:8]}")
        module.__file__ = self.path
        module.__dict__["print"] = _print_aside
        # Dataclasses and pickle look for the module there.
        sys.modules[module.__name__] = module
        try:
            exec(compile(self.text, self.path, "exec"), module.__dict__)
            function: Callable[..., Any] = module.__dict__[self.name]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything
            trace = traceback_of(error, self.path) + self._remedy(error)
            raise RunError(f"{self.path} cannot be imported; correct the file:\n{trace}") from None
        return _without_exit(function)

    def _remedy(self, error: BaseException) -> str:
        """What to do about the import of a file beside this one, which does not travel with it."""
        if not isinstance(error, ImportError):
            return ""
        name = (error.name or "").partition(".")[0]
        beside = Path(self.path).parent
        is_beside = bool(name) and any((beside / each).exists() for each in (name, f"{name}.py"))
        if not is_beside and "relative import" not in str(error):
            return ""
        return (
            "The file travels alone, without those beside it: put what it needs from them into it, "
            "or install them as a package"
        )


def _print_aside(*values: object, file: Any = None, **options: Any) -> None:
    """`print` of the user's code: stdout belongs to the command, which may write JSON there."""
    print(*values, file=sys.stderr if file is None else file, **options)


def _without_exit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; `sys.exit` and the like are errors as others are, and do not end the run."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as end:  # noqa: BLE001 - the user's code may raise anything
            said = f"raised {end!r}"
            if isinstance(end, SystemExit):
                said = f"called sys.exit({end.code!r})"
            problem = RuntimeError(f"the function {said}")
            raise problem.with_traceback(end.__traceback__) from None

    return call


def traceback_of(error: BaseException, path: str) -> str:
    """The error's traceback from the user's file on, without finray's frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != path:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def functions_in(settings: BaseModel, key: str = "") -> Iterator[tuple[str, UserFunction]]:
    """(dotted key, function) of all user functions in a recipe or a section of it."""
    if isinstance(settings, UserFunction):
        yield key, settings
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for index, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(item, BaseModel):
                inner = f"{name}.{index}" if isinstance(value, list | tuple) else name
                yield from functions_in(item, f"{key}.{inner}" if key else inner)


def with_texts(
    settings: AnySettings, texts: Mapping[str, str], folder: Path, key: str = ""
) -> AnySettings:
    """The settings, whose functions have these texts instead of what their files hold now.

    Args:
        settings: a recipe or a section of it.
        texts: by absolute path; a function stays whose file is not among them, or that has a text.
        folder: where a relative path starts.
        key: the key of the section, for messages.

    Raises:
        InputError: a path begins with the home of a user who does not exist.
    """

    def changed(value: Any, key: str) -> Any:
        if isinstance(value, list | tuple):
            items = [changed(item, f"{key}.{index}") for index, item in enumerate(value)]
            return type(value)(items) if any(map(operator.is_not, items, value)) else value
        return with_texts(value, texts, folder, key) if isinstance(value, BaseModel) else value

    update = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        new = changed(value, f"{key}.{name}" if key else name)
        if new is not value:
            update[name] = new
    if isinstance(settings, UserFunction) and settings.source is None:
        with about(f"{key}.file"):
            text = texts.get(resolve_path(settings.path, folder))
        if text is not None:
            update["source"] = text
    return settings.model_copy(update=update) if update else settings


@locates
def try_import(settings: PlacedSection, tried: set[str] | None = None) -> None:
    """Import each file of the user's code once, in a process of its own, before anything heavy.

    Args:
        settings: the recipe.
        tried: digests of files that were imported before; those of this recipe are added.

    Raises:
        InputError: a file raises, ends its process, or does not come to an end.
    """
    tried = set() if tried is None else tried
    for key, function in functions_in(settings):
        if function.digest in tried:
            continue
        tried.add(function.digest)
        try_file(function, key)


def try_file(function: UserFunction, key: str) -> None:
    """Import the file of a function once, in a process of its own.

    Args:
        function: the function.
        key: the key in the recipe, or the option, for messages.

    Raises:
        InputError: see `try_import`.
    """
    command = [sys.executable, "-P", "-m", "finray.training.config.user_code"]
    plain = UserFunction(file=function.file, source=function.source)
    try:
        done = subprocess.run(
            command,
            input=plain.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=_TRY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{key}.file: importing {function.path} takes longer than {_TRY_SECONDS} s; move slow "
            "work into the function"
        ) from None
    if done.returncode or not done.stdout.endswith(_TRIED):
        _, failed, error = done.stderr.rpartition(_FAILED)
        problem = error.strip() if failed else _of_ended(done)
        raise InputError(f"{key}.file: {redact(problem)}")


def _of_ended(done: subprocess.CompletedProcess[str]) -> str:
    """What is known of a process that ended without an error of its own."""
    problem = f"its process ended with exit code {done.returncode}"
    *_, last = done.stderr.strip().splitlines() or [""]
    return f"{problem}, after the line: {last}" if last else problem


def main() -> int:
    """Import a file; returns the exit code."""
    try:
        UserFunction.model_validate_json(sys.stdin.read()).load()
    except RunError as error:
        print(_FAILED, error, sep="", file=sys.stderr)
        return error.exit_code
    print(_TRIED, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
