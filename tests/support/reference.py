"""The reference of recipes and sweeps, written from their JSON schemas.

    python tests/support/reference.py

renews docs/reference/recipe.md and docs/reference/sweep.md.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finray.training.config.recipe import Recipe
from finray.training.config.section import json_schema
from finray.tuning.sweep import Sweep

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"

Schema = dict[str, Any]

_RECIPE = """\
# Recipe reference

Every key of a recipe: its type, its default and its meaning. In `--set` and in a sweep, a key is
written with dots, as here: `--set optim.learning_rate=1e-4`, `--set data.train.0.path=rows.jsonl`.

This page is written from the schema that `finray schema` prints. With that schema an editor
completes keys, shows these texts and marks mistakes:

```
finray schema > recipe.schema.json
```

The YAML language server (VS Code's YAML extension, Neovim, JetBrains) then reads this first line of
a recipe:

```yaml
# yaml-language-server: $schema=recipe.schema.json
name: support
model: {base: Qwen/Qwen3-0.6B}
data: {train: [{path: conversations.jsonl}]}
```
"""
_SWEEP = """\
# Sweep reference

Every key of a sweep file: its type, its default and its meaning. [Sweeps](../sweeps.md) shows how
they work together. For editors: `finray schema sweep > sweep.schema.json`, and as first line of the
file `# yaml-language-server: $schema=sweep.schema.json`.
"""


@dataclass
class Part:
    """A section of the settings, or one of several that a key may hold."""

    schema: Schema
    is_variant: bool
    keys: list[str] = field(default_factory=list)
    """Dotted keys under which it occurs; [] for an item of a list, * for any key of a mapping."""

    @property
    def _places(self) -> list[str]:
        return [key.rstrip("[]*.") for key in self.keys]

    @property
    def title(self) -> str:
        places = ", ".join(self._places) or "Top level"
        if not self.is_variant:
            return places
        kind = self.schema["properties"].get("kind", {}).get("const")
        return f"{places}: {kind or '{' + self.schema['required'][0] + ': …}'}"

    @property
    def level(self) -> int:
        """Level of its heading."""
        return 3 if self.is_variant or "." in self._places[0] else 2

    @property
    def prefix(self) -> str:
        """What comes before its keys, where that is always the same."""
        is_fixed = len(self.keys) == 1 and self.keys[0].isidentifier()
        return f"{self.keys[0]}." if is_fixed else ""


class Reference:
    """The parts of a schema, in the order in which its keys name them."""

    def __init__(self, schema: Schema) -> None:
        self._defs: dict[str, Schema] = schema.get("$defs", {})
        self._parts = {"": Part(schema, False, [""])}
        self._descend(schema, "")

    def render(self) -> str:
        """All parts as Markdown."""
        lines = [line for part in self._parts.values() for line in self._render(part)]
        return "\n" + "\n".join(lines)

    def _descend(self, schema: Schema, key: str) -> None:
        for child, value in schema["properties"].items():
            places = dict(self._sections(value, f"{key}.{child}" if key else child))
            fresh = [name for name in places if name not in self._parts]
            for name, place in places.items():
                part = self._parts.setdefault(name, Part(self._defs[name], len(places) > 1))
                part.keys += [place] if place not in part.keys else []
            for name in fresh:
                self._descend(self._defs[name], places[name])

    def _sections(self, value: Schema, key: str) -> Iterator[tuple[str, str]]:
        """(definition, dotted key) of every section that a value may hold."""
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2], key
        for choice in [*value.get("anyOf", []), *value.get("oneOf", [])]:
            yield from self._sections(choice, key)
        if isinstance(value.get("items"), dict):
            yield from self._sections(value["items"], f"{key}[]")
        if isinstance(value.get("additionalProperties"), dict):
            yield from self._sections(value["additionalProperties"], f"{key}.*")

    def _render(self, part: Part) -> Iterator[str]:
        yield f"{'#' * part.level} {part.title}\n"
        if part.keys != [""] and (text := part.schema.get("description")):
            yield f"{_escaped(text)}\n"
        required = part.schema.get("required", [])
        for child, value in part.schema["properties"].items():
            yield f"#### `{part.prefix}{child}`\n"
            yield f"{self._facts(value, child in required)}\n"
            yield f"{_escaped(value['description'])}\n"

    def _facts(self, value: Schema, is_required: bool) -> str:
        kind = self._kind(value)
        kind = kind[:1].upper() + kind[1:]
        if is_required:
            return f"*{kind} · required*"
        if "const" in value:
            return f"*{kind}*"
        default = value.get("default")
        if isinstance(default, dict) and default and "additionalProperties" not in value:
            return f"*{kind} · may be left out*"
        return f"*{kind} · default `{json.dumps(default)}`*"

    def _kind(self, value: Schema) -> str:
        """What a value may be, in words."""
        choices = _choices(value)
        links = [self._link(choice["$ref"]) for choice in choices if "$ref" in choice]
        kinds = [f"section {_joined(links)}"] if links else []
        # A default of null says that the key may be left out.
        is_optional = value.get("default", "") is None
        plain = [choice for choice in choices if "$ref" not in choice]
        kinds += [
            self._plain_kind(choice)
            for choice in plain
            if not (is_optional and choice.get("type") == "null")
        ]
        return " or ".join(dict.fromkeys(kinds))

    def _link(self, reference: str) -> str:
        title = self._parts[reference.rpartition("/")[2]].title
        return f"[{title}](#{_slug(title)})"

    def _plain_kind(self, value: Schema) -> str:
        if "const" in value or "enum" in value:
            return _joined([f"`{each}`" for each in value.get("enum") or [value["const"]]])
        kind = value.get("type", "")
        if kind == "array":
            return self._list(value)
        if kind == "object":
            inner = value.get("additionalProperties")
            names = self._kind(value["propertyNames"]) if "propertyNames" in value else "text"
            words = self._kind(inner) if isinstance(inner, dict) else "any value"
            return f"mapping of {names} to {words}"
        return _SIMPLE.get(kind, "any value") + _bounds(value)

    def _list(self, value: Schema) -> str:
        if "prefixItems" in value:
            return f"pair [{', '.join(self._kind(item) for item in value['prefixItems'])}]"
        least = ", at least one" if value.get("minItems") else ""
        return f"list of {self._kind(value['items'])}{least}"


def _choices(value: Schema) -> list[Schema]:
    """The alternatives of a value, also those of an alternative; itself if there is one."""
    parts = value.get("anyOf") or value.get("oneOf")
    return [each for part in parts for each in _choices(part)] if parts else [value]


_SIMPLE = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "null": "`null`",
}


def _joined(items: list[str]) -> str:
    """a, b or c"""
    return " or ".join([", ".join(items[:-1]), items[-1]] if items[1:] else items)


def _bounds(value: Schema) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {value[name]:,.10g}" for name, word in words.items() if name in value]
    return f" {' and '.join(bounds)}" if bounds else ""


def _escaped(text: str) -> str:
    """One line of Markdown in which `<` and `*` stand for themselves."""
    line = " ".join(text.split())
    return line.replace("<", "&lt;").replace("*", "\\*")


def _slug(title: str) -> str:
    """The anchor of a heading."""
    kept = "".join(each for each in title.lower() if each.isalnum() or each in " -_")
    return "-".join(kept.split())


def pages() -> dict[Path, str]:
    """The text of each page, by its file."""
    return {
        FOLDER / "recipe.md": _RECIPE + Reference(json_schema(Recipe)).render(),
        FOLDER / "sweep.md": _SWEEP + Reference(json_schema(Sweep)).render(),
    }


def main() -> None:
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
