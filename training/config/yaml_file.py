"""Reads YAML and remembers the file and line of each key, for error messages."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..common.errors import InputError
from ..common.yaml_text import Loader, load_yaml

Key = tuple[str | int, ...]
Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Values of a YAML file, with overrides applied, and file:line of each key."""

    values: dict[str, Any]
    places: dict[Key, str]

    def place(self, key: Key) -> str:
        """file:line of a key, or of its nearest parent that is in the file."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places[key]

    def section(self, name: str, defaults: dict[str, Any]) -> "Document":
        """The mapping under a key as a document, with defaults for missing keys."""
        places = {key[1:]: place for key, place in self.places.items() if key[:1] == (name,)}
        return Document({**defaults, **self.values[name]}, {(): self.places[()], **places})


@dataclass(frozen=True)
class Change:
    """A value that overrides the one in a file."""

    key: str
    """Dotted key; numbers are indices of lists."""
    value: Any
    place: str
    """Origin of the change, for messages."""


def read_recipe_file(path: Path, overrides: Sequence[str | Change] = ()) -> Document:
    """Parse the file and apply overrides; an override given as text is `dotted.key=value`.

    Raises:
        InputError: the file cannot be read, is not a YAML mapping or repeats a key, or an override
            is not `key=value`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot read the file: {reason}") from None
    try:
        root = yaml.compose(text, Loader=Loader)
        values = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(values, dict) or root is None:
        raise InputError(f"{path}: expected a mapping of settings, such as 'name: my-run'")
    places: dict[Key, str] = {(): str(path)}
    places.update(_places(root, str(path), ()))
    document = Document(values, places)
    apply_changes(document, overrides)
    return document


def apply_changes(document: Document, overrides: Sequence[str | Change]) -> None:
    """Set values in a document.

    Raises:
        InputError: a text is not `key=value`, or a key does not fit into the document.
    """
    for override in overrides:
        _apply(document, _parse(override) if isinstance(override, str) else override)


def validate(settings: type[Settings], document: Document) -> Settings:
    """Build `settings` from a document.

    Raises:
        InputError: with one line for each error.
    """
    try:
        return settings.model_validate(document.values)
    except ValidationError as error:
        lines = [_message(settings, document, dict(fault)) for fault in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def _places(node: yaml.Node, file: str, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            line = key_node.start_mark.line + 1
            if name in seen:
                dotted = ".".join(map(str, (*key, name)))
                raise InputError(f"{file}:{line}: {dotted}: already set on line {seen[name]}")
            seen[name] = line
            yield (*key, name), f"{file}:{line}"
            yield from _places(value_node, file, (*key, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*key, index), f"{file}:{item.start_mark.line + 1}"
            yield from _places(item, file, (*key, index))


def _parse(override: str) -> Change:
    dotted, separator, text = override.partition("=")
    place = f"--set {override}"
    if not separator or not dotted:
        raise InputError(f"{place}: expected key=value, such as optim.learning_rate=1e-4")
    try:
        return Change(dotted, load_yaml(text), place)
    except yaml.YAMLError:
        raise InputError(f"{place}: the value is not valid YAML") from None


def _apply(document: Document, change: Change) -> None:
    parts = change.key.split(".")
    key: Key = tuple(int(part) if part.isdigit() else part for part in parts)
    target: Any = document.values
    for depth, part in enumerate(key[:-1]):
        if isinstance(target, dict) and target.get(str(part)) is None:
            target[str(part)] = {}
        target = _child(target, part, change.place, ".".join(parts[: depth + 1]))
    last = key[-1]
    if isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = change.value
    elif isinstance(target, dict):
        target[str(last)] = change.value
    else:
        raise InputError(f"{change.place}: the recipe has no key or list item {change.key}")
    for depth in range(1, len(key) + 1):
        document.places.setdefault(key[:depth], change.place)
    document.places[key] = change.place


def _child(target: Any, part: str | int, place: str, dotted: str) -> Any:
    if isinstance(target, dict):
        return target[str(part)]
    if isinstance(target, list) and isinstance(part, int) and part < len(target):
        return target[part]
    raise InputError(f"{place}: {dotted} is not a section of the recipe")


def _message(settings: type[BaseModel], document: Document, fault: dict[str, Any]) -> str:
    """One error of pydantic as `file:line: key: what is wrong; how to fix it`."""
    key = _written_key(document, fault["loc"])
    dotted = ".".join(map(str, key)) or "recipe"
    place = document.place(key)
    kind = fault["type"]
    if kind == "extra_forbidden":
        return f"{place}: {dotted}: unknown key{suggestion(settings, key)}"
    if kind == "missing":
        return f"{place}: {dotted}: missing, and it has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = str(fault.get("ctx", {}).get("expected_tags", ""))
        return f"{place}: {dotted}.kind: expected one of {expected}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{place}: {message}" if not key else f"{place}: {dotted}: {message}"
    return f"{place}: {dotted}: {message[:1].lower()}{message[1:]}, found {fault['input']!r}"


def _written_key(document: Document, location: tuple[str | int, ...]) -> Key:
    """pydantic's location without the names of union members, which are not in the file."""
    key: list[str | int] = []
    value: Any = document.values
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(value, dict) and (part in value or is_last):
            key.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            key.append(part)
            value = value[part]
    return tuple(key)


def has_key(settings: type[BaseModel], key: Key) -> bool:
    """True if any variant of the settings has the key."""
    return _pattern(key) in set(_keys(settings))


def _pattern(key: Key) -> tuple[str, ...]:
    return tuple("*" if isinstance(part, int) else part for part in key)


def suggestion(settings: type[BaseModel], key: Key) -> str:
    """The end of a message about an unknown key: the most similar existing key, or all siblings."""
    existing = list(_keys(settings))
    pattern = _pattern(key)
    siblings = [name[-1] for name in existing if name[:-1] == pattern[:-1]]
    unknown = str(key[-1])
    near = difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    anywhere = {name[-1]: ".".join(name) for name in existing}
    near = difflib.get_close_matches(unknown, anywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {anywhere[near[0]]!r}?"
    return f"; possible keys: {', '.join(siblings)}" if siblings else ""


def _keys(settings: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in settings.model_fields.items():
        yield (name,)
        for model, many in _models_in(field.annotation):
            prefix = (name, "*") if many else (name,)
            yield from ((*prefix, *rest) for rest in _keys(model))


def _models_in(annotation: Any, many: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, many
        return
    inside_list = many or getattr(annotation, "__origin__", None) is list
    for argument in get_args(annotation):
        yield from _models_in(argument, inside_list)
