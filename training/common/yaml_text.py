"""YAML whose numbers are those of YAML 1.2: 1e-4 is one, and no text."""

import re
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_STARTS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """Reads plain values."""


class Dumper(yaml.SafeDumper):
    """Writes plain values so that Loader reads the same ones."""


for _each in (Loader, Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _STARTS)


def load_yaml(text: str | bytes) -> Any:
    """The values of a document.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    return yaml.load(text, Loader)


def dump_yaml(values: Any, allow_unicode: bool = False) -> str:
    """A document of plain values, their keys in order.

    Args:
        allow_unicode: for people to read. Of some line separators YAML makes a line feed, so
            what must be read back exactly is escaped.
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=allow_unicode)
