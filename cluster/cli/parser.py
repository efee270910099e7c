"""The parser, and arguments that several commands share; only the standard library is imported."""

import argparse
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

LEVELS = ("debug", "info", "warning", "error")
"""Levels of `logging`, which takes time to import."""


class UsageError(Exception):
    """A command line that argparse refuses.

    Args:
        message: argparse's reason.
        parser: of the command, as far as it could be read.
    """

    def __init__(self, message: str, parser: "Parser") -> None:
        super().__init__(message)
        self.message = message
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse prints the usage and exits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(message, self)


def add_command(commands: Any, name: str, what: str, *examples: str) -> Parser:
    """A new command with its help: what it does, and examples."""
    parser = _described(commands, name, what, examples)
    parser.set_defaults(parser=parser)
    add_general(parser, is_shown=True)
    return parser


def add_group(commands: Any, name: str, what: str, *examples: str) -> Any:
    """A new command that consists of verbs; returns what they are added to."""
    parser = _described(commands, name, what, examples)
    add_general(parser, is_shown=False)
    return parser.add_subparsers(dest="verb", metavar="VERB", required=True)


def _described(commands: Any, name: str, what: str, examples: tuple[str, ...]) -> Parser:
    title = "example:" if len(examples) == 1 else "examples:"
    parser: Parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog="\n".join([title, *(f"  finray {example}" for example in examples)]),
    )
    return parser


def add_general(parser: Parser, is_shown: bool) -> None:
    """Options that may stand before and behind a command; the help of commands shows them."""
    quiet = "print only the result and errors"
    level = f"let the libraries log: {', '.join(LEVELS)}"
    if not is_shown:
        quiet = level = argparse.SUPPRESS
    # What stands before the command is kept, as a command has no default of its own.
    default = argparse.SUPPRESS
    group = parser.add_argument_group("general options")
    group.add_argument("--quiet", action="store_true", default=default, help=quiet)
    group.add_argument("--log-level", metavar="LEVEL", choices=LEVELS, default=default, help=level)


def complete_as(action: argparse.Action, kind: Literal["file", "directory"]) -> None:
    """Let a shell complete an argument as a path; `finray completion` reads this."""
    action.complete = kind  # type: ignore[attr-defined]


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def number(text: str) -> float:
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")


def local(text: str) -> Path:
    """A path on this machine; a URI would become a folder of that name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on this machine, found the URI {text}")
    return Path(text)


def add_to(parser: Parser, what: str, default: Path | None = None) -> None:
    to = parser.add_argument("--to", "-o", metavar="FILE", type=local, default=default, help=what)
    complete_as(to, "file")


def add_preparing(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--local", action="store_true", help="run in this process (scale.workers=0)"
    )
    add_ray(parser)
    add_json(parser)


def add_training(parser: Parser) -> None:
    add_preparing(parser)
    add_waiting(parser)
    add_again(parser)


def add_storage(parser: Parser, is_verb: bool = True) -> None:
    """The storage, and JSON; what stands before a verb is kept, so a verb has no default."""
    default = argparse.SUPPRESS if is_verb else None
    storage = parser.add_argument(
        "--storage",
        metavar="FOLDER",
        default=default,
        help="folder or URI (default: $FINRAY_STORAGE, else runs)",
    )
    complete_as(storage, "directory")
    as_json = argparse.SUPPRESS if is_verb else False
    parser.add_argument(
        "--json", action="store_true", default=as_json, help="print the result as JSON"
    )


def add_model(parser: Parser) -> None:
    model = parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="a run's folder, name or URI, a checkpoint of it, a model's folder, or a hub id",
    )
    complete_as(model, "directory")


def add_recipe(parser: Parser) -> None:
    recipe = parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="the recipe, a YAML file"
    )
    complete_as(recipe, "file")
    add_overrides(parser, "a setting, such as optim.learning_rate=1e-4")


def add_overrides(parser: Parser, what: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"override {what} (may be repeated)",
    )


def add_ray(parser: Parser) -> None:
    parser.add_argument(
        "--address",
        help="a running Ray cluster, as HOST:PORT or auto (default: $FINRAY_ADDRESS unless that is "
        "a URL, then $RAY_ADDRESS), or local: start Ray on this machine, the default of a sweep",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")


def add_waiting(parser: Parser) -> None:
    parser.add_argument(
        "--wait-for-nodes",
        metavar="SECONDS",
        type=number,
        default=0.0,
        help="seconds to wait for an autoscaler to add the missing nodes (default: 0)",
    )


def add_again(parser: Parser) -> None:
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; an earlier run's folder is renamed to NAME.1",
    )
    parser.add_argument(
        "--longer",
        action="store_true",
        help="steps that were added get a learning-rate schedule of their own",
    )


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
