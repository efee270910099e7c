"""Reads YAML and remembers the file and line of each key, for error messages."""

import codecs
import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.formatting import dotted, printable, shown
from ..common.secrets import redact, texts
from ..common.yaml_faults import YamlFault
from ..common.yaml_text import Key, parse_setting, parse_yaml

LARGEST = 2**20
"""Bytes; a larger file is no recipe."""
_EXPECTED = "expected a mapping of settings, such as 'name: my-run'"
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that neither a path nor a file's text can have."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def keep(values: dict[str, Any]) -> None:
    """The full form of settings that have no short form."""


@dataclass(frozen=True)
class Document:
    """Values of a YAML file, with overrides applied, and file:line of each key."""

    values: dict[str, Any]
    places: dict[Key, str]
    write_out: Callable[[dict[str, Any]], None] = keep
    """Replaces short forms in the values by their full forms."""

    def place(self, key: Key) -> str:
        """file:line of a key, or of its nearest parent that is in the file."""
        return place_of(self.places, key)

    def section(
        self,
        name: str,
        defaults: dict[str, Any],
        write_out: Callable[[dict[str, Any]], None] = keep,
    ) -> "Document":
        """The mapping under a key as a document, with defaults for missing keys."""
        places = {key[1:]: place for key, place in self.places.items() if key[:1] == (name,)}
        places = {(): self.places[()], **places}
        document = Document({**defaults, **self.values[name]}, places, write_out)
        write_out(document.values)
        return document


@dataclass(frozen=True)
class Change:
    """A value that overrides the one in a file."""

    key: str
    """Dotted key; numbers are indices of lists."""
    value: Any
    place: str
    """Origin of the change, for messages."""


def place_of(places: dict[Key, str], key: Key) -> str:
    """The place of a key, or of its nearest parent that has one."""
    while key and key not in places:
        key = key[:-1]
    return places[key]


def split_key(key: str) -> Key:
    """The parts of a dotted key; whole numbers are indices of lists."""
    return tuple(
        int(part) if part.isdecimal() and len(part) < 10 else part for part in key.split(".")
    )


def read_settings(
    source: Path | Mapping[str, Any],
    overrides: Sequence[str | Change] = (),
    write_out: Callable[[dict[str, Any]], None] = keep,
) -> tuple[Document, Path]:
    """The document of a YAML file or of a mapping, and the folder that its paths start from.

    Raises:
        InputError: as `read_recipe_file`, and if it is neither or a key of the mapping is no text.
    """
    if isinstance(source, Path):
        return read_recipe_file(source, overrides, write_out), source.resolve().parent
    if not isinstance(source, Mapping):  # a program's
        raise InputError(f"settings: {_EXPECTED}, or the Path of a file; found {shown(source)}")
    document = Document(_plain(source, ()), {(): "settings"}, write_out)
    _check_texts(document.values, lambda _: "settings")
    write_out(document.values)
    apply_changes(document, overrides)
    return document, Path.cwd()


