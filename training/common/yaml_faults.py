"""What is wrong with a YAML document, where, and how to fix it: in one line."""

import re

import yaml

from .formatting import dotted

Key = tuple[str | int, ...]

_QUOTE = "put it into quotes"
_RULES = (
    (r"found character '\\t'", "a tab where YAML takes only spaces; replace it with spaces"),
    (
        r"found character '(?P<sign>.)'",
        "a text that starts with {sign} needs quotes; put it into single quotes",
    ),
    (
        r"mapping values are not allowed",
        "a key is not possible here; indent it like the lines around it, and put a text that "
        "contains ': ' into quotes",
    ),
    (
        r"could not find expected ':'",
        "this line is not 'key: value'; add the colon, or indent it to continue the text above",
    ),
    (
        r"double-quoted scalar: (found unknown escape|expected escape)",
        "in double quotes a backslash starts an escape; put the text into single quotes, or write "
        "/ instead",
    ),
    (r"quoted scalar: found unexpected", "a quote that starts here is not closed; close it"),
    (
        r"flow (?P<what>sequence|mapping): expected ','",
        "a bracket that opens here is not closed, or its items lack a comma; close it, or put a "
        "text with brackets into quotes",
    ),
    (
        r"expected <block end>, but found '<(block|key)",
        "this line is indented differently from the lines that it belongs to; align it with them",
    ),
    (
        r"expected <block end>, but found '-'",
        "a list item among keys; indent it below the key that it belongs to",
    ),
    (
        r"expected <block end>",
        "more text after the end of a value; put the whole text into single quotes",
    ),
    (
        r"scanning an alias|undefined alias",
        f"a text that starts with * is an alias in YAML; {_QUOTE}",
    ),
    (r"scanning an anchor", f"a text that starts with & is an anchor in YAML; {_QUOTE}"),
    (r"duplicate anchor", "an anchor (&name) that exists already; give it another name"),
    (r"(scanning|parsing) a tag|undefined tag", f"a text that starts with ! is a tag; {_QUOTE}"),
    (
        r"scanning a directive|YAML directive|YAML document|tag handle|<document start>",
        "this line is not a setting; write 'key: value', or remove it",
    ),
    (
        r"sequence entries are not allowed",
        "a list item is not possible here; write it on a line of its own below its key",
    ),
    (r"mapping keys are not allowed", f"a text that starts with '? ' is a key; {_QUOTE}"),
    (
        r"scanning a block scalar",
        "after | or > the text begins on the next line; move it there, or put it into quotes",
    ),
    (r"expected the node content", "a value is missing here; add it, or remove the comma"),
    (
        r"but found another document",
        "a second document starts here (---); keep one document in a file",
    ),
)
_STARTS_HERE = re.compile(
    r"could not find expected ':'|quoted scalar: found unexpected|expected ','"
)
"""Faults whose cause is where the construct starts, not where reading it failed."""
_TAB_WIDTH = 100
_LINE = re.compile(r" *(?:- +)*(?P<key>[A-Za-z_][\w.-]*) *:(?:\s|$)")


class YamlFault(yaml.YAMLError):
    """A fault of a document; as text "line: key: what is wrong; how to fix it".

    Args:
        line: its line, from 1.
        problem: what is wrong, and how to fix it.
        key: of the value; empty where it has none.
    """

    def __init__(self, line: int, problem: str, key: Key = ()) -> None:
        super().__init__(line, problem, key)
        self.line = line
        self.problem = problem
        self.key = key

    def __str__(self) -> str:
        key = f"{dotted(self.key)}: " if self.key else ""
        return f"{self.line}: {key}{self.problem}"


def fault_of(error: yaml.MarkedYAMLError, text: str) -> YamlFault:
    """PyYAML's error in plain words."""
    message = f"{error.context}: {error.problem}"
    mark = error.problem_mark
    if _STARTS_HERE.search(message) and error.context_mark is not None:
        mark = error.context_mark
    line = 1 if mark is None else mark.line + 1
    return fault_at(line, f"not valid YAML: {_words(message)}", text)


def fault_at(line: int, problem: str, text: str) -> YamlFault:
    """A fault on a line of a text that cannot be read as a whole; its key is guessed from the
    indentation."""
    return YamlFault(line, problem, _key_at(text, line))


def _words(message: str) -> str:
    for pattern, words in _RULES:
        match = re.search(pattern, message)
        if match is not None:
            return words.format(**match.groupdict()) if match.groupdict() else words
    return "it cannot be read from here on; put texts with special characters into quotes"


def _key_at(text: str, line: int) -> Key:
    """The key on a line, below the keys of the less indented lines before it."""
    lines = text.splitlines()[:line]
    keys: list[str | int] = []
    indent = _indent(lines[-1]) if lines else 0
    for each in reversed(lines):
        match = _LINE.match(each)
        is_own = each is lines[-1] and not keys
        if match is not None and (is_own or match.start("key") < indent):
            keys.insert(0, match["key"])
            indent = match.start("key")
        if indent == 0:
            break
    return tuple(keys)


def _indent(line: str) -> int:
    """Columns before the line's text; a tab counts as very many."""
    before = line[: len(line) - len(line.lstrip())]
    return len(before.expandtabs(_TAB_WIDTH))
