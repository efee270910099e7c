"""Decodes the columns of Arrow and Parquet that the datasets library declares as JSON.

It stores such values as text, and notes their type in the schema's metadata.
"""

import json
from collections.abc import Callable
from typing import Any

from .rows import BadRow, Row

_Decode = Callable[[Any], Any]
_LISTS = ("List", "LargeList", "Sequence")


def decode_json(schema: Any, rows: list[Row | BadRow]) -> list[Row | BadRow]:
    """The rows of an Arrow schema, with the values of JSON features in place of their text."""
    decode = _decoder_of(schema.metadata)
    if decode is None:
        return rows
    return [row if isinstance(row, BadRow) else decode(row) for row in rows]


def _decoder_of(metadata: dict[bytes, bytes] | None) -> _Decode | None:
    try:
        noted = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return _decoder(noted.get("info", {}).get("features") or {})
    except (ValueError, AttributeError):  # another program's note
        return None


def _decoder(feature: Any) -> _Decode | None:
    """Decodes the values of a feature; None if no part of it is JSON."""
    if isinstance(feature, list) and feature:
        return _of_list(_decoder(feature[0]))
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "Json":
        return _loaded
    if kind in _LISTS:
        return _of_list(_decoder(feature.get("feature")))
    if isinstance(kind, str):
        return None
    fields = {name: _decoder(inner) for name, inner in feature.items()}
    return _of_fields({name: decode for name, decode in fields.items() if decode is not None})


def _loaded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _of_list(decode: _Decode | None) -> _Decode | None:
    if decode is None:
        return None
    return lambda value: [decode(item) for item in value] if isinstance(value, list) else value


def _of_fields(fields: dict[str, _Decode]) -> _Decode | None:
    if not fields:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: fields[name](item) if name in fields else item for name, item in value.items()
        }

    return decode
