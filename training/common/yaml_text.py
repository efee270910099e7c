"""YAML with the numbers of YAML 1.2: 1e-4 is a number, not text."""

import re
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_STARTS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """Reads plain values (no Python objects) with the numbers of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """Writes plain values so that `Loader` reads the same values back."""


for _each in (Loader, Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _STARTS)


def load_yaml(text: str | bytes) -> Any:
    """The values of a YAML document.

    Raises:
        yaml.YAMLError: the document is not valid YAML.
    """
    return yaml.load(text, Loader)


def dump_yaml(values: Any, allow_unicode: bool = False) -> str:
    """The YAML document of plain values; keys keep their order.

    Args:
        allow_unicode: write non-ASCII characters as they are, for people to read. YAML reads
            some line separators back as a line feed, so escape text that must be exact.
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=allow_unicode)
