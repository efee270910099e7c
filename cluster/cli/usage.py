"""Reads the command line; a mistake in it becomes one line that names the remedy."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...training.common.errors import InputError
from .arguments import build_parser
from .commands import COMMANDS
from .parser import UsageError

_GENERAL = ("-h", "--help", "--version", "--quiet", "--log-level")
"""Options that may stand before a command."""
_REQUIRED = "the following arguments are required: "
_CHOICE = re.compile(r"(.*): invalid choice: (.*) \(choose from (.*)\)")
_SURPLUS = re.compile(r": ignored explicit argument .*")
_WORDS = {"COMMAND": "a command", "VERB": "a verb"}
_OPTION = re.compile(r"--?[A-Za-z]")
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InputError: the command line is not valid.
        SystemExit: help or the version was requested, and printed.
    """
    try:
        options, rest = build_parser().parse_known_args(arguments)
    except UsageError as error:
        raise InputError(_wrong_command(arguments) or _refusal(error)) from None
    rest += _behind_the_sweep(options)
    if rest:
        raise InputError(_wrong_command(arguments) or _unexpected(options, arguments, rest))
    if options.quiet and "verbose" in options and options.verbose:
        raise InputError("--quiet and --verbose contradict each other; leave out one of them")
    return options


def _refusal(error: UsageError) -> str:
    """argparse's reason, in finray's form."""
    program = error.parser.prog
    message = error.message.removeprefix("argument ")
    message = message.replace(": expected one argument", " needs a value")
    message = _SURPLUS.sub(" takes no value", message)
    if choice := _CHOICE.fullmatch(message):
        name, value, choices = choice.groups()
        if name == "VERB":  # of a command that also stands alone
            return _no_verb(program, value.strip("'"), choices)
        message = f"{name}: expected one of {choices.replace(chr(39), '')}, found {value}"
    if message.startswith(_REQUIRED):
        command, missing = program.partition(" ")[2], message.removeprefix(_REQUIRED)
        if missing in _WORDS:
            return f"{_WORDS[missing]} is missing; {program} --help lists them"
        message = f"{command} needs {missing}"
    return f"{message}; see {program} --help"


def _no_verb(program: str, word: str, choices: str) -> str:
    near = _nearest(word, re.findall(r"[a-z]+", choices))
    if near is None:
        return f"unexpected {word!r}; see {program} --help"
    return f"unknown verb {word!r} of {program.partition(' ')[2]}; did you mean {near!r}?"


# the words of the command


def _wrong_command(arguments: Sequence[str]) -> str | None:
    """What is wrong with the command or its verb; None if nothing is."""
    words: list[str] = []
    waiting = iter(arguments)
    for word in waiting:
        option, separator, _ = word.partition("=")
        if option in _GENERAL:
            if option == "--log-level" and not separator:
                next(waiting, None)
        elif word.startswith("-"):
            return _misplaced(option, words)
        elif word not in (choices := _choices(words)):
            return _unknown_command(word, words, choices)
        else:
            words.append(word)
            if " ".join(words) in COMMANDS:
                return None
    return None


def _choices(words: Sequence[str]) -> list[str]:
    """The commands, or the verbs of a command."""
    names = [name.split() for name in COMMANDS]
    depth = len(words)
    return list(dict.fromkeys(name[depth] for name in names if name[:depth] == list(words)))


def _unknown_command(word: str, words: Sequence[str], choices: Sequence[str]) -> str:
    near = _nearest(word, choices)
    if near is None and not words:
        # A verb without its command: submit, doctor, render.
        near = next((name for name in COMMANDS if name.endswith(f" {word}")), None)
    if near is None:
        remedy = f"{' '.join(['finray', *words])} --help lists them"
    else:
        remedy = f"did you mean {near!r}?"
    kind = f"verb {word!r} of {words[0]}" if words else f"command {word!r}"
    return f"unknown {kind}; {remedy}"


def _misplaced(option: str, words: Sequence[str]) -> str:
    """An option before the command, where only a few may stand."""
    near = _nearest(option.strip("-"), [name.strip("-") for name in _GENERAL], 0.75)
    if near is not None:
        return f"unknown option {option}; did you mean --{near}?"
    command = " ".join(["finray", *words, "VERB" if words else "COMMAND"])
    return f"{option} belongs behind the command: {command} {option}"


def _behind_the_sweep(options: argparse.Namespace) -> list[str]:
    """Surplus words of `tune`: argparse takes several, for `tune show SWEEP`.

    Raises:
        InputError: show is misspelt.
    """
    words: list[str] = options.sweep if options.command == "tune" else []
    if not words or words[0] == "show":
        return []
    is_verb = len(words) == 2 and _nearest(words[0], ["show"]) and not Path(words[0]).exists()
    if is_verb:
        raise InputError(f"unknown verb {words[0]!r} of tune; did you mean 'show'?")
    return words[1:]


def _nearest(word: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(word.lower(), choices, n=1, cutoff=cutoff)), None)


# options, and words that no argument takes


class Foreign(NamedTuple):
    """An option that the command does not have, or KEY=VALUE without --set."""

    text: str
    """As it was written, without a value that is a word of its own."""
    name: str
    value: str | None

    @property
    def is_option(self) -> bool:
        """False for KEY=VALUE."""
        return self.text.startswith("-")


def _unexpected(options: argparse.Namespace, arguments: Sequence[str], rest: Sequence[str]) -> str:
    """What to write instead of what no argument takes."""
    if options.command == "import":
        return (
            f"unexpected {rest[0]!r}; put a command line into quotes: finray import 'trl sft …'; "
            f"see {options.parser.prog} --help"
        )
    foreign = [*_unknown_options(arguments, rest)] or [*_assignments(options, rest)]
    program = options.parser.prog
    if not foreign:
        return f"unexpected {rest[0]!r}; see {program} --help"
    from .remedies import Remedies

    remedies = Remedies(options)
    settings = [remedies.setting(item.name, item.value) for item in foreign]
    if all(settings):
        return f"{_named(foreign)}; settings are given as {' '.join(map(str, settings))}"
    item = foreign[settings.index(None)]
    near = remedies.nearest(item.name, item.value)
    return f"{_named([item])}; " + (f"did you mean {near}?" if near else f"see {program} --help")


def _named(foreign: Sequence[Foreign]) -> str:
    if not foreign[0].is_option:
        return f"unexpected {', '.join(item.text for item in foreign)}"
    plural = "s" if len(foreign) > 1 else ""
    return f"unknown option{plural} {', '.join(item.name for item in foreign)}"


def _unknown_options(arguments: Sequence[str], rest: Sequence[str]) -> Iterator[Foreign]:
    for index, word in enumerate(arguments):
        if word not in rest or not _OPTION.match(word):
            continue
        name, separator, value = word.partition("=")
        following = [] if separator else arguments[index + 1 : index + 2]
        yield Foreign(word, name, value if separator else next(filter(_is_value, following), None))


def _is_value(word: str) -> bool:
    """False for an option, and for a file, which is the command's own argument."""
    return not _OPTION.match(word) and not word.endswith((".yaml", ".yml"))


def _assignments(options: argparse.Namespace, rest: Sequence[str]) -> Iterator[Foreign]:
    """KEY=VALUE without --set; where there is none, that in place of the recipe."""
    words = [word for word in rest if _ASSIGNMENT.match(word)]
    recipe = str(options.recipe) if "recipe" in options else ""
    for word in words or filter(_ASSIGNMENT.match, [recipe]):
        name, _, value = word.partition("=")
        yield Foreign(word, name, value)
