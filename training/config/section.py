"""The base class of all sections of a recipe, and the JSON schema of a file."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MOST = 10**12
"""Largest whole number: no count that a run can reach is larger."""
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Frozen, strict about its keys, and documented by the docstrings under its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def json_schema(settings: type[Section]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe or sweep file, for editors and other tools."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:finray:{settings.__name__.lower()}",
        **settings.model_json_schema(),
    }
