"""Writes a recipe as YAML for people, with a comment at each setting."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from ...training.common.formatting import one_line
from ...training.common.yaml_text import Dumper
from ...training.config.recipe import Recipe

_WIDTH = 100


def recipe_text(
    values: Mapping[str, Any],
    comments: Mapping[str, str],
    head: Sequence[str] = (),
    tail: Sequence[str] = (),
) -> str:
    """A recipe as text.

    Args:
        values: the recipe's sections.
        comments: by dotted key; short ones stand behind the value, others above it.
        head: lines of the comment before the recipe.
        tail: lines of the comment behind it.
    """
    order = list(Recipe.model_fields)
    lines = [*_comment(head, "")]
    for name in sorted(values, key=order.index):
        lines += _setting(name, values[name], name, comments, "")
    if tail:
        lines += ["", *_comment(tail, "")]
    return "\n".join(lines) + "\n"


def _comment(lines: Sequence[str], indent: str) -> Iterator[str]:
    for written in lines:
        start = " " * (len(written) - len(written.lstrip(" ")))
        line = start + one_line(written)
        if len(line) + len(indent) + 2 <= _WIDTH:
            yield f"{indent}# {line}".rstrip()
            continue
        deeper = f"{start}  "
        wrapped = textwrap.wrap(
            line, _WIDTH - len(indent) - 2, subsequent_indent=deeper, break_on_hyphens=False
        )
        yield from (f"{indent}# {part}" for part in wrapped)


def _setting(
    name: str, value: Any, key: str, comments: Mapping[str, str], indent: str
) -> Iterator[str]:
    comment = comments.get(key, "")
    if isinstance(value, dict) and any(inner.startswith(f"{key}.") for inner in comments):
        yield from _comment([comment] if comment else [], indent)
        yield f"{indent}{name}:"
        for inner, item in value.items():
            yield from _setting(inner, item, f"{key}.{inner}", comments, f"{indent}  ")
        return
    written = _written(name, value, indent)
    beside = f"{written[0]}  # {comment}"
    if comment and "\n" not in comment and len(written) == 1 and len(beside) <= _WIDTH:
        yield beside
        return
    yield from _comment(comment.split("\n") if comment else [], indent)
    yield from written


def _written(name: str, value: Any, indent: str) -> list[str]:
    """`name: value`, on one line if it fits."""
    line = f"{indent}{name}: {_flow(value)}"
    if len(line) <= _WIDTH and "\n" not in line and not (isinstance(value, str) and "\n" in value):
        return [line]
    block = yaml.dump({name: value}, Dumper=_Readable, sort_keys=False, allow_unicode=True)
    return [f"{indent}{part}" if part else part for part in block.rstrip("\n").split("\n")]


def _flow(value: Any) -> str:
    text = yaml.dump(
        [value], Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True,
        width=10**9,
    )  # fmt: skip
    return text.strip()[1:-1]


class _Readable(Dumper):
    """Writes texts of several lines, and long ones with quotes in them, as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_quoted = len(text) > _WIDTH and ("'" in text or text.startswith("{"))
    style = "|" if "\n" in text or is_quoted else None
    if text.endswith("\n\n") or text == "\n":  # a block would need a mark of its end
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)
