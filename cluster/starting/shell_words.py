"""The commands in a text for a shell, as lists of words."""

import re
from collections.abc import Iterator

from ...training.common.errors import InputError

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+)
    |(?P<comment>\#[^\n]*)
    |(?P<end>&&|\|\||[;|&\n])
    |(?P<redirect>\d*[<>]+(?P<stream>&\d+)?)
    |(?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`
        |[^\s;|&<>'"\\])+)""",
    re.VERBOSE | re.DOTALL,
)
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\\"$`])")
_NAMED = re.compile(r"(?<!\\)\$(?:\{(\w+)(?::?-([^}$]*))?\}|([A-Za-z_]\w*))")
"""$NAME, ${NAME} and ${NAME:-default}."""
_OPEN = re.compile(
    r"(?<!\\)(?:\$(?:\{[^{}]*\}|\([^()]*(?:\([^()]*\)[^()]*)*\)|[A-Za-z_]\w*)|`[^`]*`)"
    r"|^\$(?:[@*]|\d+)\Z"
)
"""What only a shell has a value for: $NAME, ${NAMES[@]}, $(command), `command`, $@, $1."""
_MARK = "\ufdd0"
"""Stands before such a piece: what is like it in single quotes is text."""
_CONTINUED = re.compile(r"\s*+-")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def read_shell(text: str) -> tuple[list[list[str]], dict[str, str]]:
    """The commands of a text, with the values of its variables in their place.

    Args:
        text: commands as a shell takes them, also a script's; a line that begins with an option
            continues the one before it.

    Returns:
        The words of each command, without assignments in front, redirections and comments; and the
        variables that are set. A piece that only a shell has a value for is marked, see
        `open_piece`.

    Raises:
        InputError: a quote is not closed.
    """
    variables: dict[str, str] = {}
    commands: list[list[str]] = []
    for words in _commands(re.sub(r"\\\r?\n", " ", text)):
        plain: list[str] = []
        for word in words:
            assigned = _ASSIGNMENT.fullmatch(word) if not plain else None
            if assigned is not None:
                variables[assigned[1]] = " ".join(_expanded(assigned[2], variables))
            elif plain or word not in ("env", "export"):
                plain += _expanded(word, variables)
        if plain:
            commands.append(plain)
    return commands, variables


def open_piece(word: str) -> str | None:
    """The first piece of a word that only a shell has a value for; None without one."""
    _, mark, rest = word.partition(_MARK)
    if not mark:
        return None
    match = _OPEN.match(rest)
    return rest if match is None else match[0]


def without_marks(word: str) -> str:
    """A word as it is written."""
    return word.replace(_MARK, "")


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command as they are written, with their quotes."""
    words: list[str] = []
    place, is_target = 0, False
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise InputError("the command line cannot be read: a quote is not closed; close it")
        place = match.end()
        kind = match.lastgroup if match.lastgroup != "stream" else "redirect"
        if kind == "word" and not is_target:
            words.append(match[0])
        elif kind == "end" and words and not (match[0] == "\n" and _CONTINUED.match(text, place)):
            yield words
            words = []
        if kind != "blank":
            is_target = kind == "redirect" and match["stream"] is None
    yield words


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    """A word without its quotes, with the values of variables; several for a variable alone whose
    value has blanks."""

    def value(match: re.Match[str]) -> str:
        default = match[0] if match[2] is None else match[2]
        return variables.get(match[1] or match[3], default)

    def valued(text: str) -> str:
        text = without_marks(_NAMED.sub(value, text))
        return _OPEN.sub(lambda match: _MARK + match[0], text)

    if _NAMED.fullmatch(word) is not None:
        return valued(word).split()
    parts: list[str] = []
    for single, double, escaped, bare in _PIECE.findall(word):
        parts.append(single or escaped or valued(bare) or _ESCAPED.sub(r"\1", valued(double)))
    return ["".join(parts)]
