"""Reads the project's Markdown: fenced blocks, prose, headings, links and commands."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "k8s/*.md", "recipes/**/README.md", "benchmarks/*.md")

_FENCE = re.compile(r"^ *(?P<mark>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<rest>.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_SHELL = ("", "sh", "bash", "shell", "console")
_OPERATORS = {"&&", "||", "|", ";", "&", "(", ")"}


@dataclass(frozen=True)
class Fence:
    """A fenced block."""

    language: str
    title: str
    text: str
    line: int
    """Number of its first line in the document."""

    @property
    def file_name(self) -> str | None:
        """The name in a first line such as `# support.yaml`."""
        first = self.text.partition("\n")[0]
        match = re.fullmatch(r"# (\S+\.(yaml|py|jsonl))", first.strip())
        return match[1] if match else None

    def commands(self) -> Iterator[tuple[int, list[str]]]:
        """(line, words) of each simple command of a shell's block."""
        if self.language not in _SHELL:
            return
        joined, start = "", self.line
        for number, line in enumerate(self.text.splitlines(), self.line):
            start = start if joined else number
            joined += line.strip().removeprefix("$ ")
            if joined.endswith("\\"):
                joined = joined.removesuffix("\\")
                continue
            yield from ((start, words) for words in _simple_commands(joined))
            joined = ""


@dataclass(frozen=True)
class Document:
    """A Markdown file."""

    path: Path
    text: str

    @cached_property
    def fences(self) -> list[Fence]:
        """The fenced blocks, in their order."""
        return list(_fences(self.text))

    @cached_property
    def prose(self) -> str:
        """The text with the same lines, those of fenced blocks empty."""
        lines = self.text.splitlines()
        for fence in self.fences:
            length = len(fence.text.splitlines())
            lines[fence.line - 2 : fence.line + length] = [""] * (length + 2)
        return "\n".join(lines)

    def code(self) -> Iterator[tuple[int, str]]:
        """(line, text) of each `code` in the prose."""
        return self._matches(_CODE, self.prose)

    def links(self) -> Iterator[tuple[int, str]]:
        """(line, target) of each link."""
        return self._matches(_LINK, _CODE.sub("", self.prose))

    def anchors(self) -> set[str]:
        """The anchors of the headings."""
        return {slug(match[1]) for match in _HEADING.finditer(self.prose)}

    @staticmethod
    def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((number, match[1]) for match in pattern.finditer(line))


def slug(heading: str) -> str:
    """The anchor that MkDocs and Git hosts make of a heading without two spaces in a row."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text).strip())


def read(path: Path) -> Document:
    return Document(path, path.read_text(encoding="utf-8"))


def documents() -> list[Document]:
    """Every document of the repository."""
    return [read(path) for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]


def _fences(text: str) -> Iterator[Fence]:
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        match = _FENCE.match(line)
        if match is None:
            continue
        content = []
        for _, inner in lines:
            if inner.strip() == match["mark"]:
                break
            content.append(inner)
        title = _TITLE.search(match["rest"])
        block = textwrap.dedent("\n".join(content))
        yield Fence(match["language"], title[1] if title else "", block, number + 1)


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line: without comments, variables and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return
    words: list[str] = []
    skips = False
    for token in [*tokens, ";"]:
        if token in _OPERATORS:
            if words:
                yield words
            words = []
        elif skips or token in ("<", ">", ">>"):
            skips = not skips
        elif words or not re.match(r"\w+=", token):
            words.append(token)
