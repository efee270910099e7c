"""Validates a document against its settings class, with messages in plain words.

What a setting takes is described from its JSON schema, so that a message does not depend on which
of pydantic's checks failed.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..common.errors import InputError
from ..common.formatting import dotted, shown
from ..common.secrets import leaves
from ..common.yaml_text import Key
from .expected import allows, describe, hint, keys_of, schema_at, schema_of
from .foreign.lookup import foreign_key, value_remedy, whole_file
from .yaml_file import Document, split_key

Settings = TypeVar("Settings", bound=BaseModel)
Fault = dict[str, Any]

_OWN = ("value_error", "reward", "metric")
"""Errors whose message is finray's own."""
_SHOWN = 50
"""Maximum number of errors of a document that are reported."""
_COMPARED = 100
"""Characters of an unknown key that are compared with the existing ones."""
_SHORT = 4
"""Characters of a name that is near to others by chance: type, dtype."""


def validate(settings: type[Settings], document: Document) -> Settings:
    """Build `settings` from a document.

    Raises:
        InputError: with one line for each error, or one for a file of another project.
    """
    _refuse_foreign(settings, document)
    _refuse_booleans(settings, document)
    try:
        return settings.model_validate(document.values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults = [_with_key(document, dict(fault)) for fault in errors[:_SHOWN]]
        lines = [_message(settings, document, group) for group in _by_key(faults)]
        more = [f"and {len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else []
        raise InputError("\n".join([*dict.fromkeys(lines), *more])) from None


def _refuse_foreign(settings: type[BaseModel], document: Document) -> None:
    """Refuse the configuration of another project, whose keys would all be unknown.

    Raises:
        InputError: naming the project, and what makes a recipe of it.
    """
    required = [name for name, field in settings.model_fields.items() if field.is_required()]
    marks = whole_file(document.values, [name for name in required if name != "name"])
    if not marks:
        return
    file = document.place(()).rpartition(":")[0] or "FILE"
    keys = " and ".join(f"{name}'s {', '.join(names[:3])}" for name, names in marks.items())
    remedy = f"finray import {file} writes a recipe from it"
    if len(marks) > 1:
        remedy = "keep the keys of one of them, and let finray import write a recipe from it"
    raise InputError(f"{document.place(())}: no recipe, but a file with {keys}; {remedy}")


def _refuse_booleans(settings: type[BaseModel], document: Document) -> None:
    """Refuse true and false where a number is expected; pydantic takes them for 1 and 0.

    Raises:
        InputError: with one line for each of them.
    """
    keys = [key for key, value in leaves(document.values) if isinstance(value, bool)]
    lines = [
        _expectation(settings, document, key)
        for key in keys
        if not allows(schema_at(schema_of(settings), document.values, key), "boolean")
    ]
    if lines:
        raise InputError("\n".join(lines))


def _with_key(document: Document, fault: Fault) -> Fault:
    """The error, with its key in the document."""
    _, key = _written(document.values, fault["loc"], fault["type"] == "missing")
    return {**fault, "key": key}


def _written(value: Any, location: Key, is_missing: bool) -> tuple[bool, Key]:
    """pydantic's location without the names of union members, which are not in the document.

    A name can be both, so the reading that ends at the location's last part is preferred.

    Returns:
        Whether the last part is in the key, and the key.
    """
    if not location:
        return False, ()
    part, rest = location[0], location[1:]
    readings = [_written(value, rest, is_missing)]
    is_item = isinstance(value, list) and isinstance(part, int) and part < len(value)
    if is_item or (isinstance(value, dict) and part in value):
        is_last, key = _written(value[part], rest, is_missing)
        readings.append((is_last or not rest, (part, *key)))
    elif is_missing and not rest and isinstance(value, dict) and isinstance(part, str):
        readings.append((True, (part,)))
    return max(readings, key=lambda reading: (reading[0], len(reading[1])))


def _by_key(faults: list[Fault]) -> Iterator[list[Fault]]:
    """The errors of each key; without those of a union whose other member got further."""
    keys = list(dict.fromkeys(fault["key"] for fault in faults))
    for key in keys:
        group = [fault for fault in faults if fault["key"] == key]
        has_inner = any(len(other) > len(key) and other[: len(key)] == key for other in keys)
        if not has_inner or any(fault["type"] in _OWN for fault in group):
            yield group


def _message(settings: type[BaseModel], document: Document, group: list[Fault]) -> str:
    """The errors of one key as `file:line: key: what is wrong; how to fix it`."""
    key: Key = group[0]["key"]
    start = f"{document.place(key)}: {dotted(key) or 'recipe'}"
    for fault in group:
        kind = fault["type"]
        if kind in _OWN:
            message = str(fault["msg"]).removeprefix("Value error, ")
            if kind == "metric":  # pydantic has the same text for every value
                message += f", found {shown(_value(document, key))}"
            return _own_message(document, key, message)
        if fault["loc"][-1:] == ("[key]",):
            section = schema_at(schema_of(settings), document.values, key[:-1])
            names = section.get("propertyNames", {})
            return f"{start}: unknown key; expected {describe(names)}"
        if kind == "extra_forbidden":
            section = schema_at(schema_of(settings), document.values, key[:-1])
            own_keys = keys_of(section, _value(document, key[:-1]))
            return f"{start}: unknown key{suggestion(settings, key, own_keys)}"
        if kind == "missing" and isinstance(fault["loc"][-1], str):
            return f"{start}: missing, and it has no default; add it"
        if kind == "union_tag_invalid":
            tags, tag = fault["ctx"]["expected_tags"], fault["ctx"]["tag"]
            return f"{start}.kind: expected one of {tags}, found {shown(tag)}"
    return _expectation(settings, document, key)


def _own_message(document: Document, key: Key, message: str) -> str:
    """A message of finray's own checks; it names the first setting that it is about."""
    named = tuple(message.split(maxsplit=1)[0].rstrip(":").split("."))
    place = document.place((*key, *named))
    return f"{place}: {dotted(key)}: {message}" if key else f"{place}: {message}"


def _expectation(settings: type[BaseModel], document: Document, key: Key) -> str:
    value = _value(document, key)
    schema = schema_at(schema_of(settings), document.values, key)
    remedy = value_remedy(dotted(key), value)
    end = hint(schema, value) if remedy is None else f"; {remedy}"
    return (
        f"{document.place(key)}: {dotted(key) or 'recipe'}: expected {describe(schema, value)}, "
        f"found {shown(value)}{end}"
    )


def _value(document: Document, key: Key) -> Any:
    value: Any = document.values
    for part in key:
        value = value[part]
    return value


def has_key(settings: type[BaseModel], key: Key) -> bool:
    """True if any variant of the settings has the key."""
    return _pattern(key) in set(_keys(settings))


def dotted_keys(settings: type[BaseModel]) -> list[str]:
    """Every key of any variant of the settings; 0 stands for an index of a list."""
    keys = (".".join(key).replace("*", "0") for key in _keys(settings))
    return list(dict.fromkeys(keys))


def _pattern(key: Key) -> tuple[str, ...]:
    return tuple("*" if isinstance(part, int) else part for part in key)


def suggestion(settings: type[BaseModel], key: Key, own_keys: Iterable[str] | None = None) -> str:
    """The end of a message about an unknown key: finray's name for another project's, the most
    similar existing key, or all siblings.

    Args:
        settings: the document's class.
        key: the key.
        own_keys: those of its section, whose kind is clear; None: those of any kind.
    """
    if (own := _own_name(settings, key)) is not None:
        return own
    existing = list(_keys(settings))
    pattern = _pattern(key)
    of_any = dict.fromkeys(name[-1] for name in existing if name[:-1] == pattern[:-1])
    siblings = list(of_any if own_keys is None else own_keys)
    unknown = str(key[-1])[:_COMPARED]
    near = difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    # A section of another kind has it: what other sections call so is something else.
    anywhere = {} if pattern in existing else {name[-1]: ".".join(name) for name in existing}
    cutoff = 0.75 if len(unknown) > _SHORT else 1.0
    near = difflib.get_close_matches(unknown, anywhere, n=1, cutoff=cutoff)
    if near:
        return f"; did you mean {anywhere[near[0]]!r}?"
    return f"; possible keys: {', '.join(siblings)}" if siblings else "; remove it"


def _own_name(settings: type[BaseModel], key: Key) -> str | None:
    """The end of a message about a key of another project; None if it is none."""
    foreign = foreign_key(str(key[-1]))
    if foreign is None:
        return None
    if foreign.fate == "left":
        return f"; remove it: {foreign.text}"
    own = foreign.to
    if split_key(own.partition(":")[0]) == key:  # that of a section of another kind
        return None
    if not has_key(settings, split_key(own.partition(":")[0])):
        if not has_key(settings, ("recipe",)):
            return None
        own = f"recipe.{own}"  # a sweep's
    text = f" ({foreign.text})" if foreign.text else ""
    return f"; did you mean {own!r}{text}?"


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