def _plain(value: Any, key: Key) -> Any:
    """A copy with the types that YAML has, so that changes and errors treat both alike."""
    if isinstance(value, Mapping):
        if wrong := [name for name in value if not isinstance(name, str)]:
            where = dotted(key) or "settings"
            raise InputError(f"settings: {where}: the key {wrong[0]!r} is not text; make it text")
        return {name: _plain(item, (*key, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*key, index)) for index, item in enumerate(value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read_recipe_file(
    path: Path,
    overrides: Sequence[str | Change] = (),
    write_out: Callable[[dict[str, Any]], None] = keep,
) -> Document:
    """Parse the file and apply overrides; an override given as text is `dotted.key=value`.

    Args:
        path: the file.
        overrides: changes to its values, in their order.
        write_out: see `Document`.

    Raises:
        InputError: the file cannot be read, is not a YAML mapping or repeats a key, or an override
            is not `key=value`.
    """
    document = _read_document(path, write_out)
    apply_changes(document, overrides)
    return document


def _read_document(
    path: Path, write_out: Callable[[dict[str, Any]], None], accepts_equal: bool = False
) -> Document:
    """A YAML file's values and their places.

    Args:
        path: the file.
        write_out: see `Document`.
        accepts_equal: see `parse_yaml`.
    """
    file = printable(str(path))
    try:
        parsed = parse_yaml(read_text(path, file), accepts_equal)
    except YamlFault as fault:
        raise InputError(f"{file}:{fault}") from None
    if not isinstance(parsed.values, dict):
        what = "the file is empty" if parsed.values is None else f"found {shown(parsed.values)}"
        raise InputError(f"{file}:{parsed.lines[()]}: {_EXPECTED}; {what}")
    places = {key: f"{file}:{line}" for key, line in parsed.lines.items()}
    _check_texts(parsed.values, lambda key: place_of(places, key))
    document = Document(parsed.values, places, write_out)
    write_out(document.values)
    return document


def read_foreign_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file of another project.

    Raises:
        InputError: the file cannot be read, or is not a mapping.
    """
    if path.suffix.lower() != ".json":
        return _read_document(path, keep, accepts_equal=True).values
    file = printable(str(path))
    try:
        values = json.loads(read_text(path, file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}; correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: {_EXPECTED}; found {shown(values)}")
    _check_texts(values, lambda _: file)
    return values


def apply_changes(document: Document, overrides: Sequence[str | Change]) -> None:
    """Set values in a document.

    Raises:
        InputError: a text is not `key=value`, or a key does not fit into the document.
    """
    for override in overrides:
        _apply(document, _parse(override) if isinstance(override, str) else override)
        document.write_out(document.values)


def read_text(path: Path, file: str) -> str:
    """The text of a file.

    Args:
        path: the file.
        file: its name in messages.

    Raises:
        InputError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{file}: cannot read the file: {reason}; name a YAML file") from None
    if len(content) > LARGEST:
        raise InputError(
            f"{file}: larger than {LARGEST / 2**20:g} MiB, so it is not a recipe; name a YAML file"
        )
    if content.startswith(_UTF16):
        raise InputError(f"{file}:1: cannot read the file: it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}:{line}: cannot read the file: not UTF-8 text; save it as UTF-8"
        ) from None


def _check_texts(values: Any, place: Callable[[Key], str]) -> None:
    for key, text in texts(values):
        match = _UNUSABLE.search(text)
        if match is not None:
            raise InputError(
                f"{place(key)}: {dotted(key)}: the text contains the character "
                f"U+{ord(match[0]):04X}; remove it"
            )


def _parse(override: str) -> Change:
    name, separator, text = override.partition("=")
    place = f"--set {_short(override)}"
    if not separator or not name:
        raise InputError(f"{place}: expected key=value, such as optim.learning_rate=1e-4")
    try:
        value = parse_setting(text)
    except YamlFault as fault:
        raise InputError(f"{place}: the value is not valid: {fault.problem}") from None
    _check_texts(value, lambda _: place)
    return Change(name, value, place)


def _short(override: str) -> str:
    text = " ".join(printable(redact(override)).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def _apply(document: Document, change: Change) -> None:
    *parents, last = change.key.split(".")
    target: Any = document.values
    key: Key = ()
    for part in parents:
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        key = (*key, _part(target, part, change))
        target = target[key[-1]]
        document.places.setdefault(key, change.place)
    key = (*key, _part(target, last, change))
    for inner in [each for each in document.places if each[: len(key)] == key]:
        del document.places[inner]
    document.places[key] = change.place
    target[key[-1]] = copy.deepcopy(change.value)
    if last == "file" and isinstance(target, dict):
        target.pop("source", None)  # the text of the file that is named no more


def _part(target: Any, part: str, change: Change) -> str | int:
    """A part of a key as the key of a mapping, or as the index of an item of a list."""
    if isinstance(target, dict):
        return part
    if isinstance(target, list) and part.isdecimal() and len(part) < 10 and int(part) < len(target):
        return int(part)
    count = f"; that list has {len(target)}, from 0" if isinstance(target, list) else ""
    raise InputError(
        f"{change.place}: the recipe has no key or list item {shown(change.key)}{count}"
    )
