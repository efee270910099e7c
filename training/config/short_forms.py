"""Short forms of a recipe's sections: a text in place of a mapping."""

from typing import Annotated, Any

from pydantic import Field

AdapterName = Annotated[str, Field(json_schema_extra={"enum": ["lora", "dora"]})]

_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
}


def as_model(value: Any) -> Any:
    """`model: NAME` as a section."""
    return {"base": value} if isinstance(value, str) else value


def as_adapter(value: Any) -> Any:
    """`adapter: lora` and `adapter: dora` as a section."""
    return dict(_ADAPTERS[value]) if isinstance(value, str) and value in _ADAPTERS else value


def as_method(value: Any) -> Any:
    """`method: KIND` as a section."""
    return {"kind": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    """`train: FILE`, `train: {…}` and `train: [FILE, …]` as a list of sections."""
    if isinstance(value, str):
        return [{"path": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def as_function(value: Any) -> Any:
    """`map: "rows.py:to_messages"` as a section."""
    return {"file": value} if isinstance(value, str) else value


def as_stages(value: Any) -> Any:
    """`curate: [deduplicate, {…}]` as a list of sections."""
    if isinstance(value, list):
        return [{"kind": item} if isinstance(item, str) else item for item in value]
    return value


_FORMS = {
    ("model",): as_model,
    ("adapter",): as_adapter,
    ("method",): as_method,
    ("data", "train"): as_sources,
    ("data", "eval"): as_sources,
    ("data", "curate"): as_stages,
}


def is_short_form(key: str, value: Any) -> bool:
    """True for a value that stands for a whole section or list."""
    full_form = _FORMS.get(tuple(key.split(".")))
    return full_form is not None and full_form(value) != value


def write_out(values: dict[str, Any]) -> None:
    """Replace the short forms in a recipe's values, so that keys inside them can be set."""
    for (*parents, last), full_form in _FORMS.items():
        section: Any = values
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            section[last] = full_form(section[last])
