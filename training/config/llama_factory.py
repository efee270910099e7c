"""Reads LLaMA-Factory's dataset_info.json: where a data set is, and what its columns are called."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..common.errors import InputError, reason
from .source import Role, Source

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""LLaMA-Factory's names of columns that finray calls otherwise."""
_ROLES: dict[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_UNUSABLE = {
    "script_url": "a loading script, whose code is not run",
    "ms_hub_url": "a data set of ModelScope, which is not reached",
    "om_hub_url": "a data set of Modelers, which is not reached",
}


def named_source(source: Source, file: Path) -> Source:
    """The source that an entry of dataset_info.json describes.

    Args:
        source: a source whose `dataset` is the name of an entry; what it sets itself comes first.
        file: dataset_info.json.

    Raises:
        InputError: the file cannot be read, has no such entry, or the entry names nothing usable.
    """
    entries = _read(file)
    entry = entries.get(str(source.dataset))
    if not isinstance(entry, dict):
        names = ", ".join(sorted(entries)) or "none"
        raise InputError(
            f"dataset: {file} has no data set {source.dataset!r}; its data sets: {names}"
        )
    own = source.model_dump(exclude_unset=True, exclude={"dataset", "dataset_info", "map"})
    try:
        written = {**_place(entry, file), **_columns(entry), **_messages(entry)}
        written = {**written, **own, "columns": {**written.get("columns", {}), **source.columns}}
        return Source.model_validate({**written, "map": source.map})
    except (TypeError, AttributeError, ValidationError):
        raise InputError(
            f"dataset: {file}: the entry {source.dataset!r} is not as LLaMA-Factory writes it; "
            "correct it"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"dataset_info: cannot read {file}: {reason(error)}; give LLaMA-Factory's "
            "dataset_info.json"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"dataset_info: {file} is not an object of data sets; correct it")
    return content


def _place(entry: dict[str, Any], file: Path) -> dict[str, Any]:
    """Where the data is, and which part of it is used."""
    written = {"subset": entry.get("subset"), "limit": entry.get("num_samples")}
    if (name := entry.get("hf_hub_url")) is not None:
        written |= {"dataset": name, "split": entry.get("split")}
        if (folder := entry.get("folder")) is not None:
            del written["dataset"], written["subset"]
            written["path"] = f"hf://datasets/{name}/{folder}"
    elif (name := entry.get("file_name")) is not None:
        written["path"] = str(file.parent / name)
    elif (name := entry.get("cloud_file_name")) is not None:
        written["path"] = name
    else:
        unusable = (what for key, what in _UNUSABLE.items() if key in entry)
        kind = next(unusable, "neither hf_hub_url nor file_name")
        raise InputError(f"dataset: {file}: the entry names {kind}; use another source")
    return {key: value for key, value in written.items() if value is not None}


def _columns(entry: dict[str, Any]) -> dict[str, Any]:
    """The columns by finray's names."""
    named = {key: name for key, name in (entry.get("columns") or {}).items() if name}
    is_chat = entry.get("formatting", "alpaca") in ("sharegpt", "openai")
    names = {"messages": "conversations"} if is_chat else dict(_ALPACA)
    if set(named) == {"prompt"} and not is_chat:  # a text to learn whole
        names = {"prompt": "text"}
    columns = {names.get(key, key): name for key, name in named.items()}
    return {"columns": {key: name for key, name in columns.items() if key != name}}


def _messages(entry: dict[str, Any]) -> dict[str, Any]:
    """The keys and roles of messages."""
    tags = entry.get("tags") or {}
    keys = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    return {
        "message_keys": {key: name for key, name in keys.items() if name},
        "roles": {tags[tag]: role for tag, role in _ROLES.items() if tags.get(tag)},
    }
