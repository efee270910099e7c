"""What a setting takes, in words, from the JSON schema of its section."""

import difflib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from ..common.yaml_text import Key

Schema = dict[str, Any]

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_HIGH = 10**6
"""A limit that no usual value comes near."""
_COMPARED = 60
"""Characters of a value that are compared with the possible ones."""
_DECIMAL_COMMA = re.compile(r"\s*([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)\s*")


@lru_cache(maxsize=8)
def schema_of(settings: type[BaseModel]) -> Schema:
    """The JSON schema of a settings class, without references."""
    schema = settings.model_json_schema()
    definitions = schema.pop("$defs", {})
    resolved: Schema = _resolve(schema, definitions)
    return resolved


def _resolve(node: Any, definitions: Schema) -> Any:
    """The node with each reference replaced by its definition; no definition contains itself."""
    if isinstance(node, list):
        return [_resolve(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _resolve(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {
        key: value if key in ("default", "mapping") else _resolve(value, definitions)
        for key, value in node.items()
    }


def schema_at(schema: Schema, values: Any, key: Key) -> Schema:
    """The schema of a key's value.

    Args:
        schema: of `values`.
        values: the document, which decides between the variants of a section.
        key: a key of it.

    Returns:
        An empty schema where any value is taken.
    """
    for part in key:
        options = [inner for each in _variants(schema, values) for inner in _inner(each, part)]
        schema = options[0] if len(options) == 1 else {"anyOf": options} if options else {}
        is_there = isinstance(values, list) or (isinstance(values, dict) and part in values)
        values = values[part] if is_there else None
    return schema


def _variants(schema: Schema, values: Any) -> Iterator[Schema]:
    """The alternatives of a schema; of sections with a kind, the one of that kind."""
    options = schema.get("anyOf") or schema.get("oneOf")
    if not options:
        yield schema
        return
    tag = schema.get("discriminator", {}).get("propertyName")
    for option in options:
        kind = option.get("properties", {}).get(tag, {}).get("const") if tag else None
        if kind is None or not isinstance(values, dict) or values.get(tag) == kind:
            yield from _variants(option, values)


def keys_of(schema: Schema, values: Any) -> list[str]:
    """The keys of a section, of its variant that the values are of."""
    variants = _variants(schema, values)
    return list(dict.fromkeys(key for each in variants for key in each.get("properties", {})))


def _inner(schema: Schema, part: str | int) -> Iterator[Schema]:
    """The schemas of a part's value: at most one."""
    if isinstance(part, int):
        items = schema.get("prefixItems", [])
        if part < len(items):
            yield items[part]
        elif isinstance(schema.get("items"), dict):
            yield schema["items"]
        return
    inner = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    if isinstance(inner, dict):
        yield inner


def allows(schema: Schema, kind: str) -> bool:
    """True if a schema takes values of a JSON type."""
    for option in _variants(schema, None):
        if not _choices(option) and option.get("type", kind) == kind:
            return True
    return False


def describe(schema: Schema, value: Any = None) -> str:
    """What a schema takes: "auto, true or false", "a whole number of at least 1".

    Args:
        schema: a setting's.
        value: the setting's; very high limits are named only where it exceeds them.
    """
    high = value if isinstance(value, int | float) else 0
    phrases = list(dict.fromkeys(_phrases(schema, high)))
    return " or ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def _phrases(schema: Schema, high: float) -> Iterator[str]:
    options = list(_options(schema))
    choices = [choice for option in options for choice in _choices(option)]
    if len(choices) == 1:
        yield repr(choices[0])
    elif choices:
        yield f"one of {', '.join(map(repr, choices))}"
    for option in options:
        tag = option.get("discriminator", {})
        if "mapping" in tag:
            yield f"a mapping with {tag['propertyName']}: {', '.join(tag['mapping'])}"
        elif not list(_choices(option)):
            yield _phrase(option, high)


def _options(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema; sections that differ by their kind are one."""
    options = schema.get("anyOf") or schema.get("oneOf")
    if not options or "discriminator" in schema:
        yield schema
        return
    for option in options:
        yield from _options(option)


def _choices(schema: Schema) -> list[Any]:
    """The only values that a schema without alternatives takes; empty if it takes others."""
    return list(schema.get("enum", [schema["const"]] if "const" in schema else []))


def _phrase(schema: Schema, high: float) -> str:
    kind = schema.get("type")
    if kind in ("integer", "number"):
        bounds = [
            f"{word} {_plain(schema[name])}"
            for name, word in _BOUNDS.items()
            if name in schema and (schema[name] < _HIGH or schema[name] <= high)
        ]
        of = ["of"] if bounds and bounds[0].startswith("at") else []
        return " ".join([_TYPES[kind], *of, " and ".join(bounds)]).strip()
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"a list [{', '.join(map(describe, items))}]"
        least = schema.get("minItems")
        return f"a list of at least {least}" if least else "a list"
    if kind == "object":
        names = list(schema.get("properties", {}))
        more = ", …" if len(names) > 4 else ""
        return f"a mapping with keys such as {', '.join(names[:4])}{more}" if names else "a mapping"
    return _TYPES.get(str(kind), "a value")


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def hint(schema: Schema, value: Any) -> str:
    """The end of a message about a value that a schema does not take: how to fix it."""
    if isinstance(value, str):
        comma = _DECIMAL_COMMA.fullmatch(value)
        if comma is not None and (allows(schema, "number") or allows(schema, "integer")):
            return f"; write a decimal point: {comma[1]}.{comma[2]}"
        names = [str(choice) for each in _options(schema) for choice in _choices(each)]
        near = difflib.get_close_matches(value[:_COMPARED], names, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    if isinstance(value, bool | int | float) and allows(schema, "string"):
        return "; put it into quotes"
    if value is None:
        return "; give it a value, or remove the key"
    return ""
